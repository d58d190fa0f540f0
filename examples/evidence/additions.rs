//! What images that come one by one cost, beside a fit on all of them.

use std::time::Instant;

use anyhow::Result;
use defend_core::Student;
use defend_core::data::read_image;
use defend_core::prelude::*;

use crate::{Assets, CIFAR, without_patches};

/// Images of the first fit.
const FIRST: usize = 309;

/// Seconds of `count` single additions to a model of [`FIRST`] images, of the refit, and of a fit on all from scratch.
pub(crate) fn measure(assets: &Assets, count: usize) -> Result<()> {
    let classes = &CIFAR[..5];
    let each = (FIRST + count).div_ceil(classes.len());
    let mut paths = Vec::new();
    for class in classes {
        paths.extend(assets.cifar("train", class, each)?);
    }
    paths.truncate(FIRST + count);
    // All classes among the first ones too.
    let (first, more): (Vec<_>, Vec<_>) = paths
        .iter()
        .cloned()
        .enumerate()
        .partition(|(i, _)| i * FIRST / paths.len() != (i + 1) * FIRST / paths.len());
    let files = |numbered: &[(usize, std::path::PathBuf)]| -> Vec<std::path::PathBuf> {
        numbered.iter().map(|(_, path)| path.clone()).collect()
    };
    let (first, more) = (files(&first), files(&more));
    let weights = assets.folder.join("weights/vit_tiny_patch16_224");
    let fit = |paths: Vec<std::path::PathBuf>| -> Result<(Detector, f64)> {
        let start = Instant::now();
        let fitted = Defend::builder()
            .teacher(Pretrained::local(&weights))
            .config(DefendConfig {
                student: Student::ClosedForm(without_patches()),
                ..DefendConfig::default()
            })
            .fit(ImageFolder::from_paths(paths), &mut Silent)?;
        Ok((fitted.detector, start.elapsed().as_secs_f64()))
    };
    let (mut detector, of_first) = fit(first)?;
    let start = Instant::now();
    let mut additions = detector.additions()?;
    for path in &more {
        additions.add(path.display().to_string(), &read_image(path)?)?;
    }
    let adding = start.elapsed().as_secs_f64();
    let start = Instant::now();
    detector.learn_additions(&additions)?;
    let refit = start.elapsed().as_secs_f64();
    let (_, of_all) = fit(paths)?;
    println!(
        "| fit of {FIRST} | {count} single additions | their refit | fit of all {} |",
        FIRST + count
    );
    println!("|---|---|---|---|");
    println!("| {of_first:.1} s | {adding:.1} s | {refit:.2} s | {of_all:.1} s |");
    Ok(())
}
