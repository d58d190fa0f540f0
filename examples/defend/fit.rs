//! `defend fit`

use std::time::Instant;

use anyhow::Result;
use defend_core::vit::Precision;
use defend_core::{Defend, Fitted, ProgressBar};

use crate::arguments::Fit;
use crate::pictures::{check_writable, find};

pub(crate) fn run(arguments: &Fit) -> Result<()> {
    let start = Instant::now();
    let config = arguments.settings()?;
    check_writable(&arguments.out)?;
    let normal = find(&arguments.normal, arguments.common.strict)?.dataset();
    let mut builder = Defend::builder()
        .backbone(arguments.pretrained())
        .config(config)
        .device(arguments.common.device())
        .strict(arguments.common.strict);
    if let Some(folder) = &arguments.features {
        builder = builder.feature_folder(folder, Precision::Full);
    }
    let fitted = builder.fit(normal, &mut ProgressBar::new())?;
    fitted.detector.save(&arguments.out)?;
    summarize(&fitted);
    eprintln!(
        "wrote {} after {:.0} s; next: defend calibrate --model {} --normal HELD-OUT",
        arguments.out.display(),
        start.elapsed().as_secs_f64(),
        arguments.out.display()
    );
    Ok(())
}

/// Says what was learnt from what.
pub(crate) fn summarize(fitted: &Fitted) {
    eprintln!(
        "fitted on {} pictures, {} could not be read",
        fitted.images,
        fitted.skipped.len()
    );
    let losses = |name: &str, losses: &[f64]| {
        if let (Some(first), Some(last)) = (losses.first(), losses.last()) {
            let epochs = losses.len();
            eprintln!("{name}: loss {first:.4} -> {last:.4} over {epochs} epochs");
        }
    };
    if let Some(dense) = &fitted.dense {
        losses("dense tuning", &dense.losses);
    }
    losses("masked distillation", &fitted.distill.losses);
}
