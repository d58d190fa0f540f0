//! `defend suspects`

use std::io::stdout;

use anyhow::Result;
use defend_core::{Defend, Detector, SuspectImage};
use serde::Serialize;

use crate::arguments::Suspects;
use crate::exit::Exit;
use crate::images::find;
use crate::progress::Progress;
use crate::say::say;
use crate::table::{Table, escaped};

pub(crate) fn run(arguments: &Suspects) -> Result<Exit> {
    let detector = match &arguments.model {
        Some(model) => arguments.common.load(model)?,
        None => of_folder(arguments)?,
    };
    let suspects = detector.suspects(arguments.count)?;
    let mut table = Table::new(arguments.format, stdout().lock());
    for suspect in &suspects {
        let row = Row::new(suspect);
        let text = format!(
            "{}\t{}\t{}",
            row.score,
            escaped(row.path),
            escaped(row.nearest)
        );
        table.row(&text, &row)?;
    }
    if suspects.is_empty() {
        say!("all images are near copies of one: there is nothing to compare");
    }
    Ok(Exit::default())
}

/// What the images of a folder say of each other.
fn of_folder(arguments: &Suspects) -> Result<Detector> {
    let normal = find(&arguments.normal, arguments.common.strict, None)?
        .distinct()
        .dataset();
    let mut builder = Defend::builder()
        .device(arguments.common.device()?)
        .strict(arguments.common.strict);
    if let Some(weights) = arguments.backbone.weights()? {
        builder = builder.teacher(weights);
    }
    Ok(builder.fit(normal, &mut Progress::new())?.detector)
}

#[derive(Serialize)]
struct Row<'a> {
    path: &'a str,
    /// What it scores when it is left out.
    score: f64,
    /// Share of all that score at least as much.
    rank: f64,
    /// Near copies, itself included.
    copies: usize,
    /// The other image that explains it most, and how much of all.
    nearest: &'a str,
    nearest_share: f64,
}

impl<'a> Row<'a> {
    fn new(suspect: &'a SuspectImage) -> Self {
        let nearest = suspect.nearest.first();
        Self {
            path: &suspect.name,
            score: suspect.score,
            rank: suspect.rank,
            copies: suspect.copies,
            nearest: nearest.map_or("-", |near| &near.name),
            nearest_share: nearest.map_or(0.0, |near| near.share),
        }
    }
}
