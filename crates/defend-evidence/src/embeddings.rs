//! What stands for an image: a few vectors of a frozen network.

use ndarray::{Array1, Array2, Axis, concatenate, s};
use std::cmp::Ordering;

use crate::Error;

/// Norms below this count as this, as in PyTorch's `normalize`.
const LEAST_NORM: f64 = 1e-12;

/// The vectors of some images: one matrix `[images, channels]` for each kind of vector.
///
/// A Vision Transformer gives three: the CLS token of the last but one block, that of the last, and the mean patch token of
/// the last, each after the final norm. Anything else that a network says of an item works too, even a single
/// matrix.
///
/// ```
/// use defend_evidence::Embeddings;
/// use ndarray::array;
///
/// let images = Embeddings::new(vec![array![[3.0, 4.0], [0.0, 2.0]]])?;
/// assert_eq!(images.len(), 2);
/// assert_eq!(images.features(1).row(0).to_vec(), [0.6, 0.8]);
/// # Ok::<(), defend_evidence::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    parts: Vec<Array2<f32>>,
}

impl Embeddings {
    /// From one matrix `[images, channels]` for each kind of vector.
    ///
    /// # Errors
    /// [`Error::Empty`] without any matrix or channel, [`Error::Shape`] when the numbers of images differ,
    /// [`Error::NotFinite`] naming the first image with such a value.
    pub fn new(parts: Vec<Array2<f32>>) -> Result<Self, Error> {
        let Some(images) = parts.first().map(Array2::nrows) else {
            return Err(Error::Empty { what: "embeddings" });
        };
        for (i, part) in parts.iter().enumerate() {
            let what = || format!("part {i} of the embeddings");
            if part.nrows() != images || part.ncols() == 0 {
                return Err(Error::Shape {
                    what: what(),
                    found: part.shape().to_vec(),
                    expected: vec![images, part.ncols().max(1)],
                });
            }
            let damaged = |row: &ndarray::ArrayView1<'_, f32>| row.iter().any(|v| !v.is_finite());
            if let Some(image) = part.rows().into_iter().position(|row| damaged(&row)) {
                return Err(Error::NotFinite {
                    what: what(),
                    image,
                });
            }
        }
        Ok(Self { parts })
    }

