//! A whole benchmark on images made here: runs, goes on after a stop, refuses other settings, reports.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may panic")]

use std::fs;
use std::path::Path;

use defend_bench::{BenchConfig, Error, Progress, Record, RunState, report, run};
use defend_core::{Device, Event, Observer};
use image::{GrayImage, Luma, Rgb, RgbImage};

/// Stripes of a class's own direction and colour; every fifth has a bright spot in a corner if asked for.
fn image(class: u32, i: u32, spot: bool) -> RgbImage {
    RgbImage::from_fn(48, 48, |x, y| {
        if spot && x < 16 && y < 16 {
            return Rgb([255, 255, 0]);
        }
        let at = match class {
            0 => x,
            1 => y,
            _ => x + y,
        };
        let light = (at + i) % (6 + i % 3) < 3;
        Rgb([
            if light { 200 } else { 40 + (i % 50) as u8 },
            60 * class as u8,
            90,
        ])
    })
}

fn save(path: &Path, image: &RgbImage) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    image.save(path).unwrap();
}

/// Three classes with an image of the training half in the test half, and a category with masks.
fn make(root: &Path) {
    for class in 0..3 {
        let name = ["across", "down", "slanted"][class as usize];
        for i in 0..8 {
            save(
                &root.join(format!("train/{name}/{i}.png")),
                &image(class, i, false),
            );
        }
        for i in 0..6 {
            let number = if i == 0 { 3 } else { 20 + i };
            save(
                &root.join(format!("test/{name}/{i}.png")),
                &image(class, number, false),
            );
        }
    }
    for i in 0..6 {
        save(
            &root.join(format!("part/train/good/{i}.png")),
            &image(0, i, false),
        );
        save(
            &root.join(format!("part/test/good/{i}.png")),
            &image(0, 30 + i, false),
        );
        save(
            &root.join(format!("part/test/spot/{i}.png")),
            &image(0, 40 + i, true),
        );
        let mask = GrayImage::from_fn(48, 48, |x, y| Luma([255 * u8::from(x < 16 && y < 16)]));
        let path = root.join(format!("part/ground_truth/spot/{i}_mask.png"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        mask.save(path).unwrap();
    }
}

const CONFIG: &str = r#"
output = "unused"
backbone = "embedded"
seeds = [0, 1]
[[data]]
name = "stripes"
source = { kind = "class-folders", train = "train", test = "test" }
protocols = [
    { kind = "one-vs-all", classes = ["across", "down"] },
    { kind = "normal-sets", sets = [["0", "slanted"]] },
]
[[data]]
name = "part"
source = { kind = "mvtec-ad", path = "part" }
protocols = [{ kind = "defects" }]
subset = { train = 5 }
[[methods]]
kind = "constant-student"
[[methods]]
kind = "mean-cls"
only = ["one-vs-all"]
seeds = [1]
"#;

fn none(what: &Error) {
    panic!("{what}");
}

/// Counts runs, and stops the benchmark by a panic after some.
#[derive(Default)]
struct Counter {
    fresh: usize,
    known: usize,
    total: usize,
    stop_after: Option<usize>,
    left_out: Vec<String>,
}

impl Observer for Counter {
    fn on(&mut self, _: &Event<'_>) {}
}

impl Progress for Counter {
    fn run(&mut self, state: &RunState<'_>) {
        self.total = state.total;
        if state.known {
            self.known += 1;
        } else {
            self.fresh += 1;
        }
        assert!(self.stop_after != Some(self.fresh), "stopped as asked");
    }

    fn left_out(&mut self, what: &Error) {
        self.left_out.push(what.to_string());
    }
}

fn read(folder: &Path, text: &str) -> Result<BenchConfig, Error> {
    let path = folder.join("bench.toml");
    fs::write(&path, text).unwrap();
    let mut config = BenchConfig::read(&path, None)?;
    config.output = folder.join("out");
    Ok(config)
}

#[test]
fn runs_goes_on_and_reports() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path());
    let config = read(folder.path(), CONFIG).unwrap();

    let stopped = std::panic::catch_unwind(|| {
        let mut counter = Counter {
            stop_after: Some(4),
            ..Counter::default()
        };
        run(&config, &Device::Cpu, &mut counter)
    });
    assert!(stopped.is_err());
    let mut counter = Counter::default();
    run(&config, &Device::Cpu, &mut counter).unwrap();
    // One-vs-all: 2 classes, a method with 2 seeds and one with 1; one normal set and the defects: 1 method, 2 seeds.
    assert_eq!((counter.known, counter.fresh, counter.total), (4, 6, 10));

    let records = Record::read_all(&[&config.output], &mut none).unwrap();
    assert_eq!(records.len(), 10);
    let first = &records[0];
    assert_eq!(
        (first.key.experiment.as_str(), first.key.method.as_str()),
        ("across", "constant student")
    );
    assert_eq!((first.scores.len(), first.train_images), (18, 7));
    assert!(first.figures.auroc > 0.9, "{:?}", first.figures);
    let defects = records
        .iter()
        .find(|r| r.key.protocol == "defects")
        .unwrap();
    assert!(
        defects.figures.pixel_auroc.unwrap() > 0.8,
        "{:?}",
        defects.figures
    );
    assert!(defects.figures.pro.is_some() && defects.train_images == 5);
    let split =
        fs::read_to_string(config.output.join("splits/stripes-one-vs-all-across.json")).unwrap();
    assert!(split.contains("\"leaks\":[3]"), "{split}");

    let report = report(&[&config.output], folder.path(), &mut none).unwrap();
    let tables = fs::read_to_string(report.folder.join("tables.md")).unwrap();
    assert!(tables.contains("stripes: across+slanted") && !tables.contains("| mean CLS"));
    assert!(tables.contains("cosine to mean CLS"), "{tables}");
    let detail = report
        .tables
        .iter()
        .find(|t| t.name == "stripes-one-vs-all")
        .unwrap();
    assert_eq!(detail.header[..3], ["method", "across", "down"]);
    assert_ne!(
        detail.rows[1][5], "–",
        "the second method is compared with the first over the seed of both"
    );
    assert!(report.folder.join("stripes-one-vs-all.csv").is_file());
    assert!(report.folder.join("part-defects-pixels.tex").is_file());
    let roc = fs::read_to_string(
        report
            .folder
            .join("plots/stripes-one-vs-all-across-roc.svg"),
    )
    .unwrap();
    assert!(roc.starts_with("<svg") && roc.contains("cosine to mean CLS"));
    let page = fs::read_to_string(&report.page).unwrap();
    for method in ["constant-student-seed0", "cosine-to-mean-CLS-seed1"] {
        let image = format!("images/stripes-one-vs-all-across-{method}-0.png");
        assert!(page.contains(&image), "{image}");
        assert!(report.folder.join(image).is_file());
    }
}

#[test]
fn one_report_of_two_benchmarks_on_copies_of_the_images() {
    let report_of = |with: &str, images: &str| {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for folder in [&first, &second] {
            make(folder.path());
        }
        let only = CONFIG.replace(
            "kind = \"mean-cls\"\nonly = [\"one-vs-all\"]\nseeds = [1]",
            "",
        );
        let only = only.replace("[[methods]]\n\n", "");
        let first_config = read(
            first.path(),
            only.trim_end().trim_end_matches("[[methods]]"),
        );
        let first_config = first_config.unwrap();
        let text = CONFIG.replace("constant-student", with);
        let text = text.replace("train = 5", images);
        let second_config = read(second.path(), &text).unwrap();
        for config in [&first_config, &second_config] {
            run(config, &Device::Cpu, &mut Counter::default()).unwrap();
        }
        report(
            &[&first_config.output, &second_config.output],
            first.path(),
            &mut none,
        )
    };
    // The constant student's runs are the same in both and count once.
    for (with, methods) in [("constant-student", 2), ("mahalanobis", 3)] {
        let tables = report_of(with, "train = 5").unwrap().tables;
        let detail = tables
            .iter()
            .find(|t| t.name == "stripes-one-vs-all")
            .unwrap();
        assert_eq!(detail.rows.len(), methods, "{with}");
        assert_eq!(detail.rows[0][0], "constant student");
        assert!(detail.rows.iter().all(|row| row[1] != "–"), "{detail:?}");
    }
    let clash = report_of("mahalanobis\"\nname = \"constant student", "train = 5").unwrap_err();
    assert!(clash.to_string().contains("other settings"), "{clash}");
    let clash = report_of("mahalanobis", "train = 4").unwrap_err();
    assert!(clash.to_string().contains("other images"), "{clash}");
}

#[test]
fn a_new_first_method_takes_its_place_in_the_tables() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path());
    let all = CONFIG.replace("only = [\"one-vs-all\"]", "");
    run(
        &read(folder.path(), &all).unwrap(),
        &Device::Cpu,
        &mut Counter::default(),
    )
    .unwrap();
    let moved = all.replace(
        "[[methods]]\nkind = \"constant-student\"",
        "[[methods]]\nkind = \"mahalanobis\"\n[[methods]]\nkind = \"constant-student\"",
    );
    run(
        &read(folder.path(), &moved).unwrap(),
        &Device::Cpu,
        &mut Counter::default(),
    )
    .unwrap();
    let records = Record::read_all(&[&folder.path().join("out")], &mut none).unwrap();
    let order = |name: &str| {
        let mut orders = records
            .iter()
            .filter(|r| r.key.method.contains(name))
            .map(|r| r.order[1]);
        let first = orders.next().unwrap();
        assert!(orders.all(|order| order == first));
        first
    };
    assert_eq!(
        [order("Mahalanobis"), order("constant"), order("mean CLS")],
        [0, 1, 2]
    );
}

