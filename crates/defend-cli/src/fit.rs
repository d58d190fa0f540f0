//! `defend fit`

use std::time::{Duration, Instant};

use anyhow::Result;
use defend_core::evidence::ClosedForm;
use defend_core::vit::Precision;
use defend_core::{ClosedFormReport, Defend, FitCheckpoints, Fitted, Student, StudentReport};

use crate::arguments::Fit;
use crate::background;
use crate::embed;
use crate::exit::{Exit, usage};
use crate::images::{check_writable, find};
use crate::progress::Progress;
use crate::say::say;

pub(crate) fn run(arguments: &Fit) -> Result<Exit> {
    let start = Instant::now();
    let config = arguments.settings()?;
    let closed_form = matches!(config.student, Student::ClosedForm(_));
    if arguments.thumbnails && (!closed_form || arguments.features.is_some()) {
        return Err(usage(
            "--thumbnails is for the default student and a fit on images: others know no nearest normal image".into(),
        ));
    }
    let normal = find(&arguments.normal, arguments.common.strict, None)?.distinct();
    let abnormal = match arguments.abnormal.as_slice() {
        [] => None,
        folders => Some(find(folders, arguments.common.strict, None)?.distinct()),
    };
    let mut inputs = normal.paths.clone();
    inputs.extend(abnormal.iter().flat_map(|found| found.paths.clone()));
    inputs.extend(arguments.background.clone());
    inputs.extend(arguments.config.clone());
    inputs.extend(arguments.features.clone());
    let out = check_writable(&arguments.out, &inputs)?;
    let mut builder = Defend::builder()
        .config(config)
        .device(arguments.common.device()?)
        .strict(arguments.common.strict);
    if let Some(weights) = arguments.backbone.weights()? {
        builder = builder.teacher(weights);
    }
    if let Some(path) = &arguments.background {
        builder = builder.background(background::source(path, arguments.common.strict)?);
    }
    if let Some(abnormal) = abnormal {
        builder = builder.abnormal(match &arguments.abnormal_masks {
            Some(masks) => abnormal.with_masks(masks)?,
            None => abnormal.dataset(),
        });
    }
    builder = builder
        .drop_suspects(arguments.drop_suspects)
        .thumbnails(arguments.thumbnails);
    if let Some(folder) = &arguments.feature_folder {
        builder = builder.feature_folder(folder, Precision::Full);
    }
    if let Some(folder) = &arguments.checkpoints {
        builder = builder.checkpoints(
            FitCheckpoints::new(folder)
                .every(Duration::from_secs(arguments.checkpoint_every))
                .resuming(arguments.resume),
        );
    }
    let fitted = if let Some(table) = &arguments.features {
        builder.fit_features(&embed::read(table)?, &mut Progress::new())?
    } else {
        if normal.paths.len() < FEW_IMAGES {
            say!(
                "{} images are very few to learn what is normal from: expect little, and take at least {FEW_IMAGES}",
                normal.paths.len()
            );
        }
        builder.fit(normal.dataset(), &mut Progress::new())?
    };
    arguments.common.check_unreadable(&fitted.skipped)?;
    fitted.detector.save(&out)?;
    summarize(&fitted);
    if fitted
        .closed_form()
        .is_some_and(|report| report.patch_weight == 0.0)
    {
        for (flag, given) in [
            ("--tiles", fitted.detector.config().tiles.is_some()),
            ("--abnormal-masks", arguments.abnormal_masks.is_some()),
        ] {
            if given {
                say!(
                    "{flag} has no influence on scores here: normal images are too various for patches to count"
                );
            }
        }
    }
    let out = arguments.out.display();
    let next = if fitted.detector.calibration().is_some() {
        format!("defend score --model {out} IMAGES")
    } else {
        format!("defend calibrate --model {out} --normal HELD-OUT")
    };
    let seconds = start.elapsed().as_secs_f64();
    say!("wrote {out} after {seconds:.1} s; next: {next}");
    Ok(Exit::after_skipping(fitted.skipped.len()))
}

/// Says what was learnt from what.
pub(crate) fn summarize(fitted: &Fitted) {
    say!(
        "fitted on {} images, {} could not be read",
        fitted.images,
        fitted.skipped.len()
    );
    let losses = |name: &str, losses: &[f64]| {
        if let (Some(first), Some(last)) = (losses.first(), losses.last()) {
            let epochs = losses.len();
            say!("{name}: loss {first:.4} -> {last:.4} over {epochs} epochs");
        }
    };
    if let Some(dense) = &fitted.dense {
        losses("dense tuning", &dense.losses);
    }
    match &fitted.student {
        StudentReport::Masked(report) => losses("masked distillation", &report.losses),
        StudentReport::ClosedForm(report) => describe(report),
    }
    if let Some(known) = fitted.detector.evidence().map(ClosedForm::known_abnormal)
        && known > 0
    {
        let memory = fitted.detector.evidence().and_then(ClosedForm::memory);
        let faults = memory.is_some_and(|memory| !memory.faults().is_empty());
        let what = if faults { ", and their faults" } else { "" };
        say!("{known} known abnormal images{what}");
    }
    match fitted.detector.calibration() {
        None => say!("no threshold yet: see defend calibrate"),
        Some(calibration) => say!(
            "threshold {} from {} left-out values: about {:.1} % of normal images are called novel (defend calibrate gives a \
             guarantee)",
            calibration.threshold,
            calibration.images,
            100.0 * calibration.false_alarm_rate
        ),
    }
}

/// Fewer images than this are told of.
const FEW_IMAGES: usize = 10;

/// Fewer groups than this leave little to learn from.
const FEW_GROUPS: usize = 20;

fn describe(report: &ClosedFormReport) {
    let found = &report.summary;
    let (images, groups) = (thousands(found.images), thousands(found.groups));
    say!("closed form: {images} images, {groups} groups of near copies");
    for name in &report.dropped {
        say!("left out as a suspect: {name}");
    }
    if found.groups == 1 && found.images > 1 {
        say!("all normal images are near copies of one: the model knows a single image");
    } else if found.groups < FEW_GROUPS {
        say!(
            "with fewer than {FEW_GROUPS} groups there is little to learn from: more different normal images help most"
        );
    }
    match &report.background {
        None => say!(
            "without ordinary photos to contrast with; --background FOLDER with about a thousand photos of anything adds them"
        ),
        Some(source) => say!(
            "contrast with {} photos ({source}): weight {:.2}, since {:.1} % of them look normal",
            thousands(found.background),
            report.contrast_weight,
            100.0 * found.accepted
        ),
    }
    say!(
        "patches: weight {:.2}, since normal images are alike by {:.3}",
        report.patch_weight,
        found.alike
    );
}

/// `1600` as `1,600`.
fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut written = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            written.push(',');
        }
        written.push(digit);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        let written = [0, 999, 1600, 1_234_567].map(thousands);
        assert_eq!(written, ["0", "999", "1,600", "1,234,567"]);
    }
}
