//! A custom backbone: colours of patches in place of a network's tokens.
//! `cargo run --example custom_backbone -- NORMAL IMAGES`.
//!
//! The closed form asks a teacher for no more than an [`Encoder`] gives: an image embedding and patch tokens of some blocks.

use std::sync::Arc;

use defend_core::prelude::*;
use defend_core::vit::{Architecture, BackboneSpec, Encoder, Error, Layer};
use defend_core::{TeacherSource, Tensor};

/// Side of an image and of a patch, pixels.
const IMAGE: usize = 64;
const PATCH: usize = 8;

/// One "block" whose patch tokens are the mean and the spread of each colour.
struct Colours {
    spec: BackboneSpec,
}

impl Colours {
    fn new() -> Self {
        let architecture = Architecture {
            image_size: IMAGE,
            patch_size: PATCH,
            width: 6,
            depth: 1,
            heads: 1,
            mlp_width: 1,
            ..Architecture::vit_tiny()
        };
        let mut spec = BackboneSpec::new(architecture);
        spec.name = "colours".into();
        Self { spec }
    }
}

impl Encoder for Colours {
    fn spec(&self) -> &BackboneSpec {
        &self.spec
    }

    fn intermediates(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Layer>, Error> {
        // `[B, 3, H, W]` to `[B, N, 3, P * P]`.
        let (b, side) = (images.dim(0)?, IMAGE / PATCH);
        let patches = images
            .reshape(vec![b, 3, side, PATCH, side, PATCH])?
            .permute(vec![0, 2, 4, 1, 3, 5])?
            .reshape((b, side * side, 3, PATCH * PATCH))?;
        let mean = patches.mean_keepdim(3)?;
        let spread = patches.broadcast_sub(&mean)?.sqr()?.mean(3)?.sqrt()?;
        let tokens = Tensor::cat(&[mean.squeeze(3)?, spread], 2)?;
        let layer = Layer {
            cls: tokens.mean(1)?,
            patches: tokens,
        };
        Ok(vec![layer; blocks.len()])
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [normal, images] = arguments.as_slice() else {
        return Err("expected NORMAL IMAGES".into());
    };
    let detector = Defend::builder()
        .teacher(TeacherSource::Encoder(Arc::new(Colours::new())))
        .fit(ImageFolder::open(normal)?, &mut Silent)?
        .detector;
    for finding in scan(&detector, ImageFolder::open(images)?, &mut Silent)?.findings {
        println!("{:.3} {}", finding.novelty.score, finding.name);
    }
    Ok(())
}
