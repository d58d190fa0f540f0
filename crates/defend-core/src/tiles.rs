//! Large images in tiles, for small faults.

use candle_core::{Device, Tensor};
use defend_vit::Grid;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Most tiles in a row or column.
const MOST: usize = 16;
/// Half the width of the Catmull-Rom kernel, in pixels of the smaller image.
const SUPPORT: f64 = 2.0;

/// An image in tiles, each as large as a teacher's input: small faults stay large enough to be seen.
///
/// The patches that say what is broken come from the tiles, and an image is as its worst tile; the image as a whole is looked at as
/// it is without tiles. So tiles count where patches do: where the normal images are alike, such as parts on a line.
///
/// Of T tiles the patches of `patches.images / T` normal images are looked at, of 64 at least: 2,000 tiles by default, in memory about
/// 300 KB each for a ViT-Ti.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tiles {
    /// Tiles in a row, in `1..=16`.
    pub columns: usize,
    /// Tiles in a column, in `1..=16`.
    pub rows: usize,
    /// Share of a tile that its neighbour shows too, in `0..=0.5`; rounded to patches. A fault on a seam is then whole in one of them.
    pub overlap: f64,
    /// Which tiles of the normal images a tile is compared with.
    pub memory: TileMemory,
}

/// Which tiles of the normal images a tile is compared with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TileMemory {
    /// All of them: parts lie anywhere.
    #[default]
    Shared,
    /// Those at its own position: parts always lie the same way, and what is normal in one place is not in another.
    PerPosition,
}

impl Default for Tiles {
    fn default() -> Self {
        Self {
            columns: 2,
            rows: 2,
            overlap: 0.25,
            memory: TileMemory::Shared,
        }
    }
}

impl Tiles {
    /// Checks every field's range.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field.
    pub fn validate(&self) -> Result<(), Error> {
        let wrong = |field, value: String, expected: &str| {
            Err(Error::Config {
                field,
                value,
                expected: expected.into(),
            })
        };
        let fine = |count: usize| (1..=MOST).contains(&count);
        if !fine(self.columns) || !fine(self.rows) || self.columns * self.rows < 2 {
            return wrong(
                "tiles",
                format!("{}x{}", self.columns, self.rows),
                "1 to 16 columns and rows, and at least two tiles",
            );
        }
        if !(0.0..=0.5).contains(&self.overlap) {
            return wrong("tiles.overlap", self.overlap.to_string(), "0 to 0.5");
        }
        Ok(())
    }

    /// For a teacher whose input is `side` pixels wide and high, in patches of `patch` pixels.
    pub(crate) fn of_side(self, side: usize, patch: usize) -> Tiling {
        let patches = (side / patch.max(1)).max(1);
        let shared = (self.overlap * patches as f64).round() as usize;
        Tiling {
            tiles: self,
            patches,
            patch,
            stride: patches.saturating_sub(shared).max(1),
        }
    }
}

/// Tiles of a known size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Tiling {
    tiles: Tiles,
    /// Patches across a tile.
    patches: usize,
    /// Pixels across a patch.
    patch: usize,
    /// Patches from one tile to the next.
    stride: usize,
}

impl Tiling {
    /// Number of tiles.
    pub(crate) fn count(&self) -> usize {
        self.tiles.columns * self.tiles.rows
    }

    /// Whether tiles are compared with those at their own position alone.
    pub(crate) fn per_position(&self) -> bool {
        self.tiles.memory == TileMemory::PerPosition
    }

    /// Side of a tile in pixels.
    pub(crate) fn side(&self) -> usize {
        self.patches * self.patch
    }

    /// Patches of the whole image.
    pub(crate) fn grid(&self) -> Grid {
        let across = |tiles: usize| self.patches + tiles.saturating_sub(1) * self.stride;
        Grid {
            rows: across(self.tiles.rows),
            columns: across(self.tiles.columns),
        }
    }

    /// Width and height of the whole image in pixels.
    pub(crate) fn input_size(&self) -> (usize, usize) {
        let Grid { rows, columns } = self.grid();
        (columns * self.patch, rows * self.patch)
    }

