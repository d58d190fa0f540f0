//! Files that somebody has tampered with: no panic, whatever is in them. The bodies are those of the fuzz targets in `fuzz/`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

#[path = "../../fuzz/bodies.rs"]
mod bodies;

use std::io::{Cursor, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use bodies::BODIES;
use defend_core::data::{Memory, RgbImage};
use defend_core::nn::Rng;
use defend_core::prelude::*;
use defend_core::vit::{Architecture, BackboneSpec, Vit, WeightPrecision};
use defend_core::{DefendConfig, Recipe};
use defend_testing::unsealed;
use image::{DynamicImage, ImageFormat};
use rand::RngExt;

/// Inputs for each body; `DEFEND_HOSTILE_INPUTS` says another number.
const INPUTS: u64 = 1500;

fn teacher() -> Vit {
    let spec = BackboneSpec::new(Architecture {
        image_size: 32,
        patch_size: 8,
        width: 16,
        depth: 2,
        heads: 2,
        mlp_width: 32,
        ..Architecture::vit_tiny()
    });
    Vit::random(spec, 0.0, &mut Rng::seed(1), &Device::Cpu).unwrap()
}

fn picture(number: u32) -> RgbImage {
    RgbImage::from_fn(32, 32, |x, y| {
        image::Rgb([
            (x * number % 256) as u8,
            (y * 7 + number) as u8,
            (x * y % 251) as u8,
        ])
    })
}

fn set() -> Memory {
    let mut images = Memory::default();
    for number in 1..25 {
        images.push(number.to_string(), picture(number), vec![]);
    }
    images
}

/// Sound files of every kind, without the checksums that would keep all changes out.
fn seeds(name: &str, folder: &Path) -> Vec<Vec<u8>> {
    let built = |config: DefendConfig| {
        let builder = Defend::builder()
            .teacher(teacher())
            .config(config)
            .thumbnails(true);
        builder.fit(set(), &mut Silent).unwrap().detector
    };
    let saved = |detector: &Detector| {
        let path = folder.join("model");
        detector.save(&path).unwrap();
        unsealed(&std::fs::read(path).unwrap())
    };
    let read = |path: &str| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        std::fs::read(root.join(path)).unwrap()
    };
    let views = "crates/defend-vit/tests/golden/layouts/views";
    match name {
        "model" => {
            let mut masked = DefendConfig::masked();
            masked.dense = None;
            if let defend_core::Student::Masked(student) = &mut masked.student {
                student.distill.epochs = 1;
                student.distill.min_steps = 0;
            }
            vec![saved(&built(DefendConfig::default())), saved(&built(masked))]
        }
        "background" => {
            let made = Defend::builder().teacher(teacher());
            let made = made.look_at_background(set(), "set", &mut Silent).unwrap();
            made.save(folder.join("background")).unwrap();
            vec![unsealed(&std::fs::read(folder.join("background")).unwrap())]
        }
        "weights" => vec![
            unsealed(&teacher().to_safetensors(WeightPrecision::Int8).unwrap()),
            read(&format!("{views}/archive.pt")),
            read(&format!("{views}/legacy.pt")),
            read(&format!("{views}/protocol4.pt")),
        ],
        "settings" => Recipe::ALL
            .iter()
            .map(|recipe| serde_json::to_vec(&recipe.config()).unwrap())
            .chain([b"seed = 1\n[student.closed-form.patches]\nweight = 0.5\n".to_vec()])
            .collect(),
        "bench_config" => vec![read("examples/bench/subset.toml"), read("examples/bench/paper.toml")],
        "record" => vec![RECORD.into()],
        "idx" => {
            let images = [&[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 4][..], &[7; 32]].concat();
            let labels = [0, 0, 8, 1, 0, 0, 0, 2, 3, 4];
            let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            packed.write_all(&images).unwrap();
            let packed = packed.finish().unwrap();
            let both = |images: &[u8]| {
                [&(images.len() as u16).to_be_bytes()[..], images, &labels].concat()
            };
            vec![both(&images), both(&packed)]
        }
        "cifar" => vec![[&[3][..], &[9; 3072]].concat().repeat(2)],
        "voc_xml" => vec![
            b"<annotation><size><width>200</width><height>100</height></size><object><name>dog</name><difficult>0</difficult>\
              <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>".to_vec(),
            b"<!DOCTYPE annotation [<!ENTITY a \"dog\"><!ENTITY b \"&a;&a;&a;\">]><annotation><object><name>&b;</name></object></annotation>".to_vec(),
        ],
        "coco_json" => vec![
            br#"{"images": [{"id": 7, "file_name": "1.jpg", "width": 4, "height": 2}], "annotations":
                [{"image_id": 7, "category_id": 2, "iscrowd": false, "bbox": [0, 0, 3, 3]}], "categories": [{"id": 2, "name": "a"}]}"#.to_vec(),
        ],
        "manifest_csv" => vec![b"path,labels,split\n1.jpg,dog;cat,train\n".to_vec(), b"\xEF\xBB\xBFpath;labels\n1.jpg;a|b\n".to_vec()],
        "manifest_json" => vec![br#"[{"path": "1.jpg", "labels": ["dog"], "split": "test"}]"#.to_vec()],
        "image" | "mask" => [
            ImageFormat::Png,
            ImageFormat::Jpeg,
            ImageFormat::Gif,
            ImageFormat::WebP,
            ImageFormat::Tiff,
            ImageFormat::Bmp,
            ImageFormat::Pnm,
        ]
        .into_iter()
        .map(|format| {
            let mut bytes = Cursor::new(Vec::new());
            let image = DynamicImage::ImageRgb8(picture(5));
            image.write_to(&mut bytes, format).unwrap();
            bytes.into_inner()
        })
        .collect(),
        _ => panic!("no seed for {name}"),
    }
}

