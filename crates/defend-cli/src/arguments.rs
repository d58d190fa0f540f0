//! What can be said on the command line.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use defend_core::data::{Mask, Region, read_image};
use defend_core::vit::{Family, Pretrained};
use defend_core::{
    Defend, DefendBuilder, DefendConfig, Detector, Device, Recipe, Skipped, best_device,
};
use defend_core::{TileMemory, Tiles};

use crate::exit::usage;
use crate::say::{be_quiet, be_verbose};
use crate::settings;

/// Does this image show what I have called normal, even when other things are in it too?
#[derive(Parser)]
#[command(name = "defend", version)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Learns from a folder of normal images and writes a model.
    Fit(Box<Fit>),
    /// Looks at ordinary photos with a backbone and writes what fits contrast with.
    Background(Background),
    /// Teaches a model more: known abnormal images, further normal ones, or what to forget.
    Extend(Extend),
    /// Names the normal images that the others do not explain, of a model or of a folder.
    Suspects(Suspects),
    /// Scores a folder as a whole: many abnormal images tell what abnormal ones look like.
    Sort(Sort),
    /// Writes what a backbone says of images, for other tools or for `defend fit --features`.
    Embed(Embed),
    /// Chooses a model's threshold from held-out normal images.
    Calibrate(Calibrate),
    /// Prints a line for each image: score, p-value, verdict, path.
    Score(Score),
    /// Writes one page with images sorted by novelty, their maps and what speaks for each score.
    Report(Report),
    /// Measures a model on labelled images.
    Evaluate(Evaluate),
    /// Scores images as they come into a folder.
    Watch(Watch),
    /// Says what a model is and what it was made from.
    Inspect(Inspect),
    /// Whether new normal images still look as those that the model was calibrated on.
    Drift(Drift),
    /// Renders images of everyday objects and does the whole job on them.
    Demo(Demo),
    /// Runs a benchmark of data sets, protocols and methods, and makes its report.
    #[cfg(feature = "bench")]
    Bench(Bench),
    /// Prints the settings of a recipe, to be changed and given to `fit --config`.
    Settings(Settings),
    /// Prints what a shell needs to complete this program's commands and flags.
    Completions(Completions),
    /// Writes manual pages into a folder.
    Man(Man),
}

impl Command {
    /// What the commands have in common.
    pub(crate) fn common(&self) -> Option<&Common> {
        Some(match self {
            Self::Fit(arguments) => &arguments.common,
            Self::Background(arguments) => &arguments.look.common,
            Self::Extend(arguments) => &arguments.common,
            Self::Suspects(arguments) => &arguments.common,
            Self::Sort(arguments) => &arguments.common,
            Self::Embed(arguments) => &arguments.look.common,
            Self::Calibrate(arguments) => &arguments.common,
            Self::Score(arguments) => &arguments.common,
            Self::Report(arguments) => &arguments.common,
            Self::Evaluate(arguments) => &arguments.common,
            Self::Watch(arguments) => &arguments.common,
            Self::Inspect(arguments) => &arguments.common,
            Self::Drift(arguments) => &arguments.common,
            Self::Demo(arguments) => &arguments.common,
            #[cfg(feature = "bench")]
            Self::Bench(arguments) => &arguments.common,
            Self::Settings(_) | Self::Completions(_) | Self::Man(_) => return None,
        })
    }
}