    /// Whole images `[B, 3, H, W]` in tiles, `[B * tiles, 3, side, side]`; those of an image are together, row by row.
    pub(crate) fn cut(&self, images: &Tensor) -> Result<Tensor, Error> {
        let (side, step) = (self.side(), self.stride * self.patch);
        let mut tiles = Vec::with_capacity(self.count());
        for row in 0..self.tiles.rows {
            let band = images.narrow(2, row * step, side)?;
            for column in 0..self.tiles.columns {
                tiles.push(band.narrow(3, column * step, side)?);
            }
        }
        Ok(Tensor::stack(&tiles, 1)?.flatten(0, 1)?)
    }

    /// Patch tokens of the tiles, `[B * tiles, n, D]`, as those of whole images, `[B, N, D]`: each from the tile in which it
    /// is farthest from the edge.
    pub(crate) fn stitch(&self, tokens: &Tensor) -> Result<Tensor, Error> {
        let (rows, patches, width) = tokens.dims3()?;
        let tiles = self.count();
        let all = tokens
            .contiguous()?
            .reshape((rows / tiles, tiles * patches, width))?;
        let places = self
            .places()
            .map(|(tile, patch)| (tile * patches + patch) as u32);
        let places = Tensor::from_iter(places, tokens.device())?;
        Ok(all.index_select(&places, 1)?)
    }

    /// The tile of each patch of the whole image.
    pub(crate) fn tile_of_patches(&self) -> Vec<usize> {
        self.places().map(|(tile, _)| tile).collect()
    }

    /// Tile and number in it of each patch of the whole image, row-major.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        let (this, Grid { rows, columns }) = (*self, self.grid());
        // Twice the distance to a tile's middle, in whole numbers; the first of equals.
        let nearest = move |at: usize, tiles: usize| {
            let off = |tile: usize| (2 * at + 1).abs_diff(2 * tile * this.stride + this.patches);
            let tile = (0..tiles).min_by_key(|&tile| off(tile)).unwrap_or(0);
            (tile, at - tile * this.stride)
        };
        (0..rows).flat_map(move |row| {
            let (tile_row, y) = nearest(row, this.tiles.rows);
            (0..columns).map(move |column| {
                let (tile_column, x) = nearest(column, this.tiles.columns);
                (
                    tile_row * this.tiles.columns + tile_column,
                    y * this.patches + x,
                )
            })
        })
    }

    /// Whole images at the size of a tile, `[B, 3, side, side]`, as a teacher sees them without tiles.
    pub(crate) fn whole(&self, images: &Tensor) -> Result<Tensor, Error> {
        let (width, height) = self.input_size();
        let weights = |from: usize| weights(from, self.side(), images.device());
        // Rows first, as the resize of an image does.
        let narrow = images.broadcast_matmul(&weights(width)?.t()?)?;
        Ok(weights(height)?.broadcast_matmul(&narrow)?)
    }

    /// The patch of an image that was looked at as a whole under each patch of the tiles.
    pub(crate) fn patches_of_whole(&self) -> Vec<u32> {
        let Grid { rows, columns } = self.grid();
        let under = |at: usize, of: usize| (2 * at + 1) * self.patches / (2 * of);
        (0..rows)
            .flat_map(|row| {
                (0..columns)
                    .map(move |column| under(row, rows) * self.patches + under(column, columns))
            })
            .map(|patch| patch as u32)
            .collect()
    }
}

/// A smaller side from a larger one, `[to, from]`: Catmull-Rom, widened as Pillow does where it shrinks.
fn weights(from: usize, to: usize, device: &Device) -> Result<Tensor, Error> {
    let scale = from as f64 / to as f64;
    let widened = scale.max(1.0);
    let mut values = vec![0f32; to * from];
    for (i, row) in values.chunks_exact_mut(from).enumerate() {
        let centre = (i as f64 + 0.5) * scale;
        let first = (centre - SUPPORT * widened).max(0.0) as usize;
        let last = ((centre + SUPPORT * widened).ceil() as usize).min(from);
        let kernel = |x: usize| catmull_rom((x as f64 + 0.5 - centre) / widened);
        let total: f64 = (first..last).map(kernel).sum();
        for (x, value) in row.iter_mut().enumerate().take(last).skip(first) {
            *value = (kernel(x) / total) as f32;
        }
    }
    Ok(Tensor::from_vec(values, (to, from), device)?)
}

