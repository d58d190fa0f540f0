//! The main job on a small random backbone: fit, calibrate, score, map, save, load, and what bad input
//! does to it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

mod small;
mod stripes;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};

use defend_core::data::{ImageFolder, Memory, RgbImage};
use defend_core::dense::{DenseConfig, DenseTuner, PrototypeObjective};
use defend_core::distill::{Aggregation, DistillConfig, DistillRoles, Distiller};
use defend_core::nn::Rng;
use defend_core::prelude::*;
use defend_core::train::Training;
use defend_core::vit::{ComputePrecision, ImageSource, TrainScope, Vit};
use defend_core::{DType, Error, Event, MaskedConfig, Observer, Recipe, Stage, Student, Tensor};
use defend_testing::unsealed;
use image::{DynamicImage, ImageBuffer, Luma, LumaA, Rgb, Rgba};
use stripes::{held_out, set, small_dense, stripes};

fn teacher() -> Vit {
    small::teacher(7)
}

fn config() -> DefendConfig {
    DefendConfig {
        dense: Some(small_dense()),
        student: Student::Masked(masked()),
        ..DefendConfig::default()
    }
}

fn masked() -> MaskedConfig {
    MaskedConfig {
        distill: DistillConfig {
            epochs: 12,
            min_steps: 0,
            batch_size: 8,
            cls_weight: 1.0,
            learning_rate: 3e-3,
            ..DistillConfig::default()
        },
        aggregation: Aggregation::PatchesAndCls { weight: 1.0 },
    }
}

fn fitted() -> Detector {
    let builder = Defend::builder().teacher(teacher()).config(config());
    let fitted = builder.fit(set(3, 21), &mut Silent).expect("a fit");
    assert_eq!((fitted.images, fitted.skipped.len()), (21, 0));
    fitted.detector
}

fn scores(detector: &Detector, set: Memory) -> Vec<f64> {
    scan(detector, set, &mut Silent).expect("a scan").scores()
}

#[test]
fn the_main_job_tells_novel_from_normal_and_survives_a_file() -> Result<(), Error> {
    let mut detector = fitted();
    let (normal, novel) = (scores(&detector, set(3, 9)), scores(&detector, set(5, 9)));
    let highest = normal.iter().copied().fold(f64::MIN, f64::max);
    assert!(
        novel.iter().all(|s| *s > highest),
        "normal {normal:?}, novel {novel:?}"
    );
    let unsure = scan(&detector, set(5, 1), &mut Silent)?;
    assert_eq!(unsure.findings[0].novelty.verdict, None);
    detector.calibrate(held_out(3, 30), FalseAlarmRate::new(0.1)?, &mut Silent)?;
    let sure = scan(&detector, set(5, 1), &mut Silent)?;
    assert_eq!(sure.findings[0].novelty.verdict, Some(Verdict::Novel));
    let map = sure.findings[0].novelty.map.as_ref().expect("a map");
    assert_eq!(
        (map.grid.rows, map.grid.columns, map.values.len()),
        (4, 4, 16)
    );

    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("stripes.defend");
    detector.save(&path)?;
    let again = Detector::load(&path, &Device::Cpu)?;
    assert_eq!(again.calibration(), detector.calibration());
    // The images that the student was trained on are known, also after a reload.
    let mut reloaded = Detector::load(&path, &Device::Cpu)?;
    let refused = reloaded.calibrate(set(3, 30), FalseAlarmRate::new(0.1)?, &mut Silent);
    assert!(matches!(refused, Err(Error::FittedOn { .. })));
    assert_eq!(again.config(), detector.config());
    assert_eq!(again.map_scale(), detector.map_scale());
    for period in [3, 5] {
        let (before, after) = (
            scan(&detector, set(period, 9), &mut Silent)?,
            scan(&again, set(period, 9), &mut Silent)?,
        );
        for (a, b) in before.findings.iter().zip(&after.findings) {
            assert_eq!(a.novelty, b.novelty);
        }
    }
    // One file, nothing left beside it.
    assert_eq!(
        std::fs::read_dir(folder.path()).expect("a folder").count(),
        1
    );
    Ok(())
}

