//! Tables, plots and a page from any set of records.

use std::path::{Path, PathBuf};

use defend_core::metrics::{Auroc, Experiment as Sample, Interval, compare, mean_interval};
use ndarray::Array1;

use crate::group::{Group, groups, histogram_name, plot_name};
use crate::page::write_page;
use crate::plots::{histogram, roc_curves};
use crate::record::file_name;
use crate::{Error, Record, Table};

/// Resamples of the bootstrap.
const RESAMPLES: usize = 1000;
/// Confidence of the intervals.
const CONFIDENCE: f64 = 0.95;
/// Seed of the bootstrap.
const BOOTSTRAP_SEED: u64 = 0;
/// Where no run is.
const NONE: &str = "–";

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The tables, as they stand in the files.
    pub tables: Vec<Table>,
    /// Folder of everything.
    pub folder: PathBuf,
    /// The page to open.
    pub page: PathBuf,
}

/// Makes tables (`tables.md`, a CSV and a LaTeX file each), plots and `index.html` in the folder `report` of the first
/// of some benchmarks' outputs, from the records that are in any of them.
///
/// The page shows images of every method's worst errors; data sets that cannot be opened below `root` go without. A damaged
/// record is left out, and `left_out` hears of it.
///
/// # Errors
/// Those of [`Record::read_all`], [`Error::Io`], [`Error::Plot`], [`Error::Metrics`].
pub fn report(
    outputs: &[&Path],
    root: &Path,
    left_out: &mut dyn FnMut(&Error),
) -> Result<Report, Error> {
    let records = Record::read_all(outputs, left_out)?;
    let groups = groups(&records);
    let folder = outputs.first().unwrap_or(&Path::new("")).join("report");
    let plots = folder.join("plots");
    std::fs::create_dir_all(&plots).map_err(Error::io(&plots, "making the folder"))?;

    let mut tables = summaries(&groups);
    for group in &groups {
        tables.push(group.table()?);
        tables.extend(group.pixel_table());
        tables.extend(group.object_table());
    }
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(Error::io(&path, "writing"))
    };
    let all: Vec<String> = tables.iter().map(Table::markdown).collect();
    write("tables.md", &all.join("\n"))?;
    for table in &tables {
        write(&format!("{}.csv", table.name), &table.csv())?;
        write(&format!("{}.tex", table.name), &table.latex())?;
    }
    for group in &groups {
        for experiment in &group.experiments {
            let shown: Vec<&Record> = group.of_experiment(experiment).collect();
            let name = plot_name(group, experiment);
            roc_curves(&plots.join(format!("{name}-roc.svg")), experiment, &shown)?;
            for record in shown {
                histogram(&plots.join(histogram_name(record)), record)?;
            }
        }
    }
    let page = write_page(&folder, root, &tables, &groups)?;
    Ok(Report {
        tables,
        folder,
        page,
    })
}

