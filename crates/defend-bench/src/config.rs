//! What a benchmark runs, as a TOML file says it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use defend_baselines::MethodConfig;
use defend_core::data::{ImageFolder, ResizeMode};
use defend_core::vit::Pretrained;
use defend_core::{Background, BackgroundSource};
use serde::{Deserialize, Serialize};

use crate::{DataConfig, Error, ProtocolConfig};

/// A whole benchmark: every method on every experiment of every data set, for every seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BenchConfig {
    /// Folder that relative paths of data sets and weights begin in; records name them without it.
    #[serde(skip)]
    pub root: PathBuf,
    /// Folder for records, splits and reports.
    pub output: PathBuf,
    /// Weights of the teacher: a file, a folder with `config.json`, `embedded`, or with the feature `hub` a model id such as
    /// `hub:timm/vit_base_patch16_224.augreg_in21k`.
    pub backbone: PathBuf,
    /// Seeds of the methods.
    #[serde(default = "one_seed")]
    pub seeds: Vec<u64>,
    /// How images become square.
    #[serde(default)]
    #[serde(alias = "fit")]
    pub resize_mode: ResizeMode,
    /// Folder that keeps the teacher's features between runs; memory only without it.
    #[serde(default)]
    pub features: Option<PathBuf>,
    /// Ordinary photos that this library's closed form contrasts with: a file of `defend background` or a folder of photos.
    #[serde(default)]
    pub background: Option<PathBuf>,
    /// Limit of the memory for the teacher's features, GiB.
    #[serde(default = "four")]
    pub feature_memory_gib: f64,
    /// The data sets.
    pub data: Vec<DataEntry>,
    /// The methods, the first of them is the one that others are compared with.
    #[serde(alias = "systems")]
    pub methods: Vec<MethodEntry>,
}

fn one_seed() -> Vec<u64> {
    vec![0]
}

fn four() -> f64 {
    4.0
}

/// A data set with its protocols.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataEntry {
    /// Name for tables and files.
    pub name: String,
    /// Where it is and what layout it has.
    pub source: DataConfig,
    /// What is normal.
    pub protocols: Vec<ProtocolConfig>,
    /// A part of it, where the whole is too much.
    #[serde(default)]
    pub subset: Subset,
}

/// A part of a data set: a seeded sample in the proportions of its classes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Subset {
    /// Training images of each experiment, at most.
    pub train: Option<usize>,
    /// Test images of the data set, at most; all experiments share them.
    pub test: Option<usize>,
    /// Seed of the choice.
    pub seed: u64,
    /// Whether each of the benchmark's seeds has a training sample of its own, drawn with [`Subset::seed`] plus that seed. The
    /// test images stay.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub redraw: bool,
}

impl Subset {
    /// Seed of the training sample of a run.
    pub(crate) fn train_seed(self, seed: u64) -> u64 {
        self.seed + if self.redraw { seed } else { 0 }
    }
}

/// A method under a name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MethodEntry {
    /// Name for tables and files, so that two variants of one method stand in one table; the method's own without it.
    #[serde(default, alias = "label", skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Protocols and data sets that it runs on, such as `voc` or `one-vs-all`; everything without it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub only: Vec<String>,
    /// Those of the benchmark's seeds that it runs with; all without it. For methods that take long.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seeds: Vec<u64>,
    /// The method and its settings.
    #[serde(flatten)]
    pub config: MethodConfig,
}

impl MethodEntry {
    /// Name for tables and files.
    pub fn name(&self) -> String {
        let own = || self.config.method().name();
        self.name.clone().unwrap_or_else(own)
    }

    /// Whether it runs on a protocol of a data set.
    pub fn runs_on(&self, data: &str, protocol: &str) -> bool {
        self.only.is_empty()
            || self
                .only
                .iter()
                .any(|name| name == data || name == protocol)
    }

    /// Whether it runs with a seed.
    pub fn runs_with(&self, seed: u64) -> bool {
        self.seeds.is_empty() || self.seeds.contains(&seed)
    }
}

