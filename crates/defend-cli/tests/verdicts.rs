//! Verdicts, exit codes and folders as they are, as a user calls the program.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use image::{Rgb, RgbImage};
use serde_json::Value;

fn command(arguments: &[&str], folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_defend"));
    command.args(arguments).current_dir(folder);
    command
}

/// Exit code, standard output and standard error.
fn call(arguments: &[&str], folder: &Path) -> (i32, String, String) {
    answer(&command(arguments, folder).output().unwrap())
}

fn answer(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().unwrap();
    (code, text(&output.stdout), text(&output.stderr))
}

/// Stripes of a few widths and shades; `odd`: a checkerboard.
fn pattern(number: u32, odd: bool) -> RgbImage {
    let (period, shade) = (9 + number % 5, (number * 37 % 120) as u8);
    RgbImage::from_fn(96, 96, |x, y| {
        let stripe = (x + y * (number % 3) / 4 + number).is_multiple_of(period);
        let side = 6 + number % 11;
        let check = (x / side + y / side).is_multiple_of(2);
        let block =
            x.abs_diff(15 + number * 53 % 67) < 12 && y.abs_diff(15 + number * 29 % 61) < 12;
        if block && !odd {
            return Rgb([30, shade / 2 + 90, 200]);
        }
        match (odd, stripe, check) {
            (true, _, true) => Rgb([230, 20 + shade, 120]),
            (true, ..) => Rgb([10, 240, 60 + shade]),
            (false, true, _) => Rgb([240, 230, shade]),
            (false, ..) => Rgb([shade, 60, 90]),
        }
    })
}

/// `normal/` to fit on, `held-out/` to calibrate on, `new/` with three images of which one is odd.
fn images(folder: &Path) {
    let save = |number: u32, odd: bool, path: &str| {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        pattern(number, odd).save(path).unwrap();
    };
    for number in 0..30 {
        save(number, false, &format!("normal/{number:02}.png"));
    }
    for number in 0..50 {
        save(100 + number, false, &format!("held-out/{number:02}.png"));
    }
    save(300, false, "new/a.png");
    save(301, true, "new/b.png");
    save(302, false, "new/c.png");
}

fn fitted(folder: &Path) {
    images(folder);
    let (code, _, errors) = call(&["fit", "--normal", "normal", "--out", "model"], folder);
    assert_eq!(code, 0, "{errors}");
    let rate = [
        "calibrate",
        "--model",
        "model",
        "--normal",
        "held-out",
        "--false-alarm-rate",
        "0.2",
    ];
    let (code, _, errors) = call(&rate, folder);
    assert_eq!(code, 0, "{errors}");
    assert!(errors.contains("on average over calibrations"), "{errors}");
    assert!(errors.contains("95 % of calibrations"), "{errors}");
}

#[test]
fn verdicts_scores_and_exit_codes_agree() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fitted(folder);

    let score = |extra: &[&str]| {
        let words = [&["score", "--model", "model", "--format", "json"], extra].concat();
        let (code, lines, errors) = call(&words, folder);
        let rows: Vec<Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        (code, rows, errors)
    };
    let (code, rows, _) = score(&["new"]);
    assert_eq!((code, rows.len()), (1, 3));
    for row in &rows {
        let [score, threshold, p] =
            ["score", "threshold", "p_value"].map(|k| row[k].as_f64().unwrap());
        assert_eq!(row["verdict"] == "novel", score > threshold, "{row}");
        assert!(p > 0.0 && p <= 1.0);
    }
    assert_eq!(rows[1]["verdict"], "novel");
    let (_, held_out, _) = score(&["held-out"]);
    let normal = held_out
        .iter()
        .find(|row| row["verdict"] == "normal")
        .unwrap();
    assert_eq!(score(&[normal["path"].as_str().unwrap()]).0, 0);

    // The text has every digit.
    let (_, lines, errors) = call(&["score", "--model", "model", "new"], folder);
    let first = lines
        .lines()
        .next()
        .unwrap()
        .split('\t')
        .collect::<Vec<_>>();
    assert_eq!(
        first[0].parse::<f64>().unwrap(),
        rows[0]["score"].as_f64().unwrap()
    );
    assert!(
        errors.contains(&format!("threshold {}", rows[0]["threshold"])),
        "{errors}"
    );

    // Unreadable images stand where they are, each once, and can end the run.
    fs::write(folder.join("new/bb.png"), "no image").unwrap();
    let (code, rows, _) = score(&["new"]);
    let names: Vec<&str> = rows
        .iter()
        .map(|row| row["path"].as_str().unwrap())
        .collect();
    assert_eq!(code, 3);
    assert_eq!(names, ["new/a.png", "new/b.png", "new/bb.png", "new/c.png"]);
    assert!(rows[2]["error"].is_string() && rows[2]["score"].is_null());
    assert_eq!(score(&["new", "--max-unreadable", "1"]).0, 3);
    assert_eq!(score(&["new", "--strict"]).0, 4);
    assert_eq!(score(&["nowhere"]).0, 4);
    assert_eq!(score(&["new", "--nonsense"]).0, 2);

    // A batch with a bounded share of false discoveries.
    let (code, rows, _) = score(&["new/a.png", "new/b.png", "new/c.png", "--fdr", "0.3"]);
    assert_eq!((code, &rows[1]["verdict"]), (1, &"novel".into()));
    let novel = rows.iter().filter(|row| row["verdict"] == "novel").count();
    assert!(
        novel < 3 && rows.iter().all(|row| row["threshold"].is_null()),
        "{rows:?}"
    );

    // Paths from standard input.
    let mut child = command(&["score", "--model", "model", "--quiet", "-"], folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"new/c.png\nnew/b.png\n")
        .unwrap();
    let (code, lines, errors) = answer(&child.wait_with_output().unwrap());
    assert_eq!((code, errors.as_str()), (1, ""));
    assert!(
        lines.lines().next().unwrap().ends_with("new/c.png"),
        "{lines}"
    );
}

