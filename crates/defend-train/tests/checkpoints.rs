//! A run that is stopped anywhere and resumed ends with the bits of one that was not.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use candle_core::{Device, Tensor, Var};
use defend_nn::{Rng, normal};
use defend_train::{
    AdamW, AdamWConfig, Checkpoints, Error, MovingAverage, ParameterGroup, Training, TrainingPlan,
    TrainingReport, TrainingStage, TrainingStep, train,
};

const PLAN: TrainingPlan = TrainingPlan {
    images: 10,
    batch_size: 4,
    epochs: 3,
};

/// Follows targets with noise from the run's generator; fails at a step that a test chooses.
struct Follow {
    weight: Var,
    average: MovingAverage,
    targets: Tensor,
    stop_at: Option<usize>,
    /// An image whose loss or gradient is not finite.
    poison: Option<(usize, Poison)>,
    steps: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Poison {
    Loss,
    Gradient,
}

impl Follow {
    fn new(stop_at: Option<usize>) -> (Self, AdamW) {
        let mut rng = Rng::seed(1);
        let weight = normal((3, 2), 1.0, &mut rng, &Device::Cpu).unwrap();
        let weight = Var::from_tensor(&weight).unwrap();
        let parameters = vec![("weight".to_owned(), weight.clone())];
        let average = MovingAverage::new(0.5, parameters.clone()).unwrap();
        let group = ParameterGroup {
            parameters,
            learning_rate: 0.1,
            weight_decay: 0.01,
        };
        let stage = Self {
            weight,
            average,
            targets: normal((10, 3, 2), 1.0, &mut rng, &Device::Cpu).unwrap(),
            stop_at,
            poison: None,
            steps: 0,
        };
        let optimiser = AdamW::new(vec![group], AdamWConfig::default()).unwrap();
        (stage, optimiser)
    }

    fn run(
        stop_at: Option<usize>,
        checkpoints: Option<&Checkpoints>,
    ) -> Result<(TrainingReport, Vec<f32>), Error> {
        Self::run_poisoned(stop_at, None, checkpoints)
    }

