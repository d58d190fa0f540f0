//! A page with the tables, the plots and images of the worst errors.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use defend_core::data::{Dataset, write_png};
use defend_core::overlay;
use image::imageops::{FilterType, resize};

use crate::group::{Group, histogram_name, plot_name, run_name};
use crate::{Error, Record, Table};

/// Side of an image on the page, pixels.
const SIDE: u32 = 160;

const STYLE: &str = "body{font-family:sans-serif;margin:2em;max-width:80em}table{border-collapse:collapse;margin:1em 0}\
    td,th{border:1px solid #ccc;padding:.3em .6em;text-align:right}td:first-child,th:first-child{text-align:left}\
    .worst{display:flex;flex-wrap:wrap;gap:.6em}.worst figure{margin:0;font-size:.8em}img.plot{width:24em}";

pub(crate) fn write_page(
    folder: &Path,
    root: &Path,
    tables: &[Table],
    groups: &[Group<'_>],
) -> Result<PathBuf, Error> {
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'\"><title>Benchmark</title><style>{STYLE}</style>\n"
    );
    for table in tables {
        html += &table_html(table);
    }
    let mut sources = HashMap::new();
    for group in groups {
        let _ = writeln!(
            html,
            "<h2>{}, {}: plots and worst errors</h2>",
            escape(group.data),
            escape(group.protocol)
        );
        for experiment in &group.experiments {
            let _ = writeln!(
                html,
                "<h3>{}</h3>\n<img class=\"plot\" src=\"plots/{}-roc.svg\" alt=\"ROC curves\">",
                escape(experiment),
                escape(&plot_name(group, experiment)),
            );
            for (i, record) in group.of_experiment(experiment).enumerate() {
                let _ = writeln!(
                    html,
                    "<details{}><summary>{}</summary>\n<img class=\"plot\" src=\"plots/{}\" alt=\"scores\">",
                    if i == 0 { " open" } else { "" },
                    escape(&record.key.method),
                    escape(&histogram_name(record))
                );
                // Opened once for all experiments; a data set that is gone leaves the page without images.
                let set = sources.entry(record.key.data.clone()).or_insert_with(|| {
                    let halves = record.source.open(root).ok();
                    halves.map(|halves| halves.test)
                });
                if let Some(set) = set {
                    html += &worst_errors(folder, record, set)?;
                }
                html += "</details>\n";
            }
        }
    }
    let path = folder.join("index.html");
    std::fs::write(&path, html).map_err(Error::io(&path, "writing"))?;
    Ok(path)
}

fn table_html(table: &Table) -> String {
    let cells = |tag: &str, row: &[String]| -> String {
        let cell = |text: &String| format!("<{tag}>{}</{tag}>", escape(text));
        format!("<tr>{}</tr>\n", row.iter().map(cell).collect::<String>())
    };
    let rows: String = table.rows.iter().map(|row| cells("td", row)).collect();
    format!(
        "<h2>{}</h2><p>{}</p><table>{}{rows}</table>\n",
        escape(&table.title),
        escape(&table.note),
        cells("th", &table.header)
    )
}

/// Images with their maps: false alarms, then misses.
fn worst_errors(folder: &Path, record: &Record, set: &Arc<dyn Dataset>) -> Result<String, Error> {
    let images = folder.join("images");
    std::fs::create_dir_all(&images).map_err(Error::io(&images, "making the folder"))?;
    let mut html = String::from(
        "<p>Normal images with the highest scores, then abnormal ones with the lowest.</p>\n<div class=\"worst\">\n",
    );
    let name = run_name(record);
    for (i, worst) in record.worst.iter().enumerate() {
        let Some(scored) = record.scores.get(worst.place) else {
            continue;
        };
        let Ok(image) = set.image(scored.index) else {
            continue;
        };
        let small = resize(&image, SIDE, SIDE, FilterType::Triangle);
        let shown = match (worst.patch_map(), &record.map_scale) {
            (Some(map), Some(scale)) => overlay(&small, &map, scale),
            _ => small,
        };
        let file = format!("{name}-{i}.png");
        let path = images.join(&file);
        write_png(&path, shown).map_err(Error::io(&path, "writing"))?;
        let kind = if scored.abnormal {
            "miss"
        } else {
            "false alarm"
        };
        let _ = writeln!(
            html,
            "<figure><img src=\"images/{}\" alt=\"{kind}\"><figcaption>{kind}, {:.4}<br>{}</figcaption></figure>",
            escape(&file),
            scored.score,
            escape(last_part(&scored.name)),
        );
    }
    html += "</div>\n";
    Ok(html)
}

fn last_part(name: &str) -> &str {
    name.rsplit(['/', '\\']).next().unwrap_or(name)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