#[test]
fn promises_need_their_images() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fitted(folder);
    let calibrate = |extra: &[&str]| {
        let words = [&["calibrate", "--model", "model", "--out", "other"], extra].concat();
        call(&words, folder)
    };
    let (code, _, errors) = calibrate(&["--normal", "held-out", "--confidence", "0.95"]);
    assert!(
        code == 4 && errors.contains("at least 59 held-out normal images"),
        "{errors}"
    );
    let confident = [
        "--normal",
        "held-out",
        "--false-alarm-rate",
        "0.2",
        "--confidence",
        "0.9",
    ];
    let (code, _, errors) = calibrate(&confident);
    assert!(
        code == 0 && errors.contains("with 90.0 % confidence"),
        "{errors}"
    );
    // Images that were fitted on are known, and copies count once.
    let (code, _, errors) = calibrate(&["--normal", "held-out", "--normal", "normal/03.png"]);
    assert!(
        code == 4 && errors.contains("normal/03.png is one of the normal images"),
        "{errors}"
    );
    fs::copy(
        folder.join("held-out/04.png"),
        folder.join("held-out/copy.png"),
    )
    .unwrap();
    let (code, _, errors) = calibrate(&["--normal", "held-out", "--false-alarm-rate", "0.2"]);
    assert!(
        code == 0 && errors.contains("near copies of other images do not count"),
        "{errors}"
    );

    let (code, facts, _) = call(&["inspect", "other", "--json"], folder);
    let facts: Value = serde_json::from_str(&facts).unwrap();
    assert_eq!(
        (code, &facts["calibration"]["source"]),
        (0, &"held-out".into())
    );
    let (_, lines, _) = call(&["inspect", "other"], folder);
    assert!(
        lines.contains("closed form") && lines.contains("on average"),
        "{lines}"
    );

    // What was learnt later ends the promise.
    let (code, _, errors) = call(
        &["extend", "--model", "other", "--abnormal", "new/b.png"],
        folder,
    );
    assert!(code == 0 && errors.contains("holds no longer"), "{errors}");
    let (code, _, errors) = call(
        &["score", "--model", "other", "--fdr", "0.1", "new"],
        folder,
    );
    assert!(
        code == 4 && errors.contains("--fdr needs p-values"),
        "{errors}"
    );

    // Images like those of the calibration do not drift, others do.
    let (code, line, _) = call(&["drift", "model", "held-out"], folder);
    assert!(code == 0 && line.contains("no drift"), "{line}");
    for number in 0..20 {
        let path = folder.join(format!("new/odd-{number}.png"));
        pattern(number, true).save(path).unwrap();
    }
    let (code, line, _) = call(&["drift", "model", "new"], folder);
    assert!(code == 1 && line.contains("drift: these images"), "{line}");
}

