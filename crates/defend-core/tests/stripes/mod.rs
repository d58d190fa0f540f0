//! Images that several tests distinguish, and settings that are enough for them.

use defend_core::data::{Memory, RgbImage};
use defend_core::dense::DenseConfig;

/// Stripes of a period: 3 is normal, 5 is novel.
pub(crate) fn stripes(period: u32, phase: u32) -> RgbImage {
    RgbImage::from_fn(40, 32, |x, y| {
        let on = (x + phase).is_multiple_of(period);
        let v = if on { 220 } else { 30 };
        [v, (y * 7 % 256) as u8, 255 - v].into()
    })
}

/// The first phases of a period.
pub(crate) fn set(period: u32, images: u32) -> Memory {
    let mut memory = Memory::default();
    for phase in 0..images {
        memory.push(format!("{period}/{phase}"), stripes(period, phase), vec![]);
    }
    memory
}

/// Images of a period that are in no [`set`]: brighter ones.
#[allow(dead_code, reason = "not every test calibrates")]
pub(crate) fn held_out(period: u32, images: u32) -> Memory {
    let mut memory = Memory::default();
    for phase in 0..images {
        let mut image = stripes(period, phase);
        for pixel in image.pixels_mut() {
            pixel.0[1] = pixel.0[1].saturating_add(1 + (phase % 7) as u8);
        }
        memory.push(format!("held-out {period}/{phase}"), image, vec![]);
    }
    memory
}

/// One epoch of a small dense stage.
#[allow(dead_code, reason = "not every test has a dense stage")]
pub(crate) fn small_dense() -> DenseConfig {
    DenseConfig {
        epochs: 1,
        batch_size: 8,
        crops: 2,
        crop_size: 16,
        head_hidden: vec![16],
        head_output: 8,
        ..DenseConfig::default()
    }
}