    /// The images of some batches, one after the other.
    ///
    /// # Errors
    /// [`Error::Empty`] without any batch, [`Error::Shape`] for batches of other widths than the first.
    pub fn joined(batches: &[Self]) -> Result<Self, Error> {
        let Some(first) = batches.first() else {
            return Err(Error::Empty { what: "embeddings" });
        };
        for batch in batches {
            first.check_widths(batch, "a batch of embeddings")?;
        }
        let join = |part: usize| {
            let views: Vec<_> = batches
                .iter()
                .map(|batch| batch.parts[part].view())
                .collect();
            concatenate(Axis(0), &views).map_err(|_| Error::Empty { what: "embeddings" })
        };
        let parts = (0..first.parts.len()).map(join).collect::<Result<_, _>>()?;
        Ok(Self { parts })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.parts.first().map_or(0, Array2::nrows)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The matrices.
    pub fn parts(&self) -> &[Array2<f32>] {
        &self.parts
    }

    /// Channels of each part.
    pub fn widths(&self) -> Vec<usize> {
        self.parts.iter().map(Array2::ncols).collect()
    }

    /// Some of the images, in the order asked for.
    #[must_use]
    pub fn select(&self, images: &[usize]) -> Self {
        Self {
            parts: self
                .parts
                .iter()
                .map(|part| part.select(Axis(0), images))
                .collect(),
        }
    }

    /// The images in order, a bounded number at a time: what is computed of them takes no more memory for more images.
    pub(crate) fn batches(&self) -> impl Iterator<Item = Self> {
        const ROWS: usize = 1024;
        (0..self.len()).step_by(ROWS).map(|from| {
            let to = self.len().min(from + ROWS);
            self.select(&(from..to).collect::<Vec<_>>())
        })
    }

    /// The first `parts` parts at unit length, joined, at unit length again; `[images, channels]`.
    pub fn features(&self, parts: usize) -> Array2<f64> {
        self.joined_parts(parts, 1.0)
    }

    /// `phi`: all parts at unit length, the first one times `first`, joined, at unit length again; `[images, channels]`.
    pub fn phi(&self, first: f64) -> Array2<f64> {
        self.joined_parts(usize::MAX, first)
    }

    fn joined_parts(&self, parts: usize, first: f64) -> Array2<f64> {
        let parts: Vec<&Array2<f32>> = self.parts.iter().take(parts.max(1)).collect();
        let width = parts.iter().map(|part| part.ncols()).sum();
        // Filled row by row: rows with gaps would be summed in another order.
        let mut all = Array2::zeros((self.len(), width));
        let mut from = 0;
        for part in parts {
            let to = from + part.ncols();
            let mut rows = unit(part.as_standard_layout().mapv(f64::from));
            if from == 0 {
                rows *= first;
            }
            all.slice_mut(s![.., from..to]).assign(&rows);
            from = to;
        }
        unit(all)
    }

    /// An order of the images that depends on their values alone, in which equal ones are neighbours.
    pub(crate) fn by_value(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.sort_by(|&a, &b| self.compare(a, b));
        order
    }

    /// Compares two images by their values.
    pub(crate) fn compare(&self, a: usize, b: usize) -> Ordering {
        let parts = self.parts.iter().map(|part| {
            let pairs = part.row(a).into_iter().zip(part.row(b));
            pairs
                .map(|(a, b)| a.total_cmp(b))
                .find(|o| o.is_ne())
                .unwrap_or(Ordering::Equal)
        });
        parts
            .into_iter()
            .find(|order| order.is_ne())
            .unwrap_or(Ordering::Equal)
    }

    /// Refuses embeddings of other widths than `self`.
    pub(crate) fn check_widths(&self, other: &Self, what: &str) -> Result<(), Error> {
        if self.widths() == other.widths() {
            return Ok(());
        }
        Err(Error::Shape {
            what: what.into(),
            found: other.widths(),
            expected: self.widths(),
        })
    }
}

/// Rows at unit length.
fn unit(mut rows: Array2<f64>) -> Array2<f64> {
    let norms: Array1<f64> = rows.map_axis(Axis(1), |row| row.dot(&row).sqrt().max(LEAST_NORM));
    rows /= &norms.insert_axis(Axis(1));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn features_join_unit_parts() {
        let images = Embeddings::new(vec![
            array![[3.0, 4.0]],
            array![[0.0, 0.0, 9.0]],
            array![[1.0]],
        ])
        .unwrap();
        let half = 0.5f64.sqrt();
        let found = images.features(2);
        for (found, expected) in found.iter().zip([0.6 * half, 0.8 * half, 0.0, 0.0, half]) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
        assert_eq!(images.features(3).ncols(), 6);
        let nothing = Embeddings::new(vec![array![[0.0, 0.0]]]).unwrap();
        assert_eq!(nothing.features(1), array![[0.0, 0.0]]);
    }

    #[test]
    fn batches_are_joined() {
        let batch = |value: f32| {
            Embeddings::new(vec![
                array![[value], [value]],
                array![[value, 1.0], [value, 2.0]],
            ])
        };
        let (a, b) = (batch(1.0).unwrap(), batch(2.0).unwrap());
        let both = Embeddings::joined(&[a.clone(), b.clone()]).unwrap();
        assert_eq!((both.select(&[0, 1]), both.select(&[2, 3])), (a.clone(), b));
        assert!(Embeddings::joined(&[]).is_err());
        let other = Embeddings::new(vec![array![[1.0]]]).unwrap();
        assert!(matches!(
            Embeddings::joined(&[a, other]),
            Err(Error::Shape { .. })
        ));
    }

    #[test]
    fn faults_are_named() {
        assert!(matches!(
            Embeddings::new(Vec::new()),
            Err(Error::Empty { .. })
        ));
        let uneven = Embeddings::new(vec![Array2::zeros((2, 3)), Array2::zeros((1, 3))]);
        assert!(matches!(uneven, Err(Error::Shape { .. })));
        let mut damaged = Array2::zeros((3, 2));
        damaged[[1, 1]] = f32::NAN;
        let error = Embeddings::new(vec![Array2::zeros((3, 1)), damaged]).unwrap_err();
        assert_eq!(
            error,
            Error::NotFinite {
                what: "part 1 of the embeddings".into(),
                image: 1
            }
        );
    }
}
