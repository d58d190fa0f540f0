//! The dense loss and its gradients against PyTorch, from `tools/golden_dense.py`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use candle_core::{DType, Tensor, Var};
use defend_dense::{
    Assignment, CropBox, DenseObjective, ProjectionHead, PrototypeObjective, Resampling,
    crop_targets,
};
use defend_ot::SinkhornKnopp;
use defend_testing::{Golden, assert_close};
use defend_vit::Grid;

const VIEW: Grid = Grid {
    rows: 4,
    columns: 4,
};
const CROP: Grid = Grid {
    rows: 2,
    columns: 2,
};

fn objective(golden: &Golden, assignment: Assignment) -> PrototypeObjective {
    let layer = |i| {
        (
            golden.get(&format!("head.{i}.weight")),
            golden.get(&format!("head.{i}.bias")),
        )
    };
    let head = ProjectionHead::from_layers(&[layer(0), layer(1), layer(2)]).unwrap();
    let prototypes = golden.get("prototypes");
    PrototypeObjective::new(
        head,
        &prototypes,
        Box::new(SinkhornKnopp::default()),
        assignment,
        0.1,
    )
    .unwrap()
}

fn boxes(rows: &Tensor) -> Vec<CropBox> {
    let rows = rows.to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
    let side = |v: u32| v as usize;
    let boxes = rows.iter().map(|b| CropBox {
        row: side(b[0]),
        column: side(b[1]),
        height: side(b[2]),
        width: side(b[3]),
    });
    boxes.collect()
}

/// Assigns, and checks targets, loss and gradients of a variant.
fn check(name: &str, assignment: Assignment, resampling: Resampling) {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "dense");
    let get = |part: &str| golden.get(&format!("{name}.{part}"));
    let objective = objective(&golden, assignment).with_resampling(resampling);
    let boxes = boxes(&golden.get("boxes"));
    let q = objective.assign(&golden.get("view_tokens")).unwrap();
    assert_close(&q.reshape((32, 5)).unwrap(), &golden.get("q"), 1e-5, "q");
    let targets = crop_targets(&q, &boxes, VIEW, CROP, assignment, resampling).unwrap();
    assert_close(&targets, &get("target"), 1e-5, &format!("{name} target"));

    let crops = Var::from_tensor(&golden.get("crop_tokens")).unwrap();
    let loss = objective.loss(&q, VIEW, &crops, CROP, &boxes).unwrap();
    assert_close(&loss, &get("loss"), 1e-5, &format!("{name} loss"));
    let grads = loss.backward().unwrap();
    assert_close(
        grads.get(&crops).unwrap(),
        &get("grads.crop_tokens"),
        1e-4,
        "crop tokens",
    );
    let parameters = objective.parameters();
    assert_eq!(parameters.len(), 7);
    for (parameter, var) in parameters {
        let grad = grads
            .get(&var)
            .unwrap_or_else(|| panic!("{parameter} has no gradient"));
        assert_close(grad, &get(&format!("grads.{parameter}")), 1e-4, &parameter);
    }
}

const ROI: Resampling = Resampling::RoiAlign { side: 3 };

#[test]
fn loss_targets_and_gradients_match_pytorch() {
    check("hard", Assignment::Hard, Resampling::Area);
    check("soft", Assignment::Soft, Resampling::Area);
    check("roi", Assignment::Soft, ROI);
}

#[test]
fn targets_match_pytorch_for_every_box() {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "dense");
    let q = golden.get("q").narrow(0, 0, 16).unwrap();
    let q = q.reshape((1, 16, 5)).unwrap();
    let boxes = boxes(&golden.get("all.boxes"));
    assert_eq!(boxes.len(), 100);
    for (name, resampling) in [("all.area", Resampling::Area), ("all.roi", ROI)] {
        let found = crop_targets(&q, &boxes, VIEW, CROP, Assignment::Soft, resampling).unwrap();
        assert_close(&found, &golden.get(name), 1e-6, name);
    }
}

#[test]
fn a_queue_takes_part_in_the_assignment() {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "dense");
    let objective = objective(&golden, Assignment::Soft).with_queue(20);
    let assign = |tokens: &str| {
        let q = objective.assign(&golden.get(tokens)).unwrap();
        q.reshape((32, 5)).unwrap()
    };
    assert_close(&assign("view_tokens"), &golden.get("q"), 1e-5, "first");
    let later = assign("queue.view_tokens");
    assert_close(&later, &golden.get("queue.q"), 1e-5, "later");
}

/// A half precision backbone: the loss is computed in f32 and its gradient comes back in the features' type.
#[test]
fn half_precision_features_meet_the_loss_in_f32() {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "dense");
    let boxes = boxes(&golden.get("boxes"));
    for half in [DType::F16, DType::BF16] {
        let run = |dtype: DType| {
            let features = |name: &str| {
                let rounded = golden.get(name).to_dtype(half).unwrap();
                rounded.to_dtype(dtype).unwrap()
            };
            let objective = objective(&golden, Assignment::Soft);
            let crops = Var::from_tensor(&features("crop_tokens")).unwrap();
            let q = objective.assign(&features("view_tokens")).unwrap();
            assert_eq!(q.dtype(), DType::F32);
            let loss = objective.loss(&q, VIEW, &crops, CROP, &boxes).unwrap();
            assert_eq!(loss.dtype(), DType::F32);
            let grads = loss.backward().unwrap();
            (loss, grads.get(&crops).unwrap().clone())
        };
        let ((loss, grad), (reference, reference_grad)) = (run(half), run(DType::F32));
        assert_close(&loss, &reference, 1e-6, "loss");
        assert_eq!(grad.dtype(), half);
        let rounding = if half == DType::F16 { 1e-3 } else { 8e-3 };
        assert_close(&grad, &reference_grad, rounding, "gradient");
    }
}
