//! Is the image like one that is known to be abnormal? The contrast of the normal images with a few of them.

use ndarray::ArrayView2;

use crate::closed_form::{distinct, first_equal, within};
use crate::{ClosedForm, Contrast, Embeddings, Error, Groups, KnownConfig, Standard, Weighed};

/// The contrast with known abnormal images.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) abnormal: Embeddings,
    pub(crate) contrast: Contrast,
    pub(crate) scale: Standard,
    /// Kept normal images that it was fitted on, ascending, and their left-out values.
    pub(crate) normal_rows: Vec<usize>,
    pub(crate) left_out: Vec<f64>,
}

impl Known {
    /// `normal`: the images `normal_rows`, by `groups`.
    pub(crate) fn fit(
        normal: &Embeddings,
        groups: &Groups,
        abnormal: Embeddings,
        normal_rows: Vec<usize>,
        config: KnownConfig,
    ) -> Result<Self, Error> {
        let (contrast, left_out) = Contrast::fit(
            normal.features(usize::MAX).view(),
            groups,
            abnormal.features(usize::MAX).view(),
            None,
            config.width,
            config.ridge,
        )?;
        Ok(Self {
            abnormal,
            contrast,
            scale: Standard::from_values(&left_out.normal),
            normal_rows,
            left_out: left_out.normal,
        })
    }

    /// What speaks against images, unit rows `[B, D]`: deviations beyond the margin, or nothing.
    pub(crate) fn evaluate(
        &self,
        images: ArrayView2<'_, f64>,
        config: KnownConfig,
    ) -> Vec<Weighed> {
        let values = self.contrast.evaluate(images);
        let of = |value| self.against(value, config);
        values.into_iter().map(of).collect()
    }

    /// Its part of the sum for a normal image that it was fitted on, left out.
    pub(crate) fn of_normal(&self, image: usize, config: KnownConfig) -> f64 {
        let place = self.normal_rows.binary_search(&image).ok();
        let value = place.and_then(|place| self.left_out.get(place));
        value.map_or(0.0, |value| {
            let piece = self.against(*value, config);
            piece.weight * piece.z
        })
    }

    fn against(&self, value: f64, config: KnownConfig) -> Weighed {
        let known = self.abnormal.len() as f64;
        Weighed {
            z: (self.scale.z(value) - config.margin).max(0.0),
            weight: known / (known + config.hesitation),
        }
    }
}

impl ClosedForm {
    /// Learns what some abnormal images look like, beside those that are known already. A new image is then also asked whether
    /// it is like one of them, which speaks against it and never for it: see [`KnownConfig`]. Left-out
    /// values change too.
    ///
    /// # Errors
    /// [`Error::Shape`] for other widths, [`Error::AlsoNormal`] for an image whose embeddings are those of a normal one;
    /// nothing changes then.
    pub fn learn_abnormal(&mut self, abnormal: &Embeddings) -> Result<(), Error> {
        self.normal
            .check_widths(abnormal, "the abnormal embeddings")?;
        if let Some(image) = first_equal(abnormal, &self.normal)? {
            return Err(Error::AlsoNormal { image });
        }
        let known = self.known.as_ref().map(|known| known.abnormal.clone());
        let all: Vec<Embeddings> = known.into_iter().chain([abnormal.clone()]).collect();
        let all = Embeddings::joined(&all)?;
        let all = all.select(&distinct(&all));
        if all.is_empty() {
            return Ok(());
        }
        let rows = self.judged();
        let groups = within(&self.groups, &rows);
        let known = Known::fit(
            &self.normal.select(&rows),
            &groups,
            all,
            rows,
            self.config.known,
        )?;
        self.known = Some(known);
        self.settle();
        Ok(())
    }

    /// Number of known abnormal images.
    pub fn known_abnormal(&self) -> usize {
        self.known.as_ref().map_or(0, |known| known.abnormal.len())
    }
}
