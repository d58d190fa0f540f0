//! `defend calibrate`

use anyhow::Result;
use defend_core::Calibration;
use defend_core::metrics::{FalseAlarmRate, Promise};

use crate::arguments::Calibrate;
use crate::exit::Exit;
use crate::images::{check_writable, find};
use crate::progress::Progress;
use crate::say::say;

/// Share of calibrations that the range of the false alarm rate is told for.
const RANGE: f64 = 0.95;

pub(crate) fn run(arguments: &Calibrate) -> Result<Exit> {
    let rate = FalseAlarmRate::new(arguments.false_alarm_rate)?;
    let promise = match arguments.confidence {
        None => Promise::OnAverage(rate),
        Some(confidence) => Promise::WithConfidence { rate, confidence },
    };
    let out = arguments.out.as_ref().unwrap_or(&arguments.model);
    let held_out = find(&arguments.normal, arguments.common.strict, None)?.distinct();
    let out = check_writable(out, &held_out.paths)?;
    let mut detector = arguments.common.load(&arguments.model)?;
    let scan = detector.calibrate(held_out.dataset(), promise, &mut Progress::new())?;
    arguments.common.check_unreadable(&scan.skipped)?;
    detector.save(&out)?;
    if let Some(calibration) = detector.calibration() {
        let copies = scan.findings.len() - calibration.images;
        if copies > 0 {
            say!("{copies} near copies of other images do not count");
        }
        say!(
            "threshold {} from {} normal images ({} could not be read)",
            calibration.threshold,
            calibration.images,
            scan.skipped.len()
        );
        for line in promised(calibration)? {
            say!("{line}");
        }
        say!("wrote {}", out.display());
    }
    Ok(Exit::after_skipping(scan.skipped.len()))
}

/// What a threshold promises, in words.
pub(crate) fn promised(calibration: &Calibration) -> Result<Vec<String>> {
    let percent = 100.0 * calibration.false_alarm_rate;
    let promise = match calibration.confidence {
        None => format!(
            "at most {percent:.1} % of normal images are called novel, on average over calibrations"
        ),
        Some(confidence) => format!(
            "at most {percent:.1} % of normal images are called novel, with {:.1} % confidence",
            100.0 * confidence
        ),
    };
    if calibration.scores.is_empty() {
        return Ok(vec![promise]);
    }
    let [low, high] = calibration.false_alarm_range(RANGE)?;
    let range = format!(
        "with {} images the share lies between {:.1} and {:.1} % in {:.0} % of calibrations",
        calibration.images,
        100.0 * low,
        100.0 * high,
        100.0 * RANGE
    );
    Ok(vec![promise, range])
}
