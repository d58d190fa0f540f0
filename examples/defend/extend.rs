//! `defend extend`

use anyhow::Result;
use defend_core::ProgressBar;

use crate::arguments::Extend;
use crate::pictures::{check_writable, find};

pub(crate) fn run(arguments: &Extend) -> Result<()> {
    let out = arguments.out.as_ref().unwrap_or(&arguments.model);
    check_writable(out)?;
    let mut detector = arguments.common.load(&arguments.model)?;
    let abnormal = find(&arguments.abnormal, arguments.common.strict)?.dataset();
    let learnt = detector.learn_abnormal(abnormal, &mut ProgressBar::new())?;
    for skipped in &learnt.skipped {
        eprintln!("{skipped}");
    }
    detector.save(out)?;
    let known = detector.evidence().map_or(0, |e| e.known_abnormal());
    eprintln!(
        "learnt {} abnormal pictures, {} could not be read; {known} different ones are known",
        learnt.images,
        learnt.skipped.len()
    );
    match detector.calibration() {
        Some(calibration) => eprintln!("new threshold {}", calibration.threshold),
        None if learnt.calibration_dropped => eprintln!(
            "scores have changed, so the threshold from held-out pictures is gone: calibrate again with defend calibrate"
        ),
        None => {}
    }
    eprintln!("wrote {}", out.display());
    Ok(())
}
