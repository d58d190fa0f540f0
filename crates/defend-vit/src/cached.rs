//! Features that are computed once for every image.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Tensor};

use crate::feature_store::{Entry, Key, Memory, Store, block_key, keys, weights_hash};
use crate::{Backbone, BackboneSpec, Encoder, Error, Features, Grid, Layer, TokenSet};

/// Where [`Cached`] keeps features, and how exactly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// Limit of the memory for features, bytes; images beyond it are read from the folder, or computed again. The
    /// last layer of ViT-Ti takes 150 KB an image.
    pub memory_bytes: usize,
    /// Folder that keeps the features between runs, in a sub-folder for each set of weights. `None`: memory only.
    pub folder: Option<PathBuf>,
    /// How exactly features are kept.
    pub precision: Precision,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            memory_bytes: 2 << 30,
            folder: None,
            precision: Precision::Full,
        }
    }
}

/// How exactly features are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// As they were computed: the cache changes no result.
    #[default]
    Full,
    /// Rounded to `f16`, half the space; a value changes by up to a two-thousandth of itself.
    Half,
}

/// A frozen backbone that remembers the features of the images it has seen.
///
/// An image is known by its pixels after the preprocessing, so that changed files, sizes and normalisations are other
/// images, and a folder is known by the weights. Several detectors on one teacher, the epochs of a training run, and
/// runs that begin again pay for the teacher once. [`Backbone::features_masked`] is handed on as it is.
pub struct Cached {
    inner: Arc<dyn Backbone>,
    spec: BackboneSpec,
    store: Arc<Store>,
}

impl Cached {
    /// Remembers the features of `inner` as `config` says.
    ///
    /// # Errors
    /// [`Error::Config`] for a folder beside a backbone that does not show its tensors, so that its features could be
    /// taken for another's; [`Error::Io`] when the folder cannot be made.
    pub fn new(inner: Arc<dyn Backbone>, config: CacheConfig) -> Result<Self, Error> {
        let folder = match config.folder {
            Some(folder) => {
                let precision = match config.precision {
                    Precision::Full => "",
                    Precision::Half => "-f16",
                };
                let weights = weights_hash(&*inner)?;
                let layers = inner.spec().layers;
                let folder = folder.join(format!("{weights}-{layers}{precision}"));
                std::fs::create_dir_all(&folder).map_err(|source| Error::Io {
                    path: folder.clone(),
                    source,
                })?;
                Some(folder)
            }
            None => None,
        };
        Ok(Self {
            spec: inner.spec().clone(),
            inner,
            store: Arc::new(Store {
                folder,
                half: config.precision == Precision::Half,
                memory: Mutex::new(Memory {
                    entries: HashMap::new(),
                    free_bytes: config.memory_bytes,
                }),
            }),
        })
    }

    /// The same memory behind a backbone that gives the last `layers` layers only.
    ///
    /// # Errors
    /// [`Error::Config`] for none, or more than the cached backbone gives.
    pub fn with_layers(&self, layers: usize) -> Result<Self, Error> {
        let available = self.spec.layers;
        if layers == 0 || layers > available {
            return Err(Error::Config {
                origin: self.spec.name.clone(),
                reason: format!("cannot return {layers} of {available} cached layers"),
            });
        }
        let mut spec = self.spec.clone();
        spec.layers = layers;
        Ok(Self {
            inner: Arc::clone(&self.inner),
            spec,
            store: Arc::clone(&self.store),
        })
    }

    /// Features of the images that are not known yet, one entry an image.
    fn compute(&self, images: &Tensor, missing: &[usize]) -> Result<Vec<Entry>, Error> {
        let features = self.inner.features(&rows_of(images, missing)?)?;
        let mut all = vec![&features.cls, &features.patches, &features.cls_attention];
        for layer in &features.intermediates {
            all.extend([&layer.cls, &layer.patches]);
        }
        let entry = |row| {
            let tensors = all.iter().map(|t| self.kept(t, row));
            let tensors = tensors.collect::<Result<_, Error>>()?;
            let grid = features.grid;
            Ok(Entry { tensors, grid })
        };
        (0..missing.len()).map(entry).collect()
    }