impl BenchConfig {
    /// Reads a TOML file. Relative paths of data sets and weights are relative to `root`, the file's own folder
    /// without it; that of the output is left as it is.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Config`] with the parser's place and reason, or what has no meaning.
    pub fn read(path: &Path, root: Option<&Path>) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path, "reading"))?;
        Self::parse(&text, path, root)
    }

    /// As [`BenchConfig::read`], from the content of the file `path`.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn parse(text: &str, path: &Path, root: Option<&Path>) -> Result<Self, Error> {
        let fault = |reason: String| Error::Config {
            path: path.into(),
            reason,
        };
        let mut config: Self = toml::from_str(text).map_err(|e| fault(e.to_string()))?;
        let own = path.parent().unwrap_or(Path::new("."));
        root.unwrap_or(own).clone_into(&mut config.root);
        config.check().map_err(fault)?;
        Ok(config)
    }

    /// Where the teacher's weights come from.
    ///
    /// # Errors
    /// [`Error::Vit`] for a model id that cannot be one, and for a path where nothing is.
    pub(crate) fn weights(&self) -> Result<Pretrained, Error> {
        let name = self.backbone.to_string_lossy();
        Ok(if self.backbone == Path::new(EMBEDDED) {
            defend_core::embedded_backbone()
        } else if name.starts_with("hub:") {
            Pretrained::parse(&name)?
        } else {
            Pretrained::local(self.root.join(&self.backbone))
        })
    }

    /// The background, read or to be looked at by the teacher.
    pub(crate) fn background(&self) -> Result<BackgroundSource, Error> {
        let Some(path) = &self.background else {
            return Ok(BackgroundSource::None);
        };
        let whole = self.root.join(path);
        if !whole.is_dir() {
            return Ok(Background::load(whole)?.into());
        }
        let photos = ImageFolder::open(&whole).map_err(defend_core::Error::from)?;
        Ok(BackgroundSource::Photos(
            Arc::new(photos),
            path.display().to_string(),
        ))
    }

    fn check(&self) -> Result<(), String> {
        let lists = [
            ("data", self.data.len()),
            ("methods", self.methods.len()),
            ("seeds", self.seeds.len()),
        ];
        if let Some((field, _)) = lists.iter().find(|(_, len)| *len == 0) {
            return Err(format!("{field} is empty, expected at least one entry"));
        }
        let unique = |kind: &str, names: Vec<String>| match names
            .iter()
            .enumerate()
            .find(|(i, name)| names[..*i].contains(name))
        {
            Some((_, name)) => Err(format!(
                "two {kind} are called \"{name}\", give one another name"
            )),
            None => Ok(()),
        };
        unique(
            "data sets",
            self.data.iter().map(|d| d.name.clone()).collect(),
        )?;
        unique(
            "methods",
            self.methods.iter().map(MethodEntry::name).collect(),
        )?;
        let seeds = |seeds: &[u64]| {
            let twice = seeds
                .iter()
                .enumerate()
                .find(|(i, seed)| seeds[..*i].contains(seed));
            twice.map(|(_, seed)| *seed)
        };
        let all_seeds = self.methods.iter().map(|method| method.seeds.as_slice());
        if let Some(seed) = std::iter::once(self.seeds.as_slice())
            .chain(all_seeds)
            .find_map(seeds)
        {
            return Err(format!("seed {seed} comes twice, expected each once"));
        }
        if !(self.feature_memory_gib >= 0.0 && self.feature_memory_gib.is_finite()) {
            return Err(format!(
                "feature_memory_gib is {}, expected 0 or more",
                self.feature_memory_gib
            ));
        }
        let places = self.data.iter().flat_map(|data| {
            let protocols = data.protocols.iter().map(|p| p.name().to_owned());
            std::iter::once(data.name.clone()).chain(protocols)
        });
        let places: std::collections::BTreeSet<String> = places.collect();
        for method in &self.methods {
            if let Some(unknown) = method.only.iter().find(|name| !places.contains(*name)) {
                return Err(format!(
                    "method \"{}\" runs only on \"{unknown}\", which is none of the data sets and protocols: {}",
                    method.name(),
                    places.into_iter().collect::<Vec<_>>().join(", ")
                ));
            }
        }
        let mut protocols = self.data.iter().flat_map(|data| &data.protocols);
        if self.resize_mode != ResizeMode::Squash && protocols.any(ProtocolConfig::judges_objects) {
            return Err(
                "the protocol \"objects\" needs resize_mode = \"squash\", whose maps lie over the whole image"
                    .into(),
            );
        }
        for method in &self.methods {
            let unknown = method.seeds.iter().find(|seed| !self.seeds.contains(seed));
            if let Some(seed) = unknown {
                return Err(format!(
                    "seed {seed} of method \"{}\" is none of the benchmark's seeds {:?}",
                    method.name(),
                    self.seeds
                ));
            }
        }
        Ok(())
    }
}

