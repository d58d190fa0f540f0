//! Features as a table: taken, saved, and fitted on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod small;

use defend_core::data::{Memory, RgbImage};
use defend_core::evidence::EvidenceConfig;
use defend_core::prelude::*;
use defend_core::{Error, FeatureTable, MaskedConfig, Student, scan_with_maps};
use small::teacher;

/// Blots whose place and colours are the image's own.
fn images(kind: u32, numbers: std::ops::Range<u32>) -> Memory {
    let mut memory = Memory::default();
    for number in numbers {
        let image = RgbImage::from_fn(32, 32, |x, y| {
            let near = (x * (1 + kind) + number * 7) % 32 < 12 && (y + number * 5) % 32 < 12;
            let base = (number * 37 % 200) as u8;
            if near {
                [250, base, 20]
            } else {
                [base, 40, 90]
            }
            .into()
        });
        memory.push(format!("{kind}/{number}"), image, vec![]);
    }
    memory
}

fn table(seed: u64) -> Result<FeatureTable, Error> {
    let images = images(0, 0..40);
    let (table, skipped) = Defend::builder()
        .teacher(teacher(seed))
        .embed(images, &mut Silent)?;
    assert!(skipped.is_empty());
    Ok(table)
}

fn scores(detector: &Detector) -> Vec<f64> {
    let found = scan(detector, images(3, 0..6), &mut Silent).unwrap();
    found.scores()
}

/// Settings under which patches do not count.
fn without_patches() -> DefendConfig {
    let mut evidence = EvidenceConfig::default();
    evidence.patches.weight = 0.0;
    DefendConfig {
        student: Student::ClosedForm(evidence),
        ..DefendConfig::default()
    }
}

#[test]
fn a_fit_on_a_saved_table_is_the_fit_on_the_images() -> Result<(), Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("normal.safetensors");
    let made = table(7)?;
    made.save(&path)?;
    let table = FeatureTable::load(&path)?;
    assert_eq!(table, made);
    assert_eq!(
        (table.len(), table.embeddings().widths()),
        (40, vec![24; 3])
    );
    assert_eq!((table.hashes()[0].len(), table.hashes().len()), (64, 40));

    let builder = || {
        Defend::builder()
            .teacher(teacher(7))
            .config(without_patches())
    };
    let of_table = builder().fit_features(&table, &mut Silent)?;
    let of_images = builder().fit(images(0, 0..40), &mut Silent)?;
    assert_eq!(of_table.images, 40);
    assert_eq!(scores(&of_table.detector), scores(&of_images.detector));
    assert_eq!(
        of_table.detector.calibration(),
        of_images.detector.calibration()
    );
    // Names are those of the images; the model is saved and loaded like any, without maps.
    let model = folder.path().join("model.defend");
    of_table.detector.save(&model)?;
    let again = Detector::load(&model, &Device::Cpu)?;
    assert_eq!(scores(&again), scores(&of_table.detector));
    let found = scan_with_maps(&again, images(3, 0..2), &mut Silent)?;
    let novelty = &found.findings[0].novelty;
    assert!(novelty.map.is_none());
    let nearest = &novelty.explanation.as_ref().unwrap().nearest[0].name;
    assert!(table.names().contains(nearest));
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_by_name() -> Result<(), Error> {
    let folder = tempfile::tempdir().unwrap();
    let made = table(7)?;
    let other = Defend::builder()
        .teacher(teacher(8))
        .config(without_patches())
        .fit_features(&made, &mut Silent);
    assert!(matches!(other.err().unwrap(), Error::OtherFeatures { .. }));
    let masked = Defend::builder()
        .teacher(teacher(7))
        .config(DefendConfig {
            student: Student::Masked(MaskedConfig::default()),
            ..DefendConfig::default()
        })
        .fit_features(&made, &mut Silent);
    assert!(matches!(
        masked.err().unwrap(),
        Error::Config {
            field: "student",
            ..
        }
    ));
    let mut evidence = EvidenceConfig::default();
    evidence.patches.alike_from = -2.0;
    let alike = Defend::builder()
        .teacher(teacher(7))
        .config(DefendConfig {
            student: Student::ClosedForm(evidence),
            ..DefendConfig::default()
        })
        .fit_features(&made, &mut Silent);
    assert!(matches!(
        alike.err().unwrap(),
        Error::Config {
            field: "features",
            ..
        }
    ));
    let path = folder.path().join("damaged.safetensors");
    made.save(&path)?;
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(matches!(
        FeatureTable::load(&path).err().unwrap(),
        Error::Features { .. }
    ));
    assert!(matches!(
        FeatureTable::load(folder.path().join("none"))
            .err()
            .unwrap(),
        Error::Io { .. }
    ));
    Ok(())
}