#[test]
fn other_settings_do_not_replace_a_record() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path());
    let text = CONFIG
        .replace("seeds = [0, 1]", "seeds = [0]")
        .replace("\nseeds = [1]", "")
        .replace(
            "kind = \"constant-student\"",
            "kind = \"nearest-neighbours\"\nname = \"k-NN\"",
        );
    run(
        &read(folder.path(), &text).unwrap(),
        &Device::Cpu,
        &mut Counter::default(),
    )
    .unwrap();
    let before = Record::read_all(&[&folder.path().join("out")], &mut none).unwrap();
    let other = text.replace("name = \"k-NN\"", "name = \"k-NN\"\nneighbours = 2");
    let error = run(
        &read(folder.path(), &other).unwrap(),
        &Device::Cpu,
        &mut Counter::default(),
    );
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("other settings") && error.contains("k-NN-seed0.json"),
        "{error}"
    );
    assert_eq!(
        Record::read_all(&[&folder.path().join("out")], &mut none).unwrap(),
        before
    );
}

#[test]
fn faults_come_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path());
    let wrong = CONFIG.replace("\"across\", \"down\"", "\"across\", \"up\"");
    let mut counter = Counter::default();
    let error = run(
        &read(folder.path(), &wrong).unwrap(),
        &Device::Cpu,
        &mut counter,
    )
    .unwrap_err();
    assert!(matches!(error, Error::UnknownClass { .. }), "{error}");
    assert_eq!(counter.fresh, 0);
    assert!(matches!(
        report(&[&folder.path().join("out")], folder.path(), &mut none),
        Err(Error::NoRuns { .. })
    ));
}

