//! What a backbone gives and what it is asked for: the roles other stages see.

use std::collections::HashMap;

use candle_core::{DType, Tensor, Var};
use defend_nn::{Rng, ops};
use serde::{Deserialize, Serialize};

use crate::{BackboneSpec, Error};

/// Rows and columns of patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grid {
    /// Patches from top to bottom.
    pub rows: usize,
    /// Patches from left to right.
    pub columns: usize,
}

impl Grid {
    /// Number of patches, N.
    pub fn patches(self) -> usize {
        self.rows * self.columns
    }
}

/// Tokens of one block after the final norm.
#[derive(Debug, Clone)]
pub struct Layer {
    /// CLS token, `[B, D]`.
    pub cls: Tensor,
    /// Patch tokens, `[B, N, D]`, in the order of [`Features::patches`].
    pub patches: Tensor,
}

/// The last layer of a backbone for a batch of images, and earlier ones on request.
#[derive(Debug, Clone)]
pub struct Features {
    /// CLS token after the final norm, `[B, D]`.
    pub cls: Tensor,
    /// Patch tokens after the final norm, `[B, N, D]`, row-major over the grid (or in the order of the
    /// kept tokens).
    pub patches: Tensor,
    /// Attention of the last block's CLS token to each patch, `[B, h, N]`; rows sum to less than one
    /// because the CLS column is left out. Carries no gradient.
    pub cls_attention: Tensor,
    /// Patches of the whole view.
    pub grid: Grid,
    /// The blocks before the last, nearest first; [`BackboneSpec::layers`]` - 1` of them.
    pub intermediates: Vec<Layer>,
}

impl Features {
    /// Number of images, B.
    ///
    /// # Errors
    /// [`Error::Candle`] when the CLS tensor is not a matrix.
    pub fn batch_size(&self) -> Result<usize, Error> {
        Ok(self.cls.dim(0)?)
    }
}

/// The patches that a backbone sees, by index over the row-major grid; the CLS token always stays.
#[derive(Debug, Clone)]
pub struct TokenSet {
    indices: Tensor,
    grid: Grid,
}

impl TokenSet {
    /// The same number M of kept patches for each image: `indices` `[B, M]` of `u32`, all below N.
    ///
    /// # Errors
    /// [`Error::TokenSet`] for another type or rank, an empty set, or an index outside the grid.
    pub fn new(indices: Tensor, grid: Grid) -> Result<Self, Error> {
        let expected = || {
            format!(
                "a u32 tensor [images, kept patches] with indices below {}",
                grid.patches()
            )
        };
        if indices.rank() != 2 || indices.dtype() != DType::U32 || indices.elem_count() == 0 {
            return Err(Error::TokenSet {
                found: format!("{:?} of {:?}", indices.dims(), indices.dtype()),
                expected: expected(),
            });
        }
        let highest = indices.flatten_all()?.max(0)?.to_scalar::<u32>()? as usize;
        if highest >= grid.patches() {
            return Err(Error::TokenSet {
                found: format!("patch {highest}"),
                expected: expected(),
            });
        }
        Ok(Self { indices, grid })
    }

    /// From one list of patches an image.
    ///
    /// # Errors
    /// As [`TokenSet::new`]; lists of different lengths are an error too.
    pub fn from_rows(
        rows: &[Vec<u32>],
        grid: Grid,
        device: &candle_core::Device,
    ) -> Result<Self, Error> {
        let kept = rows.first().map_or(0, Vec::len);
        if let Some(row) = rows.iter().find(|row| row.len() != kept) {
            return Err(Error::TokenSet {
                found: format!("{} and {kept} patches in one batch", row.len()),
                expected: "the same number of patches for every image".into(),
            });
        }
        let indices = Tensor::from_vec(rows.concat(), (rows.len(), kept), device)?;
        Self::new(indices, grid)
    }

    /// `[B, M]` of `u32`.
    pub fn indices(&self) -> &Tensor {
        &self.indices
    }

