//! The page's HTML. Every name is escaped, and a policy in the page itself forbids requests and scripts.

use std::fmt::Write;
use std::sync::Arc;

use anyhow::Result;
use defend_core::data::Dataset;
use defend_core::evidence::Weighed;
use defend_core::{CalibrationSource, Novelty, Verdict};

use super::{Content, Entry, NEAREST, histogram};
use crate::calibrate::promised;

const STYLE: &str = "
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1080px;padding:0 1rem;color:#1c1c1c;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.entry{display:flex;gap:1rem;flex-wrap:wrap;align-items:flex-start;border-top:1px solid #ddd;padding:1rem 0}
.entry img{max-width:256px;height:auto;display:block}
.facts{flex:1;min-width:300px}.name{font-weight:600;overflow-wrap:anywhere}
.badge{border-radius:3px;padding:0 .45em;color:#fff;background:#3b7a57}.badge.novel{background:#b3261e}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.1em .9em .1em 0;text-align:left;font-weight:400}
td.n{text-align:right;font-variant-numeric:tabular-nums}
figure{margin:0}.nearest{display:flex;gap:.8rem;flex-wrap:wrap;font-size:.85em;overflow-wrap:anywhere}.nearest img{max-width:96px}
svg{width:100%;max-width:720px}svg text{font-size:12px;fill:#555}
rect.normal{fill:#3b7a57}rect.novel{fill:#b3261e}line.threshold{stroke:#1c1c1c;stroke-dasharray:4 3}
@media(prefers-color-scheme:dark){body{color:#e8e8e8;background:#161616}.entry{border-color:#444}svg text{fill:#aaa}line.threshold{stroke:#e8e8e8}}
";

/// Text in HTML, also between quotes.
fn escaped(text: &str) -> String {
    let escape = |c: char| match c {
        '&' => "&amp;".to_owned(),
        '<' => "&lt;".to_owned(),
        '>' => "&gt;".to_owned(),
        '"' => "&quot;".to_owned(),
        '\'' => "&#39;".to_owned(),
        c if c.is_control() => c.escape_default().to_string(),
        c => c.to_string(),
    };
    text.chars().map(escape).collect()
}

pub(super) fn render(content: &Content<'_>, images: &Arc<dyn Dataset>) -> Result<String> {
    let calibration = content.detector.calibration();
    let threshold = calibration.map(|c| c.threshold);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>Novelty of {} images</title><style>{STYLE}</style></head><body>\n",
        content.scores.len()
    );
    let _ = write!(
        page,
        "<h1>{} images, {} novel, {} unreadable</h1>\n<p>Model {}, backbone {}.",
        content.scores.len(),
        content.novel,
        content.unreadable.len(),
        escaped(&content.model),
        escaped(&content.detector.teacher().spec().name)
    );
    match calibration {
        None => page.push_str(" It has no threshold, so there are no verdicts."),
        Some(calibration) => {
            let _ = write!(page, " Threshold {}", calibration.threshold);
            if calibration.source == CalibrationSource::HeldOut {
                for line in promised(calibration).unwrap_or_default() {
                    let _ = write!(page, "; {}", escaped(&line));
                }
            } else {
                let _ = write!(
                    page,
                    "; about {:.1} % of normal images are called novel",
                    100.0 * calibration.false_alarm_rate
                );
            }
            page.push('.');
        }
    }
    page.push_str("</p>\n<h2>Scores</h2>\n");
    page.push_str(&histogram::svg(&content.scores, threshold));
    let _ = write!(
        page,
        "\n<h2>The {} most novel</h2>\n<p>Beside each image its map: no colour where a patch is usual, full colour at the right end of the \
         bar below it.</p>\n",
        content.entries.len()
    );
    for entry in &content.entries {
        let pictures = content.pictures(entry, images)?;
        entry_of(&mut page, entry, &pictures, content);
    }
    if !content.unreadable.is_empty() {
        page.push_str("<h2>What could not be read</h2>\n<ul>\n");
        for (name, reason) in &content.unreadable {
            let _ = writeln!(page, "<li>{}: {}</li>", escaped(name), escaped(reason));
        }
        page.push_str("</ul>\n");
    }
    page.push_str("</body></html>\n");
    Ok(page)
}

fn entry_of(page: &mut String, entry: &Entry, pictures: &[String], content: &Content<'_>) {
    let Entry { name, novelty, .. } = entry;
    let name = escaped(name);
    page.push_str("<section class=\"entry\">");
    for (picture, what) in pictures.iter().zip(["", "map of "]) {
        let _ = write!(page, "<img src=\"{picture}\" alt=\"{what}{name}\">");
    }
    let badge = match novelty.verdict {
        Some(Verdict::Novel) => "<span class=\"badge novel\">novel</span> ",
        Some(Verdict::Normal) => "<span class=\"badge\">normal</span> ",
        None => "",
    };
    let _ = write!(
        page,
        "<div class=\"facts\"><div class=\"name\">{name}</div><div>{badge}score {}",
        novelty.score
    );
    if let Some(p) = novelty.p_value {
        let _ = write!(page, ", p-value {p:.4}");
    }
    page.push_str("</div>");
    pieces(page, novelty);
    let nearest = novelty.explanation.iter().flat_map(|e| &e.nearest);
    page.push_str("<div>nearest normal images</div><div class=\"nearest\">");
    for near in nearest.take(NEAREST) {
        let shown = content.normal.get(&near.name);
        let shown = shown.map(|image| format!("<img src=\"{image}\" alt=\"\">"));
        let _ = write!(
            page,
            "<figure>{}<figcaption>{} ({:.0} %)</figcaption></figure>",
            shown.unwrap_or_default(),
            escaped(&near.name),
            100.0 * near.share
        );
    }
    page.push_str("</div></div></section>\n");
}

/// What each piece of evidence says: weight, z, and what it adds.
fn pieces(page: &mut String, novelty: &Novelty) {
    let Some(explanation) = &novelty.explanation else {
        return;
    };
    let rows: [(&str, Option<Weighed>); 4] = [
        ("unlike the normal images", Some(explanation.posterior)),
        ("more like ordinary photos", explanation.contrast),
        ("a part unlike anything normal", explanation.patches),
        ("like a known abnormal image", explanation.known),
    ];
    page.push_str("<table><tr><th></th><th>weight</th><th>z</th><th>adds</th></tr>");
    for (what, piece) in rows {
        if let Some(Weighed { weight, z, .. }) = piece {
            let _ = write!(
                page,
                "<tr><td>{what}</td><td class=\"n\">{weight:.2}</td><td class=\"n\">{z:.2}</td><td class=\"n\">{:.2}</td></tr>",
                weight * z
            );
        }
    }
    page.push_str("</table>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_become_markup() {
        let name = "\"><script>alert('x')</script>&\n";
        assert_eq!(
            escaped(name),
            "&quot;&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;\\n"
        );
    }
}
