//! Images of several kinds, all different, with copies that differ a little.

use defend_core::data::{Memory, RgbImage};

/// Stripes of some period, place and colour, all different; `copy` dims the image a little.
pub(crate) fn image(kind: u32, number: u32, copy: u32) -> RgbImage {
    let period = 3 + 2 * kind;
    RgbImage::from_fn(32, 32, |x, y| {
        let on = (x + number).is_multiple_of(period) ^ (y / (2 + number % 5)).is_multiple_of(2);
        let v = if on {
            200 + (number * 7 % 40)
        } else {
            20 + (number * 13 % 60)
        } - copy;
        [v as u8, (y * (1 + number % 9) % 256) as u8, 255 - v as u8].into()
    })
}

pub(crate) fn images(kind: u32, numbers: std::ops::Range<u32>, copies: u32) -> Memory {
    let mut memory = Memory::default();
    for number in numbers {
        for copy in 0..=copies {
            memory.push(
                format!("{kind}/{number}-{copy}"),
                image(kind, number, copy),
                vec![],
            );
        }
    }
    memory
}