    /// Grid that the indices refer to.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// Refuses a set that belongs to other images.
    pub(crate) fn check(&self, images: usize, grid: Grid) -> Result<(), Error> {
        let described = |images: usize, grid: Grid| {
            format!(
                "{images} images of {} x {} patches",
                grid.rows, grid.columns
            )
        };
        let found = self.indices.dim(0)?;
        if found == images && self.grid == grid {
            return Ok(());
        }
        Err(Error::TokenSet {
            found: described(found, self.grid),
            expected: described(images, grid),
        })
    }

    /// Picks the kept rows: `[B, N, D]` to `[B, M, D]`, differentiable.
    ///
    /// # Errors
    /// [`Error::TokenSet`] when the tensor has another number of images or patches.
    pub fn gather(&self, tokens: &Tensor) -> Result<Tensor, Error> {
        let (b, n, _) = tokens.dims3()?;
        if n != self.grid.patches() {
            return Err(Error::TokenSet {
                found: format!("patches of {} on a grid", self.grid.patches()),
                expected: format!("patches of {n}"),
            });
        }
        self.check(b, self.grid)?;
        Ok(ops::pick_of_each(tokens, &self.indices)?)
    }
}

/// Role: a frozen network that gives tokens of any of its blocks.
///
/// This is all that the closed-form student needs of a teacher, so vision models without CLS attention can have it too.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use defend_nn::{Rng, normal};
/// use defend_vit::{Architecture, BackboneSpec, Encoder, Error, Layer, Vit};
///
/// /// Any encoder, which sees mirrored images.
/// struct Mirrored<E>(E);
///
/// impl<E: Encoder> Encoder for Mirrored<E> {
///     fn spec(&self) -> &BackboneSpec {
///         self.0.spec()
///     }
///
///     fn intermediates(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Layer>, Error> {
///         self.0.intermediates(&images.flip(&[3])?, blocks)
///     }
/// }
///
/// let architecture = Architecture { image_size: 16, patch_size: 8, width: 12, depth: 2, heads: 2, mlp_width: 24, ..Architecture::vit_tiny() };
/// let mut rng = Rng::seed(0);
/// let vit = Vit::random(BackboneSpec::new(architecture), 0.0, &mut rng, &Device::Cpu)?;
/// let images = normal((3, 3, 16, 16), 1.0, &mut rng, &Device::Cpu)?;
/// let layers = Mirrored(vit).intermediates(&images, &[1])?;
/// assert_eq!((layers[0].cls.dims(), layers[0].patches.dims()), (&[3, 12][..], &[3, 4, 12][..]));
/// # Ok::<(), Error>(())
/// ```
pub trait Encoder: Send + Sync {
    /// Architecture and preprocessing.
    fn spec(&self) -> &BackboneSpec;

    /// Blocks whose tokens it gives, ascending; all of them unless a network shows only some. The closed form works with what there is.
    fn available_blocks(&self) -> Vec<usize> {
        (0..self.spec().architecture.depth).collect()
    }

    /// Tokens of some blocks, each after the final norm, in the order asked for. `blocks`: available numbers from 0, ascending;
    /// `images`: `[B, 3, H, W]` normalised as the [`BackboneSpec`] says, H and W multiples of the patch size.
    ///
    /// # Errors
    /// [`Error::Config`] for blocks that there are not or that do not ascend, [`Error::Input`] for images that do not fit.
    fn intermediates(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Layer>, Error>;

    /// As [`Encoder::intermediates`], and a vector for each patch that says what is around it.
    ///
    /// Patch tokens of a network that was trained on its CLS token say little of objects. A [`Vit`](crate::Vit) gives *local CLS
    /// tokens*, `[B, N, D]`: what the CLS token would be if it had seen nothing but the surroundings of a patch in the last third
    /// of the blocks. `None` for a network that has no such thing. What wraps another encoder without changing its weights passes this on:
    /// backgrounds are made of it.
    ///
    /// # Errors
    /// As [`Encoder::intermediates`].
    fn intermediates_and_local(
        &self,
        images: &Tensor,
        blocks: &[usize],
    ) -> Result<(Vec<Layer>, Option<Tensor>), Error> {
        Ok((self.intermediates(images, blocks)?, None))
    }

    /// All parameters by name, for saving; `None` for a network that keeps them to itself.
    ///
    /// # Errors
    /// [`Error::Candle`] when candle fails.
    fn tensors(&self) -> Result<Option<HashMap<String, Tensor>>, Error> {
        Ok(None)
    }
}

/// Role: a frozen feature extractor with CLS attention, which runs on part of its tokens too.
pub trait Backbone: Encoder {
    /// Features of whole images, `[B, 3, H, W]` normalised as the [`BackboneSpec`] says; H and W are
    /// multiples of the patch size.
    ///
    /// # Errors
    /// [`Error::Input`] for other shapes.
    fn features(&self, images: &Tensor) -> Result<Features, Error>;

