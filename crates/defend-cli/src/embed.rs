//! `defend embed`

use std::path::Path;

use anyhow::{Context, Result, bail};
use defend_core::{Device, FeatureTable, ProgressBar, Tensor};
use serde::Serialize;

use crate::arguments::Embed;
use crate::images::{check_writable, find};

pub(crate) fn run(arguments: &Embed) -> Result<()> {
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
    check_writable(&arguments.out)?;
    let images = find(&arguments.paths, arguments.look.common.strict)?.dataset();
    let (table, skipped) = arguments
        .look
        .builder()
        .embed(images, &mut ProgressBar::new())?;
    match extension {
        Some("npy") => write_npy(&table, &arguments.out)?,
        #[cfg(feature = "parquet")]
        Some("parquet") => crate::parquet::write(&table, &arguments.out)?,
        _ => table.save(&arguments.out)?,
    }
    eprintln!(
        "wrote {}: {} images by {}, {} could not be read",
        arguments.out.display(),
        table.len(),
        table.teacher(),
        skipped.len()
    );
    Ok(())
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