impl<'a> Group<'a> {
    fn find(&self, method: &str, experiment: &str, seed: u64) -> Option<&'a Record> {
        let found = self.records.iter().find(|record| {
            let key = &record.key;
            key.method == method && key.experiment == experiment && key.seed == seed
        });
        found.copied()
    }

    /// Every method's record of the first seed that it ran with.
    pub(crate) fn of_experiment(&self, experiment: &str) -> impl Iterator<Item = &'a Record> {
        let methods = self.methods.iter();
        methods.filter_map(move |method| {
            let mut seeds = self.seeds.iter();
            seeds.find_map(|&seed| self.find(method, experiment, seed))
        })
    }

    /// Every experiment's record of a method and a seed; `None` when one is missing.
    fn whole(&self, method: &str, seed: u64) -> Option<Vec<&'a Record>> {
        let experiments = self.experiments.iter();
        experiments
            .map(|experiment| self.find(method, experiment, seed))
            .collect()
    }

    /// Mean AUROC over experiments and the seeds with which it ran in all of them.
    fn mean(&self, method: &str) -> Option<f64> {
        let all = self.seeds.iter();
        let all: Vec<&Record> = all
            .filter_map(|&seed| self.whole(method, seed))
            .flatten()
            .collect();
        (!all.is_empty())
            .then(|| all.iter().map(|r| r.figures.auroc).sum::<f64>() / all.len() as f64)
    }

    /// Methods by experiments, with the mean, its interval, and the comparison with the first method.
    fn table(&self) -> Result<Table, Error> {
        let mut header = vec!["method".to_owned()];
        header.extend(self.experiments.iter().map(ToString::to_string));
        header.extend(["mean [95 %]", "less first [95 %]", "p", "fit, s"].map(String::from));
        let mut rows = Vec::new();
        for method in &self.methods {
            let mut row = vec![(*method).to_owned()];
            row.extend(
                self.experiments
                    .iter()
                    .map(|experiment| self.cell(method, experiment)),
            );
            row.push(self.interval(method)?);
            row.extend(self.comparison(method)?);
            let seconds = self.records.iter().filter(|r| r.key.method == *method);
            let seconds: Vec<f64> = seconds.map(|r| r.fit_seconds).collect();
            row.push(format!(
                "{:.0}",
                seconds.iter().sum::<f64>() / seconds.len().max(1) as f64
            ));
            rows.push(row);
        }
        let first = self.records.first();
        let images = first.map_or(0, |r| r.scores.len());
        let train: Vec<usize> = self.records.iter().map(|r| r.train_images).collect();
        let backbone = first.map_or_else(String::new, |r| {
            let name = r.backbone.file_name();
            name.map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default()
        });
        Ok(Table {
            name: [self.data, self.protocol].map(file_name).join("-"),
            title: format!("{}, {}", self.data, self.protocol),
            note: format!(
                "AUROC in %, {backbone}, {} seed(s), {}–{} training and {images} test images an experiment. Intervals: \
                 stratified bootstrap over test images ({RESAMPLES}), the same for all seeds, experiments taken \
                 as independent; differences and p-values are paired.",
                self.seeds.len(),
                train.iter().min().unwrap_or(&0),
                train.iter().max().unwrap_or(&0),
            ),
            header,
            rows,
        })
    }

    /// Mean over the seeds, with their standard deviation when there are several.
    fn cell(&self, method: &str, experiment: &str) -> String {
        let found = self
            .seeds
            .iter()
            .filter_map(|&seed| self.find(method, experiment, seed));
        let values: Vec<f64> = found.map(|record| record.figures.auroc).collect();
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        match values.len() {
            0 => NONE.into(),
            1 => percent(mean),
            _ => {
                let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
                format!(
                    "{} ± {}",
                    percent(mean),
                    percent((squares / (count - 1.0)).sqrt())
                )
            }
        }
    }

    /// The seeds with which a method ran in every experiment.
    fn seeds_of(&self, method: &str) -> Vec<u64> {
        let seeds = self.seeds.iter().copied();
        seeds
            .filter(|&seed| self.whole(method, seed).is_some())
            .collect()
    }

    /// A method's scores in every experiment, one run a seed; `None` without a seed, or when a run is missing.
    fn scores(&self, method: &str, seeds: &[u64]) -> Option<Vec<Scores>> {
        let experiment = |experiment: &&str| {
            let records = seeds.iter().map(|&s| self.find(method, experiment, s));
            Scores::new(&records.collect::<Option<Vec<_>>>()?)
        };
        self.experiments.iter().map(experiment).collect()
    }

    /// Mean over experiments and seeds with its interval.
    fn interval(&self, method: &str) -> Result<String, Error> {
        let Some(scores) = self.scores(method, &self.seeds_of(method)) else {
            return Ok(NONE.into());
        };
        let samples: Vec<Sample<'_>> = scores.iter().map(Scores::sample).collect();
        let found = mean_interval(&Auroc, &samples, RESAMPLES, CONFIDENCE, BOOTSTRAP_SEED)?;
        Ok(bounds(&found))
    }

    /// Difference to the first method over the seeds of both, and its p-value; [`Record::read_all`] lets only runs on the
    /// same images into a group.
    fn comparison(&self, method: &str) -> Result<[String; 2], Error> {
        let first = self.methods.first().filter(|first| **first != method);
        let scores = first.and_then(|first| {
            let mut seeds = self.seeds_of(first);
            seeds.retain(|seed| self.whole(method, *seed).is_some());
            Some((self.scores(method, &seeds)?, self.scores(first, &seeds)?))
        });
        let Some((own, first)) = scores else {
            return Ok([NONE, NONE].map(String::from));
        };
        let own: Vec<Sample<'_>> = own.iter().map(Scores::sample).collect();
        let first: Vec<Sample<'_>> = first.iter().map(Scores::sample).collect();
        let found = compare(&Auroc, &own, &first, RESAMPLES, CONFIDENCE, BOOTSTRAP_SEED)?;
        Ok([bounds(&found.difference), format!("{:.3}", found.p_value)])
    }

    /// Image and pixel figures, where pixels were scored.
    fn pixel_table(&self) -> Option<Table> {
        self.figures_table(
            "pixels",
            format!(
                "In %; pixels at {0} x {0}, PRO up to a false positive rate of 0.3.",
                crate::PIXEL_SIDE
            ),
            [
                ("AUROC", &|r| Some(r.figures.auroc)),
                ("average precision", &|r| Some(r.figures.average_precision)),
                ("pixel AUROC", &|r| r.figures.pixel_auroc),
                ("PRO", &|r| r.figures.pro),
            ],
        )
    }

    /// Image and object figures, where maps were judged by boxes.
    fn object_table(&self) -> Option<Table> {
        self.figures_table(
            "objects",
            "In %; patches in boxes of normal objects against patches in boxes of others, of all images together and within an \
             image (mean over the images that show both)."
                .into(),
            [
                ("AUROC", &|r| Some(r.figures.auroc)),
                ("patches", &|r| r.figures.object_auroc),
                ("patches within an image", &|r| r.figures.object_auroc_within),
            ],
        )
    }

    /// Means over the experiments of some figures, where a method has the last of them.
    fn figures_table<const N: usize>(
        &self,
        kind: &str,
        note: String,
        figures: [(&str, Figure<'_>); N],
    ) -> Option<Table> {
        let (_, last) = figures.last()?;
        self.records.iter().find(|record| last(record).is_some())?;
        let rows = self.methods.iter().map(|method| {
            let records = self.records.iter();
            let records: Vec<&&Record> = records.filter(|r| r.key.method == *method).collect();
            let mean = |figure: Figure<'_>| {
                let values: Option<Vec<f64>> = records.iter().map(|r| figure(r)).collect();
                values.map_or_else(
                    || NONE.into(),
                    |values| percent(values.iter().sum::<f64>() / values.len() as f64),
                )
            };
            let means = figures.iter().map(|(_, figure)| mean(figure));
            [(*method).to_owned()].into_iter().chain(means).collect()
        });
        let names = figures.iter().map(|(name, _)| *name);
        Some(Table {
            name: [self.data, self.protocol, kind].map(file_name).join("-"),
            title: format!("{}, {}: images and {kind}", self.data, self.protocol),
            note,
            header: ["method"]
                .into_iter()
                .chain(names)
                .map(String::from)
                .collect(),
            rows: rows.collect(),
        })
    }
}

