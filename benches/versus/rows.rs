//! The rows: the same work on both sides.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use candle_core::{DType, Device, IndexOp, Tensor};
use defend_benches::{StudentStep, frozen_vit, noise, random_vit};
use defend_data::{Interpolation, Preprocess, ResizeMode, decode_image};
use defend_dense::{CropSampler, DenseConfig, DenseObjective, PrototypeObjective, extract};
use defend_distill::{DistillObjective, FeatureDistance};
use defend_nn::{Rng, backward};
use defend_ot::{Assigner, SinkhornKnopp};
use defend_train::{AdamW, AdamWConfig, ParameterGroup};
use defend_vit::{
    Architecture, Backbone, ComputePrecision, FrozenTokens, Grid, TrainScope, Trainable, Vit,
};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::candle;

const GRID: Grid = Grid {
    rows: 14,
    columns: 14,
};

/// Largest difference of results computed from the same numbers, relative to the largest of them.
const TOLERANCE: f64 = 1e-3;

/// What is timed here, and numbers that the other side should find too.
pub(crate) struct Work {
    pub(crate) run: Box<dyn FnMut()>,
    pub(crate) check: Box<dyn FnMut() -> Vec<f64>>,
    /// Another way to do the same in this process, and its name.
    pub(crate) here: Option<(&'static str, Box<Work>)>,
}

type Prepare = dyn FnOnce(&Path) -> (Value, Work);

pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) engines: Vec<&'static str>,
    /// Images a repetition, 0 for rows in milliseconds.
    pub(crate) items: usize,
    /// Whether it runs before it is timed.
    pub(crate) warm_up: bool,
    /// Largest difference that a check allows, relative to the largest value.
    pub(crate) tolerance: f64,
    /// Writes weights and inputs into a folder; the request for `theirs.py`, and the work here.
    pub(crate) prepare: Box<Prepare>,
}

pub(crate) fn all(photos: Option<&Path>) -> Vec<Row> {
    let models = [
        ("vit_tiny_patch16_224", "ViT-Ti", Architecture::vit_tiny()),
        ("vit_small_patch16_224", "ViT-S", Architecture::vit_small()),
        ("vit_base_patch16_224", "ViT-B", Architecture::vit_base()),
    ];
    let mut rows = Vec::new();
    for (timm, name, architecture) in &models {
        for batch in [1, 8, 32] {
            rows.push(forward(timm, name, architecture.clone(), batch));
        }
    }
    for (timm, name, architecture) in &models {
        rows.push(rounded_forward(timm, name, architecture.clone()));
    }
    for (timm, name, architecture) in &models[..2] {
        rows.push(student_step(timm, name, architecture.clone()));
    }
    rows.push(dense_step());
    rows.extend([20, 300].map(sinkhorn));
    rows.extend(photos.map(images));
    rows
}

/// Weights and inputs in files that `theirs.py` reads.
fn request(
    row: &str,
    folder: &Path,
    model: Option<(&str, &Vit)>,
    tensors: &HashMap<&str, Tensor>,
) -> Value {
    let inputs = folder.join("inputs.safetensors");
    candle_core::safetensors::save(tensors, &inputs).expect("a file of inputs");
    let mut request = json!({ "prepare": row, "images": inputs });
    if let Some((timm, vit)) = model {
        let weights = folder.join("weights.safetensors");
        let state = vit.state_dict().expect("weights");
        candle_core::safetensors::save(&state, &weights).expect("a file of weights");
        request["model"] = timm.into();
        request["weights"] = json!(weights);
    }
    request
}

fn first(t: &Tensor) -> Vec<f64> {
    let values = t.flatten_all().and_then(|t| t.to_dtype(DType::F64));
    let values: Vec<f64> = values.and_then(|t| t.to_vec1()).expect("values");
    values.into_iter().take(8).collect()
}

fn forward(timm: &'static str, name: &'static str, arch: Architecture, batch_size: usize) -> Row {
    let prepare = move |folder: &Path| {
        let (vit, images, request) = forward_inputs(timm, &arch, batch_size, folder);
        let plain = candle_forward(&vit, arch, &images);
        let mut work = features(vit, &images);
        work.here = Some(("candle", Box::new(plain)));
        (request, work)
    };
    Row {
        name: format!("forward, {name}, batch {batch_size}"),
        engines: vec!["torch", "onnxruntime"],
        items: batch_size,
        warm_up: true,
        tolerance: TOLERANCE,
        prepare: Box::new(prepare),
    }
}

