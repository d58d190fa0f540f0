//! A cache of what frozen networks compute.

use candle_core::{Result, Tensor};
/// The rows of some of a batch's images; `batch`, `[B, ...]`, has those of `indices`, among which all of `wanted` are.
///
/// # Errors
/// When an image is not in the batch, and those of candle.
pub fn rows_of(batch: &Tensor, indices: &[usize], wanted: &[usize]) -> Result<Tensor> {
    if indices == wanted {
        return Ok(batch.clone());
    }
    let row = |image: &usize| match indices.iter().position(|index| index == image) {
        Some(row) => Ok(row as u32),
        None => candle_core::bail!("image {image} is not in its batch"),
    };
    let rows = wanted.iter().map(row).collect::<Result<Vec<u32>>>()?;
    batch.index_select(&Tensor::new(rows, batch.device())?, 0)
}

/// Keeps tensors computed once for each image, up to a limit of memory.
///
/// Without augmentation the frozen part of a network gives the same result in every epoch. Images beyond
/// the limit are computed again each time.
#[derive(Debug)]
pub struct TensorCache<const N: usize> {
    rows: Vec<Option<[Tensor; N]>>,
    free_bytes: usize,
}

impl<const N: usize> TensorCache<N> {
    /// An empty cache for `images` images that holds at most `limit` bytes.
    pub fn new(images: usize, limit: usize) -> Self {
        Self {
            rows: vec![const { None }; images],
            free_bytes: limit,
        }
    }

    /// The `N` tensors of a batch, each `[B, ...]`; `compute` makes them for the images that are not
    /// cached yet.
    ///
    /// # Errors
    /// Whatever `compute` or candle returns.
    pub fn batch<E: From<candle_core::Error>>(
        &mut self,
        indices: &[usize],
        compute: impl FnOnce(&[usize]) -> std::result::Result<[Tensor; N], E>,
    ) -> std::result::Result<[Tensor; N], E> {
        let missing: Vec<usize> = indices
            .iter()
            .copied()
            .filter(|&i| self.rows.get(i).is_none_or(Option::is_none))
            .collect();
        if missing.is_empty() {
            return Ok(self.gather(indices)?);
        }
        let computed = compute(&missing)?;
        let bytes: usize = computed
            .iter()
            .map(|t| t.elem_count() * t.dtype().size_in_bytes())
            .sum();
        if bytes <= self.free_bytes {
            self.free_bytes -= bytes;
            for (row, &index) in missing.iter().enumerate() {
                // A row of its own, so that it does not keep the whole batch alive. `copy` would clone
                // the storage of the whole batch for every row.
                let row = each(&computed, |t| t.narrow(0, row, 1)?.force_contiguous())?;
                if let Some(slot) = self.rows.get_mut(index) {
                    *slot = Some(row);
                }
            }
            return Ok(self.gather(indices)?);
        }
        if missing.len() == indices.len() {
            return Ok(computed);
        }
        // Part of the batch is cached and the rest does not fit: join the two in the batch's order.
        let mut next = 0;
        let mut rows = Vec::with_capacity(indices.len());
        for &index in indices {
            if let Some(Some(row)) = self.rows.get(index) {
                rows.push(row.clone());
            } else {
                rows.push(each(&computed, |t| t.narrow(0, next, 1))?);
                next += 1;
            }
        }
        Ok(join(&rows)?)
    }

    fn gather(&self, indices: &[usize]) -> Result<[Tensor; N]> {
        let rows: Vec<[Tensor; N]> = indices
            .iter()
            .filter_map(|&i| self.rows.get(i).cloned().flatten())
            .collect();
        join(&rows)
    }
}

fn each<const N: usize>(
    tensors: &[Tensor; N],
    f: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<[Tensor; N]> {
    let mut out = tensors.clone();
    for (out, tensor) in out.iter_mut().zip(tensors) {
        *out = f(tensor)?;
    }
    Ok(out)
}

fn join<const N: usize>(rows: &[[Tensor; N]]) -> Result<[Tensor; N]> {
    let Some(first) = rows.first() else {
        candle_core::bail!("a batch without images")
    };
    let mut out = first.clone();
    for (i, out) in out.iter_mut().enumerate() {
        let parts: Vec<&Tensor> = rows.iter().map(|row| &row[i]).collect();
        *out = Tensor::cat(&parts, 0)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn rows_are_found_by_their_image() -> Result<()> {
        let [batch] = rows(&[4, 2, 7])?;
        let of = |wanted: &[usize]| {
            rows_of(&batch, &[4, 2, 7], wanted)?
                .flatten_all()?
                .to_vec1::<f32>()
        };
        assert_eq!(of(&[4, 2, 7])?, [4.0, 2.0, 7.0]);
        assert_eq!(of(&[7, 4])?, [7.0, 4.0]);
        assert!(of(&[7, 5]).is_err());
        Ok(())
    }

    fn rows(indices: &[usize]) -> Result<[Tensor; 1]> {
        let values: Vec<f32> = indices.iter().map(|&i| i as f32).collect();
        Ok([Tensor::from_vec(values, (indices.len(), 1), &Device::Cpu)?])
    }

    fn values(t: &[Tensor; 1]) -> Vec<f32> {
        t[0].flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn cached_images_are_not_computed_again() -> Result<()> {
        let mut cache = TensorCache::<1>::new(4, 1024);
        assert_eq!(values(&cache.batch(&[2, 0], rows)?), [2.0, 0.0]);
        let again = cache.batch(&[0, 2], |_| -> Result<[Tensor; 1]> { panic!("was cached") })?;
        assert_eq!(values(&again), [0.0, 2.0]);
        Ok(())
    }

    #[test]
    fn a_row_holds_no_more_than_itself() -> Result<()> {
        let mut cache = TensorCache::<1>::new(4, 1024);
        cache.batch(&[3, 1, 0], rows)?;
        for row in cache.rows.iter().flatten() {
            let (storage, _) = row[0].storage_and_layout();
            let candle_core::Storage::Cpu(storage) = &*storage else {
                panic!("on the CPU")
            };
            assert_eq!(storage.as_slice::<f32>()?.len(), 1);
        }
        Ok(())
    }

    #[test]
    fn images_beyond_the_limit_are_computed_each_time() -> Result<()> {
        let mut cache = TensorCache::<1>::new(4, 8);
        cache.batch(&[3, 1], rows)?;
        for _ in 0..2 {
            let mut computed = Vec::new();
            let batch = cache.batch(&[0, 1, 2, 3], |missing| {
                computed = missing.to_vec();
                rows(missing)
            })?;
            assert_eq!(values(&batch), [0.0, 1.0, 2.0, 3.0]);
            assert_eq!(computed, [0, 2]);
        }
        Ok(())
    }
}
