//! Optimal transport alone: features are assigned to prototypes such that all are used equally.

use candle_core::{Device, Tensor};
use defend_ot::{Assigner, SinkhornKnopp};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Six features that all prefer the first of three prototypes, by different margins.
    let scores: Vec<f32> = (0..6)
        .flat_map(|i| [0.9, 0.9 - 0.1 * i as f32, 0.5])
        .collect();
    let scores = Tensor::from_vec(scores, (6, 3), &Device::Cpu)?;
    let assigned = SinkhornKnopp::default().assign(&scores)?;
    for row in assigned.to_vec2::<f32>()? {
        println!("{row:.2?}");
    }
    let used = assigned.sum(0)?.to_vec1::<f32>()?;
    println!("each prototype is used by {used:.2?} of 6 features");
    Ok(())
}