    fn run_poisoned(
        stop_at: Option<usize>,
        poison: Option<(usize, Poison)>,
        checkpoints: Option<&Checkpoints>,
    ) -> Result<(TrainingReport, Vec<f32>), Error> {
        let (mut stage, mut optimiser) = Self::new(stop_at);
        stage.poison = poison;
        let (mut rng, mut on_step) = (Rng::seed(2), |_| ControlFlow::Continue(()));
        let training = Training::new(&mut rng, &mut on_step).with_checkpoints(checkpoints);
        let report = train(&mut stage, &mut optimiser, &PLAN, training)?;
        let mut values = stage.weight.flatten_all()?.to_vec1::<f32>()?;
        for (_, average) in stage.average.state() {
            values.extend(average.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok((report, values))
    }
}

impl TrainingStage for Follow {
    type Error = Error;

    fn loss(&mut self, indices: &[usize], rng: &mut Rng) -> Result<Tensor, Error> {
        if self.stop_at == Some(self.steps) {
            return Err(candle_core::Error::Msg("stopped".into()).into());
        }
        self.steps += 1;
        let poison = self.poison.filter(|(image, _)| indices.contains(image));
        let indices: Vec<u32> = indices.iter().map(|&i| i as u32).collect();
        let targets = self
            .targets
            .index_select(&Tensor::new(indices, &Device::Cpu)?, 0)?;
        let noise = normal(targets.dims(), 0.1, rng, &Device::Cpu)?;
        let away = (targets + noise)?.broadcast_sub(&self.weight)?;
        let loss = away.sqr()?.mean_all()?;
        Ok(match poison {
            None => loss,
            Some((_, Poison::Loss)) => (loss / 0.0)?,
            // The root of 0 is finite and its slope is not.
            Some((_, Poison::Gradient)) => {
                let none = (self.weight.as_tensor() - self.weight.as_tensor().detach())?;
                (loss + none.sqr()?.sum_all()?.sqrt()?)?
            }
        })
    }

    fn after_step(&mut self) -> Result<(), Error> {
        Ok(self.average.update()?)
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>, Error> {
        Ok(self.average.state().into_iter().collect())
    }

    fn restore(&mut self, mut state: BTreeMap<String, Tensor>) -> Result<(), Error> {
        Ok(self.average.restore(&mut state)?)
    }
}

fn checkpoints(path: &Path, run: &str) -> Checkpoints {
    Checkpoints::new(path, run).every(Duration::ZERO)
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() -> Result<(), Error> {
    let whole = Follow::run(None, None)?;
    assert_eq!(whole.0.steps, 9);
    for stop in 0..9 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let saved = checkpoints(&path, "run");
        assert!(Follow::run(Some(stop), Some(&saved)).is_err());
        assert_eq!(path.exists(), stop > 0);
        // Twice: stopped again at once, then to the end.
        let resumed = saved.resuming(true);
        assert!(Follow::run(Some(0), Some(&resumed)).is_err());
        assert_eq!(
            Follow::run(None, Some(&resumed))?,
            whole,
            "stopped at {stop}"
        );
        // What is over stays so.
        assert_eq!(Follow::run(Some(0), Some(&resumed))?, whole);
    }
    Ok(())
}

/// Whoever watches may stop a run at any step; what was saved then goes on to the same bits.
#[test]
fn a_run_that_is_stopped_saves_itself() -> Result<(), Error> {
    let whole = Follow::run(None, None)?;
    for last in 1..9 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        // No checkpoint would be due by time.
        let saved = Checkpoints::new(&path, "run").every(Duration::from_hours(1));
        let (mut stage, mut optimiser) = Follow::new(None);
        let (mut rng, mut on_step) = (Rng::seed(2), |step: TrainingStep| {
            if step.step == last {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let training = Training::new(&mut rng, &mut on_step).with_checkpoints(Some(&saved));
        let stopped = train(&mut stage, &mut optimiser, &PLAN, training);
        assert!(matches!(stopped, Err(Error::Stopped { step }) if step == last));
        assert!(path.exists(), "{last}");
        assert_eq!(
            Follow::run(None, Some(&saved.resuming(true)))?,
            whole,
            "{last}"
        );
    }
    Ok(())
}

#[test]
fn saving_changes_nothing() -> Result<(), Error> {
    let folder = tempfile::tempdir().unwrap();
    let seldom = Checkpoints::new(folder.path().join("run"), "run");
    assert_eq!(Follow::run(None, Some(&seldom))?, Follow::run(None, None)?);
    Ok(())
}

#[test]
fn a_checkpoint_of_another_run_is_refused_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    assert!(Follow::run(Some(4), Some(&checkpoints(&path, "run"))).is_err());
    let before = std::fs::read(&path).unwrap();
    let refusal = |checkpoints: Checkpoints| {
        let error = Follow::run(None, Some(&checkpoints)).unwrap_err();
        assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
        error.to_string()
    };
    assert!(refusal(checkpoints(&path, "run")).contains("it is there already"));
    let other = checkpoints(&path, "another seed").resuming(true);
    assert!(refusal(other).contains("other settings"));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    std::fs::write(&path, &before[..before.len() - 1]).unwrap();
    let damaged = checkpoints(&path, "run").resuming(true);
    assert!(refusal(damaged).contains("checksum"));
    for bit in (0..8 * before.len()).step_by(8 * before.len() / 1000) {
        let mut changed = before.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, changed).unwrap();
        let damaged = checkpoints(&path, "run").resuming(true);
        let text = refusal(damaged);
        assert!(
            text.contains("damaged") || text.contains("cut short"),
            "bit {bit}: {text}"
        );
    }
}

#[test]
fn what_is_not_finite_is_told_with_its_images_after_saving() {
    let folder = tempfile::tempdir().unwrap();
    for (number, kind) in [Poison::Loss, Poison::Gradient].into_iter().enumerate() {
        let path = folder.path().join(number.to_string());
        // Saved by time alone, there would be nothing.
        let seldom = || Checkpoints::new(&path, "run").every(Duration::from_hours(1));
        let error = Follow::run_poisoned(None, Some((7, kind)), Some(&seldom())).unwrap_err();
        let batch = error.batch().unwrap();
        assert!(batch.contains(&7) && batch.len() <= 4, "{error}");
        match (kind, &error) {
            (Poison::Loss, Error::Diverged { .. }) => {}
            (Poison::Gradient, Error::NonFiniteGradient { parameter, .. }) => {
                assert_eq!(parameter, "weight");
            }
            _ => panic!("{error}"),
        }
        // With a sound image in its place the run ends as if nothing had been.
        let resumed = Follow::run(None, Some(&seldom().resuming(true))).unwrap();
        assert_eq!(resumed, Follow::run(None, None).unwrap());
    }
}