#[test]
fn the_same_seed_gives_the_same_bits_and_the_batch_size_none() -> Result<(), Error> {
    let (a, b) = (fitted(), fitted());
    assert_eq!(scores(&a, set(5, 7)), scores(&b, set(5, 7)));
    let builder = Defend::builder().teacher(teacher()).config(DefendConfig {
        batch_size: 2,
        ..config()
    });
    // Images that are read again in each epoch change nothing either.
    let builder = builder.image_memory(0);
    let small = builder.fit(set(3, 21), &mut Silent)?.detector;
    assert_eq!(scores(&a, set(5, 7)), scores(&small, set(5, 7)));
    Ok(())
}

/// Images, and in which order they were announced and asked for.
struct Recorded {
    images: Tensor,
    orders: Mutex<[Vec<usize>; 2]>,
}

impl ImageSource for Recorded {
    fn len(&self) -> usize {
        ImageSource::len(&self.images)
    }

    fn images(&self, indices: &[usize]) -> Result<Tensor, defend_core::vit::Error> {
        self.orders.lock().unwrap()[1].extend(indices);
        self.images.images(indices)
    }

    fn prefetch(&self, order: &[usize]) {
        self.orders.lock().unwrap()[0].extend(order);
    }
}

#[test]
fn both_stages_announce_the_order_in_which_they_ask_for_images() {
    let values: Vec<f32> = (0..10 * 3 * 32 * 32).map(|i| (i as f32).sin()).collect();
    let images = Tensor::from_vec(values, (10, 3, 32, 32), &Device::Cpu).unwrap();
    let source = Recorded {
        images,
        orders: Mutex::default(),
    };
    let asked = || std::mem::take(&mut *source.orders.lock().unwrap());
    let (mut masked, mut rng) = (masked(), Rng::seed(1));
    masked.distill.epochs = 2;
    let dense = small_dense();
    let tuned = teacher().copy(TrainScope::LastBlocks(1)).unwrap();
    let objective = PrototypeObjective::random(&dense, 24, &mut rng, &Device::Cpu).unwrap();
    let tuner = DenseTuner::new(dense).unwrap();
    let report = tuner.tune(
        &tuned,
        &objective,
        &source,
        Training::new(&mut rng, &mut |_| ControlFlow::Continue(())),
    );
    report.unwrap();
    let [announced, found] = asked();
    assert_eq!((announced.len(), &announced), (10, &found));
    let (distill, student) = (masked.distill, teacher());
    let distiller = Distiller::new(distill.clone()).unwrap();
    let roles = DistillRoles {
        teacher: &tuned,
        student: &student,
        mask: &distill.mask,
        objective: &distill.distance,
    };
    let report = distiller.distill(
        roles,
        &source,
        Training::new(&mut rng, &mut |_| ControlFlow::Continue(())),
    );
    report.unwrap();
    let [announced, found] = asked();
    assert_eq!((announced.len(), &announced), (20, &found));
}

/// Names of the skipped images.
#[derive(Default)]
struct Skips(Vec<String>, Vec<Stage>);

impl Observer for Skips {
    fn on(&mut self, event: &Event<'_>) {
        match event {
            Event::Skipped(failure) => self.0.push(failure.name.clone()),
            Event::Finished { stage } => self.1.push(*stage),
            _ => {}
        }
    }
}

