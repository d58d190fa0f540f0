//! Embeddings that are no images: which days of a machine's readings are unlike the others?

use defend_evidence::{ClosedForm, Embeddings, EvidenceConfig};
use ndarray::Array2;

/// A day as 24 readings: a wave with a phase of its own; at a fault the machine stops at noon.
fn day(number: usize, fault: bool) -> Vec<f32> {
    let phase = (number % 11) as f32 / 11.0;
    let reading = |hour: usize| {
        if fault && hour >= 12 {
            0.1
        } else {
            1.5 + (hour as f32 / 4.0 + phase).sin()
        }
    };
    (0..24).map(reading).collect()
}

fn embeddings(
    days: impl Iterator<Item = Vec<f32>>,
) -> Result<Embeddings, Box<dyn std::error::Error>> {
    let rows: Vec<Vec<f32>> = days.collect();
    let count = rows.len();
    Ok(Embeddings::new(vec![Array2::from_shape_vec(
        (count, 24),
        rows.concat(),
    )?])?)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let normal = embeddings((0..60).map(|number| day(number, false)))?;
    let evidence = ClosedForm::fit(&normal, None, &EvidenceConfig::default())?;
    let new = embeddings((60..66).map(|number| day(number, number == 63)))?;
    for (number, judgement) in (60..).zip(evidence.evaluate(&new, None)?) {
        let nearest = judgement.explained_by.first().map(|(day, _)| *day);
        println!(
            "day {number}: {:.2}, nearest normal day {nearest:?}",
            judgement.score
        );
    }
    Ok(())
}
