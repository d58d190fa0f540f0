//! The kernels as functions of tensors; every tensor is contiguous, `[R, C]` means any leading dimensions with R rows in all.

use std::sync::LazyLock;

use candle_core::{DType, Result, Tensor};

use super::launch::{Grid, Number, WARPS, empty, empty_of, has_kernel, launch};

/// Rows whose sums a block of `column_sums` adds up.
const ROWS_PER_CHUNK: usize = 128;

fn named(kernel: &str, like: &Tensor) -> String {
    format!("{kernel}_{}", like.dtype().as_str())
}

/// Rows and columns of `[R, C]`.
fn extents(x: &Tensor) -> (usize, usize) {
    let columns = x.dims().last().copied().unwrap_or(1).max(1);
    (x.elem_count() / columns, columns)
}

/// Values that a thread moves at once.
fn packs(x: &Tensor) -> usize {
    x.elem_count() * x.dtype().size_in_bytes() / 16
}

/// Normalised rows, and their means and inverse standard deviations `[R, 2]` for [`layer_norm_backward`].
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn layer_norm(
    x: &Tensor,
    [w, b]: [&Tensor; 2],
    eps: f64,
    keep: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (rows, width) = extents(x);
    let out = empty(x.shape(), x)?;
    let kept = kept(x, rows, keep)?;
    launch(
        &named("layer_norm", x),
        Grid::rows(rows),
        &[Some(x), Some(w), Some(b), Some(&out), kept.as_ref()],
        &[rows.into(), width.into(), eps.into()],
    )?;
    Ok((out, kept))
}

fn kept(x: &Tensor, rows: usize, keep: bool) -> Result<Option<Tensor>> {
    keep.then(|| empty_of((rows, 2), DType::F32, x)).transpose()
}

/// Gradient of [`layer_norm`]'s input from that of its output, `g`, plus `residual`.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn layer_norm_backward(
    x: &Tensor,
    kept: &Tensor,
    w: &Tensor,
    g: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, width) = extents(x);
    let dx = empty(x.shape(), x)?;
    launch(
        &named("layer_norm_backward", x),
        Grid::rows(rows),
        &[Some(x), Some(kept), Some(w), Some(g), residual, Some(&dx)],
        &[rows.into(), width.into()],
    )?;
    Ok(dx)
}

/// A branch that is added: `factors[image] * scale * (y + bias)`.
pub struct Branch<'a> {
    /// Output of the branch's last product, before its bias.
    pub y: &'a Tensor,
    /// That bias.
    pub bias: &'a Tensor,
    /// One for each image, `f32`.
    pub factors: Option<&'a Tensor>,
    /// LayerScale, `[C]`.
    pub scale: Option<&'a Tensor>,
}

/// `x` plus a branch.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn residual(x: &Tensor, branch: &Branch<'_>) -> Result<Tensor> {
    let out = empty(x.shape(), x)?;
    add_branch(x, branch, &out, [None; 4], 0.0)?;
    Ok(out)
}

/// `x` plus a branch, and the sum's LayerNorm with what its backward pass needs.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn residual_norm(
    x: &Tensor,
    branch: &Branch<'_>,
    [w, b]: [&Tensor; 2],
    eps: f64,
    keep: bool,
) -> Result<(Tensor, Tensor, Option<Tensor>)> {
    let (out, normed) = (empty(x.shape(), x)?, empty(x.shape(), x)?);
    let kept = kept(x, extents(x).0, keep)?;
    let norm = [Some(w), Some(b), Some(&normed), kept.as_ref()];
    add_branch(x, branch, &out, norm, eps)?;
    Ok((out, normed, kept))
}

/// Into `out`; `norm`: scale, shift, result and moments of its LayerNorm, if any.
fn add_branch(
    x: &Tensor,
    branch: &Branch<'_>,
    out: &Tensor,
    norm: [Option<&Tensor>; 4],
    eps: f64,
) -> Result<()> {
    let (rows, width) = extents(x);
    let sum = [
        Some(x),
        Some(branch.y),
        Some(branch.bias),
        branch.factors,
        branch.scale,
        Some(out),
    ];
    launch(
        &named("residual", x),
        Grid::rows(rows),
        &[&sum[..], &norm].concat(),
        &[
            rows.into(),
            width.into(),
            per_factor(rows, branch.factors).into(),
            eps.into(),
        ],
    )
}

