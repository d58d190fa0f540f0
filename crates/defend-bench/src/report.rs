//! Tables, plots and a page from any set of records.

use std::path::{Path, PathBuf};

use defend_core::metrics::{Auroc, Experiment as Sample, compare, mean_interval};
use ndarray::Array1;

use crate::page::write_page;
use crate::plots::{histogram, roc_curves};
use crate::record::file_name;
use crate::{Error, Record, Table};

/// Resamples of the bootstrap.
const RESAMPLES: usize = 1000;
/// Confidence of the intervals.
const CONFIDENCE: f64 = 0.95;
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
/// The page shows pictures of every system's worst errors; data sets that cannot be opened below `root` go without.
///
/// # Errors
/// Those of [`Record::read_all`], [`Error::Io`], [`Error::Plot`], [`Error::Metrics`].
pub fn report(outputs: &[&Path], root: &Path) -> Result<Report, Error> {
    let records = Record::read_all(outputs)?;
    let groups = groups(&records);
    let folder = outputs.first().unwrap_or(&Path::new("")).join("report");
    let plots = folder.join("plots");
    std::fs::create_dir_all(&plots).map_err(Error::io(&plots, "making the folder"))?;

    let mut tables = summaries(&groups);
    for group in &groups {
        tables.push(group.table()?);
        tables.extend(group.pixel_table());
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

/// The records of one protocol on one data set.
pub(crate) struct Group<'a> {
    pub(crate) data: &'a str,
    pub(crate) protocol: &'a str,
    /// Names, in the configuration's order.
    pub(crate) experiments: Vec<&'a str>,
    pub(crate) systems: Vec<&'a str>,
    pub(crate) seeds: Vec<u64>,
    pub(crate) records: Vec<&'a Record>,
}

pub(crate) fn plot_name(group: &Group<'_>, experiment: &str) -> String {
    let parts = [group.data, group.protocol, experiment].map(file_name);
    parts.join("-")
}

pub(crate) fn histogram_name(record: &Record) -> String {
    run_name(record) + "-scores.svg"
}

pub(crate) fn run_name(record: &Record) -> String {
    let key = &record.key;
    let parts =
        [&key.data, &key.protocol, &key.experiment, &key.system].map(|part| file_name(part));
    format!("{}-seed{}", parts.join("-"), key.seed)
}

fn groups(records: &[Record]) -> Vec<Group<'_>> {
    fn add<T: PartialEq>(list: &mut Vec<T>, item: T) {
        if !list.contains(&item) {
            list.push(item);
        }
    }
    let mut groups: Vec<Group<'_>> = Vec::new();
    for record in records {
        let key = &record.key;
        let known = groups
            .iter()
            .position(|g| g.data == key.data && g.protocol == key.protocol);
        let place = known.unwrap_or(groups.len());
        if known.is_none() {
            groups.push(Group {
                data: &key.data,
                protocol: &key.protocol,
                experiments: Vec::new(),
                systems: Vec::new(),
                seeds: Vec::new(),
                records: Vec::new(),
            });
        }
        let Some(group) = groups.get_mut(place) else {
            continue;
        };
        add(&mut group.experiments, key.experiment.as_str());
        add(&mut group.seeds, key.seed);
        group.records.push(record);
    }
    for group in &mut groups {
        for record in &group.records {
            add(&mut group.systems, record.key.system.as_str());
        }
    }
    groups
}