fn catmull_rom(x: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        (1.5 * x - 2.5) * x * x + 1.0
    } else if x < 2.0 {
        ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiling(columns: usize, rows: usize, overlap: f64) -> Tiling {
        let tiles = Tiles {
            columns,
            rows,
            overlap,
            memory: TileMemory::Shared,
        };
        tiles.of_side(8, 2)
    }

    /// `[1, 3, H, W]`: the number of each patch of 2 x 2 pixels.
    fn numbered(grid: Grid) -> Tensor {
        let (height, width) = (2 * grid.rows, 2 * grid.columns);
        let value = |i: usize| ((i / width % height / 2) * grid.columns + i % width / 2) as f32;
        let values: Vec<f32> = (0..3 * height * width).map(value).collect();
        Tensor::from_vec(values, (1, 3, height, width), &Device::Cpu).unwrap()
    }

    #[test]
    fn tiles_are_cut_and_stitched_to_the_same_image() {
        for (columns, rows, overlap) in [(2, 2, 0.0), (3, 2, 0.25), (1, 4, 0.5)] {
            let tiling = tiling(columns, rows, overlap);
            let grid = tiling.grid();
            let images = numbered(grid);
            let tiles = tiling.cut(&images).unwrap();
            assert_eq!(tiles.dims(), [columns * rows, 3, 8, 8]);
            // The upper left pixel of each patch stands for its token.
            let at = |side: usize| {
                let steps: Vec<u32> = (0..side as u32).map(|i| 2 * i).collect();
                Tensor::new(steps, &Device::Cpu).unwrap()
            };
            let tokens = tiles.narrow(1, 0, 1).unwrap().contiguous().unwrap();
            let tokens = tokens.index_select(&at(4), 2).unwrap();
            let tokens = tokens.index_select(&at(4), 3).unwrap();
            let tokens = tokens.reshape((columns * rows, 16, 1)).unwrap();
            let whole = tiling.stitch(&tokens).unwrap();
            let found: Vec<f32> = whole.flatten_all().unwrap().to_vec1().unwrap();
            let expected: Vec<f32> = (0..grid.patches()).map(|i| i as f32).collect();
            assert_eq!(found, expected, "{columns}x{rows}, {overlap}");
            let mut seen = tiling.tile_of_patches();
            assert_eq!(seen.len(), grid.patches());
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), columns * rows);
        }
        // 4 patches a tile, 1 shared: 4 + 2 * 3 columns and 4 + 3 rows of 2 px.
        assert_eq!(tiling(3, 2, 0.25).input_size(), (20, 14));
        // Patches from 3.5 on are nearer to the middle of the second tile.
        let tiles = tiling(2, 1, 0.25).tile_of_patches();
        assert_eq!(tiles[..7], [0, 0, 0, 0, 1, 1, 1]);
    }

    #[test]
    fn the_whole_is_what_pytorch_makes_of_it() {
        let golden = include_bytes!("../tests/golden/tiles.safetensors");
        let golden = candle_core::safetensors::load_buffer(golden, &Device::Cpu).unwrap();
        let tiling = tiling(3, 2, 0.25);
        let whole = tiling.whole(&golden["images"]).unwrap();
        let off = (whole - &golden["whole"]).unwrap().abs().unwrap();
        let off: f32 = off.max_all().unwrap().to_scalar().unwrap();
        assert!(off < 1e-5, "{off}");
    }

    #[test]
    fn places_of_the_whole_lie_under_the_tiles() {
        let under = tiling(2, 2, 0.0).patches_of_whole();
        assert_eq!(under[..8], [0, 0, 1, 1, 2, 2, 3, 3]);
        assert_eq!(under[8 * 7..], [12, 12, 13, 13, 14, 14, 15, 15]);
    }

    #[test]
    fn tiles_out_of_range_are_named() {
        let fault = |tiles: Tiles| tiles.validate().unwrap_err().to_string();
        let of = |columns, rows, overlap| Tiles {
            columns,
            rows,
            overlap,
            ..Tiles::default()
        };
        assert!(Tiles::default().validate().is_ok());
        assert!(fault(of(1, 1, 0.0)).contains("1x1"));
        assert!(fault(of(17, 2, 0.0)).contains("17x2"));
        assert!(fault(of(0, 2, 0.0)).contains("0x2"));
        assert!(fault(of(2, 2, 0.6)).contains("overlap"));
        assert!(fault(of(2, 2, f64::NAN)).contains("overlap"));
    }
}