fn per_factor(rows: usize, factors: Option<&Tensor>) -> usize {
    factors.map_or(1, |factors| rows / factors.elem_count().max(1))
}

/// Rows times the factor of their image.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn scale_rows(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    let (rows, width) = extents(x);
    let out = empty(x.shape(), x)?;
    launch(
        &named("scale_rows", x),
        Grid::rows(rows),
        &[Some(x), Some(factors), Some(&out)],
        &[
            rows.into(),
            width.into(),
            per_factor(rows, Some(factors)).into(),
        ],
    )?;
    Ok(out)
}

/// `y + bias`.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn bias_add(y: &Tensor, bias: &Tensor) -> Result<Tensor> {
    with_bias("bias_add", y, bias)
}

/// `gelu(y + bias)`.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn bias_gelu(y: &Tensor, bias: &Tensor) -> Result<Tensor> {
    with_bias("bias_gelu", y, bias)
}

fn with_bias(kernel: &str, y: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (out, items) = (empty(y.shape(), y)?, packs(y));
    launch(
        &named(kernel, y),
        Grid::items(items),
        &[Some(y), Some(bias), Some(&out)],
        &[Number::Count(items), extents(y).1.into()],
    )?;
    Ok(out)
}

/// Gradient of [`bias_gelu`]'s `y` from that of its output.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn bias_gelu_backward(y: &Tensor, bias: &Tensor, g: &Tensor) -> Result<Tensor> {
    let (dy, items) = (empty(y.shape(), y)?, packs(y));
    launch(
        &named("bias_gelu_backward", y),
        Grid::items(items),
        &[Some(y), Some(bias), Some(g), Some(&dy)],
        &[Number::Count(items), extents(y).1.into()],
    )?;
    Ok(dy)
}

/// Channels of a head that [`Heads::attend`] takes: `DEPTH` of the kernels.
const FUSED_DEPTH: usize = 64;
/// `QUERIES` of the kernels.
const QUERIES_OF_A_WARP: usize = 16;
/// Warps of a block of [`Heads::attend`] at most: `MOST_WARPS` of the kernels.
const MOST_WARPS: usize = 7;

/// How an image's tokens are cut into heads.
#[derive(Clone, Copy)]
pub struct Heads {
    /// Images, B.
    pub images: usize,
    /// Tokens of an image, T.
    pub tokens: usize,
    /// Rows of the keys and values: tokens filled up with zeros to a multiple of 8, which the products want.
    pub padded: usize,
    /// Number of heads.
    pub count: usize,
    /// Channels of a head.
    pub depth: usize,
}

impl Heads {
    fn numbers(self, items: usize, scale: f64) -> [Number; 6] {
        [
            Number::Count(items),
            self.tokens.into(),
            self.padded.into(),
            self.count.into(),
            self.depth.into(),
            scale.into(),
        ]
    }

    /// Shape of queries.
    fn queries(self) -> (usize, usize, usize) {
        (self.images * self.count, self.tokens, self.depth)
    }

    /// Whether [`Heads::attend`] takes such values: in half precision, of heads of 64 channels, on the processors that the
    /// kernels were compiled for.
    pub fn fuse(self, packed: &Tensor) -> bool {
        static COMPILED: LazyLock<bool> = LazyLock::new(|| has_kernel("attend_bf16"));
        let half = matches!(packed.dtype(), DType::BF16 | DType::F16);
        half && self.depth == FUSED_DEPTH && *COMPILED
    }

    /// Attention of `[B T, 3 D]` plus bias, `[B T, D]`, without a backward pass.
    ///
    /// # Errors
    /// Those of candle and of the CUDA driver.
    pub fn attend(self, packed: &Tensor, bias: &Tensor, scale: f64) -> Result<Tensor> {
        let out = empty((self.images * self.tokens, self.count * self.depth), packed)?;
        // Each warp has 16 queries.
        let warps = self.tokens.div_ceil(QUERIES_OF_A_WARP);
        let blocks = warps.div_ceil(MOST_WARPS);
        let grid = Grid {
            blocks: [self.images * self.count, blocks],
            threads: [32, warps.div_ceil(blocks) as u32],
        };
        self.launch_fused("attend", grid, packed, bias, &out, scale)?;
        Ok(out)
    }