impl<'a> Group<'a> {
    fn find(&self, system: &str, experiment: &str, seed: u64) -> Option<&'a Record> {
        let found = self.records.iter().find(|record| {
            let key = &record.key;
            key.system == system && key.experiment == experiment && key.seed == seed
        });
        found.copied()
    }

    /// The first seed's record of every system.
    pub(crate) fn of_experiment(&self, experiment: &str) -> impl Iterator<Item = &'a Record> {
        let experiment = experiment.to_owned();
        let seed = self.seeds.first().copied().unwrap_or(0);
        let systems = self.systems.iter();
        systems.filter_map(move |system| self.find(system, &experiment, seed))
    }

    /// Every experiment's record of a system and a seed; `None` when one is missing.
    fn whole(&self, system: &str, seed: u64) -> Option<Vec<&'a Record>> {
        let experiments = self.experiments.iter();
        experiments
            .map(|experiment| self.find(system, experiment, seed))
            .collect()
    }

    /// Mean AUROC over experiments and seeds, where all are there.
    fn mean(&self, system: &str) -> Option<f64> {
        let all = self.seeds.iter().map(|&seed| self.whole(system, seed));
        let all: Vec<&Record> = all.collect::<Option<Vec<_>>>()?.concat();
        Some(all.iter().map(|r| r.figures.auroc).sum::<f64>() / all.len() as f64)
    }

    /// Systems by experiments, with the mean, its interval, and the comparison with the first system.
    fn table(&self) -> Result<Table, Error> {
        let mut header = vec!["system".to_owned()];
        header.extend(self.experiments.iter().map(ToString::to_string));
        header.extend(["mean [95 %]", "less first [95 %]", "p", "fit, s"].map(String::from));
        let mut rows = Vec::new();
        for system in &self.systems {
            let mut row = vec![(*system).to_owned()];
            row.extend(
                self.experiments
                    .iter()
                    .map(|experiment| self.cell(system, experiment)),
            );
            row.push(self.interval(system)?);
            row.extend(self.comparison(system)?);
            let seconds = self.records.iter().filter(|r| r.key.system == *system);
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
                 stratified bootstrap over test images ({RESAMPLES}), experiments taken as independent; differences \
                 and p-values are paired, of the first seed.",
                self.seeds.len(),
                train.iter().min().unwrap_or(&0),
                train.iter().max().unwrap_or(&0),
            ),
            header,
            rows,
        })
    }

    /// Mean over the seeds, with their standard deviation when there are several.
    fn cell(&self, system: &str, experiment: &str) -> String {
        let found = self
            .seeds
            .iter()
            .filter_map(|&seed| self.find(system, experiment, seed));
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

    /// Mean and interval over the experiments; bounds are means over the seeds.
    fn interval(&self, system: &str) -> Result<String, Error> {
        let (mut sums, mut count) = ([0.0; 3], 0.0);
        for &seed in &self.seeds {
            let Some(records) = self.whole(system, seed) else {
                return Ok(NONE.into());
            };
            let scores: Vec<_> = records.iter().map(|record| values(record)).collect();
            let samples: Vec<Sample<'_>> = scores
                .iter()
                .map(|(scores, abnormal)| Sample {
                    scores: scores.view(),
                    abnormal: abnormal.view(),
                })
                .collect();
            let found = mean_interval(&Auroc, &samples, RESAMPLES, CONFIDENCE, seed)?;
            for (sum, value) in sums.iter_mut().zip([found.estimate, found.low, found.high]) {
                *sum += value;
            }
            count += 1.0;
        }
        let [estimate, low, high] = sums.map(|sum| percent(sum / count));
        Ok(format!("{estimate} [{low}, {high}]"))
    }

    /// Difference to the first system and its p-value; [`Record::read_all`] lets only runs on the same pictures into a group.
    fn comparison(&self, system: &str) -> Result<[String; 2], Error> {
        let none = || [NONE.to_owned(), NONE.to_owned()];
        let (Some(&first), Some(&seed)) = (self.systems.first(), self.seeds.first()) else {
            return Ok(none());
        };
        let (Some(own), Some(others)) = (self.whole(system, seed), self.whole(first, seed)) else {
            return Ok(none());
        };
        if system == first {
            return Ok(none());
        }
        let own: Vec<_> = own.iter().map(|record| values(record)).collect();
        let others: Vec<_> = others.iter().map(|record| values(record)).collect();
        let pairs: Vec<_> = own
            .iter()
            .zip(&others)
            .map(|((scores, abnormal), (other, _))| {
                let sample = Sample {
                    scores: scores.view(),
                    abnormal: abnormal.view(),
                };
                (sample, other.view())
            })
            .collect();
        let found = compare(&Auroc, &pairs, RESAMPLES, CONFIDENCE, seed)?;
        let difference = found.difference;
        let [estimate, low, high] =
            [difference.estimate, difference.low, difference.high].map(percent);
        Ok([
            format!("{estimate} [{low}, {high}]"),
            format!("{:.3}", found.p_value),
        ])
    }

    /// Image and pixel figures, where pixels were scored.
    fn pixel_table(&self) -> Option<Table> {
        self.records
            .iter()
            .find(|record| record.figures.pixel_auroc.is_some())?;
        let rows = self.systems.iter().map(|system| {
            let records: Vec<&&Record> = self
                .records
                .iter()
                .filter(|r| r.key.system == *system)
                .collect();
            let mean = |figure: &dyn Fn(&Record) -> Option<f64>| {
                let values: Option<Vec<f64>> = records.iter().map(|r| figure(r)).collect();
                values.map_or_else(
                    || NONE.into(),
                    |values| percent(values.iter().sum::<f64>() / values.len() as f64),
                )
            };
            vec![
                (*system).to_owned(),
                mean(&|r| Some(r.figures.auroc)),
                mean(&|r| Some(r.figures.average_precision)),
                mean(&|r| r.figures.pixel_auroc),
                mean(&|r| r.figures.pro),
            ]
        });
        Some(Table {
            name: [self.data, self.protocol, "pixels"]
                .map(file_name)
                .join("-"),
            title: format!("{}, {}: images and pixels", self.data, self.protocol),
            note: format!(
                "In %; pixels at {0} x {0}, PRO up to a false positive rate of 0.3.",
                crate::PIXEL_SIDE
            ),
            header: ["system", "AUROC", "average precision", "pixel AUROC", "PRO"]
                .map(String::from)
                .to_vec(),
            rows: rows.collect(),
        })
    }
}

/// Data sets by systems for each protocol, and normal sets by systems where they are given: the paper's Tables 2, 4
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
        let mut systems: Vec<&str> = Vec::new();
        for system in shown.iter().flat_map(|group| &group.systems) {
            if !systems.contains(system) {
                systems.push(system);
            }
        }
        let mut rows = Vec::new();
        for group in &shown {
            let mut row = |name: String, cell: &dyn Fn(&str) -> String| {
                let mut cells = vec![name];
                cells.extend(systems.iter().map(|system| cell(system)));
                rows.push(cells);
            };
            if *protocol == "normal-sets" {
                for experiment in &group.experiments {
                    row(format!("{}: {experiment}", group.data), &|system| {
                        group.cell(system, experiment)
                    });
                }
            }
            row(
                format!("{}, mean of {}", group.data, group.experiments.len()),
                &|system| group.mean(system).map_or_else(|| NONE.into(), percent),
            );
        }
        let mut header = vec!["data".to_owned()];
        header.extend(systems.iter().map(ToString::to_string));
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

fn values(record: &Record) -> (Array1<f64>, Array1<bool>) {
    let scores = record.scores.iter();
    let abnormal = scores.clone().map(|scored| scored.abnormal).collect();
    (scores.map(|scored| scored.score).collect(), abnormal)
}

fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}
