//! Known abnormal images, suspects, and folders that are scored as a whole, on a small random backbone.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

mod small;

use defend_core::data::{Memory, RgbImage};
use defend_core::prelude::*;
use defend_core::{DefendBuilder, Error, Place, Recipe, sort};

/// Stripes of a period and colours that belong to the kind.
fn image(kind: u32, number: u32) -> RgbImage {
    let period = 3 + 2 * kind;
    RgbImage::from_fn(32, 32, |x, y| {
        let on = (x + number).is_multiple_of(period) ^ (y / (2 + number % 5)).is_multiple_of(2);
        let v = if on {
            200 + number * 7 % 40
        } else {
            20 + number * 13 % 60
        };
        let mut colour = [v as u8, (y * (1 + number % 9) % 256) as u8, 255 - v as u8];
        colour.rotate_left(kind as usize % 3);
        colour.into()
    })
}

fn images(kinds: &[(u32, std::ops::Range<u32>)]) -> Memory {
    let mut memory = Memory::default();
    for (kind, numbers) in kinds {
        for number in numbers.clone() {
            memory.push(format!("{kind}/{number}"), image(*kind, number), vec![]);
        }
    }
    memory
}

fn builder() -> DefendBuilder {
    Defend::builder().teacher(small::teacher(7))
}

/// As [`builder`], but patches do not count, as in photos of many things.
fn without_patches() -> DefendBuilder {
    let mut config = defend_core::DefendConfig::default();
    if let defend_core::Student::ClosedForm(evidence) = &mut config.student {
        evidence.patches.weight = 0.0;
    }
    builder().config(config)
}

fn fit(builder: DefendBuilder, normal: Memory) -> Detector {
    builder.fit(normal, &mut Silent).expect("a fit").detector
}

fn scores(detector: &Detector, set: Memory) -> Vec<f64> {
    scan(detector, set, &mut Silent).expect("a scan").scores()
}

#[test]
fn known_abnormal_images_are_learnt_at_once_or_later() -> Result<(), Error> {
    let (normal, queries) = (|| images(&[(0, 0..40)]), || images(&[(3, 5..15)]));
    let abnormal = || images(&[(3, 0..5)]);
    // Where patches count, a fit learns faults too, for which a later lesson lacks the normal images.
    let plain = fit(without_patches(), normal());
    let before = scores(&plain, queries());
    let at_once = fit(without_patches().abnormal(abnormal()), normal());
    let mut later = plain;
    let learnt = later.learn_abnormal(abnormal(), &mut Silent)?;
    assert_eq!((learnt.images, learnt.calibration_dropped), (5, false));
    let after = scores(&later, queries());
    assert_eq!(after, scores(&at_once, queries()));
    assert_eq!(later.calibration(), at_once.calibration());
    assert!(after.iter().zip(&before).all(|(a, b)| a >= b));
    let gain = after.iter().zip(&before).map(|(a, b)| a - b).sum::<f64>();
    assert!(gain > 1.0, "{gain}");
    let found = scan(&later, queries(), &mut Silent)?;
    let known = found.findings[0].novelty.explanation.clone().unwrap().known;
    assert!(known.unwrap().z > 0.0);

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.defend");
    later.save(&file)?;
    let loaded = Detector::load(&file, &Device::Cpu)?;
    assert_eq!(scores(&loaded, queries()), after);
    assert_eq!(loaded.calibration(), later.calibration());

    // A threshold from held-out images says nothing of other scores.
    let rate = FalseAlarmRate::new(0.2)?;
    later.calibrate(images(&[(0, 50..70)]), rate, &mut Silent)?;
    let learnt = later.learn_abnormal(images(&[(4, 0..2)]), &mut Silent)?;
    assert!(learnt.calibration_dropped && later.calibration().is_none());
    Ok(())
}

#[test]
fn an_abnormal_image_that_is_normal_is_named_and_nothing_changes() {
    let mut detector = fit(builder(), images(&[(0, 0..40)]));
    let before = scores(&detector, images(&[(3, 0..3)]));
    let mixed = images(&[(3, 0..3), (0, 7..8)]);
    let error = detector.learn_abnormal(mixed, &mut Silent).unwrap_err();
    assert!(
        matches!(&error, Error::AlsoNormal { name } if name == "0/7"),
        "{error}"
    );
    assert_eq!(scores(&detector, images(&[(3, 0..3)])), before);
    let error = detector.learn_abnormal(Memory::default(), &mut Silent);
    assert!(matches!(error, Err(Error::NoImages { .. })));

    let masked = builder().recipe(Recipe::Paper);
    let error = masked
        .abnormal(images(&[(3, 0..3)]))
        .fit(images(&[(0, 0..8)]), &mut Silent);
    assert!(matches!(
        error,
        Err(Error::Config {
            field: "abnormal",
            ..
        })
    ));
}