    /// The first token's attention to the others in the same, `[B, h, T - 1]`.
    ///
    /// # Errors
    /// Those of candle and of the CUDA driver.
    pub fn cls_attention(self, packed: &Tensor, bias: &Tensor, scale: f64) -> Result<Tensor> {
        let out = empty((self.images, self.count, self.tokens - 1), packed)?;
        let grid = Grid {
            blocks: [self.images * self.count, 1],
            threads: [32, WARPS],
        };
        self.launch_fused("cls_attention", grid, packed, bias, &out, scale)?;
        Ok(out)
    }

    fn launch_fused(
        self,
        kernel: &str,
        grid: Grid,
        packed: &Tensor,
        bias: &Tensor,
        out: &Tensor,
        scale: f64,
    ) -> Result<()> {
        launch(
            &named(kernel, packed),
            grid,
            &[Some(packed), Some(bias), Some(out)],
            &[self.tokens.into(), self.count.into(), scale.into()],
        )
    }

    /// `[B T, 3 D]` plus bias as queries `[B h, T, d]`, times `scale`, keys and values `[B h, padded, d]`.
    ///
    /// # Errors
    /// Those of candle and of the CUDA driver.
    pub fn split(self, packed: &Tensor, bias: &Tensor, scale: f64) -> Result<[Tensor; 3]> {
        let keys = (self.images * self.count, self.padded, self.depth);
        let (q, k) = (empty(self.queries(), packed)?, empty(keys, packed)?);
        let v = empty(keys, packed)?;
        let items = packs(packed) / self.tokens * self.padded;
        launch(
            &named("split_heads", packed),
            Grid::items(items),
            &[Some(packed), Some(bias), Some(&q), Some(&k), Some(&v)],
            &self.numbers(items, scale),
        )?;
        Ok([q, k, v])
    }

    /// Gradient of [`Heads::split`]'s packed rows from those of queries, keys and values.
    ///
    /// # Errors
    /// Those of candle and of the CUDA driver.
    pub fn join(self, [q, k, v]: [&Tensor; 3], scale: f64) -> Result<Tensor> {
        let width = self.count * self.depth;
        let packed = empty((self.images * self.tokens, 3 * width), q)?;
        let items = packs(&packed);
        launch(
            &named("join_heads", q),
            Grid::items(items),
            &[Some(q), Some(k), Some(v), Some(&packed)],
            &self.numbers(items, scale),
        )?;
        Ok(packed)
    }

    /// `[B h, T, d]` as `[B T, h d]`.
    ///
    /// # Errors
    /// Those of candle and of the CUDA driver.
    pub fn merge(self, x: &Tensor) -> Result<Tensor> {
        let out = empty((self.images * self.tokens, self.count * self.depth), x)?;
        self.swap(x, &out, self.count, self.tokens)?;
        Ok(out)
    }

    /// The reverse of [`Heads::merge`].
    ///
    /// # Errors
    /// Those of candle and of the CUDA driver.
    pub fn unmerge(self, x: &Tensor) -> Result<Tensor> {
        let out = empty(self.queries(), x)?;
        self.swap(x, &out, self.tokens, self.count)?;
        Ok(out)
    }

    fn swap(self, x: &Tensor, out: &Tensor, first: usize, second: usize) -> Result<()> {
        let items = packs(x);
        launch(
            &named("swap_axes", x),
            Grid::items(items),
            &[Some(x), Some(out)],
            &[
                Number::Count(items),
                first.into(),
                second.into(),
                self.depth.into(),
            ],
        )
    }

    /// Softmax of logits `[B h, T, padded]` over the tokens, zeros behind them. In place: the logits must have no other user.
    ///
    /// # Errors
    /// Those of candle and of the CUDA driver.
    pub fn softmax(self, logits: &Tensor) -> Result<()> {
        let rows = self.images * self.count * self.tokens;
        launch(
            &named("softmax", logits),
            Grid::rows(rows),
            &[Some(logits)],
            &[rows.into(), self.tokens.into(), self.padded.into()],
        )
    }

