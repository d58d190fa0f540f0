//! The default detector on a small random backbone: fit, threshold, score, explain, map, save, load, background, and what bad
//! input does to it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

mod kinds;
mod small;

use std::collections::HashMap;
use std::sync::Arc;

use defend_core::data::{Memory, RgbImage};
use defend_core::evidence::EvidenceConfig;
use defend_core::nn::Rng;
use defend_core::prelude::*;
use defend_core::{
    Background, BackgroundSource, CalibrationSource, Error, Student, Tensor, scan_with_maps,
};
use kinds::{image, images};
use rand::RngExt;
use small::teacher;

fn fit(normal: Memory) -> defend_core::Fitted {
    Defend::builder()
        .teacher(teacher(7))
        .fit(normal, &mut Silent)
        .expect("a fit")
}

fn scores(detector: &Detector, set: Memory) -> Vec<f64> {
    scan(detector, set, &mut Silent).expect("a scan").scores()
}

#[test]
fn the_main_job_has_verdicts_at_once_and_survives_a_file() -> Result<(), Error> {
    let fitted = fit(images(0, 0..40, 0));
    let report = fitted.closed_form().expect("a report");
    assert_eq!(
        (report.summary.images, report.background.as_deref()),
        (40, None)
    );
    let detector = fitted.detector;
    let calibration = detector.calibration().expect("a threshold").clone();
    assert_eq!(calibration.source, CalibrationSource::LeftOut);
    assert_eq!(calibration.images, report_groups(&detector));

    let found = scan(&detector, images(3, 0..8, 0), &mut Silent)?;
    let known = scan(&detector, images(0, 0..8, 0), &mut Silent)?;
    let mean = |scan: &defend_core::Scan| scan.scores().iter().sum::<f64>() / 8.0;
    assert!(
        mean(&found) > mean(&known) + 2.0,
        "{} {}",
        mean(&found),
        mean(&known)
    );
    for finding in found.findings.iter().chain(&known.findings) {
        let novelty = &finding.novelty;
        let explanation = novelty.explanation.as_ref().expect("an explanation");
        let pieces = [
            Some(explanation.posterior),
            explanation.contrast,
            explanation.patches,
        ];
        let sum: f64 = pieces
            .into_iter()
            .flatten()
            .map(|piece| piece.weight * piece.z)
            .sum();
        assert_eq!(sum, novelty.score);
        assert_eq!(
            novelty.verdict == Some(Verdict::Novel),
            novelty.score > calibration.threshold
        );
        assert!(novelty.map.is_none());
    }
    // A known image is explained by itself.
    let nearest =
        |finding: &defend_core::Finding| finding.novelty.explanation.clone().unwrap().nearest;
    for finding in &known.findings {
        let near = nearest(finding);
        assert!(
            near.iter().any(|near| near.name == finding.name),
            "{} {near:?}",
            finding.name
        );
    }

    let mapped = scan_with_maps(&detector, images(3, 0..2, 0), &mut Silent)?;
    for (mapped, plain) in mapped.findings.iter().zip(&found.findings) {
        let map = mapped.novelty.map.as_ref().expect("a map");
        assert_eq!((map.grid.rows, map.values.len()), (4, 16));
        assert_eq!(mapped.novelty.score, plain.novelty.score);
    }
    assert_eq!(detector.map_scale().usual.len(), 16);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stripes.defend");
    detector.save(&path)?;
    let again = Detector::load(&path, &Device::Cpu)?;
    assert_eq!(again.calibration(), detector.calibration());
    assert_eq!(
        (again.config(), again.map_scale()),
        (detector.config(), detector.map_scale())
    );
    let after = scan_with_maps(&again, images(3, 0..2, 0), &mut Silent)?;
    for (before, after) in mapped.findings.iter().zip(&after.findings) {
        assert_eq!(before.novelty, after.novelty);
    }
    Ok(())
}

fn report_groups(detector: &Detector) -> usize {
    detector.evidence().expect("a closed form").groups().len()
}

/// Neither the number of threads nor the batch nor a second run changes a bit.
#[test]
fn the_same_seed_gives_the_same_bits() -> Result<(), Error> {
    let expected = scores(&fit(images(0, 0..30, 0)).detector, images(3, 0..9, 0));
    for threads in [1, 2, 7] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let found = pool.install(|| {
            let config = DefendConfig {
                batch_size: 1 + threads,
                ..DefendConfig::default()
            };
            let builder = Defend::builder().teacher(teacher(7)).config(config);
            let detector = builder.fit(images(0, 0..30, 0), &mut Silent)?.detector;
            Ok::<_, Error>(scores(&detector, images(3, 0..9, 0)))
        })?;
        assert_eq!(found, expected, "{threads} threads");
    }
    Ok(())
}