#[cfg(feature = "bench")]
#[derive(Args)]
pub(crate) struct Bench {
    /// What to run, as TOML; see examples/bench. Runs whose records are in its output folder are not repeated.
    pub(crate) config: PathBuf,
    /// Folder that relative paths of data sets and weights start from; the configuration's own without it.
    #[arg(long)]
    pub(crate) root: Option<PathBuf>,
    /// Folder for records and report, in place of the configuration's.
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
    /// Output folder of another benchmark, whose records the report has as well. May be given several times.
    #[arg(long)]
    pub(crate) with: Vec<PathBuf>,
    /// Makes the report from the records that are there, and runs nothing.
    #[arg(long)]
    pub(crate) report_only: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// Which backbone looks at the images.
#[derive(Args)]
pub(crate) struct Backbone {
    /// Pretrained weights: a folder with config.json and weights, a safetensors or PyTorch file, or hub:owner/name, such as
    /// hub:timm/vit_small_patch16_224.augreg_in21k_ft_in1k, which is downloaded once. Without it, the small backbone inside the
    /// program.
    #[arg(long)]
    backbone: Option<String>,
    /// What a weight file without config.json was trained with, such as DINO's and DeiT's .pth files.
    #[arg(long, value_enum, requires = "backbone")]
    family: Option<FamilyName>,
}

#[derive(Clone, Copy, ValueEnum)]
enum FamilyName {
    Augreg,
    Dino,
    Deit,
    Dinov2,
}

impl Backbone {
    /// Where the weights come from; `None` for the embedded ones.
    pub(crate) fn weights(&self) -> Result<Option<Pretrained>> {
        let Some(name) = &self.backbone else {
            return Ok(None);
        };
        let Some(family) = self.family else {
            return Ok(Some(Pretrained::parse(name)?));
        };
        if name.starts_with("hub:") {
            return Err(usage(
                "--family is for weight files: a model of the hub says itself what it was trained with".into(),
            ));
        }
        let family = match family {
            FamilyName::Augreg => Family::Augreg,
            FamilyName::Dino => Family::Dino,
            FamilyName::Deit => Family::Deit,
            FamilyName::Dinov2 => Family::DinoV2,
        };
        Ok(Some(Pretrained::state_dict(name, family)))
    }
}

#[derive(Args)]
pub(crate) struct Fit {
    /// Folder of normal images; its sub-folders count too. May be given several times.
    #[arg(long, required_unless_present = "features")]
    pub(crate) normal: Vec<PathBuf>,
    /// Model file to write.
    #[arg(long)]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) backbone: Backbone,
    /// What is learnt and how: by default nothing is trained, and a fit takes seconds.
    #[arg(long, value_enum, default_value_t = RecipeName::Default)]
    pub(crate) recipe: RecipeName,
    /// Settings as TOML or JSON, in place of a recipe; see `defend settings`.
    #[arg(long, conflicts_with = "recipe")]
    pub(crate) config: Option<PathBuf>,
    /// Changes a setting, such as student.closed-form.posterior.ridge=0.2; see `defend settings` for all. May be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Ordinary photos to contrast with: a file of `defend background`, or a folder of about a thousand photos, which may show
    /// anything. Without it, the one that ships with the embedded backbone, and none for another backbone.
    #[arg(long)]
    pub(crate) background: Option<PathBuf>,
    /// Folder of known abnormal images: a few of them help a lot, also against kinds that are not among them. May be given
    /// several times.
    #[arg(long)]
    pub(crate) abnormal: Vec<PathBuf>,
    /// Folder of masks that show in white where the faults of --abnormal are, NAME_mask.png or NAME.png for each image NAME. Without,
    /// the worst patches of each are taken for faulty. Faults are learnt where normal images are alike, such as parts on a line.
    #[arg(long, requires = "abnormal")]
    pub(crate) abnormal_masks: Option<PathBuf>,
    /// Keeps small copies of the normal images in the model, at most 128 pixels a side, for `defend report`: whoever has the model then has
    /// these pictures.
    #[arg(long)]
    pub(crate) thumbnails: bool,
    /// Leaves this many of the oddest normal images out, each with its near copies: see `defend suspects`.
    #[arg(long, default_value_t = 0)]
    pub(crate) drop_suspects: usize,
    /// Side that images are resized to, pixels: a multiple of the backbone's patch size; what the backbone was trained at without it.
    #[arg(long)]
    pub(crate) image_size: Option<usize>,
    #[command(flatten)]
    pub(crate) parts: Parts,
    /// Leaves the dense fine-tuning of the backbone out.
    #[arg(long)]
    pub(crate) no_dense: bool,
    /// Share of normal images that the model may call novel, about; between 0 and 1. `defend calibrate` gives a guarantee.
    #[arg(long, value_parser = share)]
    pub(crate) false_alarm_rate: Option<f64>,
    /// Features of normal images, a safetensors or Parquet file of `defend embed`, in place of --normal.
    #[arg(long, conflicts_with = "normal")]
    pub(crate) features: Option<PathBuf>,
    /// For masked students: folder that keeps the backbone's features for the next fit on the same images; pays with
    /// --no-dense.
    #[arg(long)]
    pub(crate) feature_folder: Option<PathBuf>,
    /// For recipes that train: folder that keeps the run while it trains, so that one that was stopped can go on.
    #[arg(long)]
    pub(crate) checkpoints: Option<PathBuf>,
    /// Seconds between checkpoints.
    #[arg(long, requires = "checkpoints", default_value_t = 600)]
    pub(crate) checkpoint_every: u64,
    /// Goes on from the checkpoints, to the same model as without a stop.
    #[arg(long, requires = "checkpoints")]
    pub(crate) resume: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// What is looked at of large images.
#[derive(Args)]
pub(crate) struct Parts {
    /// Looks at large images in tiles, such as 2x2 (columns x rows), for faults that would be too small otherwise. Tiles count
    /// where normal images are alike, such as parts on a line.
    #[arg(long, value_parser = columns_and_rows)]
    pub(crate) tiles: Option<(usize, usize)>,
    /// Share of a tile that its neighbour shows too, 0 to 0.5; a quarter by default.
    #[arg(long, requires = "tiles")]
    pub(crate) tile_overlap: Option<f64>,
    /// Which tiles of the normal images a tile is compared with.
    #[arg(long, value_enum, requires = "tiles")]
    pub(crate) tile_memory: Option<TileMemoryName>,
    /// Looks at this rectangle of each image alone: x,y,width,height in pixels.
    #[arg(long, value_parser = rectangle, conflicts_with = "roi_mask")]
    pub(crate) roi: Option<Region>,
    /// Looks at what is white in this image alone; it has the shape of those that are learnt and scored.
    #[arg(long)]
    pub(crate) roi_mask: Option<PathBuf>,
}

/// Which tiles of the normal images a tile is compared with.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum TileMemoryName {
    /// All of them: parts lie anywhere.
    Shared,
    /// Those at its own position: parts always lie the same way.
    PerPosition,
}

impl Parts {
    fn set(&self, config: &mut DefendConfig) -> Result<()> {
        if let Some((columns, rows)) = self.tiles {
            let tiles = config.tiles.unwrap_or_default();
            config.tiles = Some(Tiles {
                columns,
                rows,
                overlap: self.tile_overlap.unwrap_or(tiles.overlap),
                memory: match self.tile_memory {
                    None => tiles.memory,
                    Some(TileMemoryName::Shared) => TileMemory::Shared,
                    Some(TileMemoryName::PerPosition) => TileMemory::PerPosition,
                },
            });
        }
        if let Some(region) = &self.roi {
            config.region = Some(region.clone());
        }
        if let Some(path) = &self.roi_mask {
            let white = image::imageops::grayscale(&read_image(path)?);
            let mask = Mask::new(&white)
                .with_context(|| format!("the mask {} cannot be used", path.display()))?;
            config.region = Some(Region::Mask(mask));
        }
        Ok(())
    }
}

fn columns_and_rows(text: &str) -> Result<(usize, usize), String> {
    let wrong = || format!("{text:?} is no number of columns and rows such as 3x2");
    let (columns, rows) = text.split_once('x').ok_or_else(wrong)?;
    match (columns.parse(), rows.parse()) {
        (Ok(columns), Ok(rows)) => Ok((columns, rows)),
        _ => Err(wrong()),
    }
}

fn rectangle(text: &str) -> Result<Region, String> {
    let numbers: Result<Vec<u32>, _> = text.split(',').map(str::parse).collect();
    let Ok(&[x, y, width, height]) = numbers.as_deref() else {
        return Err(format!(
            "{text:?} is no rectangle such as 100,50,640,480: x,y,width,height in pixels"
        ));
    };
    Ok(Region::Rectangle {
        x,
        y,
        width,
        height,
    })
}

#[derive(Args)]
pub(crate) struct Background {
    /// Folder of ordinary photos; its sub-folders count too. May be given several times.
    #[arg(long, required = true)]
    pub(crate) images: Vec<PathBuf>,
    /// File to write.
    #[arg(long)]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) look: Look,
}

#[derive(Args)]
pub(crate) struct Embed {
    /// File to write: .safetensors has everything, and `defend fit --features` takes it back; so has .parquet, in a program that was
    /// built with --features parquet; .npy has the tokens of each image as one row of unit length (phi), beside a table of names and
    /// hashes.
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// Images and folders of images.
    #[arg(required = true)]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) look: Look,
}

/// How a backbone looks at images, without learning from them.
#[derive(Args)]
pub(crate) struct Look {
    #[command(flatten)]
    pub(crate) backbone: Backbone,
    /// Side that images are resized to, pixels; what the backbone was trained at without it.
    #[arg(long)]
    pub(crate) image_size: Option<usize>,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl Look {
    /// The library's entry, with these settings.
    pub(crate) fn builder(&self) -> Result<DefendBuilder> {
        let builder = Defend::builder()
            .config(DefendConfig {
                image_size: self.image_size,
                ..DefendConfig::default()
            })
            .device(self.common.device()?)
            .strict(self.common.strict);
        Ok(match self.backbone.weights()? {
            Some(weights) => builder.teacher(weights),
            None => builder,
        })
    }
}

#[derive(Args)]
pub(crate) struct Extend {
    /// Model file.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Folder of known abnormal images. May be given several times.
    #[arg(long, required_unless_present_any = ["normal", "forget", "marked"])]
    pub(crate) abnormal: Vec<PathBuf>,
    /// Folder of further normal images. May be given several times.
    #[arg(long)]
    pub(crate) normal: Vec<PathBuf>,
    /// CSV table of `defend score`, `sort` or `suspects` to which you have added a column "mark" with normal or abnormal beside the
    /// images that you know. May be given several times.
    #[arg(long)]
    pub(crate) marked: Vec<PathBuf>,
    /// Normal image to forget, by its path at the fit. May be given several times.
    #[arg(long)]
    pub(crate) forget: Vec<String>,
    /// Forgets near copies of these images too.
    #[arg(long, requires = "forget")]
    pub(crate) forget_group: bool,
    /// Model file to write; by default the model is replaced.
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Args)]
pub(crate) struct Suspects {
    /// Model file, whose normal images are looked at.
    #[arg(
        long,
        required_unless_present = "normal",
        conflicts_with_all = ["normal", "backbone"]
    )]
    pub(crate) model: Option<PathBuf>,
    /// Folder of images, of which most are of one sort, in place of a model. May be given several times.
    #[arg(long)]
    pub(crate) normal: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) backbone: Backbone,
    /// How many are named.
    #[arg(long, default_value_t = 20)]
    pub(crate) count: usize,
    /// How the lines look.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Args)]
