//! Images that are scored together tell what the abnormal ones among them look like: the contrast of the normal images with the
//! folder itself.

use crate::closed_form::{spread, within};
use crate::{ClosedForm, Contrast, Embeddings, Error, Standard};

/// Half the width of a 95 % interval, in standard deviations.
const NINETY_FIVE: f64 = 1.96;

/// What many images say of each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Together {
    /// Scores, larger for more novel; those given where `weight` is 0.
    pub scores: Vec<f64>,
    /// Conformal p-value of each image's own score among the left-out values, in `0..=1`: before the images were compared with
    /// each other, since the new scores have no null distribution.
    pub p_values: Vec<f64>,
    /// The normal images' left-out scores on the scale of `scores`, one a group.
    pub left_out: Vec<f64>,
    /// Weight of the contrast with the images, `0..=1`.
    pub weight: f64,
    /// Share of the images that is abnormal, estimated from the p-values (Storey).
    pub abnormal: Share,
}

/// An estimated share with a 95 % interval, `0..=1`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Lower end.
    pub low: f64,
    /// The estimate.
    pub estimate: f64,
    /// Upper end.
    pub high: f64,
}

impl ClosedForm {
    /// Scores images anew that were scored one by one as `scores`, by what they have in common.
    ///
    /// p-values of the scores give the share of abnormal images and the probability of each to be one (one less the q-value);
    /// the normal images are contrasted with the images by that probability, each image's own part left out. The contrast
    /// counts where more images are abnormal than noise would make look so, or where `expected`, a share in `0..1`, says so.
    ///
    /// # Errors
    /// [`Error::Shape`] for other widths or another number of scores; [`Error::Config`] for an expected share out of range.
    pub fn together(
        &self,
        images: &Embeddings,
        scores: &[f64],
        expected: Option<f64>,
    ) -> Result<Together, Error> {
        let config = self.config.together;
        self.normal.check_widths(images, "the embeddings")?;
        if images.len() != scores.len() {
            return Err(Error::Shape {
                what: "the scores of the embeddings".into(),
                found: vec![scores.len()],
                expected: vec![images.len()],
            });
        }
        if let Some(share) = expected
            && !(share > 0.0 && share < 1.0)
        {
            return Err(Error::Config {
                field: "expected share of abnormal images",
                value: share.to_string(),
                expected: "a share in 0..1",
            });
        }
        let (m, n) = (scores.len(), self.left_out.len());
        let p_values = p_values(&self.left_out, scores);
        // Of a few hundred images more than one deviation is chance.
        let deviation = (1.0 / m.max(1) as f64 + 1.0 / n.max(1) as f64).sqrt();
        let mut normal_share = normal_share(&p_values);
        let clamped = |share: f64| share.clamp(0.0, 1.0);
        let abnormal = Share {
            low: clamped(1.0 - normal_share - NINETY_FIVE * deviation),
            estimate: 1.0 - normal_share,
            high: clamped(1.0 - normal_share + NINETY_FIVE * deviation),
        };
        let mut weight = match expected {
            Some(share) => {
                normal_share = normal_share.min(1.0 - share);
                1.0
            }
            None => clamped((1.0 - normal_share - config.noise * deviation) / config.full_share),
        };
        let probabilities: Vec<f64> = q_values(&p_values, normal_share)
            .into_iter()
            .map(|q| 1.0 - q)
            .collect();
        let likely = |i: &usize| probabilities.get(*i).is_some_and(|p| *p > config.least);
        let likely: Vec<usize> = (0..m).filter(likely).collect();
        if likely.is_empty() || n == 0 {
            weight = 0.0;
        }
        let mut together = Together {
            scores: scores.to_vec(),
            left_out: self.left_out.clone(),
            p_values,
            weight,
            abnormal,
        };
        if weight > 0.0 {
            let likely = spread(&likely, config.images);
            let rows = self.judged();
            let (normal, of_images) = self.against(&rows, images, &likely, &probabilities)?;
            for (score, z) in together.scores.iter_mut().zip(of_images) {
                *score += weight * z;
            }
            for (score, image) in together.left_out.iter_mut().zip(self.left_out_images()) {
                let place = rows.binary_search(&image).ok();
                let z = place.and_then(|place| normal.get(place));
                *score += weight * z.copied().unwrap_or(0.0);
            }
        }
        Ok(together)
    }

    /// z of the normal images `rows`, left out, and of the images in the contrast of the normal ones with those that are
    /// `likely` abnormal.
    fn against(
        &self,
        rows: &[usize],
        images: &Embeddings,
        likely: &[usize],
        probabilities: &[f64],
    ) -> Result<(Vec<f64>, Vec<f64>), Error> {
        let config = self.config.together;
        let weights: Vec<f64> = likely
            .iter()
            .filter_map(|&i| probabilities.get(i))
            .copied()
            .collect();
        let (contrast, left_out) = Contrast::fit(
            self.normal.select(rows).features(usize::MAX).view(),
            &within(&self.groups, rows),
            images.select(likely).features(usize::MAX).view(),
            Some(&weights),
            config.width,
            config.ridge,
        )?;
        let scale = Standard::from_values(&left_out.normal);
        let mut values = Vec::with_capacity(images.len());
        for some in images.batches() {
            values.extend(contrast.evaluate(some.features(usize::MAX).view()));
        }
        for (&image, own) in likely.iter().zip(left_out.other) {
            if let Some(value) = values.get_mut(image) {
                *value = own;
            }
        }
        let z = |values: Vec<f64>| values.into_iter().map(|value| scale.z(value)).collect();
        Ok((z(left_out.normal), z(values)))
    }
}

/// Share of left-out values that are at least as large, counting the score itself.
fn p_values(left_out: &[f64], scores: &[f64]) -> Vec<f64> {
    let mut sorted = left_out.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    let of = |score: &f64| {
        let below = sorted.partition_point(|value| value < score);
        (1 + n - below) as f64 / (n + 1) as f64
    };
    scores.iter().map(of).collect()
}

/// Storey's estimate of the share of normal images: twice the share of p-values above a half, and a little more.
fn normal_share(p_values: &[f64]) -> f64 {
    let m = p_values.len().max(1) as f64;
    let above = p_values.iter().filter(|p| **p > 0.5).count() as f64;
    (2.0 * above / m + 1.0 / m).min(1.0)
}

/// Benjamini and Hochberg's q-values times the share of normal images.
fn q_values(p_values: &[f64], normal_share: f64) -> Vec<f64> {
    let m = p_values.len();
    let mut order: Vec<usize> = (0..m).collect();
    order.sort_by(|&a, &b| p_values[a].total_cmp(&p_values[b]).then(a.cmp(&b)));
    let (mut values, mut lowest) = (vec![1.0; m], 1.0f64);
    for (rank, &image) in order.iter().enumerate().rev() {
        lowest = lowest.min(p_values[image] * m as f64 * normal_share / (rank + 1) as f64);
        values[image] = lowest;
    }
    values
}
