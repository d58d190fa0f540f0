//! Whole `fit` of VOC "horse" from the photos and the teacher's weights on, and whole `score` from the photos on, against
//! `tools/reference.py`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use defend_core::Student;
use defend_core::data::{Difficult, MultiObject, Protocol, Subset, Voc};
use defend_core::prelude::*;
use serde_json::{Value, json};

use crate::rows::{Row, Work};

/// Of the whole method without dense tuning.
const CONFIG: &str = include_str!("../../examples/voc/alone.json");
/// Images that a repetition scores.
const SCORED: usize = 256;

/// Where the images and the teacher are.
#[derive(Clone)]
pub(crate) struct Files {
    /// VOC folder with Annotations, ImageSets and JPEGImages.
    pub(crate) voc: PathBuf,
    /// Folder as on timm's hub.
    pub(crate) weights: PathBuf,
}

pub(crate) fn rows(files: &Files) -> [Row; 2] {
    [fit(files.clone()), score(files.clone())]
}

impl Files {
    fn split(&self, name: &str) -> Arc<Voc> {
        Arc::new(Voc::open(&self.voc, name, Difficult::Counted).expect("a VOC folder"))
    }

    /// Training images that show a horse.
    fn normal(&self) -> Subset {
        let train = self.split("train");
        let normal = vec![train.class("horse").expect("a class of VOC")];
        let shown = MultiObject { normal }.train(&*train);
        Subset::new(train, shown).expect("images")
    }

    /// What `theirs.py` needs for the images of a data set.
    fn request(&self, row: &str, images: &dyn Dataset) -> Value {
        let names = (0..images.len()).map(|i| {
            let path = PathBuf::from(images.name(i).into_owned());
            path.file_stem()
                .expect("a name")
                .to_string_lossy()
                .into_owned()
        });
        let config: Value = serde_json::from_str(CONFIG).expect("settings");
        json!({
            "prepare": row,
            "voc": self.voc,
            "weights": self.weights,
            "config": config,
            "names": names.collect::<Vec<_>>(),
        })
    }

    fn fitted(&self, config: DefendConfig, images: Subset) -> Detector {
        Defend::builder()
            .teacher(Pretrained::local(&self.weights))
            .config(config)
            .fit(images, &mut Silent)
            .expect("a detector")
            .detector
    }
}

fn config() -> DefendConfig {
    serde_json::from_str(CONFIG).expect("settings")
}

fn fit(files: Files) -> Row {
    let prepare = move |_: &Path| {
        let request = files.request("fit", &files.normal());
        let work = Work {
            run: Box::new(move || {
                files.fitted(config(), files.normal());
            }),
            check: Box::new(Vec::new),
            here: None,
        };
        (request, work)
    };
    Row {
        name: "whole fit, ViT-Ti, VOC horse, 6 epochs of 16".into(),
        engines: vec!["torch", "torch, teacher each epoch"],
        items: 0,
        warm_up: false,
        tolerance: 0.0,
        prepare: Box::new(prepare),
    }
}

/// With a student of one epoch: its scores are compared, not its merit.
fn score(files: Files) -> Row {
    let prepare = move |folder: &Path| {
        let test = files.split("val");
        let normal = files.normal();
        let mut config = config();
        if let Student::Masked(masked) = &mut config.student {
            masked.distill.epochs = 1;
        }
        let detector = files.fitted(config, normal);
        let path = folder.join("detector.safetensors");
        detector.save(&path).expect("a model file");
        let images = move || Subset::new(test.clone(), (0..SCORED).collect()).expect("images");
        let mut request = files.request("score", &images());
        request["detector"] = json!(path);
        let run = move || scan(&detector, images(), &mut Silent).expect("scores");
        let run = Arc::new(run);
        let check = Arc::clone(&run);
        let work = Work {
            run: Box::new(move || {
                run();
            }),
            check: Box::new(move || check().scores()),
            here: None,
        };
        (request, work)
    };
    Row {
        name: format!("whole score, ViT-Ti, {SCORED} photos of VOC"),
        engines: vec!["torch"],
        items: SCORED,
        warm_up: true,
        // The decoders of both sides round differently.
        tolerance: 2e-2,
        prepare: Box::new(prepare),
    }
}
