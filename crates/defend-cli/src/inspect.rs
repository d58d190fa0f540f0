//! `defend inspect`

use anyhow::Result;
use defend_core::{Calibration, CalibrationSource, DefendConfig, Detector, NoveltyDetector};
use serde::Serialize;

use crate::arguments::Inspect;
use crate::calibrate::promised;
use crate::exit::Exit;
use crate::say::tell;

pub(crate) fn run(arguments: &Inspect) -> Result<Exit> {
    let detector = arguments.common.load(&arguments.model)?;
    if arguments.json {
        let bytes = std::fs::metadata(&arguments.model)?.len();
        tell!("{}", serde_json::to_string(&Facts::of(&detector, bytes))?)?;
    } else {
        for (name, value) in lines(&detector)? {
            tell!("{name:<18}{value}")?;
        }
    }
    Ok(Exit::default())
}

/// What a model is, for other programs.
#[derive(Serialize)]
struct Facts<'a> {
    backbone: &'a str,
    bytes: u64,
    input: [u32; 2],
    normal_images: usize,
    groups: Option<usize>,
    known_abnormal: Option<usize>,
    contrast_weight: Option<f64>,
    patch_weight: Option<f64>,
    calibration: Option<&'a Calibration>,
    settings: &'a DefendConfig,
}

impl<'a> Facts<'a> {
    fn of(detector: &'a Detector, bytes: u64) -> Self {
        let evidence = detector.evidence();
        let (width, height) = detector.preprocess().input_size();
        Self {
            backbone: &detector.teacher().spec().name,
            bytes,
            input: [width, height],
            normal_images: detector.normal_names().len(),
            groups: evidence.map(|e| e.groups().len()),
            known_abnormal: evidence.map(defend_core::evidence::ClosedForm::known_abnormal),
            contrast_weight: evidence.map(defend_core::evidence::ClosedForm::contrast_weight),
            patch_weight: evidence.map(defend_core::evidence::ClosedForm::patch_weight),
            calibration: detector.calibration(),
            settings: detector.config(),
        }
    }
}

fn lines(detector: &Detector) -> Result<Vec<(&'static str, String)>> {
    let (width, height) = detector.preprocess().input_size();
    let spec = detector.teacher().spec();
    let mut lines = vec![
        ("backbone", spec.name.clone()),
        ("input", format!("{width} x {height} pixels")),
    ];
    if let Some(evidence) = detector.evidence() {
        lines.push(("student", "closed form".into()));
        let (images, groups) = (detector.normal_names().len(), evidence.groups().len());
        let normal = format!("{images} different images in {groups} groups of near copies");
        lines.push(("normal", normal));
        lines.push((
            "known abnormal",
            format!("{} images", evidence.known_abnormal()),
        ));
        lines.push((
            "ordinary photos",
            match evidence.summary().background {
                0 => "none to contrast with".into(),
                photos => format!("{photos}, weight {:.2}", evidence.contrast_weight()),
            },
        ));
        lines.push(("patches", format!("weight {:.2}", evidence.patch_weight())));
    } else {
        lines.push(("student", "masked".into()));
    }
    match detector.calibration() {
        None => lines.push(("threshold", "none: see defend calibrate".into())),
        Some(calibration) => {
            let source = match calibration.source {
                CalibrationSource::HeldOut => "held-out images",
                CalibrationSource::LeftOut => "images of the fit, each left out",
            };
            lines.push((
                "threshold",
                format!(
                    "{} from {} {source}",
                    calibration.threshold, calibration.images
                ),
            ));
            match calibration.source {
                CalibrationSource::HeldOut => {
                    lines.extend(promised(calibration)?.into_iter().map(|line| ("", line)));
                }
                CalibrationSource::LeftOut => lines.push((
                    "",
                    format!(
                        "about {:.1} % of normal images are called novel, without a guarantee",
                        100.0 * calibration.false_alarm_rate
                    ),
                )),
            }
        }
    }
    Ok(lines)
}
