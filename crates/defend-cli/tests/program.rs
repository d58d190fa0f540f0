//! The program from end to end, as a user calls it, with the embedded backbone.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use image::{GrayImage, Rgb, RgbImage};

/// Side of an image: more than one tile of the embedded backbone, less than two.
const SIDE: u32 = 300;

fn defend(arguments: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_defend"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap()
}

/// Standard output of a call that has to work; 1 says that something novel was found.
fn said(arguments: &[&str], folder: &Path) -> String {
    let output = defend(arguments, folder);
    let errors = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code();
    assert!(matches!(code, Some(0 | 1)), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Standard error of a call that has to fail.
fn refused(arguments: &[&str], folder: &Path) -> String {
    let output = defend(arguments, folder);
    let code = output.status.code();
    assert!(matches!(code, Some(2 | 4)), "{arguments:?} was not refused");
    String::from_utf8(output.stderr).unwrap()
}

/// A plate with a grid of holes; `odd`: a red blot, which is where normal plates are grey.
fn plate(number: u32, odd: bool) -> RgbImage {
    let shade = 120 + (number * 11 % 37) as u8;
    RgbImage::from_fn(SIDE, SIDE, |x, y| {
        let hole = (x % 60).abs_diff(30).pow(2) + (y % 60).abs_diff(30).pow(2) < 150;
        let (left, top) = (40 + number * 29 % 180, 40 + number * 47 % 180);
        let blot = odd && x.abs_diff(left) < 16 && y.abs_diff(top) < 16;
        match (blot, hole) {
            (true, _) => Rgb([200, 30, 30]),
            (false, true) => Rgb([20, 20, 25]),
            (false, false) => Rgb([shade, shade, shade.saturating_add(8)]),
        }
    })
}

/// `normal/`, `odd/` with masks in `masks/`, `new/` with both kinds.
fn images(folder: &Path) {
    for name in ["normal", "odd", "masks", "new"] {
        std::fs::create_dir(folder.join(name)).unwrap();
    }
    let save = |image: RgbImage, path: &str| image.save(folder.join(path)).unwrap();
    for number in 0..24 {
        save(plate(number, false), &format!("normal/{number:02}.png"));
    }
    for number in 30..34 {
        save(plate(number, true), &format!("odd/{number}.png"));
        let (left, top) = (40 + number * 29 % 180, 40 + number * 47 % 180);
        let mask = GrayImage::from_fn(SIDE, SIDE, |x, y| {
            let inside = x.abs_diff(left) < 16 && y.abs_diff(top) < 16;
            [if inside { 255 } else { 0 }].into()
        });
        mask.save(folder.join(format!("masks/{number}_mask.png")))
            .unwrap();
    }
    for number in 40..44 {
        save(plate(number, false), &format!("new/good-{number}.png"));
        save(plate(number, true), &format!("new/odd-{number}.png"));
    }
}

/// Scores by the names of the images.
fn scores(lines: &str) -> Vec<(String, f64)> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let name = PathBuf::from(fields[3]);
        let name = name.file_name().unwrap().to_string_lossy().into_owned();
        (name, fields[0].parse().unwrap())
    };
    lines.lines().map(line).collect()
}

/// The least score of an odd plate less the largest of a good one.
fn gap(scores: &[(String, f64)]) -> f64 {
    let of = |kind: &str| {
        let kind = kind.to_owned();
        scores
            .iter()
            .filter(move |(name, _)| name.starts_with(&kind))
            .map(|(_, score)| *score)
    };
    of("odd").fold(f64::INFINITY, f64::min) - of("good").fold(f64::NEG_INFINITY, f64::max)
}

