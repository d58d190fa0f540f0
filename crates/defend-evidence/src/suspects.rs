//! Normal images that the others do not explain.

use crate::ClosedForm;

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
    /// [`Error::Factorisation`](crate::Error::Factorisation), as of a fit.
    pub fn suspects(&self, count: usize) -> Result<Vec<Suspect>, crate::Error> {
        let images = self.left_out_images();
        let mut order: Vec<(usize, f64)> = images
            .into_iter()
            .zip(self.unaided.iter().copied())
            .collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let total = order.len();
        order.truncate(count);
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
}