/// A forward pass in `bf16` beside the same in `f32`.
fn rounded_forward(timm: &'static str, name: &'static str, arch: Architecture) -> Row {
    const BATCH: usize = 8;
    let prepare = move |folder: &Path| {
        let (vit, images, request) = forward_inputs(timm, &arch, BATCH, folder);
        let rounded = vit
            .with_compute_precision(ComputePrecision::Bf16)
            .expect("a copy");
        let mut work = features(rounded, &images);
        work.here = Some(("ours in f32", Box::new(features(vit, &images))));
        (request, work)
    };
    Row {
        name: format!("forward in bf16, {name}, batch {BATCH}"),
        engines: vec!["torch in bf16"],
        items: BATCH,
        warm_up: true,
        // A hundredth or two in eight values.
        tolerance: 0.1,
        prepare: Box::new(prepare),
    }
}

/// A backbone, images, and the request for the same forward pass.
fn forward_inputs(
    timm: &str,
    architecture: &Architecture,
    batch_size: usize,
    folder: &Path,
) -> (Vit, Tensor, Value) {
    let vit = frozen_vit(architecture);
    let images = noise(&[batch_size, 3, 224, 224], 1);
    let tensors = HashMap::from([("images", images.clone())]);
    let request = request("forward", folder, Some((timm, &vit)), &tensors);
    (vit, images, request)
}

/// Our forward pass.
fn features(vit: Vit, images: &Tensor) -> Work {
    let vit = Rc::new(vit);
    let (again, same, images) = (Rc::clone(&vit), images.clone(), images.clone());
    Work {
        run: Box::new(move || {
            vit.features(&images).expect("features");
        }),
        check: Box::new(move || first(&again.features(&same).expect("features").cls)),
        here: None,
    }
}

/// The forward pass by candle's own operations.
fn candle_forward(vit: &Vit, architecture: Architecture, images: &Tensor) -> Work {
    let state = vit.state_dict().expect("weights");
    let plain = candle::Vit::new(state, architecture, false).expect("a backbone");
    let (plain, images) = (Rc::new(plain), images.clone());
    let (again, same) = (Rc::clone(&plain), images.clone());
    let cls = move || {
        again
            .tokens(&same, None)
            .and_then(|tokens| tokens.i((.., 0)))
    };
    Work {
        run: Box::new(move || {
            plain.tokens(&images, None).expect("tokens");
        }),
        check: Box::new(move || first(&cls().expect("tokens"))),
        here: None,
    }
}

/// The student's step by candle's own operations and its AdamW, on the same kept patches of every image.
fn candle_step(
    vit: &Vit,
    architecture: Architecture,
    images: Tensor,
    kept: Vec<u32>,
    target: Tensor,
) -> Work {
    let state = vit.state_dict().expect("weights");
    let plain = Rc::new(candle::Vit::new(state, architecture, true).expect("a backbone"));
    let mut optimiser = plain.optimiser().expect("an optimiser");
    let loss = move || {
        let tokens = plain.tokens(&images, Some(&kept)).expect("tokens");
        let patches = tokens.narrow(1, 1, kept.len()).expect("patches");
        let patches = patches.contiguous().expect("patches");
        let distances = FeatureDistance::default().distances(&target, &patches);
        distances.and_then(|d| Ok(d.mean_all()?)).expect("a loss")
    };
    let check = loss.clone();
    Work {
        run: Box::new(move || candle::step(&mut optimiser, &loss()).expect("a step")),
        check: Box::new(move || first(&check())),
        here: None,
    }
}

fn student_step(timm: &'static str, name: &'static str, architecture: Architecture) -> Row {
    let batch_size = 32;
    let prepare = move |folder: &Path| {
        let student = random_vit(&architecture);
        let images = noise(&[batch_size, 3, 224, 224], 1);
        let kept = StudentStep::kept(&architecture);
        let target = noise(&[batch_size, kept, architecture.width], 2);
        let step = StudentStep::new(student, &architecture, images.clone(), target.clone());
        let tensors = HashMap::from([
            ("images", images.clone()),
            ("target", target.clone()),
            ("keep", step.keep.indices().clone()),
        ]);
        let request = request(
            "student_step",
            folder,
            Some((timm, &step.student)),
            &tensors,
        );
        let seen = StudentStep::seen(&architecture);
        let plain = candle_step(&step.student, architecture, images, seen, target);
        let step = Rc::new(RefCell::new(step));
        let same = Rc::clone(&step);
        let work = Work {
            run: Box::new(move || step.borrow_mut().run()),
            check: Box::new(move || first(&same.borrow().loss())),
            here: Some(("candle", Box::new(plain))),
        };
        (request, work)
    };
    Row {
        name: format!("student step, {name}, 99 tokens, batch {batch_size}"),
        engines: vec!["torch"],
        items: batch_size,
        warm_up: true,
        tolerance: TOLERANCE,
        prepare: Box::new(prepare),
    }
}

