//! Scores as a histogram, as SVG.

use std::fmt::Write;

/// Width and height of the plot, and the height of the axis below, pixels.
const SIZE: [f64; 3] = [720.0, 160.0, 22.0];
const BARS: usize = 48;

/// Bars over the range of the scores, those above the threshold in another colour, the threshold as a line.
pub(super) fn svg(scores: &[f64], threshold: Option<f64>) -> String {
    let all = || scores.iter().copied().chain(threshold);
    let (low, high) = (
        all().fold(f64::INFINITY, f64::min),
        all().fold(f64::NEG_INFINITY, f64::max),
    );
    if scores.is_empty() || low.is_nan() {
        return String::new();
    }
    let span = (high - low).max(f64::EPSILON);
    let bar = |score: f64| (((score - low) / span * BARS as f64) as usize).min(BARS - 1);
    // Two counts a bar: at or below the threshold, and above.
    let mut counts = [[0usize; 2]; BARS];
    for &score in scores {
        let novel = threshold.is_some_and(|threshold| score > threshold);
        if let Some(count) = counts.get_mut(bar(score)) {
            count[usize::from(novel)] += 1;
        }
    }
    let most = counts.iter().map(|[a, b]| a + b).max().unwrap_or(1).max(1);
    let [width, height, axis] = SIZE;
    let mut svg = format!(
        r#"<svg viewBox="0 0 {width} {}" role="img" aria-label="Histogram of scores">"#,
        height + axis
    );
    let across = width / BARS as f64;
    for (at, count) in counts.iter().enumerate() {
        let mut top = height;
        for (class, count) in ["normal", "novel"].iter().zip(count) {
            let tall = height * *count as f64 / most as f64;
            if *count > 0 {
                top -= tall;
                let _ = write!(
                    svg,
                    r#"<rect class="{class}" x="{:.2}" y="{top:.2}" width="{:.2}" height="{tall:.2}"/>"#,
                    at as f64 * across,
                    across - 1.0
                );
            }
        }
    }
    if let Some(threshold) = threshold {
        let x = (threshold - low) / span * width;
        let _ = write!(
            svg,
            r#"<line class="threshold" x1="{x:.2}" x2="{x:.2}" y1="0" y2="{height}"/>"#
        );
    }
    let _ = write!(
        svg,
        r#"<text x="0" y="{0}">{low:.3}</text><text x="{width}" y="{0}" text-anchor="end">{high:.3}</text></svg>"#,
        height + axis - 6.0
    );
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_score_is_in_a_bar_of_its_kind() {
        let svg = svg(&[0.0, 1.0, 1.0, 2.0, 4.0], Some(1.5));
        let of = |class: &str| svg.matches(&format!(r#"class="{class}""#)).count();
        // The two equal scores share a bar.
        assert_eq!([of("normal"), of("novel"), of("threshold")], [2, 2, 1]);
        assert!(svg.contains(">0.000<") && svg.contains(">4.000<"));
        assert_eq!(super::svg(&[], None), "");
        assert!(super::svg(&[3.0], None).contains("rect"));
    }
}