#[test]
fn an_odd_image_is_the_first_suspect_and_can_be_left_out() -> Result<(), Error> {
    let mixed = || images(&[(0, 0..30), (5, 3..4)]);
    let detector = fit(builder(), mixed());
    let suspects = detector.suspects(2)?;
    assert_eq!((suspects.len(), suspects[0].name.as_str()), (2, "5/3"));
    assert!(suspects[0].score > suspects[1].score && suspects[0].copies == 1);
    assert!(!suspects[0].nearest.is_empty());
    assert!(
        suspects[0]
            .nearest
            .iter()
            .all(|near| near.name.starts_with("0/"))
    );

    let fitted = builder().drop_suspects(1).fit(mixed(), &mut Silent)?;
    assert_eq!(fitted.closed_form().unwrap().dropped, ["5/3"]);
    let queries = || images(&[(0, 40..45), (5, 0..5)]);
    let clean = fit(builder(), images(&[(0, 0..30)]));
    assert_eq!(
        scores(&fitted.detector, queries()),
        scores(&clean, queries())
    );
    let names: Vec<String> = fitted
        .detector
        .suspects(100)?
        .into_iter()
        .map(|s| s.name)
        .collect();
    assert!(!names.contains(&"5/3".to_owned()) && names.len() > 20);
    let error = builder().drop_suspects(100).fit(mixed(), &mut Silent);
    assert!(matches!(
        error,
        Err(Error::Config {
            field: "drop_suspects",
            ..
        })
    ));
    Ok(())
}

#[test]
fn a_folder_is_sorted_as_a_whole() -> Result<(), Error> {
    let detector = fit(builder(), images(&[(0, 0..60)]));
    let folder = || {
        let mut folder = images(&[(0, 100..130)]);
        for number in 0..90 {
            let plain = |x, y| [8 * x as u8, 2 * number, 8 * y as u8].into();
            folder.push(number.to_string(), RgbImage::from_fn(32, 32, plain), vec![]);
        }
        folder
    };
    let sorted = sort(&detector, folder(), None, &mut Silent)?;
    assert_eq!(sorted.findings.len(), 120);
    let alone: Vec<f64> = sorted
        .findings
        .iter()
        .map(|f| f.alone.novelty.score)
        .collect();
    assert_eq!(alone, scores(&detector, folder()));
    assert!(sorted.weight > 0.0, "{:?}", sorted.abnormal);
    let auroc = |scores: Vec<f64>| {
        let (normal, abnormal) = scores.split_at(30);
        let wins = abnormal
            .iter()
            .flat_map(|a| normal.iter().map(move |n| usize::from(a > n)));
        wins.sum::<usize>() as f64 / 2700.0
    };
    let together = auroc(sorted.findings.iter().map(|f| f.score).collect());
    assert!(together >= auroc(alone), "{together}");
    let placed = |place| {
        sorted
            .findings
            .iter()
            .filter(|f| f.place == Some(place))
            .count()
    };
    assert_eq!(
        placed(Place::Normal) + placed(Place::Novel) + placed(Place::Unsure),
        120
    );
    assert!(placed(Place::Novel) > 30);
    assert!(
        sorted
            .findings
            .iter()
            .all(|f| f.p_value > 0.0 && f.p_value <= 1.0)
    );

    // A few images are scored as they are alone.
    let few = sort(&detector, images(&[(0, 100..104)]), None, &mut Silent)?;
    assert_eq!(few.weight, 0.0);
    assert!(
        few.findings
            .iter()
            .all(|f| f.score == f.alone.novelty.score && f.place != Some(Place::Unsure))
    );
    let wrong = sort(&detector, folder(), Some(1.5), &mut Silent);
    assert!(matches!(wrong, Err(Error::Evidence(_))));
    let nothing = sort(&detector, Memory::default(), None, &mut Silent);
    assert!(matches!(nothing, Err(Error::NoImages { .. })));
    Ok(())
}