#[test]
fn bursts_count_once_and_the_report_says_so() {
    let single = fit(images(0, 0..30, 0));
    let burst = fit(images(0, 0..30, 3));
    let summary = burst.closed_form().unwrap().summary;
    assert_eq!((summary.images, summary.distinct), (120, 120));
    let groups = single.closed_form().unwrap().summary.groups;
    assert!(
        summary.groups.abs_diff(groups) <= 3,
        "{} {groups}",
        summary.groups
    );
    assert_eq!(burst.detector.calibration().unwrap().images, summary.groups);
    // The same image in many files is one.
    let mut twice = images(0, 0..30, 0);
    for number in 0..30 {
        twice.push(format!("again/{number}"), image(0, number, 0), vec![]);
    }
    let twice = fit(twice);
    assert_eq!(
        twice.closed_form().unwrap().summary.distinct,
        single.closed_form().unwrap().summary.distinct
    );
    let queries = || images(2, 0..6, 0);
    assert_eq!(
        scores(&twice.detector, queries()),
        scores(&single.detector, queries())
    );
}

#[test]
fn few_images_fit_without_a_threshold() -> Result<(), Error> {
    for count in [1, 2, 5] {
        let mut fitted = fit(images(0, 0..count, 0));
        assert!(fitted.detector.calibration().is_none());
        assert!(
            scores(&fitted.detector, images(3, 0..3, 0))
                .iter()
                .all(|s| s.is_finite())
        );
        let error = fitted
            .detector
            .calibrate_on_left_out(FalseAlarmRate::new(0.05)?);
        let error = error.unwrap_err().to_string();
        assert!(
            count == 1 || error.contains("19"),
            "names the number that is needed: {error}"
        );
    }
    let none = Defend::builder()
        .teacher(teacher(7))
        .fit(Memory::default(), &mut Silent);
    assert!(matches!(none.err(), Some(Error::NoImages { .. })));
    Ok(())
}

/// Images of eight kinds, some like the normal ones.
fn ordinary() -> Memory {
    let mut all = images(0, 60..100, 0);
    for kind in 1..8 {
        for number in 0..40 {
            all.push(format!("{kind}/{number}"), image(kind, number, 0), vec![]);
        }
    }
    all
}

/// More images than a batch, of which the first are looked at apart from the others.
#[test]
fn each_image_is_explained_by_itself() -> Result<(), Error> {
    // Noise, of which no two are near copies.
    let images = || {
        let mut all = Memory::default();
        for number in 0..45 {
            let mut rng = Rng::seed(number);
            let image = RgbImage::from_fn(32, 32, |_, _| [(); 3].map(|()| rng.random()).into());
            all.push(number.to_string(), image, vec![]);
        }
        all
    };
    let mut evidence = EvidenceConfig::default();
    for patches_count in [false, true] {
        evidence.patches.alike_from = if patches_count { -2.0 } else { 2.0 };
        let config = DefendConfig {
            student: Student::ClosedForm(evidence.clone()),
            ..DefendConfig::default()
        };
        let builder = Defend::builder().teacher(teacher(7)).config(config);
        let detector = builder.fit(images(), &mut Silent)?.detector;
        let found = scan(&detector, images(), &mut Silent)?.findings;
        for finding in found {
            let explanation = finding.novelty.explanation.expect("an explanation");
            assert_eq!(explanation.nearest[0].name, finding.name);
            if let Some(patches) = explanation.patches {
                // Its own patches are in the memory, which is larger than all of them.
                assert!(patches.z < 0.0, "{} {}", finding.name, patches.z);
            }
        }
    }
    Ok(())
}

#[test]
fn maps_contrast_with_the_background_as_scores_do() -> Result<(), Error> {
    let folder = tempfile::tempdir().unwrap();
    let builder = || Defend::builder().teacher(teacher(7));
    let made = builder().look_at_background(ordinary(), "stripes", &mut Silent)?;
    let with = |background: BackgroundSource| {
        let builder = builder().background(background);
        builder.fit(images(0, 0..40, 0), &mut Silent)
    };
    let maps = |detector: &Detector| -> Vec<f32> {
        let scan = scan_with_maps(detector, images(3, 0..3, 0), &mut Silent).unwrap();
        let maps = scan.findings.into_iter().filter_map(|f| f.novelty.map);
        maps.flat_map(|map| map.values).collect()
    };
    let fitted = with(made.clone().into())?;
    assert!(fitted.closed_form().unwrap().contrast_weight > 0.0);
    // Twice the width: the local CLS token of a place and its own token.
    let places = made.places()?.expect("places");
    assert_eq!(places.dim(), (320, 48));
    for row in places.rows() {
        assert!((row.dot(&row) - 1.0).abs() < 1e-5);
    }
    let seen = fitted.detector.evidence().unwrap().objects().unwrap();
    assert_eq!(seen.ordinary(), Some(&places));
    let alone = with(BackgroundSource::None)?;
    assert_ne!(maps(&fitted.detector), maps(&alone.detector));
    let model = folder.path().join("model.defend");
    fitted.detector.save(&model)?;
    let again = Detector::load(&model, &Device::Cpu)?;
    assert_eq!(maps(&again), maps(&fitted.detector));
    Ok(())
}