pub(crate) struct Sort {
    /// Model file.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Share of abnormal images, between 0 and 1, where it is known: they are then compared with each other in any case. By
    /// default only where more of them seem abnormal than noise would make look so.
    #[arg(long, value_parser = share)]
    pub(crate) expect_abnormal: Option<f64>,
    /// Folder whose sub-folders normal, novel and unsure get the images; the originals stay where they are.
    #[arg(long)]
    pub(crate) into: Option<PathBuf>,
    /// Puts links there instead of copies.
    #[arg(long, requires = "into")]
    pub(crate) link: bool,
    /// How the lines look.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
    /// Images and folders of images.
    #[arg(required = true)]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Args)]
pub(crate) struct Settings {
    /// The recipe.
    #[arg(long, value_enum, default_value_t = RecipeName::Default)]
    pub(crate) recipe: RecipeName,
    /// Changes a setting, as for `defend fit`.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Prints JSON, without the comments.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Settings by name.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum RecipeName {
    /// The student in closed form on the untouched backbone.
    Default,
    /// The paper: dense fine-tuning and masked distillation of patches.
    Paper,
    /// As the paper, with the CLS token learnt and scored too.
    Masked,
    /// `masked` with the dense stage of the authors' script.
    OfficialDense,
    /// `masked` with the dense stage of the authors' second script.
    OfficialLeopart,
}

impl RecipeName {
    pub(crate) fn config(self) -> DefendConfig {
        match self {
            Self::Default => Recipe::Default,
            Self::Paper => Recipe::Paper,
            Self::Masked => Recipe::Masked,
            Self::OfficialDense => Recipe::OfficialDense,
            Self::OfficialLeopart => Recipe::OfficialLeopart,
        }
        .config()
    }
}

#[derive(Args)]
pub(crate) struct Calibrate {
    /// Model file.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Folder of normal images that were not fitted on. May be given several times.
    #[arg(long, required = true)]
    pub(crate) normal: Vec<PathBuf>,
    /// Share of normal images that may be called novel, between 0 and 1: on average over calibrations.
    #[arg(long, default_value_t = 0.05, value_parser = share)]
    pub(crate) false_alarm_rate: f64,
    /// Keeps that share with this confidence, such as 0.95, and not only on average. Needs more images.
    #[arg(long, value_parser = share)]
    pub(crate) confidence: Option<f64>,
    /// Model file to write; by default the model is replaced.
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Args)]
pub(crate) struct Score {
    /// Model file. May be given several times, for models on the same backbone: it looks at each image once, and each model has a
    /// line.
    #[arg(long, required = true)]
    pub(crate) model: Vec<PathBuf>,
    /// How the lines look.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
    /// Scores the images as a whole, as `defend sort` does: many abnormal ones tell what abnormal ones look like.
    #[arg(long, conflicts_with = "maps")]
    pub(crate) together: bool,
    /// Folder for maps of where the novelty is.
    #[arg(long)]
    pub(crate) maps: Option<PathBuf>,
    /// What a map is written as.
    #[arg(long, value_enum, requires = "maps", default_value_t = MapFormat::Overlay)]
    pub(crate) map_format: MapFormat,
    /// File to write the lines to, in place of standard output.
    #[arg(long, conflicts_with = "together")]
    pub(crate) out: Option<PathBuf>,
    /// Goes on behind the last whole line of --out, for the same images in the same order.
    #[arg(long, requires = "out", conflicts_with_all = ["together", "fdr"])]
    pub(crate) resume: bool,
    /// Calls as many images of the whole batch novel as possible such that at most this share of those is normal, on average
    /// (Benjamini-Hochberg), in place of the model's threshold. The model has to be calibrated on held-out images.
    #[arg(long, value_name = "SHARE", conflicts_with = "together", value_parser = share)]
    pub(crate) fdr: Option<f64>,
    /// Images and folders of images.
    #[arg(required = true)]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Args)]
pub(crate) struct Report {
    /// Model file.
    pub(crate) model: PathBuf,
    /// Images and folders of images.
    #[arg(required = true)]
    pub(crate) paths: Vec<PathBuf>,
    /// Page to write: one file that needs no network.
    #[arg(long, default_value = "report.html")]
    pub(crate) out: PathBuf,
    /// Images that are shown, the most novel first; the histogram and the figures are of all.
    #[arg(long, default_value_t = 200)]
    pub(crate) most: usize,
    /// Shows the nearest normal images too, where they still are where the fit found them. Small copies in the model (`fit --thumbnails`) are
    /// shown without it.
    #[arg(long)]
    pub(crate) show_normal: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Args)]
