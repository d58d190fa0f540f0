//! Weights, extents and saved activations of a block.

use super::super::attention::Heads;
use super::super::pack::Packed;
use super::super::panel_layout::{PanelLayout, Stack};
use super::super::pool::Buffer;

/// Rows of an image that a task handles at most: what lies between two products stays in the L2 cache, and few queries are left
/// for blocks that they do not fill.
const ROWS_PER_PIECE: usize = 384;
/// Rows of an image that a task handles at least, where there are threads for more tasks: two of the highest tiles.
const LEAST_ROWS_PER_PIECE: usize = 24;
/// Work that each piece of an image does again, mostly laying out the keys, as a part of the image's own.
const COST_OF_A_PIECE: f64 = 0.02;

/// Weights of a block: matrices `[O, I]` row-major, vectors `[O]`.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// Scale and shift of the first LayerNorm, `[D]` each.
    pub norm1: [&'a [f32]; 2],
    /// Queries, keys and values: `[3 D, D]` and `[3 D]`.
    pub qkv: [&'a [f32]; 2],
    /// Output of the attention: `[D, D]` and `[D]`.
    pub projection: [&'a [f32]; 2],
    /// Scale and shift of the second LayerNorm, `[D]` each.
    pub norm2: [&'a [f32]; 2],
    /// First layer of the MLP: `[hidden, D]` and `[hidden]`.
    pub fc1: [&'a [f32]; 2],
    /// Second layer of the MLP: `[D, hidden]` and `[D]`.
    pub fc2: [&'a [f32]; 2],
}

/// The four matrices of a block in panels, and the biases at the end of both branches: where LayerScale is part of the weights,
/// these are other than the block's own.
#[derive(Debug)]
pub struct Matrices {
    pub(super) qkv: Packed,
    pub(super) projection: Packed,
    pub(super) fc1: Packed,
    pub(super) fc2: Packed,
    pub(super) biases: [Vec<f32>; 2],
}

impl Matrices {
    /// For [`super::forward`]: `W^T`.
    pub fn forward(weights: &Weights<'_>, heads: usize) -> Self {
        Self::new(weights, heads, |matrix, inputs, outputs| {
            Packed::transposed(matrix, inputs, outputs)
        })
    }

    /// For the gradients of the maps' inputs: `W`.
    pub(super) fn backward(weights: &Weights<'_>, heads: usize) -> Self {
        Self::new(weights, heads, |matrix, inputs, outputs| {
            Packed::new(matrix, outputs, inputs)
        })
    }

    /// The same, and what they will be multiplied with, rounded to `bf16`.
    pub fn rounded(self) -> Self {
        self.map(Packed::rounded)
    }

    /// For more than one pass.
    pub fn cached(self) -> Self {
        self.map(Packed::cached)
    }

    fn map(self, f: impl Fn(Packed) -> Packed) -> Self {
        Self {
            qkv: f(self.qkv),
            projection: f(self.projection),
            fc1: f(self.fc1),
            fc2: f(self.fc2),
            biases: self.biases,
        }
    }

    /// From each matrix and the columns of its map's input and output.
    fn new(
        weights: &Weights<'_>,
        heads: usize,
        pack: impl Fn(&[f32], PanelLayout, PanelLayout) -> Packed,
    ) -> Self {
        let (d, hidden) = (weights.projection[1].len(), weights.fc1[1].len());
        let (whole, by_head) = (PanelLayout::whole(d), PanelLayout::grouped(d, heads));
        let hidden = PanelLayout::whole(hidden);
        Self {
            qkv: pack(
                weights.qkv[0],
                whole,
                PanelLayout::grouped(3 * d, 3 * heads),
            ),
            projection: pack(weights.projection[0], by_head, whole),
            fc1: pack(weights.fc1[0], whole, hidden),
            fc2: pack(weights.fc2[0], hidden, whole),
            biases: [weights.projection[1], weights.fc2[1]].map(<[f32]>::to_vec),
        }
    }
}

/// Extents of a block's input and what is constant in a call.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    /// Images, B.
    pub images: usize,
    /// Tokens of an image, T.
    pub tokens: usize,
    /// Channels, D.
    pub width: usize,
    /// Hidden channels of the MLP.
    pub hidden: usize,
    /// Heads of the attention; divides D.
    pub heads: usize,
    /// Added to the variance of both LayerNorms.
    pub eps: f32,
    /// Factors of both residual branches for each image; one without.
    pub factors: Option<[&'a [f32]; 2]>,
    /// Threads that have nothing but these images to do.
    pub threads: usize,
}

/// Activations that the backward pass needs, image by image.
pub struct Saved {
    /// Queries, keys and values, in blocks.
    pub(super) qkv: Buffer,
    /// Output of the attention before its projection, in blocks.
    pub(super) attended: Buffer,
    /// Input of the MLP's branch, row-major.
    pub(super) middle: Buffer,
    /// The MLP's hidden values before GELU, in blocks.
    pub(super) hidden: Buffer,
}

/// Gradients of a block's parameters, in the order of [`Weights`]: matrix, then vector.
pub type Gradients = [Vec<f32>; 12];

impl Shape<'_> {
    pub(super) fn rows(&self) -> usize {
        self.images * self.tokens
    }

    pub(super) fn heads(&self) -> Heads {
        Heads {
            tokens: self.tokens,
            width: self.width,
            count: self.heads,
        }
    }

    pub(super) fn factor(&self, branch: usize, image: usize) -> f32 {
        self.factors.map_or(1.0, |factors| factors[branch][image])
    }

    /// Rows of a piece: an image cut evenly, into more pieces where a few images would leave threads idle.
    pub(super) fn piece(&self) -> usize {
        let fewest = self.tokens.div_ceil(ROWS_PER_PIECE);
        let most = (self.tokens / LEAST_ROWS_PER_PIECE).max(fewest);
        let time = |pieces: usize| {
            let turns = (self.images * pieces).div_ceil(self.threads);
            turns as f64 * (1.0 / pieces as f64 + COST_OF_A_PIECE)
        };
        let best = (fewest..=most).min_by(|&a, &b| time(a).total_cmp(&time(b)));
        self.tokens.div_ceil(best.unwrap_or(fewest))
    }

    /// Row-major rows `[B T, columns]` cut into pieces, image by image.
    pub(super) fn pieces<'a>(&self, rows: &'a mut [f32], columns: usize) -> Vec<&'a mut [f32]> {
        let piece = self.piece() * columns;
        let images = rows.chunks_mut(self.tokens * columns);
        images.flat_map(|image| image.chunks_mut(piece)).collect()
    }

    /// A matrix of all images in blocks, whose columns are cut so.
    pub(super) fn buffer(&self, columns: PanelLayout) -> Buffer {
        Buffer::recycled(self.images * columns.values(self.tokens))
    }

    /// An image's part of such a matrix.
    pub(super) fn image<'a>(
        &self,
        values: &'a [f32],
        columns: PanelLayout,
        image: usize,
    ) -> &'a [f32] {
        let len = columns.values(self.tokens);
        &values[image * len..][..len]
    }

    /// The whole matrix, for a product over its rows.
    pub(super) fn stack<'a>(&self, values: &'a [f32], columns: PanelLayout) -> Stack<'a> {
        Stack {
            values,
            rows: self.rows(),
            piece: self.tokens,
            columns,
        }
    }

    pub(super) fn whole(&self) -> PanelLayout {
        PanelLayout::whole(self.width)
    }

    pub(super) fn inner(&self) -> PanelLayout {
        PanelLayout::whole(self.hidden)
    }

    /// Image and first row of each piece.
    pub(super) fn origins(&self) -> Vec<(usize, usize)> {
        let starts = (0..self.tokens).step_by(self.piece());
        let starts: Vec<usize> = starts.collect();
        (0..self.images)
            .flat_map(|image| starts.iter().map(move |&start| (image, start)))
            .collect()
    }
}