#[test]
fn what_is_damaged_or_empty_is_left_out_and_named() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path());
    for damaged in ["train/across/1.png", "test/down/2.png"] {
        fs::write(folder.path().join(damaged), "no image").unwrap();
    }
    // A class without images to train on, as Roboflow's root is.
    save(
        &folder.path().join("test/animals/1.png"),
        &image(2, 77, false),
    );
    let text = CONFIG.replace(", classes = [\"across\", \"down\"]", "");
    let config = read(folder.path(), &text).unwrap();
    let mut counter = Counter::default();
    run(&config, &Device::Cpu, &mut counter).unwrap();
    // One-vs-all: 3 classes of 4, 3 runs each; a normal set and the defects with 2 each.
    assert_eq!((counter.fresh, counter.total), (13, 13));
    let said = counter.left_out.join("\n");
    assert_eq!(counter.left_out.len(), 3, "{said}");
    for name in ["across/1.png", "down/2.png", "animals: 0 training images"] {
        assert!(said.contains(name), "{said}");
    }
    let records = Record::read_all(&[&config.output], &mut none).unwrap();
    let across = records
        .iter()
        .find(|r| r.key.experiment == "across")
        .unwrap();
    // Eight, one of them in the test half and one damaged; 19 test images, one of them damaged.
    assert_eq!((across.train_images, across.scores.len()), (6, 18));

    // A damaged record is left out of a report, and its run is done again.
    let path = config
        .output
        .join("runs/stripes/one-vs-all/across/constant-student-seed0.json");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let mut said = Vec::new();
    report(&[&config.output], folder.path(), &mut |what| {
        said.push(what.to_string());
    })
    .unwrap();
    assert!(
        said.len() == 1 && said[0].contains("constant-student-seed0.json"),
        "{said:?}"
    );
    let mut counter = Counter::default();
    run(&config, &Device::Cpu, &mut counter).unwrap();
    assert_eq!((counter.fresh, counter.known), (1, 12));
    let named = |what: &&String| what.contains("constant-student-seed0.json");
    assert_eq!(counter.left_out.iter().filter(named).count(), 1);
    assert_eq!(Record::read(&path).unwrap().scores, across.scores);
}

#[test]
fn a_training_image_that_is_tested_is_counted_where_none_is_left() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path());
    for i in 0..8 {
        if i != 3 {
            fs::remove_file(folder.path().join(format!("train/across/{i}.png"))).unwrap();
        }
    }
    let config = read(folder.path(), CONFIG).unwrap();
    let error = run(&config, &Device::Cpu, &mut Counter::default()).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("0 training images (and 1 that are among the test images)"),
        "{text}"
    );
}

#[test]
fn settings_without_a_meaning_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (from, to, says) in [
        ("only = [\"one-vs-all\"]", "only = [\"pets\"]", "\"pets\""),
        (
            "backbone = ",
            "feature_memory_gib = -1.0\nbackbone = ",
            "-1",
        ),
        (
            "backbone = ",
            "feature_memory_gib = nan\nbackbone = ",
            "NaN",
        ),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seed 0 comes twice"),
        ("seeds = [1]", "seeds = [1, 1]", "seed 1 comes twice"),
    ] {
        assert!(CONFIG.contains(from));
        let error = read(folder.path(), &CONFIG.replace(from, to)).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
}
