//! ViT features alone: `cargo run --example features -- WEIGHTS`, a folder with `config.json` and `model.safetensors` of timm. Without
//! WEIGHTS the backbone is random, which shows the shapes.

use candle_core::{DType, Device, Tensor};
use defend_nn::Rng;
use defend_vit::{Architecture, Backbone, BackboneSpec, Encoder, Pretrained, TrainScope, Vit};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::Cpu;
    let vit = match std::env::args().nth(1) {
        Some(weights) => Pretrained::local(weights).load(TrainScope::Frozen, &device)?,
        None => Vit::random(
            BackboneSpec::new(Architecture::vit_tiny()),
            0.0,
            &mut Rng::seed(0),
            &device,
        )?,
    };
    let side = vit.spec().architecture.image_size;
    let images = Tensor::zeros((2, 3, side, side), DType::F32, &device)?;
    let features = vit.features(&images)?;
    println!("CLS token {:?}", features.cls.dims());
    let depth = vit.spec().architecture.depth;
    for (block, layer) in [depth / 2, depth - 1]
        .into_iter()
        .zip(vit.intermediates(&images, &[depth / 2, depth - 1])?)
    {
        println!(
            "block {block}: CLS {:?}, patches {:?}",
            layer.cls.dims(),
            layer.patches.dims()
        );
    }
    Ok(())
}
