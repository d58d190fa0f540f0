//! What goes wrong on a user's machine: wrong flags, full disks, models and files of others.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use image::{Rgb, RgbImage};
use serde_json::Value;

fn defend(arguments: &[&str], folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_defend"));
    command.args(arguments).current_dir(folder);
    command
}

/// Exit code, standard output and standard error.
fn answer(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().unwrap();
    (code, text(&output.stdout), text(&output.stderr))
}

fn call(arguments: &[&str], folder: &Path) -> (i32, String, String) {
    answer(&defend(arguments, folder).output().unwrap())
}

/// Blocks of a few places and shades; those of `odd` images are of another colour.
fn picture(number: u32, odd: bool) -> RgbImage {
    let (left, top) = (number * 53 % 70, number * 29 % 70);
    RgbImage::from_fn(96, 96, |x, y| {
        let block = (left..left + 25).contains(&x) && (top..top + 25).contains(&y);
        match (block, odd) {
            (true, true) => Rgb([250, 20, 200]),
            (true, false) => Rgb([20, 90, 200]),
            _ => Rgb([
                (60 + number * 7 % 90) as u8,
                120 + (x / 12 % 2 * 9) as u8,
                80,
            ]),
        }
    })
}

/// `normal/`, `held-out/` and `new/`, whose second image is odd.
fn pictures(folder: &Path) {
    for (set, count) in [("normal", 24), ("held-out", 20), ("new", 3)] {
        fs::create_dir_all(folder.join(set)).unwrap();
        for i in 0..count {
            let number = i + 100 * set.len() as u32;
            let path = folder.join(set).join(format!("{i:02}.png"));
            picture(number, set == "new" && i == 1).save(path).unwrap();
        }
    }
}

/// Without patches, which are chosen from the images, so that a model can learn on.
const OBJECTS: [&str; 2] = ["--set", "student.closed-form.patches.weight=0"];

fn fitted(extra: &[&str], folder: &Path) {
    pictures(folder);
    let words = [&["fit", "--normal", "normal", "--out", "model"], extra].concat();
    let (code, _, errors) = call(&words, folder);
    assert_eq!(code, 0, "{errors}");
}

#[test]
fn a_command_line_without_a_meaning_ends_with_two() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for words in [
        &["score", "--model", "model", "--fdr", "2", "new"][..],
        &["score", "--model", "model", "--fdr", "0", "new"],
        &[
            "score", "--model", "a", "--model", "b", "--maps", "maps", "new",
        ],
        &[
            "calibrate",
            "--model",
            "m",
            "--normal",
            "n",
            "--false-alarm-rate",
            "1",
        ],
        &[
            "calibrate",
            "--model",
            "m",
            "--normal",
            "n",
            "--confidence",
            "95",
        ],
        &["drift", "model", "new", "--level", "nan"],
        &["watch", "--model", "model", "new", "--every", "0"],
        &["fit", "--normal", "n", "--out", "m", "--set", "seed"],
        &["fit", "--normal", "n", "--out", "m", "--set", "sead=1"],
        &["fit", "--normal", "n", "--out", "m", "--set", "seed=many"],
        &[
            "fit",
            "--normal",
            "n",
            "--out",
            "m",
            "--false-alarm-rate",
            "-0.1",
        ],
        &["fit", "--normal", "n", "--out", "m", "--device", "gpu"],
        &["suspects", "--model", "m", "--backbone", "b"],
    ] {
        let (code, _, errors) = call(words, folder);
        assert_eq!(code, 2, "{words:?}: {errors}");
    }
    // What the machine lacks is a failure.
    let (code, _, errors) = call(&["score", "--model", "none", "new"], folder);
    assert_eq!(code, 4, "{errors}");
}