/// A figure of a run.
type Figure<'a> = &'a dyn Fn(&Record) -> Option<f64>;

/// Data sets by methods for each protocol, and normal sets by methods where they are given: the paper's Tables 2, 4
/// and 5.
fn summaries(groups: &[Group<'_>]) -> Vec<Table> {
    let mut protocols: Vec<&str> = Vec::new();
    for group in groups {
        if !protocols.contains(&group.protocol) {
            protocols.push(group.protocol);
        }
    }
    let table = |protocol: &&str| {
        let shown: Vec<&Group<'_>> = groups.iter().filter(|g| g.protocol == *protocol).collect();
        let mut methods: Vec<&str> = Vec::new();
        for method in shown.iter().flat_map(|group| &group.methods) {
            if !methods.contains(method) {
                methods.push(method);
            }
        }
        let mut rows = Vec::new();
        for group in &shown {
            let mut row = |name: String, cell: &dyn Fn(&str) -> String| {
                let mut cells = vec![name];
                cells.extend(methods.iter().map(|method| cell(method)));
                rows.push(cells);
            };
            if *protocol == "normal-sets" {
                for experiment in &group.experiments {
                    row(format!("{}: {experiment}", group.data), &|method| {
                        group.cell(method, experiment)
                    });
                }
            }
            row(
                format!("{}, mean of {}", group.data, group.experiments.len()),
                &|method| group.mean(method).map_or_else(|| NONE.into(), percent),
            );
        }
        let mut header = vec!["data".to_owned()];
        header.extend(methods.iter().map(ToString::to_string));
        Table {
            name: format!("summary-{protocol}"),
            title: format!("{protocol}: all data sets"),
            note: "AUROC in %, mean over experiments and seeds.".into(),
            header,
            rows,
        }
    };
    protocols.iter().map(table).collect()
}

/// Scores of a method in one experiment: a run a seed, on the same test images.
struct Scores {
    runs: Vec<Array1<f64>>,
    abnormal: Array1<bool>,
}

impl Scores {
    fn new(records: &[&Record]) -> Option<Self> {
        let run = |record: &&Record| record.scores.iter().map(|scored| scored.score).collect();
        let truth = records.first()?.scores.iter();
        Some(Self {
            runs: records.iter().map(run).collect(),
            abnormal: truth.map(|scored| scored.abnormal).collect(),
        })
    }

    fn sample(&self) -> Sample<'_> {
        Sample {
            runs: self.runs.iter().map(|run| run.view()).collect(),
            abnormal: self.abnormal.view(),
        }
    }
}

fn bounds(found: &Interval) -> String {
    let [estimate, low, high] = [found.estimate, found.low, found.high].map(percent);
    format!("{estimate} [{low}, {high}]")
}

fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}
