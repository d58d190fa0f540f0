//! Agreement with Pillow and torchvision on synthetic files (`tools/golden_preprocess.py`).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use std::collections::BTreeMap;

use defend_data::{Interpolation, Preprocess, ResizeMode, RgbImage, decode_image};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    files: BTreeMap<String, Encoded>,
    resized: Vec<Resized>,
}

#[derive(Deserialize)]
struct Encoded {
    hex: String,
    size: (u32, u32),
    pixels: Vec<u8>,
}

#[derive(Deserialize)]
struct Resized {
    filter: Interpolation,
    fit: String,
    size: u32,
    pixels: Vec<u8>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/formats.json")).expect("golden file")
}

fn bytes(hex: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("two digits");
    (0..hex.len()).step_by(2).map(byte).collect()
}

/// Largest and mean difference in grey levels.
fn difference(a: &[u8], b: &[u8]) -> (u8, f64) {
    assert_eq!(a.len(), b.len());
    let each = || a.iter().zip(b).map(|(a, b)| a.abs_diff(*b));
    (
        each().max().unwrap_or(0),
        each().map(f64::from).sum::<f64>() / a.len() as f64,
    )
}

#[test]
fn unusual_jpegs_decode_as_in_pillow() {
    for (name, file) in golden().files {
        let image = decode_image(&bytes(&file.hex), &name).unwrap();
        assert_eq!(image.dimensions(), file.size, "{name}");
        let (max, mean) = difference(image.as_raw(), &file.pixels);
        assert!(max <= 4 && mean < 1.0, "{name}: {max} {mean}");
    }
}

#[test]
fn resizing_is_pillows() {
    let image = RgbImage::from_fn(41, 23, |x, y| {
        image::Rgb([1, 2, 3].map(|c| ((x * x * 7 + y * 13 * c + x * y) % 256) as u8))
    });
    for case in golden().resized {
        let resize_mode = match case.fit.as_str() {
            "squash" => ResizeMode::Squash,
            _ => ResizeMode::CenterCrop { crop_pct: 0.9 },
        };
        let what = format!("{:?} {resize_mode:?} {}", case.filter, case.size);
        let preprocess = Preprocess {
            resize_mode,
            filter: case.filter,
            ..Preprocess::new(case.size, [0.5; 3], [0.5; 3])
        };
        let resized = preprocess.resize(&image).unwrap();
        let (max, mean) = difference(resized.as_raw(), &case.pixels);
        assert!(max <= 1 && mean < 0.02, "{what}: {max} {mean}");
    }
}
