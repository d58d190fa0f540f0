//! `defend extend`

use anyhow::Result;
use defend_core::Learnt;

use crate::arguments::Extend;
use crate::exit::Exit;
use crate::images::{check_writable, find};
use crate::marked::Marked;
use crate::progress::Progress;
use crate::say::say;

pub(crate) fn run(arguments: &Extend) -> Result<Exit> {
    let out = arguments.out.as_ref().unwrap_or(&arguments.model);
    let inputs = [
        &arguments.normal[..],
        &arguments.abnormal,
        &arguments.marked,
    ]
    .concat();
    let out = check_writable(out, &inputs)?;
    let strict = arguments.common.strict;
    let (mut normal, mut abnormal) = (arguments.normal.clone(), arguments.abnormal.clone());
    let mut forgotten = arguments.forget.clone();
    let mut detector = arguments.common.load(&arguments.model)?;
    for table in &arguments.marked {
        let marked = Marked::read(table)?;
        // A normal image of the fit that is abnormal after all, as a suspect may be.
        let names = marked
            .abnormal
            .iter()
            .map(|path| path.display().to_string());
        forgotten.extend(names.filter(|name| detector.normal_names().any(|n| n == name)));
        normal.extend(marked.normal);
        abnormal.extend(marked.abnormal);
    }
    let (mut dropped, mut unreadable) = (false, 0);
    let mut tell_of = |what: &str, learnt: &Learnt| -> Result<()> {
        let images = learnt.images;
        let skipped = arguments.common.check_unreadable(&learnt.skipped)?;
        say!("{what} {images} images, {skipped} could not be read");
        dropped |= learnt.calibration_dropped;
        unreadable += skipped;
        Ok(())
    };
    if !forgotten.is_empty() {
        let learnt = detector.forget(&forgotten, arguments.forget_group)?;
        tell_of("forgot", &learnt)?;
    }
    if !normal.is_empty() {
        let normal = find(&normal, strict, None)?.distinct().dataset();
        tell_of(
            "learnt as normal",
            &detector.learn_normal(normal, &mut Progress::new())?,
        )?;
    }
    if !abnormal.is_empty() {
        let abnormal = find(&abnormal, strict, None)?.distinct().dataset();
        if detector
            .evidence()
            .is_some_and(|evidence| evidence.patch_weight() > 0.0)
        {
            say!(
                "patches count in this model: what is faulty about these images cannot be learnt without the normal ones, as defend fit --abnormal does"
            );
        }
        tell_of(
            "learnt as abnormal",
            &detector.learn_abnormal(abnormal, &mut Progress::new())?,
        )?;
    }
    detector.save(&out)?;
    if let Some(evidence) = detector.evidence() {
        say!(
            "the model knows {} different normal images in {} groups and {} abnormal ones",
            evidence.groups().of.len(),
            evidence.groups().len(),
            evidence.known_abnormal()
        );
    }
    match detector.calibration() {
        Some(calibration) => say!("new threshold {}", calibration.threshold),
        None if dropped => say!(
            "scores have changed, so the calibration on held-out images holds no longer and is gone: calibrate again with defend calibrate"
        ),
        None => {}
    }
    say!("wrote {}", out.display());
    Ok(Exit::after_skipping(unreadable))
}