pub(crate) struct Watch {
    /// Model file.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Folder that images come into; its sub-folders count too.
    pub(crate) folder: PathBuf,
    /// Scores what is there already, too.
    #[arg(long)]
    pub(crate) existing: bool,
    /// Seconds between two looks at the folder. A file is taken when it has not changed from one to the next.
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) every: f64,
    /// Ends when nothing has come for so long; by default it goes on until Ctrl-C.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) until_idle: Option<f64>,
    /// How the lines look.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Args)]
pub(crate) struct Inspect {
    /// Model file.
    pub(crate) model: PathBuf,
    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Args)]
pub(crate) struct Drift {
    /// Model file, calibrated on held-out images.
    pub(crate) model: PathBuf,
    /// Images and folders of new images of which about all are normal.
    #[arg(required = true)]
    pub(crate) paths: Vec<PathBuf>,
    /// Chance of calling a drift where there is none, between 0 and 1.
    #[arg(long, default_value_t = 0.01, value_parser = share)]
    pub(crate) level: f64,
    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Args)]
pub(crate) struct Completions {
    /// The shell.
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Args)]
pub(crate) struct Man {
    /// Folder to write into.
    pub(crate) folder: PathBuf,
}

#[derive(Args)]
pub(crate) struct Evaluate {
    /// Model file.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Folder with the sub-folders normal and abnormal.
    #[arg(long)]
    pub(crate) test: PathBuf,
    /// Prints the figures as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Args)]
pub(crate) struct Demo {
    /// Folder for images, model and heat maps.
    #[arg(long, default_value = "out/demo")]
    pub(crate) out: PathBuf,
    /// Object that makes an image normal.
    #[arg(long, default_value = "boat")]
    pub(crate) normal: String,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// What every job understands.
#[derive(Args, Clone)]
pub(crate) struct Common {
    /// Stops at the first image that cannot be read, instead of naming and counting it.
    #[arg(long, conflicts_with = "max_unreadable")]
    pub(crate) strict: bool,
    /// Stops when more images than this cannot be read.
    #[arg(long, value_name = "N")]
    pub(crate) max_unreadable: Option<usize>,
    /// Where to compute: best (the graphics card where this build and this machine have one), cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "best")]
    pub(crate) device: DeviceChoice,
    /// Threads to compute and decode with; as many as there are processors by default.
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<std::num::NonZeroUsize>,
    /// Seed of every random choice: of a fit, and of the demonstration's images.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Says nothing beside the results but what has failed.
    #[arg(long, short, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Says how long each stage took.
    #[arg(long, short)]
    pub(crate) verbose: bool,
}

/// What a map is written as.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MapFormat {
    /// The image with the novelty laid over it in colours, and a legend.
    Overlay,
    /// A grey PNG of 16 bits, a pixel for each patch: 0 where the value is usual or less, 32768 where the overlay has full colour.
    Png16,
    /// An array of f32 for NumPy, [rows, columns]: what lies above the usual value of each patch.
    Npy,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Format {
    /// Columns with tabs between them; of `score` `score p-value verdict path`, with several models the model at the end, of
    /// `suspects` `score path nearest`. Control characters in names are escaped.
    #[value(alias = "text")]
    Table,
    /// A header, then comma-separated values; of `score` `path,score,p_value,threshold,verdict,posterior,contrast,patches,known,
    /// nearest,map,error`, the pieces as weight times z.
    Csv,
    /// A JSON object a line.
    Json,
}

/// A share that is neither none nor all.
fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if share > 0.0 && share < 1.0 => Ok(share),
        _ => Err("expected a number between 0 and 1".into()),
    }
}