/// An image in every form that a folder may hold, and one file that is none.
fn mixed_folder(folder: &Path) {
    let save = |name: &str, image: DynamicImage| {
        image.save(folder.join(name)).expect("an image");
    };
    save("a.png", stripes(3, 1).into());
    let grey = ImageBuffer::from_pixel(30, 50, Luma([99u8]));
    save("grey.jpg", DynamicImage::ImageLuma8(grey));
    let alpha = ImageBuffer::from_pixel(8, 8, Rgba([9u8, 9, 9, 0]));
    save("alpha.png", DynamicImage::ImageRgba8(alpha));
    let deep = ImageBuffer::from_pixel(8, 8, Rgb([9u16, 60_000, 9]));
    save("deep.png", DynamicImage::ImageRgb16(deep));
    let grey_alpha = ImageBuffer::from_pixel(8, 8, LumaA([9u16, 60_000]));
    save("grey-alpha.png", DynamicImage::ImageLumaA16(grey_alpha));
    save("pixel.png", RgbImage::new(1, 1).into());
    save("large.png", RgbImage::new(10_000, 3).into());
    std::fs::write(folder.join("broken.jpg"), b"no image").expect("a file");
    std::fs::write(folder.join("notes.txt"), b"no image").expect("a file");
}

#[test]
fn every_kind_of_image_is_used_and_what_is_none_is_named() -> Result<(), Error> {
    let folder = tempfile::tempdir().expect("a folder");
    mixed_folder(folder.path());
    let mut skips = Skips::default();
    let images = ImageFolder::open(folder.path())?;
    assert_eq!(images.passed_over().len(), 1);
    let builder = || Defend::builder().teacher(teacher()).config(config());
    let fitted = builder().fit(images.clone(), &mut skips)?;
    // Seven images are fewer than a batch of eight.
    assert_eq!(
        (fitted.images, fitted.skipped.len(), skips.0.len()),
        (7, 1, 1)
    );
    assert!(skips.0[0].ends_with("broken.jpg"), "{:?}", skips.0);
    assert_eq!(skips.1, [Stage::Read, Stage::Dense, Stage::Distill]);
    let scan = scan(&fitted.detector, images.clone(), &mut Silent)?;
    assert_eq!((scan.findings.len(), scan.skipped.len()), (7, 1));

    let strict = builder().strict(true).fit(images, &mut Silent);
    let error = strict.err().expect("an error");
    assert!(matches!(&error, Error::Unreadable { name, .. } if name.ends_with("broken.jpg")));

    let none = builder().fit(Memory::default(), &mut Silent);
    assert!(matches!(none.err(), Some(Error::NoImages { tried: 0, .. })));
    Ok(())
}

#[test]
fn a_failed_calibration_keeps_the_earlier_one() -> Result<(), Error> {
    let mut detector = fitted();
    let rate = FalseAlarmRate::new(0.1)?;
    detector.calibrate(held_out(3, 20), rate, &mut Silent)?;
    let before = detector.calibration().expect("a calibration").clone();
    let error = detector.calibrate(held_out(3, 5), rate, &mut Silent);
    let error = error.expect_err("too few").to_string();
    assert!(
        error.contains('9'),
        "names the number that is needed: {error}"
    );
    assert!(
        detector
            .calibrate(Memory::default(), rate, &mut Silent)
            .is_err()
    );
    assert_eq!(detector.calibration(), Some(&before));
    Ok(())
}

#[test]
fn images_of_another_size_are_refused() -> Result<(), Error> {
    let detector = fitted();
    let images = Tensor::zeros((2, 3, 64, 64), DType::F32, &Device::Cpu)?;
    let error = detector.score(&images).expect_err("a refusal").to_string();
    assert!(
        error.contains("[2, 3, 64, 64]") && error.contains("3, 32, 32"),
        "{error}"
    );
    Ok(())
}

