//! One changed bit anywhere in a file that is read back is found.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod kinds;
mod small;

use std::path::Path;
use std::sync::Arc;

use defend_core::nn::Rng;
use defend_core::prelude::*;
use defend_core::{Background, BackgroundSource, FeatureTable};
use kinds::images;
use rand::RngExt;
use rayon::prelude::*;
use small::teacher;

/// Flips one of the bits at a time, `count` times, and hands each file over; `read` says whether it was taken.
fn flip(file: &Path, count: u64, read: impl Fn(&Path) -> bool + Sync) {
    let whole = std::fs::read(file).unwrap();
    assert!(read(file));
    let folder = tempfile::tempdir().unwrap();
    let taken: Vec<usize> = (0..count)
        .into_par_iter()
        .filter_map(|number| {
            let bit = Rng::stream(1, number).random_range(0..8 * whole.len());
            let mut changed = whole.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            let path = folder.path().join(number.to_string());
            std::fs::write(&path, changed).unwrap();
            let taken = read(&path);
            std::fs::remove_file(&path).unwrap();
            taken.then_some(bit)
        })
        .collect();
    assert!(
        taken.is_empty(),
        "{}: bits {taken:?} of {}",
        file.display(),
        8 * whole.len()
    );
}

/// All bits of the first bytes, where names and sizes are.
fn flip_all_of_the_start(file: &Path, bytes: usize, read: impl Fn(&Path) -> bool) {
    let whole = std::fs::read(file).unwrap();
    let changed_file = file.with_extension("changed");
    for bit in 0..8 * bytes.min(whole.len()) {
        let mut changed = whole.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&changed_file, changed).unwrap();
        assert!(!read(&changed_file), "{}: bit {bit}", file.display());
    }
}

#[test]
fn ten_thousand_flipped_bits_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let photos = BackgroundSource::Photos(Arc::new(images(5, 0..30, 0)), "photos".into());
    let builder = || Defend::builder().teacher(teacher(7));
    let fitted = builder()
        .background(photos)
        .thumbnails(true)
        .fit(images(0, 0..30, 0), &mut Silent)
        .unwrap();
    fitted.detector.save(path("model")).unwrap();
    let background = builder()
        .look_at_background(images(5, 0..30, 0), "photos", &mut Silent)
        .unwrap();
    background.save(path("background")).unwrap();
    let (table, _) = builder().embed(images(0, 0..30, 0), &mut Silent).unwrap();
    table.save(path("features")).unwrap();

    let model = |path: &Path| Detector::load(path, &Device::Cpu).is_ok();
    let background = |path: &Path| Background::load(path).is_ok();
    let features = |path: &Path| FeatureTable::load(path).is_ok();
    flip(&path("model"), 4000, model);
    flip(&path("background"), 3000, background);
    flip(&path("features"), 3000, features);
    flip_all_of_the_start(&path("model"), 200, model);
    flip_all_of_the_start(&path("background"), 200, background);
    flip_all_of_the_start(&path("features"), 200, features);
}
