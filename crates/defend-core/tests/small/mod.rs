//! A backbone that is small enough for tests.

use defend_core::Device;
use defend_core::nn::Rng;
use defend_core::vit::{Architecture, BackboneSpec, Vit};

/// A random backbone whose blocks give different tokens.
pub(crate) fn teacher(seed: u64) -> Vit {
    let spec = BackboneSpec::new(Architecture {
        image_size: 32,
        patch_size: 8,
        width: 24,
        depth: 3,
        heads: 2,
        mlp_width: 48,
        ..Architecture::vit_tiny()
    });
    Vit::random(spec, 0.0, &mut Rng::seed(seed), &Device::Cpu).expect("a backbone")
}