#[test]
fn damaged_models_are_named_and_leave_the_file() -> Result<(), Error> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.defend");
    fitted().save(&path)?;
    let whole = std::fs::read(&path).expect("a model");
    let plain = unsealed(&whole);
    let load = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("a file");
        let error = Detector::load(&path, &Device::Cpu);
        let error = error.err().expect("an error").to_string();
        assert!(error.contains("model.defend"), "{error}");
        error
    };
    for cut in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        load(&whole[..cut]);
    }
    // Changes the header without moving the tensors.
    let text = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = plain.windows(from.len()).position(|w| w == from.as_bytes());
        let mut bytes = plain.clone();
        let at = at.expect("the text to change");
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        load(&bytes)
    };
    let error = text("format_version\\\":2", "format_version\\\":9");
    assert!(error.contains("format version 9"), "{error}");
    let error = text(
        "\\\"preprocess\\\":{\\\"size\\\":32",
        "\\\"preprocess\\\":{\\\"size\\\":48",
    );
    assert!(
        error.contains("48 px") && error.contains("32 px"),
        "{error}"
    );
    let error = text("student.norm.bias", "student.morn.bias");
    assert!(error.contains("norm.bias"), "{error}");

    // NaN in the weights.
    std::fs::write(&path, &plain).expect("a file");
    let (_, header) = safetensors::SafeTensors::read_metadata(&plain).expect("a header");
    let mut tensors: HashMap<String, Tensor> = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let bias = (Tensor::zeros(24, DType::F32, &Device::Cpu)? / 0.0)?;
    tensors.insert("teacher.norm.bias".into(), bias);
    let bytes = safetensors::serialize(&tensors, header.metadata().clone()).expect("bytes");
    let error = load(&bytes);
    assert!(
        error.contains("norm.bias") && error.contains("NaN"),
        "{error}"
    );

    // A model of format 1 had the masked student alone, and its settings one level higher.
    let (_, header) = safetensors::SafeTensors::read_metadata(&plain).expect("a header");
    let json = &header.metadata().as_ref().expect("metadata")["defend.model"];
    let mut old: serde_json::Value = serde_json::from_str(json).expect("a header");
    old["format_version"] = 1.into();
    old["student"] = old["student"]["masked"].take();
    let config = old["config"].as_object_mut().expect("settings");
    let mut student = config.remove("student").expect("a student");
    for field in ["false_alarm_rate", "reduced_decoding"] {
        config.remove(field);
    }
    for field in ["distill", "aggregation"] {
        config.insert(field.into(), student["masked"][field].take());
    }
    std::fs::write(&path, &whole).expect("a file");
    let expected = scores(&Detector::load(&path, &Device::Cpu)?, set(5, 3));
    let tensors: HashMap<String, Tensor> = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let metadata = HashMap::from([("defend.model".to_owned(), old.to_string())]);
    let bytes = safetensors::serialize(&tensors, Some(metadata)).expect("bytes");
    std::fs::write(&path, bytes).expect("a file");
    let loaded = Detector::load(&path, &Device::Cpu)?;
    assert_eq!(loaded.config(), &self::config());
    assert_eq!(scores(&loaded, set(5, 3)), expected);

    // A failed save leaves the old file as it was.
    std::fs::write(&path, &whole).expect("a file");
    let detector = Detector::load(&path, &Device::Cpu)?;
    assert!(
        detector
            .save(folder.path().join("missing/model.defend"))
            .is_err()
    );
    let custom = detector.with_score(std::sync::Arc::new(Aggregation::Mean))?;
    assert!(matches!(
        custom.save(&path),
        Err(Error::NotSavable { role: "score" })
    ));
    assert_eq!(std::fs::read(&path).expect("a model"), whole);
    Ok(())
}

