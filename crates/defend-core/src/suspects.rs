//! Normal images that the others do not explain.

use crate::{Detector, Error, NearestNormal};

/// A normal image that the others do not explain, and what is nearest to it among them.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct SuspectImage {
    /// Its name in the data set of the fit; it stands for a group of near copies.
    pub name: String,
    /// What it scores when its group is left out, larger for odder.
    pub score: f64,
    /// Share of all groups that score at least as much.
    pub rank: f64,
    /// Images of its group that were kept, itself included.
    pub copies: usize,
    /// The other normal images that explain it most.
    pub nearest: Vec<NearestNormal>,
}

impl Detector {
    /// Names of the kept normal images at the fit, which [`Detector::forget`] takes; none for a masked student.
    pub fn normal_names(&self) -> impl ExactSizeIterator<Item = &str> {
        let normals = self.closed_form().map_or(&[][..], |closed| &closed.normals);
        normals.iter().map(|image| image.name.as_str())
    }

    /// A small copy of a kept normal image as a JPEG, where the fit was asked for them
    /// ([`DefendBuilder::thumbnails`](crate::DefendBuilder::thumbnails)).
    pub fn thumbnail(&self, name: &str) -> Option<&[u8]> {
        let mut normals = self.closed_form().ok()?.normals.iter();
        normals
            .find(|image| image.name == name)?
            .thumbnail
            .as_deref()
    }

    /// The `count` oddest normal images, each for its group of near copies: what does not belong in the folder, if anything. Known
    /// abnormal images do not matter here.
    ///
    /// # Errors
    /// [`Error::Config`] for a masked student.
    pub fn suspects(&self, count: usize) -> Result<Vec<SuspectImage>, Error> {
        let closed = self.closed_form()?;
        let name = |row: usize| {
            let image = closed.normals.get(row);
            image.map_or_else(String::new, |image| image.name.clone())
        };
        let groups = closed.evidence.groups();
        let suspects = closed.evidence.suspects(count)?.into_iter();
        let named = |suspect: defend_evidence::Suspect| SuspectImage {
            name: name(suspect.image),
            score: suspect.score,
            rank: suspect.rank,
            copies: groups.of_same(suspect.image).count(),
            nearest: suspect
                .nearest
                .into_iter()
                .map(|(row, share)| NearestNormal {
                    name: name(row),
                    share,
                })
                .collect(),
        };
        Ok(suspects.map(named).collect())
    }
}
