//! Normal images that the others do not explain.

use crate::linear::most_similar;
use crate::{ClosedForm, Embeddings, Error};

/// A group of normal images that the others do not explain.
#[derive(Debug, Clone, PartialEq)]
pub struct Suspect {
    /// The image that stands for the group, among the kept ones.
    pub image: usize,
    /// What it scores when its group is left out, larger for odder.
    pub score: f64,
    /// Share of the left-out scores that are at least as large, its own included.
    pub rank: f64,
    /// The kept images of other groups that explain it most, leaders, with their share, largest first.
    pub nearest: Vec<(usize, f64)>,
}

impl ClosedForm {
    /// The `count` groups with the largest left-out scores, the oddest first. Of more images than are judged exactly, and of
    /// many whose patches count, only the part that has left-out values is looked at.
    ///
    /// # Errors
    /// [`Error::Factorisation`], as of a fit.
    pub fn suspects(&self, count: usize) -> Result<Vec<Suspect>, Error> {
        let total = self.unaided.len();
        let order = self.oddest(count);
        let rows: Vec<usize> = order.iter().map(|(image, _)| *image).collect();
        let explained = self.explained_by_others(&rows)?;
        let suspects = order.into_iter().zip(explained).enumerate();
        let suspect = |(place, ((image, score), nearest))| Suspect {
            image,
            score,
            rank: (place + 1) as f64 / total as f64,
            nearest,
        };
        Ok(suspects.map(suspect).collect())
    }

    /// The images that stand for these groups, with their left-out scores.
    fn oddest(&self, count: usize) -> Vec<(usize, f64)> {
        let images = self.left_out_images().into_iter();
        let mut order: Vec<(usize, f64)> = images.zip(self.unaided.iter().copied()).collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        order.truncate(count);
        order
    }

    /// Which of the `images` belong to the `count` first suspects, ascending: those whose nearest kept image is in one of their
    /// groups.
    ///
    /// # Errors
    /// [`Error::Shape`] for other widths.
    pub fn images_of_suspects(
        &self,
        images: &Embeddings,
        count: usize,
    ) -> Result<Vec<usize>, Error> {
        self.normal.check_widths(images, "the embeddings")?;
        let mut odd = vec![false; self.groups.len()];
        for (suspect, _) in self.oddest(count) {
            let group = self.groups.of.get(suspect);
            if let Some(odd) = group.and_then(|&group| odd.get_mut(group)) {
                *odd = true;
            }
        }
        let first = self.config.posterior.first_part;
        let kept = self.normal.phi(first);
        let mut belongs = Vec::with_capacity(images.len());
        for some in images.batches() {
            for nearest in most_similar(some.phi(first).view(), kept.view()) {
                let group = self.groups.of.get(nearest);
                belongs.push(group.is_some_and(|&group| odd.get(group) == Some(&true)));
            }
        }
        Ok((0..images.len()).filter(|&image| belongs[image]).collect())
    }
}
