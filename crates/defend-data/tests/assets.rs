//! The published data sets as they lie in `$DEFEND_ASSETS`.
//!
//! `DEFEND_ASSETS=... cargo test -p defend-data --test assets -- --ignored`

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use defend_data::{
    AllVsOne, Batches, ClassFolder, ClassId, Coco, Crowd, Dataset, Difficult, Idx, ImageFolder,
    MultiObject, MvtecAd, Preprocess, Protocol, ResizeMode, RgbImage, Split, Voc, read_image,
};
use serde::Deserialize;

fn assets(part: &str) -> PathBuf {
    let root = std::env::var_os("DEFEND_ASSETS").expect("DEFEND_ASSETS must name the asset folder");
    PathBuf::from(root).join(part)
}

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn voc_has_the_published_counts() {
    let open = |split| Voc::open(assets("VOCdevkit/VOC2012"), split, Difficult::Counted).unwrap();
    let (train, val) = (open("train"), open("val"));
    assert_eq!((train.len(), val.len()), (2140, 1468));
    for (name, expected) in [
        ("dog", 1329),
        ("cat", 1124),
        ("person", 661),
        ("horse", 523),
        ("sheep", 356),
        ("cow", 334),
    ] {
        let protocol = MultiObject {
            normal: vec![train.class(name).unwrap()],
        };
        let found = protocol.train(&train).len() + protocol.train(&val).len();
        assert_eq!(found, expected, "{name}");
    }
    assert_eq!(train.image(0).unwrap().dimensions(), (299, 224));
}

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn coco_has_its_images_and_80_classes() {
    let open = |split: &str, crowd| {
        let annotations = assets("coco/annotations").join(format!("instances_{split}.json"));
        Coco::open(annotations, assets("coco").join(split), crowd).unwrap()
    };
    for split in ["train2017", "val2017"] {
        let set = open(split, Crowd::Counted);
        assert_eq!((set.len(), set.class_names().len()), (30, 80), "{split}");
        assert_eq!(set.class("person"), Some(ClassId(0)));
        let labelled = (0..set.len())
            .filter(|&i| !set.classes(i).is_empty())
            .count();
        assert!(
            labelled > 20,
            "{split}: {labelled} of 30 images have objects"
        );
        for i in 0..set.len() {
            assert!(set.image(i).unwrap().width() > 100, "{}", set.name(i));
        }
        let without = open(split, Crowd::Ignored);
        let objects = |set: &Coco| (0..set.len()).map(|i| set.classes(i).len()).sum::<usize>();
        assert!(objects(&without) <= objects(&set));
    }
}

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn every_defect_of_the_screw_has_a_mask_over_its_image() {
    let open = |split| MvtecAd::open(assets("mvtec/screw"), split).unwrap();
    let (train, test) = (open(Split::Train), open(Split::Test));
    assert_eq!((train.len(), test.len()), (320, 160));
    assert_eq!(test.class_names().len(), 6);
    for i in 0..test.len() {
        let good = test.classes(i) == [ClassId(0)];
        match test.mask(i).unwrap() {
            None => assert!(good, "{}", test.name(i)),
            Some(mask) => {
                let marked = mask.pixels().filter(|pixel| pixel.0[0] > 0).count();
                assert!(!good && marked > 0, "{}", test.name(i));
                assert!(marked < mask.len() / 4, "{}", test.name(i));
            }
        }
    }
}

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn fashion_mnist_is_whole() {
    for (split, len) in [(Split::Train, 60_000), (Split::Test, 10_000)] {
        let set = Idx::fashion_mnist(assets("fashion-mnist"), split).unwrap();
        assert_eq!(set.len(), len);
        assert_eq!(set.image(len - 1).unwrap().dimensions(), (28, 28));
        let all_but_bags = AllVsOne {
            abnormal: set.class("bag").unwrap(),
        };
        assert_eq!(all_but_bags.train(&set).len(), len / 10 * 9);
    }
}

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn cifar10_is_whole() {
    for (split, len) in [("train", 50_000), ("test", 10_000)] {
        let set = ClassFolder::open(assets("cifar10").join(split)).unwrap();
        assert_eq!((set.len(), set.class_names().len()), (len, 10));
        assert_eq!(set.classes(len - 1), [ClassId(9)]);
        assert_eq!(set.image(0).unwrap().dimensions(), (32, 32));
    }
}

#[derive(Deserialize)]
struct Golden {
    places: Vec<(u32, u32, usize)>,
    photos: BTreeMap<String, Photo>,
}

#[derive(Deserialize)]
struct Photo {
    size: (u32, u32),
    squash: Sampled,
    #[serde(rename = "center-crop")]
    center_crop: Sampled,
}

#[derive(Deserialize)]
struct Sampled {
    mean: [f64; 3],
    values: Vec<u8>,
}

/// Mean difference of the sampled values, and the largest of the three channel means.
fn difference(image: &RgbImage, places: &[(u32, u32, usize)], golden: &Sampled) -> (f64, f64) {
    let sampled: f64 = places
        .iter()
        .zip(&golden.values)
        .map(|(&(y, x, c), &value)| f64::from(image.get_pixel(x, y).0[c].abs_diff(value)))
        .sum();
    let pixels = f64::from(image.width() * image.height());
    let channel = |c: usize| image.pixels().map(|p| f64::from(p.0[c])).sum::<f64>() / pixels;
    let means = (0..3)
        .map(|c| (channel(c) - golden.mean[c]).abs())
        .fold(0.0, f64::max);
    (sampled / places.len() as f64, means)
}

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn photos_come_out_as_in_pillow() {
    let golden: Golden =
        serde_json::from_str(include_str!("golden/parity.json")).expect("golden file");
    assert_eq!(golden.photos.len(), 24);
    let (mut worst_value, mut worst_mean) = (0.0_f64, 0.0_f64);
    for (name, photo) in &golden.photos {
        let image = read_image(assets("parity").join(name)).unwrap();
        assert_eq!(image.dimensions(), photo.size, "{name}");
        let fits = [
            (ResizeMode::Squash, &photo.squash),
            (ResizeMode::CenterCrop { crop_pct: 0.9 }, &photo.center_crop),
        ];
        for (fit, sampled) in fits {
            let preprocess = Preprocess {
                resize_mode: fit,
                ..Preprocess::new(224, [0.5; 3], [0.5; 3])
            };
            let resized = preprocess.resize(&image).unwrap();
            let (value, mean) = difference(&resized, &golden.places, sampled);
            assert!(value < 1.0 && mean < 0.5, "{name} {fit:?}: {value} {mean}");
            println!("{name} {fit:?}: values {value:.3}, channel means {mean:.3}");
            worst_value = worst_value.max(value);
            worst_mean = worst_mean.max(mean);
        }
    }
    println!("worst photo: values {worst_value:.3}, channel means {worst_mean:.3} grey levels");
}

#[test]
#[ignore = "needs the asset folder: set DEFEND_ASSETS"]
fn a_folder_is_read_in_batches() {
    let folder: Arc<dyn Dataset> = Arc::new(ImageFolder::open(assets("imagenet-sample")).unwrap());
    let preprocess = Preprocess::new(224, [0.5; 3], [0.5; 3]);
    let indices: Vec<usize> = (0..folder.len()).collect();
    let batches = Batches::new(folder, indices.clone(), preprocess, 32).unwrap();
    let read: Vec<usize> = batches
        .flat_map(|batch| {
            assert!(batch.failures.is_empty(), "{:?}", batch.failures);
            batch.indices
        })
        .collect();
    assert_eq!(read, indices);
    assert_eq!(read.len(), 1000);
}
