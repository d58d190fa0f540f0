//! `defend score`

use std::io::{IsTerminal, stdout};

use anyhow::{Context, Result, bail};
use defend_core::data::Failure;
use defend_core::evidence::Weighed;
use defend_core::{Explanation, Finding, Maps, Novelty, Outcome, ProfileSet, ProgressBar, Verdict};
use serde::Serialize;

use crate::arguments::{Score, Sort};
use crate::images::{count, find, refusal, scan_all};
use crate::maps::MapFolder;
use crate::sort;
use crate::table::Table;

pub(crate) fn run(arguments: &Score) -> Result<()> {
    let [model] = arguments.model.as_slice() else {
        return of_many(arguments);
    };
    if arguments.together {
        return sort::run(&Sort {
            model: model.clone(),
            expect_abnormal: None,
            into: None,
            link: false,
            format: arguments.format,
            paths: arguments.paths.clone(),
            common: arguments.common,
        });
    }
    let detector = arguments.common.load(model)?;
    let found = find(&arguments.paths, arguments.common.strict)?;
    let mut maps = match &arguments.maps {
        Some(folder) => Some(MapFolder::make(folder, &detector)?),
        None => None,
    };
    if detector.calibration().is_none() {
        eprintln!("the model has no threshold yet, so there are no verdicts: see defend calibrate");
    }
    let mut bar = progress();
    let mut table = Table::new(arguments.format, stdout().lock());
    let dataset = found.dataset();
    scan_all(
        &detector,
        &dataset,
        if maps.is_some() {
            Maps::Wanted
        } else {
            Maps::Free
        },
        arguments.common.strict,
        &mut bar,
        &mut |outcome| {
            let record = Record::of_outcome(&outcome);
            table.row(&text(&record), &record)?;
            let (Some(maps), Ok((finding, resized))) = (&mut maps, outcome) else {
                return Ok(());
            };
            let inside = found.inside.get(finding.index);
            let inside = inside.context("a finding without an image")?;
            maps.write(inside, &finding, &dataset, &resized)
        },
    )?;
    if maps.is_some_and(|maps| maps.is_empty()) {
        eprintln!(
            "no map was written: the model has none, as one that was fitted on features or on a single image"
        );
    }
    Ok(())
}

/// Scores against several models in one pass of their backbone.
fn of_many(arguments: &Score) -> Result<()> {
    let for_one = [
        ("--maps", arguments.maps.is_some()),
        ("--together", arguments.together),
    ];
    if let Some((flag, _)) = for_one.iter().find(|(_, given)| *given) {
        let models = arguments.model.len();
        bail!("{flag} is for one --model, there are {models}");
    }
    let device = arguments.common.device();
    let profiles = ProfileSet::load(&arguments.model, &device)?;
    let dataset = find(&arguments.paths, arguments.common.strict)?.dataset();
    let mut table = Table::new(arguments.format, stdout().lock());
    let (mut unreadable, total) = (0, dataset.len());
    let mut bar = progress();
    profiles.scan_each::<anyhow::Error>(&dataset, &mut bar, &mut |outcome| {
        match &outcome {
            Ok((name, novelties)) => {
                for (model, novelty) in profiles.names().iter().zip(novelties) {
                    let record = Record::new(name, novelty, Some(model));
                    table.row(&text(&record), &record)?;
                }
            }
            Err(failure) if arguments.common.strict => return Err(refusal(failure)),
            Err(failure) => {
                unreadable += 1;
                for model in profiles.names() {
                    let record = Record::of_failure(failure, Some(model));
                    table.row(&text(&record), &record)?;
                }
            }
        }
        Ok(())
    })?;
    count(unreadable, total)
}

/// On a terminal the lines themselves show the progress, and a bar would write over them.
fn progress() -> ProgressBar {
    if stdout().is_terminal() {
        ProgressBar::hidden()
    } else {
        ProgressBar::new()
    }
}

/// What is known of an image, for CSV and JSON.
#[derive(Serialize)]
struct Record<'a> {
    path: &'a str,
    score: Option<f64>,
    verdict: Option<Verdict>,
    /// Parts of the score, weight times z, for the closed form.
    posterior: Option<f64>,
    contrast: Option<f64>,
    patches: Option<f64>,
    known: Option<f64>,
    /// The normal image that explains it most.
    nearest: Option<&'a str>,
    /// Where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a str>,
    error: Option<String>,
}

impl<'a> Record<'a> {
    fn of_outcome(outcome: &'a Outcome) -> Self {
        match outcome {
            Ok((Finding { name, novelty, .. }, _)) => Self::new(name, novelty, None),
            Err(failure) => Self::of_failure(failure, None),
        }
    }

    fn new(path: &'a str, novelty: &'a Novelty, model: Option<&'a str>) -> Self {
        let explanation = novelty.explanation.as_ref();
        let part = |piece: fn(&Explanation) -> Option<Weighed>| {
            explanation
                .and_then(piece)
                .map(|piece| piece.weight * piece.z)
        };
        Self {
            path,
            score: Some(novelty.score),
            verdict: novelty.verdict,
            posterior: part(|e| Some(e.posterior)),
            contrast: part(|e| e.contrast),
            patches: part(|e| e.patches),
            known: part(|e| e.known),
            nearest: explanation.and_then(|e| e.nearest.first().map(|near| near.name.as_str())),
            model,
            error: None,
        }
    }

    fn of_failure(failure: &'a Failure, model: Option<&'a str>) -> Self {
        Self {
            path: &failure.name,
            score: None,
            verdict: None,
            posterior: None,
            contrast: None,
            patches: None,
            known: None,
            nearest: None,
            model,
            error: Some(failure.error.to_string()),
        }
    }
}

/// `score<TAB>verdict<TAB>path`
fn text(record: &Record<'_>) -> String {
    let path = match record.model {
        Some(model) => format!("{}\t{model}", record.path),
        None => record.path.to_owned(),
    };
    match (record.score, record.verdict) {
        (Some(score), Some(verdict)) => format!("{score:.6}\t{}\t{path}", word(verdict)),
        (Some(score), None) => format!("{score:.6}\t-\t{path}"),
        (None, _) => format!("-\tunreadable\t{path}"),
    }
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
    use crate::arguments::Format;
    use defend_core::data::{Error, Failure, RgbImage};

    fn lines(format: Format) -> String {
        let novelty = Novelty {
            verdict: Some(Verdict::Novel),
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
        let mut table = Table::new(format, &mut bytes);
        for outcome in [Ok((good, RgbImage::new(1, 1))), Err(bad)] {
            let record = Record::of_outcome(&outcome);
            table.row(&text(&record), &record).unwrap();
        }
        drop(table);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn every_image_has_a_line_in_every_format() {
        assert_eq!(
            lines(Format::Text),
            "0.250000\tnovel\ta, \"b\".jpg\n-\tunreadable\tc.jpg\n"
        );
        let csv = lines(Format::Csv);
        let mut csv = csv.lines();
        assert_eq!(
            csv.next(),
            Some("path,score,verdict,posterior,contrast,patches,known,nearest,error")
        );
        assert_eq!(csv.next(), Some("\"a, \"\"b\"\".jpg\",0.25,novel,,,,,,"));
        assert!(csv.next().unwrap().starts_with("c.jpg,,,,,,,,"));
        let json = lines(Format::Json);
        let rows: Vec<serde_json::Value> = json
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(rows[0]["verdict"], "novel");
        assert!(rows[1]["score"].is_null() && rows[1]["error"].is_string());
    }
}
