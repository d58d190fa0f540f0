//! What the workspace's tests share. Not published; everything here panics, as tests do.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc
)]

mod killed;

pub use killed::in_peace_and_killed;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

/// A file of `defend` as versions without a checksum wrote it, so that what is inside can be changed.
pub fn unsealed(bytes: &[u8]) -> Vec<u8> {
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    let (before, rest) = header
        .split_once("\"defend.checksum\":\"")
        .expect("a checksum");
    let (_, after) = rest.split_once('"').unwrap();
    let header = format!("{before}{}", after.trim_start_matches(','));
    let mut plain = (header.len() as u64).to_le_bytes().to_vec();
    plain.extend(header.as_bytes());
    plain.extend(&bytes[8 + length..]);
    plain
}

/// A golden file with lookups that name what is missing.
pub struct Golden(HashMap<String, Tensor>);

impl Golden {
    /// Reads `tests/golden/<name>.safetensors` of the crate at `manifest` (`env!("CARGO_MANIFEST_DIR")`).
    pub fn read(manifest: &str, name: &str) -> Self {
        let path = Path::new(manifest).join(format!("tests/golden/{name}.safetensors"));
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu);
        Self(tensors.unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Tensor {
        let found = self.0.get(name);
        found
            .unwrap_or_else(|| panic!("no golden tensor {name}"))
            .clone()
    }

    /// All tensors whose names start with `prefix`, without it.
    pub fn starting_with(&self, prefix: &str) -> HashMap<String, Tensor> {
        let all = self.0.iter();
        all.filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.to_owned(), t.clone())))
            .collect()
    }
}

/// Largest absolute value.
pub fn largest(t: &Tensor) -> f64 {
    let top = t
        .to_dtype(DType::F64)
        .unwrap()
        .abs()
        .unwrap()
        .flatten_all()
        .unwrap()
        .max(0)
        .unwrap();
    top.to_scalar().unwrap()
}

/// Fails when the largest difference exceeds `tolerance` times the largest reference value.
pub fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(found.dims(), expected.dims(), "shape of {what}");
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let error = largest(&(wide(found) - wide(expected)).unwrap()) / largest(expected).max(1e-12);
    assert!(
        error <= tolerance,
        "{what}: relative error {error}, allowed {tolerance}"
    );
}

/// Compares how far a transformer's parameter of timm's `name` moved in training, and that it moved at least `least`.
///
/// AdamW divides by the gradient's own size, so an element whose gradient nearly vanishes shows the rounding of the others: single
/// elements were off by 0.8e-3 and 1.2e-3 of the largest move with two equally exact orders of attention's sums.
///
/// A softmax does not change when all keys move: the keys' part of a `qkv.bias` has no gradient but rounding, which
/// AdamW blows up to a part of a step, so only queries and values are compared there.
pub fn assert_moved(name: &str, before: &Tensor, found: &Tensor, expected: &Tensor, least: f64) {
    let parts = |t: &Tensor| {
        if !name.ends_with("qkv.bias") {
            return t.clone();
        }
        let width = t.elem_count() / 3;
        let part = |i: usize| t.narrow(0, i * width, width).unwrap();
        Tensor::cat(&[part(0), part(2)], 0).unwrap()
    };
    let change = |t: &Tensor| (parts(t) - parts(before)).unwrap();
    assert!(largest(&change(expected)) > least, "{name} hardly trained");
    assert_close(&change(found), &change(expected), 2e-3, name);
}

/// The folder of images and weights that `$DEFEND_ASSETS` names.
pub fn assets() -> PathBuf {
    let folder = std::env::var_os("DEFEND_ASSETS");
    PathBuf::from(folder.expect("set DEFEND_ASSETS to the unpacked asset folder"))
}