    /// Features of the kept patches only; the others are dropped after the positional embedding is
    /// added (MAE).
    ///
    /// # Errors
    /// [`Error::Input`], and [`Error::TokenSet`] when the set does not fit the images.
    fn features_masked(&self, images: &Tensor, keep: &TokenSet) -> Result<Features, Error>;
}

/// Tokens that enter the part of a backbone that trains.
///
/// They carry no gradient and do not change while that part is trained, so they may be cached.
#[derive(Debug, Clone)]
pub struct FrozenTokens {
    /// CLS token, extra tokens where there are any, and patches: `[B, 1 + E + N, D]`.
    pub tokens: Tensor,
    /// Patches of the view.
    pub grid: Grid,
}

/// Role: a backbone whose last part can be trained.
pub trait Trainable: Backbone {
    /// Runs the frozen part.
    ///
    /// # Errors
    /// [`Error::Input`] for images that do not fit.
    fn frozen_tokens(&self, images: &Tensor) -> Result<FrozenTokens, Error>;

    /// Runs the part that trains, with gradients.
    ///
    /// # Errors
    /// [`Error::Candle`] when the tokens have another width.
    fn features_from_frozen(&self, prefix: &FrozenTokens) -> Result<Features, Error>;

    /// A training pass with gradients and stochastic depth, over all or the kept patches.
    ///
    /// # Errors
    /// As [`Backbone::features_masked`].
    fn features_train(
        &self,
        images: &Tensor,
        keep: Option<&TokenSet>,
        rng: &mut Rng,
    ) -> Result<Features, Error>;

    /// Names and variables of what trains.
    fn parameters(&self) -> Vec<(String, Var)>;
}

/// Role: normalised images by index, for training loops.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use defend_vit::{Error, ImageSource};
///
/// /// Images that are made when they are asked for.
/// struct Blank;
///
/// impl ImageSource for Blank {
///     fn len(&self) -> usize {
///         100
///     }
///
///     fn images(&self, indices: &[usize]) -> Result<Tensor, Error> {
///         Ok(Tensor::zeros((indices.len(), 3, 32, 32), DType::F32, &Device::Cpu)?)
///     }
/// }
///
/// assert_eq!(Blank.images(&[4, 9])?.dims(), [2, 3, 32, 32]);
/// # Ok::<(), Error>(())
/// ```
pub trait ImageSource {
    /// Number of images.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Images as the backbone expects them, `[B, 3, H, W]`.
    ///
    /// # Errors
    /// [`Error::ImageSource`] when an image cannot be had, [`Error::Candle`] when the tensor cannot be made.
    fn images(&self, indices: &[usize]) -> Result<Tensor, Error>;

    /// A hint in which order images will be asked for next, each once, so that a source can prefetch; it replaces any earlier
    /// one. A source around another one passes it on.
    fn prefetch(&self, order: &[usize]) {
        let _ = order;
    }
}

/// A whole set in one tensor, `[images, 3, H, W]`.
impl ImageSource for Tensor {
    fn len(&self) -> usize {
        self.dim(0).unwrap_or(0)
    }

    fn images(&self, indices: &[usize]) -> Result<Tensor, Error> {
        let indices: Vec<u32> = indices.iter().map(|&i| i as u32).collect();
        let indices = Tensor::new(indices, self.device())?;
        Ok(self.index_select(&indices, 0)?)
    }
}
