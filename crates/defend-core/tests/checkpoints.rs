//! A fit that is ended while it trains goes on from its checkpoints, to the same bits.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

mod small;
mod stripes;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use candle_core::Device;
use defend_core::distill::DistillConfig;
use defend_core::nn::Rng;
use defend_core::prelude::*;
use defend_core::vit::TokenSet;
use defend_core::{Error, Event, FitCheckpoints, MaskedConfig, Observer, Stage, Student, Tensor};
use stripes::{set, small_dense};

fn config(seed: u64) -> DefendConfig {
    let distill = DistillConfig {
        epochs: 3,
        min_steps: 0,
        batch_size: 8,
        ..DistillConfig::default()
    };
    DefendConfig {
        seed,
        dense: Some(small_dense()),
        student: Student::Masked(MaskedConfig {
            distill,
            ..MaskedConfig::default()
        }),
        ..DefendConfig::default()
    }
}

/// Ends the process, as far as a test can, after some steps of a stage.
struct Dies {
    stage: Stage,
    steps: usize,
    now: Option<Stage>,
}

impl Observer for Dies {
    fn on(&mut self, event: &Event<'_>) {
        match event {
            Event::Started { stage, .. } => self.now = Some(*stage),
            Event::Advanced { .. } if self.now == Some(self.stage) => {
                self.steps -= 1;
                assert!(self.steps > 0, "the end");
            }
            _ => (),
        }
    }
}

fn fit(
    folder: Option<FitCheckpoints>,
    seed: u64,
    observer: &mut dyn Observer,
) -> Result<Detector, Error> {
    let mut builder = Defend::builder()
        .teacher(small::teacher(7))
        .config(config(seed));
    if let Some(folder) = folder {
        builder = builder.checkpoints(folder);
    }
    Ok(builder.fit(set(3, 21), observer)?.detector)
}

fn every_step(folder: &Path) -> FitCheckpoints {
    FitCheckpoints::new(folder).every(Duration::ZERO)
}

#[test]
fn a_fit_that_is_ended_in_either_stage_goes_on_to_the_same_bits() -> Result<(), Error> {
    let scores = |detector: &Detector| -> Result<Vec<f64>, Error> {
        Ok(scan(detector, set(5, 4), &mut Silent)?.scores())
    };
    let whole = scores(&fit(None, 3, &mut Silent)?)?;
    for (stage, steps) in [(Stage::Dense, 2), (Stage::Distill, 5)] {
        let folder = tempfile::tempdir().unwrap();
        let place = || every_step(folder.path());
        let mut dies = Dies {
            stage,
            steps,
            now: None,
        };
        let ended = catch_unwind(AssertUnwindSafe(|| {
            fit(Some(place()), 3, &mut dies).is_ok()
        }));
        assert!(ended.is_err());
        let again = fit(Some(place()), 3, &mut Silent).err().unwrap();
        assert!(again.to_string().contains("it is there already"), "{again}");
        let other = fit(Some(place().resuming(true)), 4, &mut Silent).err();
        assert!(other.unwrap().to_string().contains("other settings"));
        let resumed = fit(Some(place().resuming(true)), 3, &mut Silent)?;
        assert_eq!(scores(&resumed)?, whole, "{stage:?}");
    }
    Ok(())
}

/// Asks for the end after some images of a stage.
struct Stops {
    stage: Stage,
    images: u64,
    now: Option<Stage>,
}

impl Observer for Stops {
    fn on(&mut self, event: &Event<'_>) {
        match event {
            Event::Started { stage, .. } => self.now = Some(*stage),
            Event::Advanced { images, .. } if self.now == Some(self.stage) => {
                self.images = self.images.saturating_sub(*images);
            }
            _ => (),
        }
    }

    fn stops(&self) -> bool {
        self.now == Some(self.stage) && self.images == 0
    }
}

#[test]
fn an_observer_stops_every_stage() -> Result<(), Error> {
    let detector = fit(None, 3, &mut Silent)?;
    let mut scores = Vec::new();
    for stage in [Stage::Read, Stage::Dense, Stage::Distill, Stage::Score] {
        let mut stops = Stops {
            stage,
            images: 9,
            now: None,
        };
        let error = if stage == Stage::Score {
            scan(&detector, set(5, 40), &mut stops).err()
        } else {
            let folder = tempfile::tempdir().unwrap();
            let place = FitCheckpoints::new(folder.path());
            let error = fit(Some(place), 3, &mut stops).err();
            let place = FitCheckpoints::new(folder.path()).resuming(true);
            let resumed = fit(Some(place), 3, &mut Silent)?;
            scores.push(scan(&resumed, set(5, 4), &mut Silent)?.scores());
            error
        };
        assert!(
            matches!(error, Some(Error::Stopped)),
            "{stage:?}: {error:?}"
        );
    }
    let whole = scan(&detector, set(5, 4), &mut Silent)?.scores();
    assert!(scores.iter().all(|scores| *scores == whole));
    Ok(())
}

#[test]
fn checkpoints_of_a_fit_that_trains_nothing_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let builder = Defend::builder()
        .teacher(small::teacher(7))
        .checkpoints(FitCheckpoints::new(folder.path()));
    let error = builder.fit(set(3, 8), &mut Silent).err().unwrap();
    assert!(matches!(
        error,
        Error::Config {
            field: "checkpoints",
            ..
        }
    ));
}

/// A mask that the settings know nothing of.
struct FirstHalf;

impl defend_core::distill::MaskPolicy for FirstHalf {
    fn keep(
        &self,
        attention: &Tensor,
        grid: defend_core::vit::Grid,
        _: &mut Rng,
    ) -> Result<Option<TokenSet>, defend_core::distill::Error> {
        let kept: Vec<u32> = (0..grid.patches() as u32 / 2).collect();
        let rows = vec![kept; attention.dim(0)?];
        Ok(Some(TokenSet::from_rows(&rows, grid, &Device::Cpu)?))
    }
}

#[test]
fn a_model_says_which_roles_were_custom() -> Result<(), Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let builder = Defend::builder()
        .teacher(small::teacher(7))
        .config(DefendConfig {
            dense: None,
            ..config(3)
        })
        .mask(Box::new(FirstHalf));
    let detector = builder.fit(set(3, 8), &mut Silent)?.detector;
    assert_eq!(detector.custom_roles(), ["mask"]);
    detector.save(&path)?;
    assert_eq!(
        Detector::load(&path, &Device::Cpu)?.custom_roles(),
        ["mask"]
    );
    assert!(fit(None, 3, &mut Silent)?.custom_roles().is_empty());
    Ok(())
}
