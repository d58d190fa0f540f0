//! A training run in a file: what it takes to go on from a step to the same bits.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use defend_nn::{Position, Rng};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use crate::{AdamW, Error};

/// Metadata key of everything but the tensors.
const KEY: &str = "defend.checkpoint";
/// Raised whenever files of an older version would be read wrongly.
const FORMAT_VERSION: u32 = 1;
/// Names of the stage's own tensors begin so.
const STAGE: &str = "stage.";

/// Where a run is saved and how often.
///
/// A checkpoint holds the parameters, the optimiser's moments, the generator, the place in the epoch's order and what the stage keeps
/// beside. It is replaced at once or not at all: a run that is killed while it saves leaves the checkpoint before.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    path: PathBuf,
    run: String,
    every: Duration,
    resume: bool,
}

impl Checkpoints {
    /// Checkpoints in the file `path`. `run` says which run it is: all that its bits depend on, as settings, seed, images and the
    /// networks that it starts from. A run with another text does not go on from them.
    pub fn new(path: impl Into<PathBuf>, run: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            run: run.into(),
            every: Duration::from_mins(10),
            resume: false,
        }
    }

    /// Saves whenever so much time has passed since the last time; ten minutes without it. Zero saves after every step.
    #[must_use]
    pub fn every(mut self, interval: Duration) -> Self {
        self.every = interval;
        self
    }

    /// Goes on from the file if there is one. Without it a run refuses to start over a checkpoint.
    #[must_use]
    pub fn resuming(mut self, resume: bool) -> Self {
        self.resume = resume;
        self
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn timer(&self) -> Timer {
        Timer {
            every: self.every,
            last: Instant::now(),
        }
    }

    /// Writes where a run is.
    pub(crate) fn save(
        &self,
        progress: &Progress,
        optimiser: &AdamW,
        state: &BTreeMap<String, Tensor>,
    ) -> Result<(), Error> {
        let mut tensors = BTreeMap::new();
        for (name, var) in optimiser.variables() {
            tensors.insert(name, var.as_tensor().to_device(&Device::Cpu)?.contiguous()?);
        }
        for (name, tensor) in state {
            let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
            tensors.insert(format!("{STAGE}{name}"), tensor);
        }
        let header = Header {
            format_version: FORMAT_VERSION,
            run: self.run.clone(),
            steps: optimiser.steps(),
            progress: progress.clone(),
        };
        let wrong = |reason: String| self.wrong(reason);
        let json = serde_json::to_string(&header).map_err(|e| wrong(e.to_string()))?;
        let metadata = Some(HashMap::from([(KEY.to_owned(), json)]));
        let bytes = safetensors::serialize(&tensors, metadata).map_err(|e| wrong(e.to_string()))?;
        let sealed = defend_files::seal(&bytes);
        let written = sealed.and_then(|bytes| defend_files::write(&self.path, &bytes));
        written.map_err(|source| self.io("writing", source))
    }

    /// Brings the optimiser's parameters to where the file was written; `None` without a file.
    pub(crate) fn resume(&self, optimiser: &mut AdamW) -> Result<Option<Resumed>, Error> {
        let bytes = match std::fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(self.io("reading", source)),
        };
        if !self.resume {
            return Err(self.wrong(
                "it is there already: resume the run, or remove the file to start anew".into(),
            ));
        }
        let header = header_of(&bytes).map_err(|reason| self.wrong(reason))?;
        if header.run != self.run {
            let reason = "it is of a run with other settings, images or networks";
            return Err(self.wrong(reason.into()));
        }
        let mut tensors: BTreeMap<String, Tensor> =
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
                .map_err(|e| self.wrong(e.to_string()))?
                .into_iter()
                .collect();
        let mut values = Vec::new();
        // All is looked at before anything is changed.
        for (name, var) in optimiser.variables() {
            let Some(value) = tensors.remove(&name) else {
                return Err(self.wrong(format!("tensor \"{name}\" is missing")));
            };
            if value.shape() != var.shape() || value.dtype() != var.dtype() {
                return Err(self.wrong(format!(
                    "tensor \"{name}\" is {:?} of shape {:?}, expected {:?} of shape {:?}",
                    value.dtype(),
                    value.dims(),
                    var.dtype(),
                    var.dims()
                )));
            }
            values.push(value);
        }
        for ((_, var), value) in optimiser.variables().into_iter().zip(values) {
            var.set(&value.to_device(var.device())?)?;
        }
        optimiser.set_steps(header.steps);
        let mut state = BTreeMap::new();
        for (name, tensor) in tensors {
            match name.strip_prefix(STAGE) {
                Some(name) => state.insert(name.to_owned(), tensor),
                None => return Err(self.wrong(format!("unexpected tensor \"{name}\""))),
            };
        }
        Ok(Some(Resumed {
            progress: header.progress,
            state,
        }))
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Checkpoint {
            path: self.path.clone(),
            reason,
        }
    }

    fn io(&self, action: &'static str, source: std::io::Error) -> Error {
        Error::Io {
            path: self.path.clone(),
            action,
            source,
        }
    }
}

fn header_of(bytes: &[u8]) -> Result<Header, String> {
    defend_files::check_seal(bytes, Some(KEY)).map_err(|e| e.to_string())?;
    let (_, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|e| format!("no complete safetensors file: {e}"))?;
    let json = metadata.metadata().as_ref().and_then(|m| m.get(KEY));
    let json = json.ok_or_else(|| format!("no \"{KEY}\" in its metadata"))?;
    let version: Version = serde_json::from_str(json).map_err(|e| format!("{KEY}: {e}"))?;
    if version.format_version != FORMAT_VERSION {
        return Err(format!(
            "format version {}, this library reads version {FORMAT_VERSION}",
            version.format_version
        ));
    }
    serde_json::from_str(json).map_err(|e| format!("{KEY}: {e}"))
}

/// The part of a header that every version has.
#[derive(Deserialize)]
struct Version {
    format_version: u32,
}

#[derive(Serialize, Deserialize)]
struct Header {
    format_version: u32,
    run: String,
    steps: usize,
    progress: Progress,
}

/// What a checkpoint says beside the optimiser's variables.
pub(crate) struct Resumed {
    pub(crate) progress: Progress,
    /// Of the stage.
    pub(crate) state: BTreeMap<String, Tensor>,
}

/// Where a run is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Mean losses of the epochs that are over.
    pub(crate) losses: Vec<f64>,
    /// Sum of the losses of this epoch's images.
    pub(crate) total: f64,
    /// Batches of this epoch that are over.
    pub(crate) batches_done: usize,
    /// The generator before this epoch's order was drawn.
    pub(crate) epoch_start: Position,
    /// The generator now.
    pub(crate) rng: Position,
    pub(crate) last_loss: Option<f64>,
}

impl Progress {
    pub(crate) fn new(rng: &Rng) -> Self {
        Self {
            losses: Vec::new(),
            total: 0.0,
            batches_done: 0,
            epoch_start: rng.position(),
            rng: rng.position(),
            last_loss: None,
        }
    }
}

/// Says when the next checkpoint is due.
pub(crate) struct Timer {
    every: Duration,
    last: Instant,
}

impl Timer {
    /// Whether the interval is over; the next one then begins.
    pub(crate) fn is_over(&mut self) -> bool {
        let over = self.last.elapsed() >= self.every;
        if over {
            self.last = Instant::now();
        }
        over
    }
}
