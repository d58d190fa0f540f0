//! The dense loss and its gradients against PyTorch, from `tools/golden_dense.py`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use candle_core::{DType, Var};
use defend_dense::{
    Assignment, CropBox, DenseObjective, ProjectionHead, PrototypeObjective, crop_targets,
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

fn boxes(golden: &Golden) -> Vec<CropBox> {
    let rows = golden
        .get("boxes")
        .to_dtype(DType::U32)
        .unwrap()
        .to_vec2::<u32>()
        .unwrap();
    let side = |v: u32| v as usize;
    let boxes = rows.iter().map(|b| CropBox {
        row: side(b[0]),
        column: side(b[1]),
        height: side(b[2]),
        width: side(b[3]),
    });
    boxes.collect()
}

#[test]
fn loss_targets_and_gradients_match_pytorch() {
    let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "dense");
    for (name, assignment) in [("hard", Assignment::Hard), ("soft", Assignment::Soft)] {
        let get = |part: &str| golden.get(&format!("{name}.{part}"));
        let (objective, boxes) = (objective(&golden, assignment), boxes(&golden));
        let q = objective.assign(&golden.get("view_tokens")).unwrap();
        assert_close(&q.reshape((32, 5)).unwrap(), &golden.get("q"), 1e-5, "q");
        let targets = crop_targets(&q, &boxes, VIEW, CROP, assignment).unwrap();
        assert_close(&targets, &get("target"), 1e-5, &format!("{name} target"));

        let crops = Var::from_tensor(&golden.get("crop_tokens")).unwrap();
        let loss = objective
            .loss(&golden.get("view_tokens"), VIEW, &crops, CROP, &boxes)
            .unwrap();
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
}