const RECORD: &str = r#"{"key": {"data": "a", "protocol": "one-vs-all", "experiment": "b", "classes": ["b"], "subset": {"train": null, "test": null, "seed": 0},
    "method": "m", "settings": {"kind": "mean-cls"}, "weights": "w", "resize_mode": "squash", "split": "s", "seed": 0}, "source": {"kind": "mnist", "path": "p"},
    "backbone": "embedded", "order": [0, 0], "deviations": "", "software": {"version": "0", "commit": "c", "platform": "p", "device": "cpu", "threads": 2},
    "finished": 1, "fit_seconds": 1.0, "score_seconds": 1.0, "train_images": 3, "figures": {"auroc": 0.5, "average_precision": 0.5, "pixel_auroc": null, "pro": null},
    "scores": [{"index": 0, "name": "n", "abnormal": true, "score": 1.0}], "worst": [{"place": 0, "grid": {"rows": 1, "columns": 1}, "map": [0.5]}], "map_scale": null}"#;

/// A sound file with a few things changed: bits, numbers, lengths, parts put elsewhere.
fn tampered(seed: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..rng.random_range(1..5) {
        if bytes.is_empty() {
            break;
        }
        // Headers come first, and matter most.
        let reach = if rng.random_bool(0.6) {
            bytes.len().min(2048)
        } else {
            bytes.len()
        };
        let at = rng.random_range(0..reach);
        match rng.random_range(0..8) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => bytes.truncate(at),
            3 => {
                let extreme = [0, 1, 0x7F, 0x80, 0xFF][rng.random_range(0..5)];
                let end = (at + rng.random_range(1..9)).min(bytes.len());
                bytes[at..end].fill(extreme);
            }
            4 => {
                // A number in a text becomes a large one.
                let digits = b"99999999999999999999";
                let count = rng.random_range(1..digits.len());
                if let Some(digit) = bytes[at..].iter().position(u8::is_ascii_digit) {
                    let place = at + digit;
                    bytes.splice(place..=place, digits[..count].iter().copied());
                }
            }
            5 => {
                let from = rng.random_range(0..bytes.len());
                let part = bytes[from..(from + rng.random_range(1..64)).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
            6 => {
                let end = (at + rng.random_range(1..64)).min(bytes.len());
                bytes.drain(at..end);
            }
            _ => bytes[at] = b"{}[]\",:<>&-\n\0"[rng.random_range(0..13)],
        }
    }
    bytes
}

#[test]
fn no_file_makes_the_library_panic() {
    let inputs = std::env::var("DEFEND_HOSTILE_INPUTS");
    let inputs = inputs.map_or(INPUTS, |number| number.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let mut faults = Vec::new();
    for (name, body) in BODIES {
        let seeds = seeds(name, folder.path());
        for seed in &seeds {
            body(seed);
        }
        let panics = |number: &u64| {
            let mut rng = Rng::stream(11, *number);
            let bytes = tampered(&seeds[*number as usize % seeds.len()], &mut rng);
            catch_unwind(AssertUnwindSafe(|| body(&bytes))).is_err()
        };
        faults.extend(
            (0..inputs)
                .find(panics)
                .map(|number| format!("{name} {number}")),
        );
    }
    assert!(faults.is_empty(), "panics: {faults:?}");
}