#[test]
fn images_that_were_fitted_on_are_known_in_other_files() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fitted(&OBJECTS, folder);
    // The same pixels under another name and in another format.
    let copy = image::open(folder.join("normal/07.png")).unwrap();
    copy.save(folder.join("held-out/99.bmp")).unwrap();
    let words = [
        "calibrate",
        "--model",
        "model",
        "--normal",
        "held-out",
        "--false-alarm-rate",
        "0.2",
    ];
    let before = fs::read(folder.join("model")).unwrap();
    let (code, _, errors) = call(&words, folder);
    assert!(code == 4 && errors.contains("99.bmp"), "{errors}");
    assert_eq!(fs::read(folder.join("model")).unwrap(), before);
    fs::remove_file(folder.join("held-out/99.bmp")).unwrap();
    let (code, _, errors) = call(&words, folder);
    assert_eq!(code, 0, "{errors}");
    // What was forgotten may be held out.
    let forget = ["extend", "--model", "model", "--forget", "normal/07.png"];
    let (code, _, errors) = call(&forget, folder);
    assert_eq!(code, 0, "{errors}");
    copy.save(folder.join("held-out/99.bmp")).unwrap();
    let (code, _, errors) = call(&words, folder);
    assert_eq!(code, 0, "{errors}");
}

#[test]
fn small_copies_are_kept_when_they_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fitted(&OBJECTS, folder);
    let report = |extra: &[&str]| {
        let words = [&["report", "model", "new", "--out", "page.html"], extra].concat();
        let (code, _, errors) = call(&words, folder);
        assert!(code < 2, "{errors}");
        let page = fs::read_to_string(folder.join("page.html")).unwrap();
        page.matches("<figure><img src=\"data:image/jpeg;base64,")
            .count()
    };
    assert_eq!(report(&[]), 0);
    let from_files = report(&["--show-normal"]);
    assert!(from_files > 0);
    let size = |path: &str| fs::metadata(folder.join(path)).unwrap().len();
    let without = size("model");
    fitted(&[&OBJECTS[..], &["--thumbnails"]].concat(), folder);
    let more = size("model") - without;
    assert!(more > 24 * 300 && more < 24 * 20_000, "{more} bytes more");
    fs::rename(folder.join("normal"), folder.join("elsewhere")).unwrap();
    assert_eq!(report(&[]), from_files);
    // A model that learns on keeps doing so.
    let learn = ["extend", "--model", "model", "--normal", "held-out"];
    let before = size("model");
    let (code, _, errors) = call(&learn, folder);
    assert_eq!(code, 0, "{errors}");
    assert!(size("model") - before > 20 * 300);
}

#[test]
fn json_has_boxes_around_what_is_novel() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fitted(&[], folder);
    let words = [
        "score", "--model", "model", "--format", "json", "--maps", "maps", "new",
    ];
    let (_, lines, errors) = call(&words, folder);
    let rows: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rows.len(), 3, "{errors}");
    for row in &rows {
        for region in row["regions"].as_array().unwrap() {
            let [left, top, right, bottom, strength] =
                ["left", "top", "right", "bottom", "strength"]
                    .map(|side| region[side].as_f64().unwrap());
            assert!(0.0 <= left && left < right && right <= 1.0, "{region}");
            assert!(0.0 <= top && top < bottom && bottom <= 1.0, "{region}");
            assert!(strength > 0.5, "{region}");
        }
    }
    // The odd block is at 63..88 by 49..74 of 96 pixels, and a patch has 7.
    let strongest = &rows[1]["regions"][0];
    for (side, expected) in [
        ("left", 63.0),
        ("right", 88.0),
        ("top", 49.0),
        ("bottom", 74.0),
    ] {
        let found = 96.0 * strongest[side].as_f64().unwrap();
        assert!(
            (found - expected).abs() < 14.0,
            "{side}: {found}, {strongest}"
        );
    }
    // A table has no place for them.
    let words = [
        "score", "--model", "model", "--format", "csv", "--maps", "maps", "new",
    ];
    assert!(!call(&words, folder).1.contains("strength"));
}