#[test]
fn a_background_is_made_saved_checked_and_used() -> Result<(), Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("photos.background");
    let look = |seed| {
        Defend::builder().teacher(teacher(seed)).look_at_background(
            ordinary(),
            "stripes",
            &mut Silent,
        )
    };
    let made = look(7)?;
    made.save(&path)?;
    let read = Background::load(&path)?;
    assert_eq!(
        (&read, read.photos(), read.source()),
        (&made, 320, "stripes")
    );

    let with = |background: BackgroundSource| {
        let builder = Defend::builder().teacher(teacher(7)).background(background);
        builder.fit(images(0, 0..40, 0), &mut Silent)
    };
    let fitted = with(read.into())?;
    let report = fitted.closed_form().unwrap();
    assert_eq!(
        (report.summary.background, report.background.as_deref()),
        (320, Some("stripes"))
    );
    assert!(report.contrast_weight > 0.0);
    let explained = scan(&fitted.detector, images(3, 0..2, 0), &mut Silent)?;
    let explanation = explained.findings[0].novelty.explanation.clone().unwrap();
    assert_eq!(explanation.contrast.unwrap().weight, report.contrast_weight);
    // Eight bits a value change little against the photos themselves, and the model is one file.
    let photos = with(BackgroundSource::Photos(
        Arc::new(ordinary()),
        "stripes".into(),
    ))?;
    let both = [&fitted, &photos].map(|f| scores(&f.detector, images(3, 0..6, 0)));
    for (a, b) in both[0].iter().zip(&both[1]) {
        assert!((a - b).abs() < 1e-9, "{a} {b}: both are rounded alike");
    }
    let model = folder.path().join("model.defend");
    fitted.detector.save(&model)?;
    let again = Detector::load(&model, &Device::Cpu)?;
    assert_eq!(scores(&again, images(3, 0..6, 0)), both[0]);

    // Another teacher's is refused by both names before any image is read.
    let error = with(look(8)?.into()).err().unwrap();
    assert!(matches!(error, Error::OtherTeacher { .. }), "{error}");
    let tuned = DefendConfig {
        dense: Some(defend_core::dense::DenseConfig::default()),
        ..DefendConfig::default()
    };
    let builder = Defend::builder()
        .teacher(teacher(7))
        .config(tuned)
        .background(made);
    let error = builder.fit(images(0, 0..4, 0), &mut Silent).err().unwrap();
    assert!(
        matches!(
            error,
            Error::Config {
                field: "background",
                ..
            }
        ),
        "{error}"
    );

    // A damaged file is named.
    let whole = std::fs::read(&path).unwrap();
    for cut in [0, 9, 200, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let error = Background::load(&path).unwrap_err().to_string();
        assert!(error.contains("photos.background"), "{error}");
    }
    std::fs::write(&path, std::fs::read(&model).unwrap()).unwrap();
    assert!(
        Background::load(&path)
            .unwrap_err()
            .to_string()
            .contains("no background")
    );
    Ok(())
}

#[test]
fn roles_of_the_other_student_are_refused() {
    let refused = |builder: defend_core::DefendBuilder, name: &str| {
        let error = builder.fit(images(0, 0..4, 0), &mut Silent).err().unwrap();
        assert!(
            matches!(&error, Error::Config { field, .. } if *field == name),
            "{error}"
        );
    };
    let builder = || Defend::builder().teacher(teacher(7));
    refused(builder().student(Arc::new(teacher(1))), "student");
    refused(
        builder().feature_folder("features", defend_core::vit::Precision::Full),
        "feature_folder",
    );
    let masked = builder().config(DefendConfig {
        dense: None,
        ..DefendConfig::masked()
    });
    let photos = BackgroundSource::Photos(Arc::new(Memory::default()), String::new());
    refused(masked.background(photos), "background");
    let mut evidence = EvidenceConfig::default();
    evidence.posterior.ridge = -1.0;
    let wrong = builder().config(DefendConfig {
        student: Student::ClosedForm(evidence),
        ..DefendConfig::default()
    });
    let error = wrong.fit(images(0, 0..4, 0), &mut Silent).err().unwrap();
    assert!(
        error.to_string().contains("evidence.posterior.ridge"),
        "{error}"
    );
}

