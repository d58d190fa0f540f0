//! The small Vision Transformer that ships with `defend`, as the bytes of a safetensors file.
//!
//! Width 192, 8 blocks, 3 heads, patches of 16 pixels at 224: 3.7 million parameters, matrices as `int8` with a scale for each output
//! channel, with the specification in the file's metadata. It was distilled from timm's `vit_tiny_patch16_224.augreg_in21k_ft_in1k`
//! (Apache-2.0) by `examples/train_backbone`; the model card in `docs/MODEL_CARD.md` says from what photos and how good it is.
//! `defend_core::embedded_backbone()` loads it.

/// Content of the weight file, read with `defend_vit::Pretrained::Bytes`.
pub const WEIGHTS: &[u8] = include_bytes!("../weights.safetensors");

/// Tokens of 1,000 ordinary photos by this backbone, a few KB of each and eight bits a value, of which no image can be made:
/// `defend background --images imagenet-sample`, a file that `defend-core` reads.
pub const BACKGROUND: &[u8] = include_bytes!("../background.safetensors");