#[test]
fn tiles_regions_and_known_faults() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    images(folder);
    let fit = |more: &[&str]| {
        let arguments = ["fit", "--normal", "normal", "--out", "plates.defend"];
        said(&[&arguments, more].concat(), folder);
        said(&["score", "--model", "plates.defend", "new"], folder)
    };
    let plain = scores(&fit(&[]));
    assert_eq!(plain.len(), 8);
    let tiled = scores(&fit(&["--tiles", "2x2"]));
    assert!(gap(&tiled) > 0.0, "{tiled:?}");
    assert_ne!(tiled, plain);
    let faults = ["--abnormal", "odd", "--abnormal-masks", "masks"];
    let known = scores(&fit(&faults));
    assert!(gap(&known) > gap(&plain), "{known:?} beside {plain:?}");
    let region = scores(&fit(&["--roi", "10,20,240,250"]));
    assert_ne!(region, plain);
    let masked = scores(&fit(&["--roi-mask", "masks/30_mask.png"]));
    assert_eq!(masked.len(), 8);

    let arguments = ["fit", "--normal", "normal", "--out", "none.defend"];
    let with = |more: &[&str]| refused(&[&arguments, more].concat(), folder);
    let error = with(&["--roi", "100,100,201,10"]);
    assert!(error.contains("300 x 300"), "{error}");
    let error = with(&["--roi", "1,2,3"]);
    assert!(error.contains("x,y,width,height"), "{error}");
    let error = with(&["--tiles", "2x2", "--roi", "0,0,100,300"]);
    assert!(
        error.contains("100 x 300") && error.contains("tiles"),
        "{error}"
    );
    let error = with(&["--tiles", "two"]);
    assert!(error.contains("columns and rows"), "{error}");
    let error = with(&["--abnormal", "odd", "--abnormal-masks", "normal"]);
    assert!(error.contains("no mask"), "{error}");
    let error = with(&["--abnormal", "odd", "--abnormal-masks", "odd"]);
    assert!(error.contains("its own mask"), "{error}");
    let error = with(&["--tiles", "16x16", "--image-size", "448"]);
    assert!(error.contains("tiles") && error.contains("4096"), "{error}");
    assert!(!folder.join("none.defend").exists());
}

#[test]
fn features_marks_and_whole_folders() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    images(folder);
    // Photos of many things, so that patches do not count: the plates are half of it.
    for number in 0..24u32 {
        let image = RgbImage::from_fn(64, 64, |x, y| {
            let wave = (x * (1 + number % 7) + y * (1 + number % 5)) % 97;
            Rgb([(wave * 2) as u8, (number * 10) as u8, (255 - wave) as u8])
        });
        image
            .save(folder.join(format!("normal/other-{number}.png")))
            .unwrap();
    }
    said(&["embed", "normal", "--out", "normal.safetensors"], folder);
    said(&["embed", "normal", "--out", "normal.npy"], folder);
    let names = std::fs::read_to_string(folder.join("normal.npy.csv")).unwrap();
    assert_eq!(names.lines().count(), 49);
    let error = refused(&["embed", "normal", "--out", "normal.txt"], folder);
    assert!(error.contains("normal.txt"), "{error}");
    let score = |model: &str| said(&["score", "--model", model, "new"], folder);
    said(
        &[
            "fit",
            "--features",
            "normal.safetensors",
            "--out",
            "table.defend",
        ],
        folder,
    );
    said(
        &["fit", "--normal", "normal", "--out", "images.defend"],
        folder,
    );
    assert_eq!(score("table.defend"), score("images.defend"));

    let table = ["embed", "normal", "--out", "normal.parquet"];
    let refit = [
        "fit",
        "--features",
        "normal.parquet",
        "--out",
        "parquet.defend",
    ];
    if cfg!(feature = "parquet") {
        said(&table, folder);
        said(&refit, folder);
        assert_eq!(score("parquet.defend"), score("images.defend"));
    } else {
        assert!(refused(&table, folder).contains("--features parquet"));
    }

    let together = said(
        &["score", "--together", "--model", "images.defend", "new"],
        folder,
    );
    assert_eq!(
        together,
        said(&["sort", "--model", "images.defend", "new"], folder)
    );
    let error = refused(
        &[
            "score",
            "--together",
            "--model",
            "images.defend",
            "--model",
            "table.defend",
            "new",
        ],
        folder,
    );
    assert!(error.contains("--together"), "{error}");
    marks(folder);
}

/// Somebody looks at a table and marks two images, which the model then learns.
fn marks(folder: &Path) {
    let score = |model: &str| said(&["score", "--model", model, "new"], folder);
    let table = said(
        &[
            "score",
            "--format",
            "csv",
            "--model",
            "images.defend",
            "new",
        ],
        folder,
    );
    let marked: Vec<String> = table
        .lines()
        .enumerate()
        .map(|(i, line)| {
            let mark = match i {
                0 => "mark",
                _ if line.contains("odd-41") => "abnormal",
                _ if line.contains("odd-40") => "normal",
                _ => "",
            };
            format!("{line},{mark}")
        })
        .collect();
    std::fs::write(folder.join("found.csv"), marked.join("\n")).unwrap();
    let before = score("images.defend");
    let extend = [
        "extend",
        "--model",
        "images.defend",
        "--marked",
        "found.csv",
    ];
    let output = defend(&extend, folder);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    for learnt in ["learnt as normal 1 images", "learnt as abnormal 1 images"] {
        assert!(errors.contains(learnt), "{errors}");
    }
    assert_ne!(score("images.defend"), before);
}