/// Longest time to wait for something, seconds.
const LONGEST_WAIT: f64 = 3600.0;

/// A time to wait.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if seconds > 0.0 && seconds <= LONGEST_WAIT => Ok(seconds),
        _ => Err(format!("expected seconds above 0 and up to {LONGEST_WAIT}")),
    }
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceChoice {
    Best,
    Cpu,
    Cuda(usize),
    Metal,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("cuda:").map(str::parse);
        match (text, number) {
            ("best", _) => Ok(Self::Best),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            ("metal", _) => Ok(Self::Metal),
            (_, Some(Ok(number))) => Ok(Self::Cuda(number)),
            _ => Err("expected best, cpu, cuda, cuda:N or metal".into()),
        }
    }
}

impl Common {
    pub(crate) fn device(&self) -> Result<Device> {
        match self.device {
            DeviceChoice::Best => Ok(best_device()),
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda(number) => {
                Device::new_cuda(number).with_context(|| format!("cannot use CUDA device {number}"))
            }
            DeviceChoice::Metal => Device::new_metal(0).context("cannot use the Metal device"),
        }
    }

    /// Most images that may be unreadable.
    pub(crate) fn max_unreadable(&self) -> usize {
        if self.strict {
            return 0;
        }
        self.max_unreadable.unwrap_or(usize::MAX)
    }