/// In place of a path: the small backbone inside the program.
const EMBEDDED: &str = "embedded";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]

    use super::*;

    const GOOD: &str = r#"
        output = "out"
        backbone = "embedded"
        [[data]]
        name = "cameras"
        source = { kind = "class-folders", train = "a/train", test = "a/test" }
        protocols = [{ kind = "one-vs-all" }, { kind = "normal-sets", sets = [["dog", "cat"]] }]
        subset = { train = 100 }
        [[methods]]
        kind = "defend"
        recipe = "paper"
        [[methods]]
        kind = "patch-core"
        share = 0.01
        only = ["cameras"]
        seeds = [0]
    "#;

    fn read(text: &str) -> Result<BenchConfig, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bench.toml");
        std::fs::write(&path, text).unwrap();
        let config = BenchConfig::read(&path, None)?;
        assert_eq!(config.root, folder.path());
        Ok(config)
    }

    #[test]
    fn a_configuration_in_full() {
        let config = read(GOOD).unwrap();
        assert_eq!(
            (config.seeds.as_slice(), config.data[0].subset.train),
            (&[0][..], Some(100))
        );
        assert_eq!(config.backbone, Path::new("embedded"));
        assert_eq!(config.methods[1].name(), "PatchCore");
        assert!(config.methods[1].runs_on("cameras", "one-vs-all"));
        assert!(!config.methods[1].runs_on("voc", "one-vs-all"));
        assert!(config.methods[1].runs_with(0) && !config.methods[1].runs_with(1));
        assert!(config.methods[0].runs_with(1));
    }

    #[cfg(feature = "hub")]
    #[test]
    fn a_model_id_is_no_path() {
        let config = read(&GOOD.replace("embedded", "hub:timm/vit_base")).unwrap();
        assert_eq!(config.backbone, Path::new("hub:timm/vit_base"));
        assert!(
            matches!(config.weights(), Ok(Pretrained::Hub { model, .. }) if model == "timm/vit_base")
        );
    }

    #[test]
    fn faults_say_where() {
        let fails = |from: &str, to: &str, reason: &str| {
            let error = read(&GOOD.replace(from, to)).unwrap_err().to_string();
            assert!(
                error.contains("bench.toml") && error.contains(reason),
                "{error}"
            );
        };
        fails("kind = \"patch-core\"", "kind = \"csi\"", "csi");
        fails("output", "outputs", "outputs");
        let objects = GOOD.replace("one-vs-all\" }", "objects\" }");
        assert!(read(&objects).is_ok());
        let cropped = "fit = { center-crop = { crop_pct = 0.9 } }\nbackbone";
        let error = read(&objects.replace("backbone", cropped)).unwrap_err();
        assert!(error.to_string().contains("needs resize_mode"), "{error}");
        fails("share = 0.01", "shares = 0.01", "shares");
        fails(
            "seeds = [0]",
            "seeds = [3]",
            "seed 3 of method \"PatchCore\"",
        );
        fails(
            "kind = \"patch-core\"\n        share = 0.01",
            "kind = \"defend\"\n        recipe = \"paper\"",
            "two methods",
        );
    }
}
