//! `defend score`

mod output;

use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail};
use defend_core::data::{Dataset, Failure, Subset};
use defend_core::evidence::Weighed;
use defend_core::metrics::{FalseAlarmRate, benjamini_hochberg};
use defend_core::{
    Calibration, CalibrationSource, Detector, Explanation, Finding, Maps, NovelRegion, Novelty,
    Outcome, ProfileSet, Verdict,
};
use serde::Serialize;

use crate::arguments::{Format, Score, Sort};
use crate::exit::{Exit, usage};
use crate::images::{Found, Unreadable, find, scan_rest};
use crate::maps::MapFolder;
use crate::progress::Progress;
use crate::say::{complain, say};
use crate::sort;
use crate::table::{Table, escaped};

pub(crate) fn run(arguments: &Score) -> Result<Exit> {
    let [model] = arguments.model.as_slice() else {
        return of_many(arguments);
    };
    if arguments.resume && matches!(arguments.format, Format::Table) {
        return Err(usage("--resume needs --format csv or json".into()));
    }
    if arguments.together {
        return as_a_whole(arguments, model.clone());
    }
    let rate = arguments.fdr.map(FalseAlarmRate::new).transpose()?;
    let detector = arguments.common.load(model)?;
    let calibration = detector.calibration();
    if rate.is_some()
        && calibration.is_none_or(|c| c.source != CalibrationSource::HeldOut || c.scores.is_empty())
    {
        bail!("--fdr needs p-values of held-out images: see defend calibrate");
    }
    let found = find(
        &arguments.paths,
        arguments.common.strict,
        arguments.maps.as_deref(),
    )?;
    let mut maps = map_folder(arguments, &detector, &found)?;
    let wanted = if maps.is_some() {
        Maps::Wanted
    } else {
        Maps::Free
    };
    say_threshold(calibration);
    let dataset = found.dataset();
    let (out, done) = output::open(
        arguments,
        &found,
        &*dataset,
        calibration.map(|c| c.threshold),
    )?;
    let mut lines = Lines(Table::with_header(arguments.format, out, done.is_empty()));
    let (mut kept, mut exit, mut unwritten) = (Vec::new(), Exit::default(), 0);
    exit.novel = done.novel;
    let left: Arc<dyn Dataset> = Arc::new(Subset::new(
        Arc::clone(&dataset),
        (done.images..dataset.len()).collect(),
    )?);
    let most = arguments.common.max_unreadable();
    let unreadable = scan_rest(
        &detector,
        &left,
        wanted,
        Unreadable::after(done.unreadable, dataset.len(), most),
        &mut progress(arguments),
        &mut |mut outcome| {
            if let Ok((finding, _)) = &mut outcome {
                finding.index += done.images;
            }
            let mut record = Record::of_outcome(&outcome, calibration);
            if let Ok((finding, _)) = &outcome {
                let map = finding.novelty.map.as_ref();
                let map = map.filter(|_| maps.is_some());
                record.regions = map.map(|map| detector.map_scale().regions(map));
            }
            if let (Some(maps), Ok((finding, resized))) = (&mut maps, &outcome) {
                // The scores go on without a map.
                match maps.write(finding, &dataset, resized) {
                    Ok(path) => record.map = path.map(|path| path.display().to_string()),
                    Err(error) => {
                        unwritten += 1;
                        complain!("{error:#}");
                    }
                }
            }
            if rate.is_some() {
                kept.push(record);
                return Ok(());
            }
            exit.novel |= record.is_novel();
            lines.write(&record)
        },
    )?;
    if let Some(rate) = rate {
        decide_together(&mut kept, rate);
        for record in &kept {
            exit.novel |= record.is_novel();
            lines.write(record)?;
        }
    }
    exit.unreadable = unreadable > 0;
    if unwritten > 0 {
        bail!("{unwritten} maps could not be written");
    }
    if done.images < dataset.len() && maps.is_some_and(|maps| maps.is_empty()) {
        say!(
            "no map was written: the model has none, as one that was fitted on features or on a single image"
        );
    }
    Ok(exit)
}

/// As `defend sort` scores a folder.
fn as_a_whole(arguments: &Score, model: PathBuf) -> Result<Exit> {
    sort::run(&Sort {
        model,
        expect_abnormal: None,
        into: None,
        link: false,
        format: arguments.format,
        paths: arguments.paths.clone(),
        common: arguments.common.clone(),
    })
}