#[test]
fn damaged_models_are_named() -> Result<(), Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.defend");
    fit(images(0, 0..20, 0)).detector.save(&path)?;
    let whole = std::fs::read(&path).unwrap();
    let load = || {
        Detector::load(&path, &Device::Cpu)
            .err()
            .expect("an error")
            .to_string()
    };
    for cut in [0, 7, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        assert!(load().contains("model.defend"));
    }
    let whole = defend_testing::unsealed(&whole);
    std::fs::write(&path, &whole).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&whole).unwrap();
    let tensors: HashMap<String, Tensor> = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let written = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        std::fs::write(
            &path,
            safetensors::serialize(&tensors, header.metadata().clone()).unwrap(),
        )
        .unwrap();
        load()
    };
    let gone = written(&|tensors| drop(tensors.remove("evidence.groups")));
    assert!(gone.contains("groups"), "{gone}");
    let other = written(&|tensors| {
        let rows = tensors["evidence.normal.0"]
            .narrow(0, 0, 3)
            .unwrap()
            .contiguous()
            .unwrap();
        tensors.insert("evidence.normal.0".into(), rows);
    });
    assert!(other.contains("model.defend"), "{other}");
    let nan = written(&|tensors| {
        let damaged = (&tensors["evidence.patches.0"] / 0.0).unwrap();
        tensors.insert("evidence.patches.0".into(), damaged);
    });
    assert!(nan.contains("patches.0"), "{nan}");
    Ok(())
}

#[test]
fn a_tuned_teacher_can_have_the_closed_form_too() -> Result<(), Error> {
    let config = DefendConfig {
        dense: Some(defend_core::dense::DenseConfig {
            epochs: 1,
            batch_size: 8,
            crop_size: 16,
            trained_blocks: 1,
            head_hidden: vec![16],
            head_output: 8,
            ..defend_core::dense::DenseConfig::default()
        }),
        ..DefendConfig::default()
    };
    let builder = Defend::builder().teacher(teacher(7)).config(config);
    let photos = BackgroundSource::Photos(Arc::new(images(5, 0..30, 0)), "photos".into());
    let fitted = builder
        .background(photos)
        .fit(images(0, 0..30, 0), &mut Silent)?;
    assert!(fitted.dense.is_some());
    assert_eq!(fitted.closed_form().unwrap().summary.background, 30);
    let untouched = scores(&fit(images(0, 0..30, 0)).detector, images(3, 0..3, 0));
    assert_ne!(scores(&fitted.detector, images(3, 0..3, 0)), untouched);
    Ok(())
}

/// The embedded backbone comes with ordinary photos.
#[test]
#[cfg(feature = "embedded")]
fn the_embedded_backbone_has_a_background() -> Result<(), Error> {
    let fitted = Defend::builder().fit(images(0, 0..12, 0), &mut Silent)?;
    let report = fitted.closed_form().unwrap();
    assert_eq!(report.summary.background, 1000);
    assert_eq!(report.background.as_deref(), Some("imagenet-sample"));
    // Another size has other tokens, and says that it goes without.
    let config = DefendConfig {
        image_size: Some(96),
        ..DefendConfig::default()
    };
    let small = Defend::builder()
        .config(config)
        .fit(images(0, 0..3, 0), &mut Silent)?;
    assert_eq!(small.closed_form().unwrap().background, None);
    Ok(())
}

#[test]
fn an_image_in_memory_has_the_score_of_its_file() -> Result<(), Error> {
    let detector = fit(images(0, 0..20, 0)).detector;
    let image = image(3, 7, 0);
    let mut bytes = std::io::Cursor::new(Vec::new());
    image
        .write_to(&mut bytes, image::ImageFormat::Png)
        .expect("a file");
    let bytes = bytes.into_inner();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.png"), &bytes).unwrap();
    let file = scan(&detector, ImageFolder::open(folder.path())?, &mut Silent)?;
    let expected = &file.findings[0].novelty;
    assert_eq!(&detector.score_image(&image)?, expected);
    assert_eq!(&detector.score_encoded(&bytes, "upload")?, expected);
    let error = detector.score_encoded(b"no image", "upload").unwrap_err();
    assert!(error.to_string().contains("upload"), "{error}");
    Ok(())
}