    /// How many images could not be read; an error when they are more than may be.
    pub(crate) fn check_unreadable(&self, skipped: &[Skipped]) -> Result<usize> {
        let most = self.max_unreadable();
        match skipped.get(most) {
            Some(first) => bail!("{first} (--strict or --max-unreadable)"),
            None => Ok(skipped.len()),
        }
    }

    pub(crate) fn load(&self, model: &Path) -> Result<Detector> {
        Ok(Detector::load(model, &self.device()?)?)
    }

    /// What holds for the whole program.
    pub(crate) fn set_up(&self) -> Result<()> {
        if self.quiet {
            be_quiet();
        }
        if self.verbose {
            be_verbose();
        }
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads.get())
                .build_global()
                .context("cannot set the number of threads")?;
        }
        Ok(())
    }
}

impl Fit {
    /// Settings from file and flags.
    pub(crate) fn settings(&self) -> Result<DefendConfig> {
        let mut config = match &self.config {
            None => self.recipe.config(),
            Some(path) => settings::read(path)?,
        };
        config = settings::changed(config, &self.set)?;
        if let Some(seed) = self.common.seed {
            config.seed = seed;
        }
        if self.no_dense {
            config.dense = None;
        }
        if let Some(rate) = self.false_alarm_rate {
            config.false_alarm_rate = rate;
        }
        if self.image_size.is_some() {
            config.image_size = self.image_size;
        }
        self.parts.set(&mut config)?;
        config.validate()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn devices_by_name() {
        for (text, expected) in [
            ("best", DeviceChoice::Best),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:3", DeviceChoice::Cuda(3)),
            ("metal", DeviceChoice::Metal),
        ] {
            assert_eq!(text.parse(), Ok(expected));
        }
        for text in ["gpu", "cuda:", "cuda:x", ""] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
    }
}
