//! ROC curves and histograms of scores as SVG.

use std::path::Path;

use defend_core::metrics::RocCurve;
use ndarray::{Array1, ArrayView1};
use plotters::prelude::*;

use crate::{Error, Record};

const SIZE: (u32, u32) = (640, 480);
const BINS: usize = 40;
const NORMAL: RGBColor = RGBColor(40, 110, 180);
const ABNORMAL: RGBColor = RGBColor(200, 70, 40);

/// The curves of all methods in one experiment.
pub(crate) fn roc_curves(path: &Path, title: &str, records: &[&Record]) -> Result<(), Error> {
    let curves = records
        .iter()
        .map(|record| {
            let scores: Array1<f64> = record.scores.iter().map(|s| s.score).collect();
            let abnormal: Array1<bool> = record.scores.iter().map(|s| s.abnormal).collect();
            let curve = RocCurve::new(ArrayView1::from(&scores), ArrayView1::from(&abnormal))?;
            let points: Vec<(f64, f64)> = curve.points().iter().map(|p| (p.fpr, p.tpr)).collect();
            let name = format!("{} ({:.3})", record.key.method, record.figures.auroc);
            Ok((name, points))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    draw(path, |root| {
        let mut chart = ChartBuilder::on(root)
            .caption(title, ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
        chart
            .configure_mesh()
            .x_desc("false positive rate")
            .y_desc("true positive rate")
            .draw()?;
        for (i, (name, points)) in curves.into_iter().enumerate() {
            let colour = Palette99::pick(i).to_rgba();
            chart
                .draw_series(LineSeries::new(points, colour))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.8))
            .draw()?;
        Ok(())
    })
}

/// Scores of normal and abnormal images, each as the share of its own number.
pub(crate) fn histogram(path: &Path, record: &Record) -> Result<(), Error> {
    let scores = record.scores.iter().map(|s| s.score);
    let low = scores.clone().fold(f64::INFINITY, f64::min);
    let high = scores.fold(f64::NEG_INFINITY, f64::max).max(low + 1e-9);
    let width = (high - low) / BINS as f64;
    let shares = |abnormal: bool| {
        let mut counts = [0.0; BINS];
        let mut total = 0.0;
        for scored in record.scores.iter().filter(|s| s.abnormal == abnormal) {
            let bin = ((scored.score - low) / width) as usize;
            if let Some(count) = counts.get_mut(bin.min(BINS - 1)) {
                *count += 1.0;
            }
            total += 1.0;
        }
        counts.map(|count| count / f64::max(total, 1.0))
    };
    let both = [
        ("normal", NORMAL, shares(false)),
        ("abnormal", ABNORMAL, shares(true)),
    ];
    let top = both
        .iter()
        .flat_map(|(_, _, shares)| shares)
        .fold(0.0, |a: f64, b| a.max(*b));
    draw(path, |root| {
        let title = format!("{}: {}", record.key.experiment, record.key.method);
        let mut chart = ChartBuilder::on(root)
            .caption(title, ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(low..high, 0.0..top * 1.05)?;
        chart
            .configure_mesh()
            .x_desc("novelty score")
            .y_desc("share of images")
            .draw()?;
        for (name, colour, shares) in &both {
            let bars = shares.iter().enumerate().map(|(i, share)| {
                let left = low + i as f64 * width;
                Rectangle::new(
                    [(left, 0.0), (left + width, *share)],
                    colour.mix(0.45).filled(),
                )
            });
            let colour = *colour;
            chart
                .draw_series(bars)?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .draw()?;
        Ok(())
    })
}

type Root<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw(
    path: &Path,
    content: impl FnOnce(&Root<'_>) -> Result<(), Box<dyn std::error::Error>>,
) -> Result<(), Error> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    let drawn = root
        .fill(&WHITE)
        .map_err(Into::into)
        .and_then(|()| content(&root))
        .and_then(|()| root.present().map_err(Into::into));
    drawn.map_err(|e| Error::Plot {
        path: path.into(),
        reason: e.to_string(),
    })
}