#[cfg(unix)]
#[test]
fn folders_are_taken_as_they_are() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    images(folder);
    symlink(
        folder.join("normal/00.png"),
        folder.join("normal/again.png"),
    )
    .unwrap();
    symlink(folder.join("nowhere"), folder.join("normal/dangling.png")).unwrap();
    fs::create_dir(folder.join("empty")).unwrap();
    fs::write(folder.join("normal/phone.heic"), "x").unwrap();
    let fit = |out: &str| {
        let words = [
            "fit", "--normal", "normal", "--normal", "empty", "--normal", "normal", "--out", out,
        ];
        call(&words, folder)
    };
    let (code, _, errors) = fit("model");
    assert_eq!(code, 0, "{errors}");
    for part in [
        "fitted on 30 images",
        "32 images were given twice",
        "dangling.png: a link to something that is not there",
        "phone.heic: HEIC is not supported, convert with",
        "passed over empty: it holds no image",
    ] {
        assert!(errors.contains(part), "{part}: {errors}");
    }
    // Outputs are tried before work begins.
    for (out, part) in [
        ("normal/00.png", "one of the files"),
        ("normal", "is a folder"),
        ("/dev/null", "is a device"),
    ] {
        let (code, _, errors) = fit(out);
        assert!(code == 4 && errors.contains(part), "{errors}");
    }
    // A link is followed.
    symlink(folder.join("model"), folder.join("link")).unwrap();
    assert_eq!(fit("link").0, 0);
    assert!(folder.join("link").is_symlink());

    // Names that would break lines, maps beside images, and a map that cannot be written.
    fs::rename(folder.join("new/a.png"), folder.join("new/a\tb\n.png")).unwrap();
    let score = [
        "score", "--model", "model", "--maps", "new/maps", "--format", "table", "new",
    ];
    let (_, lines, _) = call(&score, folder);
    assert_eq!(lines.lines().count(), 3);
    assert!(lines.contains("new/a\\tb\\n.png"), "{lines}");
    let (_, again, _) = call(&score, folder);
    assert_eq!(again, lines, "maps are not scored again");
    fs::remove_file(folder.join("new/maps/b.png.png")).unwrap();
    fs::create_dir(folder.join("new/maps/b.png.png")).unwrap();
    let (code, scored, errors) = call(&score, folder);
    assert!(
        code == 4 && errors.contains("1 maps could not be written"),
        "{errors}"
    );
    assert_eq!(scored, lines, "scores go on");
    for (format, name) in [("png16", "b.png.png"), ("npy", "b.png.npy")] {
        let maps = format!("maps-{format}");
        let words = [
            "score",
            "--model",
            "model",
            "--maps",
            &maps,
            "--map-format",
            format,
            "new/b.png",
        ];
        let (_, _, errors) = call(&words, folder);
        assert!(folder.join(&maps).join(name).is_file(), "{errors}");
    }
    let deep = image::open(folder.join("maps-png16/b.png.png")).unwrap();
    assert!(matches!(deep, image::DynamicImage::ImageLuma16(_)));
    assert_eq!((deep.width(), deep.height()), (14, 14));
}

#[test]
fn a_report_is_one_page_that_asks_for_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fitted(folder);
    fs::rename(folder.join("new/b.png"), folder.join("new/<b> & 'c'.png")).unwrap();
    fs::write(folder.join("new/broken.png"), "no image").unwrap();
    let words = [
        "report",
        "model",
        "new",
        "--out",
        "page.html",
        "--show-normal",
    ];
    let (code, _, errors) = call(&words, folder);
    assert_eq!(code, 3, "{errors}");
    let page = fs::read_to_string(folder.join("page.html")).unwrap();
    assert_eq!(page.matches("<section").count(), 3);
    assert_eq!(page.matches("</section>").count(), 3);
    assert_eq!(page.matches("<div").count(), page.matches("</div>").count());
    assert!(page.contains("&lt;b&gt; &amp; &#39;c&#39;.png") && !page.contains("<b>"));
    assert!(page.contains("broken.png") && page.contains("class=\"threshold\""));
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("<script"));
    // The most novel comes first, with its map and its nearest normal images.
    let first = page.split("<section").nth(1).unwrap();
    assert!(
        first.contains("&lt;b&gt;") && first.contains("badge novel"),
        "{first}"
    );
    assert!(first.matches("data:image/jpeg;base64,").count() >= 3);
    assert!(first.contains("p-value"));
}

#[test]
fn images_are_scored_as_they_come() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fitted(folder);
    let watch = [
        "watch",
        "--model",
        "model",
        "--every",
        "0.1",
        "--until-idle",
        "4",
        "new",
    ];
    let mut child = command(&watch, folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // What comes after the program has looked at the folder is new.
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("watching") {
        line.clear();
        assert!(errors.read_line(&mut line).unwrap() > 0, "it ended");
    }
    fs::copy(folder.join("new/b.png"), folder.join("later.png")).unwrap();
    fs::rename(folder.join("later.png"), folder.join("new/later.png")).unwrap();
    let output = child.wait_with_output().unwrap();
    let (code, lines, errors) = answer(&output);
    assert_eq!((code, lines.lines().count()), (1, 1), "{lines} {errors}");
    assert!(lines.contains("novel\tnew/later.png"), "{lines}");
}

#[test]
fn a_closed_pipe_is_no_fault() {
    let folder = tempfile::tempdir().unwrap();
    for words in [vec!["settings"], vec!["completions", "bash"]] {
        let mut child = command(&words, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let (code, _, errors) = answer(&child.wait_with_output().unwrap());
        assert!(
            code == 141 && errors.is_empty(),
            "{words:?}: {code} {errors}"
        );
    }
    let (code, ..) = call(&["man", "pages"], folder.path());
    assert_eq!(code, 0);
    assert!(folder.path().join("pages/defend-score.1").is_file());
}
