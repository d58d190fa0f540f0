//! What is kept of a run: one JSON file.

use std::path::{Path, PathBuf};

use defend_baselines::MethodConfig;
use defend_core::data::ResizeMode;
use defend_core::vit::Grid;
use defend_core::{Device, MapScale, PatchMap};
use serde::{Deserialize, Serialize};

use crate::{DataConfig, Error, Subset};

/// One method fitted and scored in one experiment with one seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What was run; equal for equal runs.
    pub key: RunKey,
    /// Where the data set was, below the root of the configuration.
    pub source: DataConfig,
    /// Where the teacher's weights were, likewise.
    pub backbone: PathBuf,
    /// Place of the experiment and of the method in the configuration, for the order in tables.
    pub order: [usize; 2],
    /// What differs from the method's paper.
    pub deviations: String,
    /// Version and commit of this software, and what it ran on.
    pub software: Software,
    /// When the run ended, seconds since 1970.
    pub finished: u64,
    /// Seconds of the fit, reading included.
    pub fit_seconds: f64,
    /// Seconds of scoring all test images.
    pub score_seconds: f64,
    /// Training images.
    pub train_images: usize,
    /// The figures of merit.
    pub figures: Figures,
    /// Every test image.
    pub scores: Vec<Scored>,
    /// The worst errors with their maps, where the method has maps.
    pub worst: Vec<Worst>,
    /// How map values become colours: usual values over the test images.
    pub map_scale: Option<MapScale>,
}

/// What makes a run another run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunKey {
    /// Name of the data set.
    pub data: String,
    /// Name of the protocol.
    pub protocol: String,
    /// Name of the experiment.
    pub experiment: String,
    /// Normal classes, or the abnormal one.
    pub classes: Vec<String>,
    /// The part of the data set.
    pub subset: Subset,
    /// Name of the method.
    #[serde(alias = "system")]
    pub method: String,
    /// Its settings.
    pub settings: MethodConfig,
    /// Hash of the teacher's architecture and weights.
    pub weights: String,
    /// How images became square.
    #[serde(alias = "fit")]
    pub resize_mode: ResizeMode,
    /// [`crate::Split::fingerprint`].
    pub split: String,
    /// Seed of the method.
    pub seed: u64,
}

/// Versions behind a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Software {
    /// Version of this crate.
    pub version: String,
    /// Commit that it was built from.
    pub commit: String,
    /// Architecture and operating system.
    pub platform: String,
    /// `cpu`, `cuda` or `metal`.
    pub device: String,
    /// Threads of the processor.
    pub threads: usize,
}

impl Software {
    pub(crate) fn this(device: &Device) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            commit: env!("DEFEND_COMMIT").into(),
            platform: format!("{} {}", std::env::consts::ARCH, std::env::consts::OS),
            device: match device {
                Device::Cpu => "cpu",
                Device::Cuda(_) => "cuda",
                Device::Metal(_) => "metal",
            }
            .into(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// Figures of merit of a run, `0..=1`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Area under the ROC curve over images.
    pub auroc: f64,
    /// Average precision over images.
    pub average_precision: f64,
    /// Area under the ROC curve over pixels, where the data set has masks and the method maps.
    pub pixel_auroc: Option<f64>,
    /// Per-region overlap up to a false positive rate of 0.3, likewise.
    pub pro: Option<f64>,
    /// Area under the ROC curve over patches in boxes of normal objects and of others, of all images, where the protocol asks for
    /// it and the method has maps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object_auroc: Option<f64>,
    /// The same within an image, mean over the images that show both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object_auroc_within: Option<f64>,
}

/// A test image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// Position in the test half of the data set.
    pub index: usize,
    /// Name of the image.
    pub name: String,
    /// The truth.
    pub abnormal: bool,
    /// Novelty score.
    pub score: f64,
}

/// An error worth looking at: a normal image that scores high, or an abnormal one that scores low.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Worst {
    /// Place in [`Record::scores`].
    pub place: usize,
    /// Rows and columns of the map.
    pub grid: Option<Grid>,
    /// Its values.
    pub map: Vec<f32>,
}

impl Worst {
    pub(crate) fn patch_map(&self) -> Option<PatchMap> {
        let values = self.map.clone();
        self.grid.map(|grid| PatchMap { grid, values })
    }
}