/// Runs the program where no file may be larger than so many blocks of 512 bytes, as on a full disk.
#[cfg(unix)]
fn on_a_full_disk(blocks: u32, arguments: &[&str], folder: &Path) -> (i32, String, String) {
    let mut command = Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_defend")]);
    answer(
        &command
            .args(arguments)
            .current_dir(folder)
            .output()
            .unwrap(),
    )
}

#[cfg(unix)]
#[test]
fn a_full_disk_loses_nothing_that_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fitted(&[], folder);
    let files = || {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    let (before, there) = (fs::read(folder.join("model")).unwrap(), files());
    // The model is larger than a megabyte.
    for words in [
        &["fit", "--normal", "normal", "--out", "model"][..],
        &[
            "calibrate",
            "--model",
            "model",
            "--normal",
            "held-out",
            "--false-alarm-rate",
            "0.2",
        ],
        &["extend", "--model", "model", "--normal", "held-out"],
    ] {
        let (code, _, errors) = on_a_full_disk(2000, words, folder);
        assert_eq!(code, 4, "{words:?}: {errors}");
        assert!(errors.contains("model"), "{errors}");
        assert!(
            fs::read(folder.join("model")).unwrap() == before,
            "{words:?}"
        );
        assert_eq!(files(), there, "{words:?}");
    }
    // Maps fail one by one, and the scores go on; no half of a map stays.
    let words = ["score", "--model", "model", "--maps", "maps", "new"];
    let (code, lines, errors) = on_a_full_disk(0, &words, folder);
    assert_eq!((code, lines.lines().count()), (4, 3), "{errors}");
    assert!(errors.contains("3 maps could not be written"), "{errors}");
    assert_eq!(fs::read_dir(folder.join("maps")).unwrap().count(), 0);
    let (code, lines, _) = call(&["score", "--model", "model", "new"], folder);
    assert!(code < 2 && lines.lines().count() == 3);
    // A report is written whole or not at all.
    fs::write(folder.join("page.html"), "before").unwrap();
    let words = ["report", "model", "new", "--out", "page.html"];
    let (code, _, errors) = on_a_full_disk(4, &words, folder);
    assert_eq!(code, 4, "{errors}");
    assert_eq!(
        fs::read_to_string(folder.join("page.html")).unwrap(),
        "before"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fitted(&[], folder);
    for format in ["table", "csv", "json"] {
        let full = fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let output = defend(
            &["score", "--model", "model", "--format", format, "new"],
            folder,
        )
        .stdout(full)
        .output()
        .unwrap();
        assert_eq!(output.status.code(), Some(4), "{format}");
    }
}

#[test]
fn the_output_is_none_of_the_inputs() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    pictures(folder);
    let before = fs::read(folder.join("new/00.png")).unwrap();
    for out in ["new/00.png", "./new/../new/00.png"] {
        let words = [
            "fit",
            "--normal",
            "normal",
            "--abnormal",
            "new",
            "--out",
            out,
        ];
        let (code, _, errors) = call(&words, folder);
        assert!(
            code == 4 && errors.contains("one of the files that are read"),
            "{errors}"
        );
    }
    assert_eq!(fs::read(folder.join("new/00.png")).unwrap(), before);
}

