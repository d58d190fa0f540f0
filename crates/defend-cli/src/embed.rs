//! `defend embed`

use std::path::Path;

use anyhow::{Context, Result, bail};
use defend_core::{Device, FeatureTable, Tensor};
use serde::Serialize;

use crate::arguments::Embed;
use crate::exit::Exit;
use crate::images::{check_writable, find};
use crate::progress::Progress;
use crate::say::say;

pub(crate) fn run(arguments: &Embed) -> Result<Exit> {
    let extension = arguments.out.extension().and_then(|e| e.to_str());
    if !matches!(extension, Some("safetensors" | "npy" | "parquet")) {
        bail!(
            "{} is no .safetensors, .npy or .parquet, which features can be written as",
            arguments.out.display()
        );
    }
    if extension == Some("parquet") && !cfg!(feature = "parquet") {
        bail!(WITHOUT_PARQUET);
    }
    let images = find(&arguments.paths, arguments.look.common.strict, None)?;
    let out = check_writable(&arguments.out, &images.paths)?;
    let images = images.dataset();
    let (table, skipped) = arguments
        .look
        .builder()?
        .embed(images, &mut Progress::new())?;
    arguments.look.common.check_unreadable(&skipped)?;
    match extension {
        Some("npy") => write_npy(&table, &out)?,
        #[cfg(feature = "parquet")]
        Some("parquet") => crate::parquet::write(&table, &out)?,
        _ => table.save(&out)?,
    }
    say!(
        "wrote {}: {} images by {}, {} could not be read",
        arguments.out.display(),
        table.len(),
        table.teacher(),
        skipped.len()
    );
    Ok(Exit::after_skipping(skipped.len()))
}

const WITHOUT_PARQUET: &str =
    "this program was built without Parquet: build it with --features parquet";

/// A table that was written before.
pub(crate) fn read(path: &Path) -> Result<FeatureTable> {
    if path.extension().is_some_and(|e| e == "parquet") {
        #[cfg(feature = "parquet")]
        return crate::parquet::read(path);
        #[cfg(not(feature = "parquet"))]
        bail!(WITHOUT_PARQUET);
    }
    Ok(FeatureTable::load(path)?)
}

#[derive(Serialize)]
struct Row<'a> {
    path: &'a str,
    hash: &'a str,
}

/// The tokens of each image as one row of unit length, and names and hashes as `<out>.csv`, row by row.
fn write_npy(table: &FeatureTable, out: &Path) -> Result<()> {
    let phi = table.embeddings().phi(1.0).mapv(|value| value as f32);
    let shape = phi.dim();
    Tensor::from_iter(phi, &Device::Cpu)?
        .reshape(shape)?
        .write_npy(out)
        .with_context(|| format!("cannot write {}", out.display()))?;
    let names = out.with_extension("npy.csv");
    let said = || format!("cannot write {}", names.display());
    let mut rows = csv::Writer::from_path(&names).with_context(said)?;
    for (path, hash) in table.names().iter().zip(table.hashes()) {
        rows.serialize(Row { path, hash }).with_context(said)?;
    }
    rows.flush().with_context(said)
}
