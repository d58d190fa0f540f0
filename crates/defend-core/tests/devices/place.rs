//! The device under test and the reference, and what both have to agree in.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use defend_core::nn::{Rng, normal};
use defend_core::prelude::*;
use defend_core::vit::{Architecture, BackboneSpec, Features, Grid, TrainScope, Vit, Weights};
use defend_testing::{assert_close, assert_moved};

/// Where a stage runs, and in which type.
pub(crate) struct Place {
    pub(crate) device: Device,
    pub(crate) dtype: DType,
}

impl Place {
    pub(crate) fn best() -> Self {
        let device = best_device();
        eprintln!("on {:?}", device.location());
        Self {
            device,
            dtype: DType::F32,
        }
    }

    pub(crate) fn reference() -> Self {
        Self {
            device: Device::Cpu,
            dtype: if best_device().is_cpu() {
                DType::F64
            } else {
                DType::F32
            },
        }
    }

    pub(crate) fn put(&self, t: &Tensor) -> Tensor {
        let there = t.to_device(&self.device).unwrap();
        there.to_dtype(self.dtype).unwrap()
    }

    pub(crate) fn noise(&self, shape: &[usize], seed: u64) -> Tensor {
        self.put(&normal(shape, 1.0, &mut Rng::seed(seed), &Device::Cpu).unwrap())
    }

    /// A backbone of random weights, the same at every place.
    pub(crate) fn vit(&self, seed: u64, scope: TrainScope) -> Vit {
        self.vit_with(false, seed, scope)
    }

    pub(crate) fn vit_with(&self, layer_scale: bool, seed: u64, scope: TrainScope) -> Vit {
        let spec = BackboneSpec::new(Architecture {
            image_size: 32,
            patch_size: 8,
            width: 48,
            depth: 3,
            heads: 3,
            mlp_width: 96,
            layer_scale,
            ..Architecture::vit_tiny()
        });
        let random = Vit::random(spec.clone(), 0.0, &mut Rng::seed(seed), &Device::Cpu).unwrap();
        let state = random.state_dict().unwrap().into_iter();
        let state = state.map(|(name, t)| {
            // LayerScale starts with ones, which would hide its absence.
            let t = if name.ends_with("gamma") {
                normal(t.dims(), 1.0, &mut Rng::seed(50), &Device::Cpu).unwrap()
            } else {
                t
            };
            (name, self.put(&t))
        });
        let state = state.collect();
        Vit::load(
            spec,
            Weights::from_tensors(state, "random"),
            scope,
            &self.device,
        )
        .unwrap()
    }
}

pub(crate) const GRID: Grid = Grid {
    rows: 4,
    columns: 4,
};

pub(crate) fn at_home(t: &Tensor) -> Tensor {
    let home = t.to_device(&Device::Cpu).unwrap();
    home.to_dtype(DType::F64).unwrap()
}

/// Fails when the largest difference exceeds `tolerance` times the largest reference value.
pub(crate) fn close(found: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    assert_close(&at_home(found), &at_home(expected), tolerance, what);
}

pub(crate) fn all_close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    let tensor = |values: &[f64]| Tensor::new(values, &Device::Cpu).unwrap();
    close(&tensor(found), &tensor(expected), tolerance, what);
}

pub(crate) fn same_features(found: &Features, expected: &Features, tolerance: f64, what: &str) {
    let pairs = [
        ("CLS", &found.cls, &expected.cls),
        ("patches", &found.patches, &expected.patches),
        (
            "CLS attention",
            &found.cls_attention,
            &expected.cls_attention,
        ),
    ];
    for (name, found, expected) in pairs {
        close(found, expected, tolerance, &format!("{what}: {name}"));
    }
    assert_eq!(found.intermediates.len(), expected.intermediates.len());
    for (found, expected) in found.intermediates.iter().zip(&expected.intermediates) {
        let what = format!("{what}: earlier layer");
        close(&found.cls, &expected.cls, tolerance, &what);
        close(&found.patches, &expected.patches, tolerance, &what);
    }
}

/// Names and values of variables before they are trained.
pub(crate) fn values(parameters: &[(String, Var)]) -> HashMap<String, Tensor> {
    let copy = |(name, var): &(String, Var)| (name.clone(), at_home(&var.copy().unwrap()));
    parameters.iter().map(copy).collect()
}

/// Each parameter moved by `least`, and as far here as there.
pub(crate) fn same_moves(
    before: &HashMap<String, Tensor>,
    found: &[(String, Var)],
    expected: &[(String, Var)],
    least: f64,
) {
    assert_eq!((found.len(), expected.len()), (before.len(), before.len()));
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        let (found, expected) = (at_home(found.as_tensor()), at_home(expected.as_tensor()));
        assert_moved(name, &before[name], &found, &expected, least);
    }
}