    /// Turns the gradient of the probabilities into that of the logits. In place: `g` must have no other user.
    ///
    /// # Errors
    /// Those of candle and of the CUDA driver.
    pub fn softmax_backward(self, p: &Tensor, g: &Tensor) -> Result<()> {
        let rows = self.images * self.count * self.tokens;
        launch(
            &named("softmax_backward", p),
            Grid::rows(rows),
            &[Some(p), Some(g)],
            &[rows.into(), self.padded.into()],
        )
    }
}

/// Sums of the columns of `[R, C]`: the gradient of a bias.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn column_sums(g: &Tensor) -> Result<Tensor> {
    sums(g, None)
}

/// Gradients of a LayerNorm's scale and shift from that of its output.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn norm_sums(g: &Tensor, x: &Tensor, kept: &Tensor) -> Result<[Tensor; 2]> {
    let (both, width) = (sums(g, Some((x, kept)))?, extents(g).1);
    let part = |i: usize| both.narrow(0, i * width, width);
    Ok([part(0)?, part(1)?])
}

fn sums(g: &Tensor, normed: Option<(&Tensor, &Tensor)>) -> Result<Tensor> {
    let (rows, width) = extents(g);
    let chunks = rows.div_ceil(ROWS_PER_CHUNK);
    let joined = if normed.is_some() { 2 * width } else { width };
    let sums = empty_of((chunks, joined), DType::F32, g)?;
    let grid = Grid {
        blocks: [chunks, width.div_ceil(32)],
        threads: [32, 8],
    };
    let (x, kept) = normed.unzip();
    launch(
        &named("column_sums", g),
        grid,
        &[Some(g), x, kept, Some(&sums)],
        &[rows.into(), width.into(), ROWS_PER_CHUNK.into()],
    )?;
    let out = empty(joined, g)?;
    launch(
        &named("join_sums", g),
        Grid::items(joined),
        &[Some(&sums), Some(&out)],
        &[chunks.into(), joined.into()],
    )?;
    Ok(out)
}

/// Rows of unit length, and the lengths that they had, `[R]`.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn l2_normalize(x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let (rows, width) = extents(x);
    let (out, lengths) = (empty(x.shape(), x)?, empty_of(rows, DType::F32, x)?);
    launch(
        &named("l2_normalize", x),
        Grid::rows(rows),
        &[Some(x), Some(&out), Some(&lengths)],
        &[rows.into(), width.into(), eps.into()],
    )?;
    Ok((out, lengths))
}

/// Gradient of [`l2_normalize`]'s input from its result and that result's gradient.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn l2_normalize_backward(y: &Tensor, lengths: &Tensor, g: &Tensor) -> Result<Tensor> {
    let (rows, width) = extents(y);
    let dx = empty(y.shape(), y)?;
    launch(
        &named("l2_normalize_backward", y),
        Grid::rows(rows),
        &[Some(y), Some(lengths), Some(g), Some(&dx)],
        &[rows.into(), width.into()],
    )?;
    Ok(dx)
}

/// Columns that [`scatter_rows`] has threads for.
pub const MOST_SCATTERED: usize = 2048;

/// Gradient of a table `[N, D]` from that of rows picked from it, `g` `[R, D]`; `at` `[R]` says which.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn scatter_rows(at: &Tensor, g: &Tensor, rows: usize) -> Result<Tensor> {
    let (count, width) = extents(g);
    let out = empty((rows, width), g)?;
    let grid = Grid {
        blocks: [rows, 1],
        threads: [256, 1],
    };
    launch(
        &named("scatter_rows", g),
        grid,
        &[Some(at), Some(g), Some(&out)],
        &[Number::Count(count), width.into()],
    )?;
    Ok(out)
}

/// Patches of images `[B, 3, H, W]` as rows `[B, M, 3 side^2]`: those that `which` `[B, M]` names, or all.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn patches(images: &Tensor, side: usize, which: Option<&Tensor>) -> Result<Tensor> {
    let (b, _, height, width) = images.dims4()?;
    let kept = match which {
        Some(which) => which.dim(1)?,
        None => height / side * (width / side),
    };
    let out = empty((b, kept, 3 * side * side), images)?;
    let items = out.elem_count();
    launch(
        &named("patches", images),
        Grid::items(items),
        &[Some(images), which, Some(&out)],
        &[
            Number::Count(items),
            height.into(),
            width.into(),
            side.into(),
            kept.into(),
        ],
    )?;
    Ok(out)
}