fn map_folder(arguments: &Score, detector: &Detector, found: &Found) -> Result<Option<MapFolder>> {
    let Some(folder) = &arguments.maps else {
        return Ok(None);
    };
    MapFolder::make(folder, arguments.map_format, detector, found).map(Some)
}

fn say_threshold(calibration: Option<&Calibration>) {
    match calibration {
        None => {
            say!("the model has no threshold yet, so there are no verdicts: see defend calibrate");
        }
        Some(calibration) => say!("threshold {}", calibration.threshold),
    }
}

/// Verdicts of a batch with a bounded share of false discoveries.
fn decide_together(records: &mut [Record], rate: FalseAlarmRate) {
    let p_values: Vec<f64> = records.iter().filter_map(|r| r.p_value).collect();
    let mut novel = benjamini_hochberg(&p_values, rate).into_iter();
    for record in records.iter_mut().filter(|r| r.p_value.is_some()) {
        record.verdict = novel.next().map(|novel| {
            if novel {
                Verdict::Novel
            } else {
                Verdict::Normal
            }
        });
        // It is not the model's threshold that has decided.
        record.threshold = None;
    }
}

/// Scores against several models in one pass of their backbone.
fn of_many(arguments: &Score) -> Result<Exit> {
    let for_one = [
        ("--maps", arguments.maps.is_some()),
        ("--together", arguments.together),
        ("--fdr", arguments.fdr.is_some()),
        ("--out", arguments.out.is_some()),
    ];
    if let Some((flag, _)) = for_one.iter().find(|(_, given)| *given) {
        let models = arguments.model.len();
        return Err(usage(format!(
            "{flag} is for one --model, there are {models}"
        )));
    }
    let device = arguments.common.device()?;
    let profiles = ProfileSet::load(&arguments.model, &device)?;
    let dataset = find(&arguments.paths, arguments.common.strict, None)?.dataset();
    let mut lines = Lines::new(arguments.format, stdout().lock());
    let mut unreadable = Unreadable::of(dataset.len(), arguments.common.max_unreadable());
    let mut exit = Exit::default();
    profiles.scan_each::<anyhow::Error>(&dataset, &mut progress(arguments), &mut |outcome| {
        match &outcome {
            Ok((name, novelties)) => {
                let models = profiles.names().iter().zip(profiles.detectors());
                for ((model, detector), novelty) in models.zip(novelties) {
                    let mut record = Record::new(name, novelty, detector.calibration());
                    record.model = Some(model.clone());
                    exit.novel |= record.is_novel();
                    lines.write(&record)?;
                }
            }
            Err(failure) => {
                unreadable.count(failure)?;
                for model in profiles.names() {
                    let mut record = Record::of_failure(failure);
                    record.model = Some(model.clone());
                    lines.write(&record)?;
                }
            }
        }
        Ok(())
    })?;
    exit.unreadable = unreadable.finish()? > 0;
    Ok(exit)
}

/// On a terminal the lines themselves show the progress, and a bar would write over them.
fn progress(arguments: &Score) -> Progress {
    if arguments.out.is_none() && stdout().is_terminal() {
        Progress::hidden()
    } else {
        Progress::new()
    }
}

/// Writes a line for each image.
pub(crate) struct Lines<W: Write>(Table<W>);

impl<W: Write> Lines<W> {
    pub(crate) fn new(format: Format, out: W) -> Self {
        Self(Table::new(format, out))
    }

    pub(crate) fn write(&mut self, record: &Record) -> Result<()> {
        match &self.0 {
            Table::Json(_) => self.0.row(
                "",
                &Whole {
                    record,
                    regions: &record.regions,
                },
            ),
            Table::Columns(_) | Table::Csv(_) => self.0.row(&text(record), record),
        }
    }
}

/// What JSON holds beside a table's columns.
#[derive(Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    record: &'a Record,
    /// Boxes in shares of the width and height of what the detector looks at.
    #[serde(skip_serializing_if = "Option::is_none")]
    regions: &'a Option<Vec<NovelRegion>>,
}

/// What is known of an image, for CSV and JSON.
#[derive(Serialize)]
pub(crate) struct Record {
    path: String,
    score: Option<f64>,
    /// Share of normal images that score at least as high.
    p_value: Option<f64>,
    /// A score above it is novel.
    threshold: Option<f64>,
    verdict: Option<Verdict>,
    /// Parts of the score, weight times z, for the closed form.
    posterior: Option<f64>,
    contrast: Option<f64>,
    patches: Option<f64>,
    known: Option<f64>,
    /// The normal image that explains it most.
    nearest: Option<String>,
    /// Where its map was written.
    map: Option<String>,
    /// Its novel parts, where there is a map; a table has no place for them.
    #[serde(skip)]
    regions: Option<Vec<NovelRegion>>,
    /// Where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    error: Option<String>,
}

