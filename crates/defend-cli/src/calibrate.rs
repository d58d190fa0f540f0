//! `defend calibrate`

use anyhow::{Result, bail};
use defend_core::ProgressBar;
use defend_core::metrics::FalseAlarmRate;

use crate::arguments::Calibrate;
use crate::images::{check_writable, find};

pub(crate) fn run(arguments: &Calibrate) -> Result<()> {
    let rate = FalseAlarmRate::new(arguments.false_alarm_rate)?;
    let out = arguments.out.as_ref().unwrap_or(&arguments.model);
    check_writable(out)?;
    let mut detector = arguments.common.load(&arguments.model)?;
    let held_out = find(&arguments.normal, arguments.common.strict)?.dataset();
    let scan = detector.calibrate(held_out, rate, &mut ProgressBar::new())?;
    if let (true, Some(first)) = (arguments.common.strict, scan.skipped.first()) {
        bail!("{first} (--strict)");
    }
    detector.save(out)?;
    if let Some(calibration) = detector.calibration() {
        eprintln!(
            "threshold {:.6} from {} normal images ({} could not be read): at most {:.1} % of normal \
             images are called novel; wrote {}",
            calibration.threshold,
            calibration.images,
            scan.skipped.len(),
            100.0 * calibration.false_alarm_rate,
            out.display()
        );
    }
    Ok(())
}