fn dense_step() -> Row {
    let batch_size = 32;
    let prepare = move |folder: &Path| {
        let vit = random_vit(&Architecture::vit_tiny());
        let vit = vit.copy(TrainScope::LastBlocks(2)).expect("a copy");
        let images = noise(&[batch_size, 3, 224, 224], 1);
        let tensors = HashMap::from([("images", images.clone())]);
        let model = Some(("vit_tiny_patch16_224", &vit));
        let request = request("dense_step", folder, model, &tensors);
        let (config, mut rng) = (DenseConfig::default(), Rng::seed(0));
        let objective =
            PrototypeObjective::random(&config, 192, &mut rng, &Device::Cpu).expect("an objective");
        let group = ParameterGroup {
            parameters: [vit.parameters(), objective.parameters()].concat(),
            learning_rate: 1e-6,
            weight_decay: 1e-2,
        };
        let mut optimiser = AdamW::new(vec![group], AdamWConfig::default()).expect("an optimiser");
        let sampler = CropSampler::new(config.crop_area, config.crop_aspect);
        let tokens = vit.frozen_tokens(&images).expect("tokens").tokens;
        let view = FrozenTokens { tokens, grid: GRID };
        let mut run = move || -> Result<(), defend_dense::Error> {
            let boxes = sampler.boxes(GRID, batch_size * config.crops, &mut rng);
            let crops = extract(&images, &boxes, 16, config.crop_size)?;
            objective.constrain()?;
            let q = objective.assign(&vit.features_from_frozen(&view)?.patches.detach())?;
            let crops = vit.features_from_frozen(&vit.frozen_tokens(&crops)?)?;
            let loss = objective.loss(&q, GRID, &crops.patches, crops.grid, &boxes)?;
            optimiser.step(&backward(&loss)?, 1.0)?;
            Ok(())
        };
        let work = Work {
            run: Box::new(move || run().expect("a step")),
            check: Box::new(Vec::new),
            here: None,
        };
        (request, work)
    };
    Row {
        name: format!("dense step, ViT-Ti, 4 crops, batch {batch_size}"),
        engines: vec!["torch"],
        items: batch_size,
        warm_up: true,
        tolerance: TOLERANCE,
        prepare: Box::new(prepare),
    }
}

fn sinkhorn(prototypes: usize) -> Row {
    let prepare = move |folder: &Path| {
        let scores = noise(&[6272, prototypes], 1).tanh().expect("scores");
        let tensors = HashMap::from([("scores", scores.clone())]);
        let request = request("sinkhorn", folder, None, &tensors);
        let same = scores.clone();
        let assign = |scores: &Tensor| SinkhornKnopp::default().assign(scores).expect("Q");
        let work = Work {
            run: Box::new(move || {
                assign(&scores);
            }),
            check: Box::new(move || first(&assign(&same))),
            here: None,
        };
        (request, work)
    };
    Row {
        name: format!("Sinkhorn, 6272 x {prototypes}"),
        engines: vec!["torch"],
        items: 0,
        warm_up: true,
        tolerance: TOLERANCE,
        prepare: Box::new(prepare),
    }
}

fn images(folder: &Path) -> Row {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("a folder of photos")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "jpg" || e == "jpeg"))
        .collect();
    paths.sort();
    paths.truncate(1000);
    let items = paths.len();
    let prepare = move |_: &Path| {
        let request = json!({ "prepare": "images", "paths": paths });
        let preprocess = Preprocess {
            resize_mode: ResizeMode::Squash,
            filter: Interpolation::Bicubic,
            ..Preprocess::new(224, [0.5; 3], [0.5; 3])
        };
        let read = move |path: &PathBuf| {
            let bytes = std::fs::read(path).expect("a file");
            let image = decode_image(&bytes, "versus").expect("an image");
            preprocess.resize(&image).expect("an image")
        };
        let (same, again) = (read.clone(), paths[..8].to_vec());
        let mean = move |path: &PathBuf| {
            let image = same(path);
            let total: f64 = image.as_raw().iter().map(|&v| f64::from(v)).sum();
            total / image.as_raw().len() as f64 / 255.0
        };
        let work = Work {
            run: Box::new(move || {
                let images: Vec<_> = paths.par_iter().map(&read).collect();
                assert_eq!(images.len(), items);
            }),
            check: Box::new(move || again.iter().map(&mean).collect()),
            here: None,
        };
        (request, work)
    };
    Row {
        name: format!("decode and resize {items} photos"),
        engines: vec!["pillow", "torchvision"],
        items,
        warm_up: true,
        // The decoders of both sides round differently.
        tolerance: 5e-3,
        prepare: Box::new(prepare),
    }
}