#[test]
fn scores_that_need_the_cls_token_are_refused_without_it() {
    let mut wrong = masked();
    wrong.distill.cls_weight = 0.0;
    let wrong = DefendConfig {
        student: Student::Masked(wrong),
        ..config()
    };
    let builder = Defend::builder().teacher(teacher()).config(wrong);
    let error = builder.fit(set(3, 4), &mut Silent).err().expect("an error");
    assert!(
        matches!(
            error,
            Error::Config {
                field: "aggregation",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_teacher_of_ones_own_cannot_be_tuned_but_used() -> Result<(), Error> {
    let own = std::sync::Arc::new(teacher());
    let builder = || Defend::builder().teacher(defend_core::TeacherSource::Backbone(own.clone()));
    let refused = builder().config(config()).fit(set(3, 4), &mut Silent);
    assert!(matches!(
        refused.err(),
        Some(Error::Config { field: "dense", .. })
    ));
    let untuned = DefendConfig {
        dense: None,
        ..config()
    };
    let fitted = builder()
        .config(untuned.clone())
        .fit(set(3, 8), &mut Silent)?;
    let plain = Defend::builder().teacher(teacher()).config(untuned);
    let plain = plain.fit(set(3, 8), &mut Silent)?;
    assert_eq!(
        scores(&fitted.detector, set(5, 3)),
        scores(&plain.detector, set(5, 3))
    );
    Ok(())
}

#[test]
fn another_image_size_travels_with_the_model() -> Result<(), Error> {
    let config = DefendConfig {
        image_size: Some(48),
        ..config()
    };
    let builder = Defend::builder().teacher(teacher()).config(config);
    let detector = builder.fit(set(3, 9), &mut Silent)?.detector;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("large.defend");
    detector.save(&path)?;
    let again = Detector::load(&path, &Device::Cpu)?;
    for detector in [&detector, &again] {
        let found = scan(detector, set(5, 1), &mut Silent)?;
        let map = found.findings[0].novelty.map.as_ref().expect("a map");
        assert_eq!((map.grid.rows, map.grid.columns), (6, 6));
    }
    assert_eq!(scores(&detector, set(5, 3)), scores(&again, set(5, 3)));
    let wrong = DefendConfig {
        image_size: Some(50),
        ..detector.config().clone()
    };
    let builder = Defend::builder().teacher(teacher()).config(wrong);
    assert!(builder.fit(set(3, 9), &mut Silent).is_err());
    Ok(())
}

#[test]
fn bf16_changes_scores_little_and_travels_with_the_model() -> Result<(), Error> {
    let folder = tempfile::tempdir().expect("a folder");
    let saved = |compute_precision: ComputePrecision| -> Result<_, Error> {
        let builder = Defend::builder().teacher(teacher()).config(DefendConfig {
            compute_precision,
            ..config()
        });
        let detector = builder.fit(set(3, 21), &mut Silent)?.detector;
        let path = folder.path().join("stripes.defend");
        detector.save(&path)?;
        let again = Detector::load(&path, &Device::Cpu)?;
        let found = [3, 5].map(|period| scores(&detector, set(period, 9)));
        assert_eq!(found, [3, 5].map(|period| scores(&again, set(period, 9))));
        Ok((found, std::fs::metadata(&path).expect("a file").len()))
    };
    let (single, whole) = saved(ComputePrecision::F32)?;
    let ([normal, novel], compact) = saved(ComputePrecision::Bf16)?;
    assert!(compact < whole * 3 / 5, "{compact} of {whole} bytes");
    let highest = normal.iter().copied().fold(f64::MIN, f64::max);
    assert!(novel.iter().all(|s| *s > highest), "{normal:?} {novel:?}");
    for (single, rounded) in single.concat().iter().zip([normal, novel].concat()) {
        let change = (rounded / single - 1.0).abs();
        assert!(change > 0.0 && change < 0.05, "{single} became {rounded}");
    }
    Ok(())
}

#[test]
fn networks_of_ones_own_keep_their_arithmetic_in_the_file() -> Result<(), Error> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("stripes.defend");
    let rounded = teacher().with_compute_precision(ComputePrecision::Bf16)?;
    for dense in [None, config().dense] {
        let builder = Defend::builder()
            .teacher(rounded.copy(TrainScope::Frozen)?)
            .student(Arc::new(rounded.copy(TrainScope::All)?))
            .config(DefendConfig { dense, ..config() });
        let detector = builder.fit(set(3, 9), &mut Silent)?.detector;
        detector.save(&path)?;
        let again = Detector::load(&path, &Device::Cpu)?;
        assert_eq!(scores(&detector, set(5, 5)), scores(&again, set(5, 5)));
    }
    Ok(())
}

/// Every variant of Table 1 and METHOD.md is a value of the configuration.
#[test]
fn every_variant_fits_and_scores() {
    let dense = |fields: &str| format!(r#"{{"dense": {{{fields}}}}}"#);
    let distill = |fields: &str| format!(r#"{{"dense": null, "distill": {{{fields}}}}}"#);
    let mut variants = vec![
        dense(r#""assignment": "soft", "trained_blocks": 1, "head_hidden": []"#),
        dense(r#""crops": 8, "prototypes": 7, "head_hidden": [8, 8, 8]"#),
        dense(r#""view": {"random": {"count": 2, "area": [0.25, 1]}}, "queue": 40"#),
        dense(r#""resampling": {"roi-align": {"side": 3}}, "target_momentum": 0.9"#),
        dense(r#""weight_decay": 0.04, "final_weight_decay": 0.5, "trained_blocks": 3"#),
        distill(r#""layers": 3"#),
    ];
    for mask in ["random", "keep-salient", "hide-salient"] {
        for ratio in [0.0, 0.9] {
            let kinds: &[&str] = match mask {
                "random" => &[""],
                _ => &[r#", "selection": "top-k""#, r#", "selection": "sampled""#],
            };
            for kind in kinds {
                let mask = format!(r#""mask": {{"{mask}": {{"ratio": {ratio}{kind}}}}}"#);
                variants.push(distill(&mask));
            }
        }
    }
    variants.push(distill(r#""mask": "none""#));
    for norm in ["none", "layer", "l2"] {
        for side in ["both", "teacher"] {
            for penalty in ["squared", "smooth-l1"] {
                variants.push(distill(&format!(
                    r#""distance": {{"norm": "{norm}", "side": "{side}", "penalty": "{penalty}"}}"#
                )));
            }
        }
    }
    let mut refused = Vec::new();
    for variant in variants {
        let mut value = serde_json::to_value(config()).expect("settings");
        let change: serde_json::Value = serde_json::from_str(&variant).expect("a variant");
        for (stage, fields) in change.as_object().expect("stages") {
            let at = match stage.as_str() {
                "distill" => &mut value["student"]["masked"]["distill"],
                stage => &mut value[stage],
            };
            match fields.as_object() {
                None => *at = fields.clone(),
                Some(fields) => {
                    for (field, setting) in fields {
                        at[field] = setting.clone();
                    }
                }
            }
        }
        value["student"]["masked"]["distill"]["epochs"] = 1.into();
        let config: DefendConfig = serde_json::from_value(value).expect("settings");
        if let Err(error) = config.validate() {
            refused.push(error.to_string());
            continue;
        }
        let builder = Defend::builder().teacher(teacher()).config(config);
        let fitted = builder.fit(set(3, 9), &mut Silent);
        let detector = fitted.unwrap_or_else(|e| panic!("{variant}: {e}")).detector;
        let scores = scores(&detector, set(5, 2));
        assert!(scores.iter().all(|s| s.is_finite()), "{variant}");
    }
    // Normalising one side alone says nothing without a normalisation.
    assert_eq!(refused.len(), 2, "{refused:?}");
    assert!(refused[0].contains("distance.side"), "{refused:?}");
}

#[test]
fn the_recipes_are_files_too() {
    let read = |file: &str| -> DefendConfig { serde_json::from_str(file).expect("settings") };
    let file = include_str!("../../../examples/recipes/official-dense.json");
    assert_eq!(read(file), Recipe::OfficialDense.config());
    let file = include_str!("../../../examples/recipes/official-leopart.json");
    assert_eq!(read(file), Recipe::OfficialLeopart.config());
    let file = include_str!("../../../examples/recipes/paper.json");
    // The 20 classes of Pascal VOC.
    let paper = DefendConfig {
        dense: Some(DenseConfig::paper(20)),
        ..DefendConfig::paper()
    };
    assert_eq!(read(file), paper);
}