impl Record {
    /// Reads a record.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Record`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let bytes = std::fs::read(path).map_err(Error::io(path, "reading"))?;
        serde_json::from_slice(&bytes).map_err(|e| Error::Record {
            path: path.into(),
            reason: format!("no record of a run: {e}"),
        })
    }

    /// Writes beside the target and renames: a killed run leaves no half record.
    pub(crate) fn write(&self, path: &Path) -> Result<(), Error> {
        write_json(path, self)
    }

    /// All records of some benchmarks' output folders, in the order of the folders and of their configurations. A run
    /// that several have counts once.
    ///
    /// A damaged record is left out, and `left_out` hears of it.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Record`] for two records of one name with other settings; [`Error::NoRuns`] for a folder
    /// without any.
    pub fn read_all(
        outputs: &[&Path],
        left_out: &mut dyn FnMut(&Error),
    ) -> Result<Vec<Self>, Error> {
        let mut all: Vec<Self> = Vec::new();
        for output in outputs {
            let mut paths = Vec::new();
            list(&output.join(RUNS), &mut paths)?;
            paths.sort_unstable();
            let mut records = Vec::new();
            for path in paths {
                match Self::read(&path) {
                    Ok(record) => records.push((path, record)),
                    Err(damaged @ Error::Record { .. }) => left_out(&damaged),
                    Err(error) => return Err(error),
                }
            }
            if records.is_empty() {
                return Err(Error::NoRuns {
                    path: (*output).into(),
                });
            }
            records.sort_by_key(|(_, record)| (record.order, record.key.seed));
            for (path, record) in records {
                let same = |known: &&Self| known.key.name() == record.key.name();
                if all.iter().any(|known| !known.key.fits_beside(&record.key)) {
                    return Err(Error::Record {
                        path,
                        reason: "another run of this experiment has other images, other weights or another resize mode: \
                                 give the data set another name"
                            .into(),
                    });
                }
                match all.iter().find(same) {
                    None => all.push(record),
                    Some(known) if known.key == record.key => {}
                    Some(_) => {
                        return Err(Error::Record {
                            path,
                            reason: "another folder has a run of the same name with other settings: give \
                                     the method another name"
                                .into(),
                        });
                    }
                }
            }
        }
        Ok(all)
    }
}

/// Folder of the records in a benchmark's output.
const RUNS: &str = "runs";

fn list(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<(), Error> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(folder, "listing")(error)),
    };
    for entry in entries {
        let path = entry.map_err(Error::io(folder, "listing"))?.path();
        if path.is_dir() {
            list(&path, paths)?;
        } else if path.extension().is_some_and(|e| e == "json") {
            paths.push(path);
        }
    }
    Ok(())
}

impl RunKey {
    /// What tables and files call the run.
    fn name(&self) -> (&str, &str, &str, &str, u64) {
        (
            &self.data,
            &self.protocol,
            &self.experiment,
            &self.method,
            self.seed,
        )
    }

    /// Whether both may stand in one table: another experiment, or the same images, teacher and resize mode.
    fn fits_beside(&self, other: &Self) -> bool {
        // Of a sample that is drawn again for each seed, each seed is an experiment of its own.
        let draw = |key: &Self| if key.subset.redraw { key.seed } else { 0 };
        let experiment = (&self.data, &self.protocol, &self.experiment, draw(self));
        let basis = (&self.split, &self.weights, self.resize_mode);
        experiment != (&other.data, &other.protocol, &other.experiment, draw(other))
            || basis == (&other.split, &other.weights, other.resize_mode)
    }

    /// Where the record of this run belongs.
    pub(crate) fn path(&self, output: &Path) -> PathBuf {
        let folder = output
            .join(RUNS)
            .join(file_name(&self.data))
            .join(&self.protocol)
            .join(file_name(&self.experiment));
        folder.join(format!(
            "{}-seed{}.json",
            file_name(&self.method),
            self.seed
        ))
    }
}

/// A name as a file's, without what file systems or shells mind.
///
/// Long names, such as a normal set of forty classes, are cut and told apart by a hash.
pub(crate) fn file_name(name: &str) -> String {
    const LONGEST: usize = 60;
    let safe = |c: char| {
        if c.is_alphanumeric() || "+-_.".contains(c) {
            c
        } else {
            '-'
        }
    };
    let all: String = name.chars().map(safe).collect();
    if all.chars().count() <= LONGEST {
        return all;
    }
    let start: String = all.chars().take(LONGEST - 9).collect();
    let hash = blake3::hash(name.as_bytes()).to_hex();
    format!("{start}-{}", &hash[..8])
}

pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(Error::io(folder, "making the folder"))?;
    let bytes = serde_json::to_vec(value).map_err(|e| Error::Record {
        path: path.into(),
        reason: e.to_string(),
    })?;
    defend_files::write(path, &bytes).map_err(Error::io(path, "writing"))
}