#[test]
fn learning_on_and_forgetting_is_a_fit_from_scratch() -> Result<(), Error> {
    let queries = || images(&[(0, 50..55), (3, 0..5)]);
    let mut detector = fit(without_patches(), images(&[(0, 0..30)]));
    let whole = fit(without_patches(), images(&[(0, 0..40)]));
    let before = scores(&detector, queries());
    let learnt = detector.learn_normal(images(&[(0, 30..40)]), &mut Silent)?;
    assert_eq!((learnt.images, learnt.calibration_dropped), (10, false));
    assert_eq!(scores(&detector, queries()), scores(&whole, queries()));
    assert_eq!(detector.calibration(), whole.calibration());
    let nearest = |detector: &Detector| {
        let found = scan(detector, queries(), &mut Silent).unwrap().findings;
        found[0].novelty.explanation.clone().unwrap().nearest
    };
    assert_eq!(nearest(&detector), nearest(&whole));

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.defend");
    detector.save(&file)?;
    let mut loaded = Detector::load(&file, &Device::Cpu)?;
    let names: Vec<String> = (30..40).map(|number| format!("0/{number}")).collect();
    assert_eq!(loaded.forget(&names, false)?.images, 10);
    assert_eq!(scores(&loaded, queries()), before);

    let error = loaded
        .forget(&["0/0".into(), "cat".into()], false)
        .unwrap_err();
    assert!(
        matches!(&error, Error::UnknownImages { count: 1, first } if first == "cat"),
        "{error}"
    );
    assert_eq!(scores(&loaded, queries()), before, "nothing changed");
    loaded.learn_abnormal(images(&[(3, 7..9)]), &mut Silent)?;
    let error = loaded
        .learn_normal(images(&[(3, 8..9)]), &mut Silent)
        .unwrap_err();
    assert!(
        matches!(&error, Error::AlsoAbnormal { name } if name == "3/8"),
        "{error}"
    );
    // Ten images are too few for a threshold at 5 %.
    let names: Vec<String> = (10..30).map(|number| format!("0/{number}")).collect();
    assert!(loaded.forget(&names, true)?.calibration_dropped);
    assert!(loaded.calibration().is_none());
    Ok(())
}

#[test]
fn images_that_come_one_by_one_are_learnt_together() -> Result<(), Error> {
    let queries = || images(&[(0, 50..55), (3, 0..5)]);
    let mut detector = fit(without_patches(), images(&[(0, 0..30)]));
    let whole = fit(without_patches(), images(&[(0, 0..40)]));
    let mut additions = detector.additions()?;
    assert!(additions.is_empty());
    for number in 30..40 {
        additions.add(format!("0/{number}"), &image(0, number))?;
    }
    let empty = additions.add("empty", &RgbImage::new(0, 3)).unwrap_err();
    assert!(matches!(empty, Error::Data(_)), "{empty}");
    assert_eq!(additions.len(), 10);
    assert_eq!(detector.learn_additions(&additions)?.images, 10);
    let pairs = scores(&detector, queries());
    for (found, expected) in pairs.iter().zip(scores(&whole, queries())) {
        assert!((found - expected).abs() < 1e-4, "{found} beside {expected}");
    }
    assert!(detector.normal_names().eq(whole.normal_names()));

    let patches_count = fit(builder(), images(&[(0, 0..30)]));
    assert!(patches_count.evidence().unwrap().patch_weight() > 0.0);
    assert!(matches!(patches_count.additions(), Err(Error::Evidence(_))));

    let before = scores(&detector, queries());
    let nothing = detector.additions()?;
    assert!(matches!(
        detector.learn_additions(&nothing),
        Err(Error::NoImages { .. })
    ));
    let error = detector.learn_additions(&whole.additions()?).unwrap_err();
    assert!(error.to_string().contains("another detector"), "{error}");
    assert_eq!(scores(&detector, queries()), before, "nothing changed");
    Ok(())
}

#[test]
fn one_pass_scores_against_many_models() -> Result<(), Error> {
    let models = || {
        let plain = fit(builder(), images(&[(0, 0..40)]));
        let other = fit(without_patches(), images(&[(3, 0..40)]));
        vec![("a".to_owned(), plain), ("b".to_owned(), other)]
    };
    let queries = || images(&[(0, 50..55), (3, 50..57)]);
    let profiles = defend_core::ProfileSet::new(models())?;
    assert_eq!(profiles.names(), ["a", "b"]);
    let shown = std::sync::Arc::new(queries()) as std::sync::Arc<dyn Dataset>;
    let mut found: Vec<(String, Vec<defend_core::Novelty>)> = Vec::new();
    profiles.scan_each(&shown, &mut Silent, &mut |outcome| {
        found.extend(outcome.ok());
        Ok::<(), Error>(())
    })?;
    assert_eq!(found.len(), 12);
    for (place, (_, alone)) in models().iter().enumerate() {
        let alone = scan(alone, queries(), &mut Silent)?;
        for (finding, (name, novelties)) in alone.findings.iter().zip(&found) {
            assert_eq!((&finding.name, &finding.novelty), (name, &novelties[place]));
        }
    }

    let other = Defend::builder().teacher(small::teacher(8));
    let mut mixed = models();
    mixed.push(("c".into(), fit(other, images(&[(0, 0..20)]))));
    let error = defend_core::ProfileSet::new(mixed).err().unwrap();
    assert!(
        matches!(&error, Error::OtherProfile { model, .. } if model == "c"),
        "{error}"
    );
    assert!(matches!(
        defend_core::ProfileSet::new(Vec::new()),
        Err(Error::Config { .. })
    ));
    Ok(())
}