#[test]
fn backbones_are_found_where_they_are_said_to_be() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    pictures(folder);
    let fit = |backbone: &str, extra: &[&str]| {
        let words = [
            "fit",
            "--normal",
            "normal",
            "--out",
            "model",
            "--backbone",
            backbone,
        ];
        let mut command = defend(&[&words, extra].concat(), folder);
        // A cache with the configuration of one model, and no way to get more.
        command
            .env("HF_HUB_CACHE", folder.join("cache"))
            .env("HF_ENDPOINT", "http://127.0.0.1:9");
        answer(&command.output().unwrap())
    };
    let (code, _, errors) = fit("timm/vit_tiny", &[]);
    assert!(code == 4 && errors.contains("hub:owner/name"), "{errors}");
    let model = folder.join("cache/models--timm--tiny");
    fs::create_dir_all(model.join("refs")).unwrap();
    fs::create_dir_all(model.join("snapshots/abc")).unwrap();
    fs::write(model.join("refs/main"), "abc").unwrap();
    fs::write(model.join("snapshots/abc/config.json"), "{}").unwrap();
    fs::write(
        model.join("snapshots/abc/model.safetensors"),
        "<!DOCTYPE html>",
    )
    .unwrap();
    let (code, _, errors) = fit("hub:timm/tiny", &[]);
    assert!(
        code == 4 && errors.contains("HTML page") && errors.contains("snapshots"),
        "{errors}"
    );
    fs::write(
        folder.join("weights.pth"),
        "version https://git-lfs.example/spec/v1\n",
    )
    .unwrap();
    let (code, _, errors) = fit("weights.pth", &["--family", "dino"]);
    assert!(code == 4 && errors.contains("Git LFS"), "{errors}");
    // A message of the program speaks of its flags, not of the library.
    assert!(!errors.contains("::"), "{errors}");
    let (code, _, errors) = call(&["score", "--model", "normal/00.png", "new"], folder);
    assert!(
        code == 4 && errors.contains("no model of defend"),
        "{errors}"
    );
}

#[test]
fn a_score_that_was_cut_anywhere_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fitted(&[], folder);
    fs::write(folder.join("new/broken.png"), "no image").unwrap();
    for (format, file) in [("csv", "found.csv"), ("json", "found.jsonl")] {
        let score = |extra: &[&str]| {
            let words = [
                "score", "--model", "model", "--format", format, "--out", file,
            ];
            call(&[&words, extra, &["new", "held-out"]].concat(), folder)
        };
        let (code, out, errors) = score(&[]);
        assert!(code == 3 && out.is_empty(), "{errors}");
        let whole = fs::read(folder.join(file)).unwrap();
        // Without the flag nothing is lost.
        let (code, _, errors) = score(&[]);
        assert!(code == 4 && errors.contains("--resume"), "{errors}");
        assert!(fs::read(folder.join(file)).unwrap() == whole);
        for cut in [
            0,
            3,
            whole.len() / 3,
            whole.len() / 2,
            whole.len() - 1,
            whole.len(),
        ] {
            fs::write(folder.join(file), &whole[..cut]).unwrap();
            let (code, _, errors) = score(&["--resume"]);
            assert_eq!(code, 3, "{errors}");
            assert!(
                fs::read(folder.join(file)).unwrap() == whole,
                "{format} {cut}"
            );
        }
        // Lines of other images stay as they are.
        let words = [
            "score", "--model", "model", "--format", format, "--out", file, "--resume", "held-out",
        ];
        let (code, _, errors) = call(&words, folder);
        assert!(
            code == 4 && errors.contains("same images in the same order"),
            "{errors}"
        );
        assert!(fs::read(folder.join(file)).unwrap() == whole);
    }
    let words = [
        "score",
        "--model",
        "model",
        "--out",
        "found.txt",
        "--resume",
        "new",
    ];
    assert_eq!(call(&words, folder).0, 2);
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    pictures(folder);
    let run = |threads: &str| {
        let (code, _, errors) = call(
            &[
                "fit",
                "--normal",
                "normal",
                "--out",
                "model",
                "--threads",
                threads,
            ],
            folder,
        );
        assert_eq!(code, 0, "{errors}");
        let words = [
            "score",
            "--model",
            "model",
            "--format",
            "csv",
            "--threads",
            threads,
            "new",
            "held-out",
        ];
        let scores = call(&words, folder).1;
        let words = [
            "extend",
            "--model",
            "model",
            "--abnormal",
            "new/01.png",
            "--threads",
            threads,
        ];
        let before = fs::read(folder.join("model")).unwrap();
        let (code, _, errors) = call(&words, folder);
        assert_eq!(code, 0, "{errors}");
        (before, scores, fs::read(folder.join("model")).unwrap())
    };
    let one = run("1");
    assert!(one.1.lines().count() > 20);
    for threads in ["2", "7"] {
        assert!(run(threads) == one, "{threads} threads");
    }
}