    /// An image's row of a tensor as it is kept.
    fn kept(&self, tensor: &Tensor, row: usize) -> Result<Tensor, Error> {
        let row = tensor.detach().narrow(0, row, 1)?.force_contiguous()?;
        if !self.store.half {
            return Ok(row);
        }
        Ok(row.to_dtype(DType::F16)?)
    }

    /// The batch's features from its entries, cut to the layers asked for.
    fn join(&self, entries: &[Entry], dtype: DType) -> Result<Features, Error> {
        let column = |i: usize| column(entries, i, dtype);
        let earlier = (1..self.spec.layers)
            .map(|layer| {
                Ok(Layer {
                    cls: column(1 + 2 * layer)?,
                    patches: column(2 + 2 * layer)?,
                })
            })
            .collect::<Result<_, Error>>()?;
        let grid = entries.first().map_or(
            Grid {
                rows: 0,
                columns: 0,
            },
            |e| e.grid,
        );
        Ok(Features {
            cls: column(0)?,
            patches: column(1)?,
            cls_attention: column(2)?,
            grid,
            intermediates: earlier,
        })
    }
}

impl Encoder for Cached {
    fn spec(&self) -> &BackboneSpec {
        &self.spec
    }

    /// Blocks are kept one by one, apart from the features.
    fn available_blocks(&self) -> Vec<usize> {
        self.inner.available_blocks()
    }

    fn intermediates(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Layer>, Error> {
        let keys = keys(images)?;
        if keys.is_empty() {
            return self.inner.intermediates(images, blocks);
        }
        let of_block =
            |block: usize| -> Vec<Key> { keys.iter().map(|key| block_key(key, block)).collect() };
        let keys: Vec<Vec<Key>> = blocks.iter().map(|block| of_block(*block)).collect();
        let mut entries: Vec<Vec<Option<Entry>>> = keys
            .iter()
            .map(|keys| self.store.get_all(keys, images.device()))
            .collect();
        let known = |i: usize| entries.iter().all(|block| block[i].is_some());
        let missing: Vec<usize> = (0..images.dim(0)?).filter(|&i| !known(i)).collect();
        if !missing.is_empty() {
            let some = rows_of(images, &missing)?;
            let layers = self.inner.intermediates(&some, blocks)?;
            for ((layer, keys), entries) in layers.iter().zip(&keys).zip(&mut entries) {
                for (row, &i) in missing.iter().enumerate() {
                    let grid = Grid {
                        rows: 1,
                        columns: layer.patches.dim(1)?,
                    };
                    let tensors =
                        vec![self.kept(&layer.cls, row)?, self.kept(&layer.patches, row)?];
                    let entry = Entry { tensors, grid };
                    self.store.put(&keys[i], &entry)?;
                    entries[i] = Some(entry);
                }
            }
        }
        let layers = entries.into_iter().map(|block| {
            let entries: Vec<Entry> = block.into_iter().flatten().collect();
            Ok(Layer {
                cls: column(&entries, 0, images.dtype())?,
                patches: column(&entries, 1, images.dtype())?,
            })
        });
        layers.collect()
    }

    /// Nothing of it is kept.
    fn intermediates_and_local(
        &self,
        images: &Tensor,
        blocks: &[usize],
    ) -> Result<(Vec<Layer>, Option<Tensor>), Error> {
        self.inner.intermediates_and_local(images, blocks)
    }

    fn tensors(&self) -> Result<Option<HashMap<String, Tensor>>, Error> {
        self.inner.tensors()
    }
}

impl Backbone for Cached {
    fn features(&self, images: &Tensor) -> Result<Features, Error> {
        let keys = keys(images)?;
        if keys.is_empty() {
            return self.inner.features(images);
        }
        let mut entries = self.store.get_all(&keys, images.device());
        let missing: Vec<usize> = (0..keys.len()).filter(|&i| entries[i].is_none()).collect();
        if !missing.is_empty() {
            for (&i, entry) in missing.iter().zip(self.compute(images, &missing)?) {
                self.store.put(&keys[i], &entry)?;
                entries[i] = Some(entry);
            }
        }
        let entries: Vec<Entry> = entries.into_iter().flatten().collect();
        self.join(&entries, images.dtype())
    }