impl Record {
    pub(crate) fn of_outcome(outcome: &Outcome, calibration: Option<&Calibration>) -> Self {
        match outcome {
            Ok((Finding { name, novelty, .. }, _)) => Self::new(name, novelty, calibration),
            Err(failure) => Self::of_failure(failure),
        }
    }

    fn new(path: &str, novelty: &Novelty, calibration: Option<&Calibration>) -> Self {
        let explanation = novelty.explanation.as_ref();
        let part = |piece: fn(&Explanation) -> Option<Weighed>| {
            explanation
                .and_then(piece)
                .map(|piece| piece.weight * piece.z)
        };
        Self {
            path: path.to_owned(),
            score: Some(novelty.score),
            p_value: novelty.p_value,
            threshold: calibration.map(|c| c.threshold),
            verdict: novelty.verdict,
            posterior: part(|e| Some(e.posterior)),
            contrast: part(|e| e.contrast),
            patches: part(|e| e.patches),
            known: part(|e| e.known),
            nearest: explanation.and_then(|e| e.nearest.first().map(|near| near.name.clone())),
            map: None,
            regions: None,
            model: None,
            error: None,
        }
    }

    fn of_failure(failure: &Failure) -> Self {
        Self {
            error: Some(failure.error.to_string()),
            score: None,
            ..Self::new(&failure.name, &Novelty::of_score(0.0), None)
        }
    }

    pub(crate) fn is_novel(&self) -> bool {
        self.verdict == Some(Verdict::Novel)
    }
}

/// `score<TAB>p-value<TAB>verdict<TAB>path`. Numbers have all their digits, so that none contradicts a verdict.
fn text(record: &Record) -> String {
    let number = |value: Option<f64>| value.map_or("-".into(), |value| value.to_string());
    let verdict = match (record.score, record.verdict) {
        (None, _) => "unreadable",
        (_, Some(verdict)) => word(verdict),
        (_, None) => "-",
    };
    let (score, p_value) = (number(record.score), number(record.p_value));
    let mut line = format!("{score}\t{p_value}\t{verdict}\t{}", escaped(&record.path));
    if let Some(model) = &record.model {
        line.push('\t');
        line.push_str(&escaped(model));
    }
    line
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Normal => "normal",
        Verdict::Novel => "novel",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use defend_core::data::{Error, Failure, RgbImage};

    fn lines(format: Format) -> String {
        let novelty = Novelty {
            verdict: Some(Verdict::Novel),
            p_value: Some(0.1),
            ..Novelty::of_score(0.25)
        };
        let name = "a, \"b\".jpg".to_owned();
        let good = Finding {
            index: 0,
            name,
            novelty,
        };
        let bad = Failure {
            index: 1,
            name: "c.jpg".into(),
            error: Error::EmptyFile {
                origin: "c.jpg".into(),
            },
        };
        let mut bytes = Vec::new();
        let mut lines = Lines::new(format, &mut bytes);
        for outcome in [Ok((good, RgbImage::new(1, 1))), Err(bad)] {
            lines.write(&Record::of_outcome(&outcome, None)).unwrap();
        }
        drop(lines);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn every_image_has_a_line_in_every_format() {
        assert_eq!(
            lines(Format::Table),
            "0.25\t0.1\tnovel\ta, \"b\".jpg\n-\t-\tunreadable\tc.jpg\n"
        );
        let csv = lines(Format::Csv);
        let mut csv = csv.lines();
        assert_eq!(
            csv.next(),
            Some(
                "path,score,p_value,threshold,verdict,posterior,contrast,patches,known,nearest,map,error"
            )
        );
        assert_eq!(
            csv.next(),
            Some("\"a, \"\"b\"\".jpg\",0.25,0.1,,novel,,,,,,,")
        );
        assert!(csv.next().unwrap().starts_with("c.jpg,,,,,,,,,,,"));
        let json = lines(Format::Json);
        let rows: Vec<serde_json::Value> = json
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(rows[0]["verdict"], "novel");
        assert!(rows[1]["score"].is_null() && rows[1]["error"].is_string());
    }
}
