//! `defend drift`

use anyhow::{Result, bail};
use defend_core::CalibrationSource;
use defend_core::metrics::{Drift, drift};
use serde::Serialize;

use crate::arguments;
use crate::exit::Exit;
use crate::images::find;
use crate::progress::Progress;
use crate::say::tell;

/// p-values at or below this are counted, beside their expected share.
const SMALL: f64 = 0.05;

pub(crate) fn run(arguments: &arguments::Drift) -> Result<Exit> {
    let detector = arguments.common.load(&arguments.model)?;
    let Some(calibration) = detector.calibration().filter(|c| !c.scores.is_empty()) else {
        bail!(
            "{} has no calibration to compare with: see defend calibrate",
            arguments.model.display()
        );
    };
    let found = find(&arguments.paths, arguments.common.strict, None)?;
    // As the calibration counted its images: near copies once.
    let (scan, scores) =
        detector.scan_without_copies(found.distinct().dataset(), &mut Progress::new())?;
    let unreadable = arguments.common.check_unreadable(&scan.skipped)?;
    let Drift { distance, p_value } = drift(&calibration.scores, &scores)?;
    let p_values = scores.iter().filter_map(|s| calibration.p_value(*s));
    let small = p_values.filter(|p| *p <= SMALL).count() as f64 / scores.len() as f64;
    let facts = Facts {
        images: scores.len(),
        calibrated_on: calibration.scores.len(),
        distance,
        p_value,
        small,
        drifted: p_value <= arguments.level,
        left_out: calibration.source == CalibrationSource::LeftOut,
    };
    if arguments.json {
        tell!("{}", serde_json::to_string(&facts)?)?;
    } else {
        tell!(
            "{} images beside {} of the calibration",
            facts.images,
            facts.calibrated_on
        )?;
        tell!(
            "{:.1} % have a p-value of {SMALL} or less ({:.1} % are expected)",
            100.0 * small,
            100.0 * SMALL
        )?;
        tell!("Kolmogorov-Smirnov distance {distance:.4}, p {p_value:.2e}")?;
        tell!(
            "{}",
            if facts.drifted {
                "drift: these images do not score as those of the calibration; look at them, and calibrate or fit again if they are normal"
            } else {
                "no drift that these images would show"
            }
        )?;
        if facts.left_out {
            tell!(
                "the calibration is on images of the fit, whose left-out scores new ones need not resemble: calibrate on held-out images"
            )?;
        }
    }
    Ok(Exit {
        novel: facts.drifted,
        unreadable: unreadable > 0,
    })
}

#[derive(Serialize)]
struct Facts {
    images: usize,
    calibrated_on: usize,
    /// Largest distance of the two distributions of scores.
    distance: f64,
    p_value: f64,
    /// Share of the images with a p-value of 0.05 or less.
    small: f64,
    drifted: bool,
    /// Whether the calibration is on images of the fit.
    left_out: bool,
}