    fn features_masked(&self, images: &Tensor, keep: &TokenSet) -> Result<Features, Error> {
        let mut features = self.inner.features_masked(images, keep)?;
        features.intermediates.truncate(self.spec.layers - 1);
        Ok(features)
    }
}

/// Some of a batch's images.
fn rows_of(images: &Tensor, rows: &[usize]) -> Result<Tensor, Error> {
    let rows: Vec<u32> = rows.iter().map(|&i| i as u32).collect();
    Ok(images.index_select(&Tensor::new(rows, images.device())?, 0)?)
}

/// One tensor of each entry, joined.
fn column(entries: &[Entry], i: usize, dtype: DType) -> Result<Tensor, Error> {
    let rows = entries.iter().filter_map(|entry| entry.tensors.get(i));
    Ok(Tensor::cat(&rows.collect::<Vec<_>>(), 0)?.to_dtype(dtype)?)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use defend_nn::Rng;

    use candle_core::Device;
    use rand::RngExt;

    use super::*;
    use crate::feature_store::read;
    use crate::{Architecture, Vit};

    /// Counts the images that reach the backbone.
    struct Counting {
        vit: Vit,
        images: AtomicUsize,
    }

    impl Encoder for Counting {
        fn spec(&self) -> &BackboneSpec {
            self.vit.spec()
        }

        fn intermediates(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Layer>, Error> {
            self.images.fetch_add(images.dim(0)?, Ordering::SeqCst);
            self.vit.intermediates(images, blocks)
        }

        fn tensors(&self) -> Result<Option<HashMap<String, Tensor>>, Error> {
            self.vit.tensors()
        }
    }

    impl Backbone for Counting {
        fn features(&self, images: &Tensor) -> Result<Features, Error> {
            self.images.fetch_add(images.dim(0)?, Ordering::SeqCst);
            self.vit.features(images)
        }

        fn features_masked(&self, images: &Tensor, keep: &TokenSet) -> Result<Features, Error> {
            self.vit.features_masked(images, keep)
        }
    }

    fn counting(seed: u64) -> Arc<Counting> {
        let architecture = Architecture {
            image_size: 32,
            patch_size: 8,
            width: 16,
            depth: 3,
            heads: 2,
            mlp_width: 32,
            ..Architecture::vit_tiny()
        };
        let spec = BackboneSpec::new(architecture);
        let vit = Vit::random(spec, 0.0, &mut Rng::seed(seed), &Device::Cpu).unwrap();
        Arc::new(Counting {
            vit: vit.with_layers(3).unwrap(),
            images: AtomicUsize::new(0),
        })
    }

    fn images(count: usize) -> Tensor {
        let values = (0..count * 3 * 32 * 32).map(|i| (i as f32 * 0.37).sin());
        Tensor::from_vec(values.collect(), (count, 3, 32, 32), &Device::Cpu).unwrap()
    }

    fn all(features: &Features) -> Vec<Vec<f32>> {
        let mut tensors = vec![&features.cls, &features.patches, &features.cls_attention];
        for layer in &features.intermediates {
            tensors.extend([&layer.cls, &layer.patches]);
        }
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
        tensors.into_iter().map(values).collect()
    }

    #[test]
    fn known_images_are_not_computed_again_and_change_nothing() {
        let inner = counting(1);
        let cached = Cached::new(inner.clone(), CacheConfig::default()).unwrap();
        let images = images(5);
        let plain = inner.vit.features(&images).unwrap();
        cached.features(&images.narrow(0, 1, 2).unwrap()).unwrap();
        assert_eq!(inner.images.load(Ordering::SeqCst), 2);
        for _ in 0..2 {
            assert_eq!(all(&cached.features(&images).unwrap()), all(&plain));
            assert_eq!(inner.images.load(Ordering::SeqCst), 5);
        }
        let one = cached.with_layers(1).unwrap();
        let found = one.features(&images).unwrap();
        assert_eq!(all(&found), all(&plain)[..3]);
        assert_eq!(inner.images.load(Ordering::SeqCst), 5);
        assert!(one.with_layers(2).is_err() && cached.with_layers(0).is_err());
    }

    #[test]
    fn images_beyond_the_memory_are_computed_each_time() {
        let inner = counting(1);
        let config = CacheConfig {
            memory_bytes: 0,
            ..CacheConfig::default()
        };
        let cached = Cached::new(inner.clone(), config).unwrap();
        for _ in 0..2 {
            cached.features(&images(3)).unwrap();
        }
        assert_eq!(inner.images.load(Ordering::SeqCst), 6);
    }

    #[test]
    fn a_folder_outlives_the_process_and_knows_the_weights() {
        let folder = tempfile::tempdir().unwrap();
        let config = |precision| CacheConfig {
            memory_bytes: 0,
            folder: Some(folder.path().into()),
            precision,
        };
        let plain = counting(1).vit.features(&images(2)).unwrap();
        for (round, computed) in [2, 0].into_iter().enumerate() {
            let inner = counting(1);
            let cached = Cached::new(inner.clone(), config(Precision::Full)).unwrap();
            assert_eq!(all(&cached.features(&images(2)).unwrap()), all(&plain));
            assert_eq!(
                inner.images.load(Ordering::SeqCst),
                computed,
                "round {round}"
            );
        }
        let other = counting(2);
        let cached = Cached::new(other.clone(), config(Precision::Full)).unwrap();
        cached.features(&images(2)).unwrap();
        assert_eq!(other.images.load(Ordering::SeqCst), 2);

        let half = Cached::new(counting(1), config(Precision::Half)).unwrap();
        let first = all(&half.features(&images(2)).unwrap());
        assert_eq!(all(&half.features(&images(2)).unwrap()), first);
        let pairs = first
            .iter()
            .flatten()
            .zip(all(&plain).into_iter().flatten());
        for (rounded, exact) in pairs.map(|(a, b)| (*a, b)) {
            assert!((rounded - exact).abs() <= exact.abs() / 2000.0 + 1e-6);
        }
    }

    #[test]
    fn blocks_are_kept_one_by_one() {
        let inner = counting(1);
        let cached = Cached::new(inner.clone(), CacheConfig::default()).unwrap();
        let seen = || inner.images.load(Ordering::SeqCst);
        let values = |layers: Vec<Layer>| -> Vec<Vec<f32>> {
            let tensors = layers.into_iter().flat_map(|l| [l.cls, l.patches]);
            tensors
                .map(|t| t.flatten_all().unwrap().to_vec1().unwrap())
                .collect()
        };
        let images = images(3);
        let blocks = [0, inner.spec().architecture.depth - 1];
        let plain = values(inner.vit.intermediates(&images, &blocks).unwrap());
        let first = cached
            .intermediates(&images.narrow(0, 0, 2).unwrap(), &blocks)
            .unwrap();
        assert_eq!((first.len(), seen()), (2, 2));
        assert_eq!(
            values(cached.intermediates(&images, &blocks).unwrap()),
            plain
        );
        assert_eq!(seen(), 3);
        assert_eq!(
            values(cached.intermediates(&images, &blocks[1..]).unwrap()),
            plain[2..]
        );
        assert_eq!(seen(), 3);
    }

    #[test]
    fn a_damaged_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let config = CacheConfig {
            folder: Some(folder.path().into()),
            ..CacheConfig::default()
        };
        let cached = Cached::new(counting(1), config.clone()).unwrap();
        let expected = all(&cached.features(&images(1)).unwrap());
        let key = keys(&images(1)).unwrap()[0];
        let path = cached.store.path(&key).unwrap();
        std::fs::write(&path, "no tensors").unwrap();
        let again = Cached::new(counting(1), config).unwrap();
        assert_eq!(all(&again.features(&images(1)).unwrap()), expected);
        assert!(read(&path, &Device::Cpu).is_some());

        // One changed bit anywhere: the features are computed again.
        let whole = std::fs::read(&path).unwrap();
        for number in 0..10_000 {
            let bit = Rng::stream(3, number).random_range(0..8 * whole.len());
            let mut changed = whole.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, changed).unwrap();
            assert!(read(&path, &Device::Cpu).is_none(), "bit {bit}");
        }
    }
}
