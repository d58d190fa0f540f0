//! Products with a matrix in panels, by the fastest instructions for its format.

use super::bf16;
use super::format::PackedFormat;
use super::gemm::Product;
use super::microkernel::{Accumulate, Target};
use super::pack::PackedView;
use super::panel_layout::Rows;

/// `out = start + factor x M` for the rows of `x`, `[rows, depth]`; `out` is `[rows, columns]`.
///
/// A row's result depends on no other row.
///
/// # Panics
/// When the sides do not fit each other.
pub fn product(
    out: Target<'_, '_>,
    start: Accumulate<'_>,
    x: &Rows<'_>,
    matrix: PackedView<'_>,
    factor: f32,
) {
    assert_eq!(x.columns, matrix.depth);
    assert_eq!(x.blocks.len(), x.columns.blocks());
    assert_eq!(matrix.values.len(), matrix.len());
    assert!(matrix.first_row + matrix.depth.count <= matrix.all_rows);
    out.check(x.count, matrix.columns);
    if let Accumulate::Bias(bias) = start {
        assert_eq!(bias.len(), matrix.columns.count);
    }
    let product = Product {
        out,
        start,
        x,
        matrix,
        factor,
    };
    match matrix.form {
        PackedFormat::Pairs(processor) => bf16::pairs::run(processor, product),
        PackedFormat::Tiles(processor) => bf16::tiles::run(processor, product),
        PackedFormat::Single | PackedFormat::Rounded => pulp::Arch::new().dispatch(product),
    }
}

#[cfg(test)]
mod tests {
    use super::super::pack::Packed;
    use super::super::panel_layout::{PanelLayout, fill, read, split};
    use super::*;

    fn noise(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * step).sin()).collect()
    }

    fn blocks(x: &[f32], columns: PanelLayout) -> Vec<f32> {
        let mut blocks = vec![f32::NAN; columns.values(x.len() / columns.count)];
        fill(&mut blocks, x, columns, 1.0);
        blocks
    }

    /// The nearest value of eight significant bits.
    fn eight_bits(x: f32) -> f64 {
        let x = f64::from(x);
        let step = (x.abs().log2().floor() - 7.0).exp2();
        if x == 0.0 {
            x
        } else {
            (x / step).round_ties_even() * step
        }
    }

    fn check_product(
        rows: usize,
        [depth, inner]: [usize; 2],
        [columns, outer]: [usize; 2],
        start: Accumulate<'_>,
    ) {
        check_form(rows, [depth, inner], [columns, outer], start, false);
        check_form(rows, [depth, inner], [columns, outer], start, true);
    }

    fn check_form(
        rows: usize,
        [depth, inner]: [usize; 2],
        [columns, outer]: [usize; 2],
        start: Accumulate<'_>,
        rounded: bool,
    ) {
        let form = |packed: Packed| if rounded { packed.rounded() } else { packed };
        let value = |x: f32| if rounded { eight_bits(x) } else { f64::from(x) };
        let (x, m) = (noise(rows * depth, 0.37), noise(depth * columns, 0.73));
        let transpose: Vec<f32> = (0..columns * depth)
            .map(|i| m[i % depth * columns + i / depth])
            .collect();
        let [depths, outs] = [(depth, inner), (columns, outer)]
            .map(|(count, groups)| PanelLayout::grouped(count, groups));
        let blocked = blocks(&x, depths);
        let x_rows = || Rows::all(&blocked, rows, depths);
        let before = noise(rows * columns, 0.11);
        let mut a = before.clone();
        let packed = form(Packed::new(&m, depths, outs));
        let target = Target::RowMajor(&mut a);
        product(target, start, &x_rows(), packed.panels(), 0.5);
        let mut b = blocks(&before, outs);
        let transposed = form(Packed::transposed(&transpose, depths, outs));
        let target = Target::Panels(&mut split(&mut b, rows));
        product(target, start, &x_rows(), transposed.panels(), 0.5);
        let mut same = vec![0.0; a.len()];
        read(&mut same, &b, outs);
        assert_eq!(a, same);
        for (i, found) in a.iter().enumerate() {
            let (r, c) = (i / columns, i % columns);
            let terms = (0..depth).map(|k| value(x[r * depth + k]) * value(m[k * columns + c]));
            let start = match start {
                Accumulate::Add => before[i],
                Accumulate::Replace => 0.0,
                Accumulate::Bias(bias) => bias[c],
            };
            let expected = f64::from(start) + 0.5 * terms.sum::<f64>();
            assert!(
                (f64::from(*found) - expected).abs() < 1e-4,
                "{rows} {depth} {columns} at {i}, rounded: {rounded}: {found}, expected {expected}"
            );
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn rounded_products_use_the_instructions_for_them_where_there_are_some() {
        let form = |depth| {
            let packed = Packed::new(
                &vec![0.0; depth * 3],
                PanelLayout::whole(depth),
                PanelLayout::whole(3),
            );
            packed.rounded().form
        };
        let pairs = std::is_x86_feature_detected!("avx512bf16");
        let tiles = |form| matches!(form, PackedFormat::Tiles(_));
        println!("pairs: {pairs}, tiles: {}", tiles(form(64)));
        assert_eq!(matches!(form(36), PackedFormat::Pairs(_)), pairs);
        assert_eq!(
            matches!(form(64), PackedFormat::Pairs(_)) || tiles(form(64)),
            pairs
        );
        // A system may refuse the matrix unit, but none grants it without.
        let listed = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        assert!(!tiles(form(64)) || listed.contains(" amx_bf16"));
        assert!(matches!(form(6), PackedFormat::Rounded));
    }

    #[test]
    fn parts_of_a_matrix_make_the_whole_product() {
        for (rounded, depth, columns) in [(false, 90, 70), (true, 90, 70), (true, 96, 96)] {
            let (rows, depths, outs) = (19, PanelLayout::whole(depth), PanelLayout::whole(columns));
            let (x, m) = (noise(rows * depth, 0.37), noise(depth * columns, 0.73));
            let x = blocks(&x, depths);
            let x = Rows::all(&x, rows, depths);
            let m = Packed::new(&m, depths, outs);
            let m = if rounded { m.rounded() } else { m };
            let mut whole = vec![f32::NAN; outs.values(rows)];
            let target = Target::Panels(&mut split(&mut whole, rows));
            product(target, Accumulate::Replace, &x, m.panels(), 0.5);
            let mut parts = vec![f32::NAN; outs.values(rows)];
            let parts = &mut split(&mut parts, rows)[..];
            let cut = |count: usize| [0..count / 2, count / 2..count];
            for columns in cut(outs.blocks()) {
                for depth in cut(depths.blocks()) {
                    let panels = m.panels().of_columns(columns.clone());
                    let panels = panels.of_depth(depth.clone());
                    let start = match depth.start {
                        0 => Accumulate::Replace,
                        _ => Accumulate::Add,
                    };
                    let x = Rows {
                        blocks: x.blocks[depth].to_vec(),
                        count: rows,
                        columns: panels.depth,
                    };
                    let target = Target::Panels(&mut parts[columns.clone()]);
                    product(target, start, &x, panels, 0.5);
                }
            }
            for (i, (part, whole)) in parts.iter().zip(split(&mut whole, rows)).enumerate() {
                let (filled, width) = (outs.block(i).1, outs.width);
                for (part, whole) in part.chunks(width).zip(whole.chunks(width)) {
                    let pairs = part[..filled].iter().zip(whole);
                    pairs.for_each(|(a, b)| assert!((a - b).abs() < 1e-4, "{a} {b}"));
                }
            }
        }
    }

    #[test]
    fn products_of_every_height_and_odd_widths_match_loops() {
        let bias = noise(64, 0.2);
        for rows in 1..=13 {
            check_product(rows, [7, 1], [33, 3], Accumulate::Add);
            check_product(rows, [64, 2], [64, 1], Accumulate::Bias(&bias));
        }
        // The depth is taken in several parts.
        check_product(5, [800, 1], [64, 2], Accumulate::Bias(&bias));
        check_product(6, [900, 3], [17, 1], Accumulate::Replace);
        check_product(13, [385, 5], [40, 1], Accumulate::Add);
        check_product(40, [768, 6], [64, 1], Accumulate::Bias(&bias));
        // Rows that fill tiles of 16 and 32, or do not.
        for rows in [15, 16, 17, 31, 32, 33, 48, 50, 99] {
            check_product(rows, [96, 3], [70, 1], Accumulate::Replace);
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let (x, m) = (noise(11 * 50, 0.37), noise(50 * 20, 0.73));
        let (depth, columns) = (PanelLayout::whole(50), PanelLayout::whole(20));
        let m = Packed::new(&m, depth, columns);
        let bias = noise(20, 0.2);
        let run = |x: &[f32], start: Accumulate<'_>| {
            let rows = x.len() / 50;
            let mut out = vec![7.0; rows * 20];
            let x = blocks(x, depth);
            let x = Rows::all(&x, rows, depth);
            product(Target::RowMajor(&mut out), start, &x, m.panels(), 1.0);
            out
        };
        let all = run(&x, Accumulate::Bias(&bias));
        for row in 0..11 {
            let one = run(&x[row * 50..][..50], Accumulate::Bias(&bias));
            assert_eq!(one, all[row * 20..][..20]);
            let bare = run(&x[row * 50..][..50], Accumulate::Replace);
            let pairs = one.iter().zip(&bare).zip(&bias);
            assert!(
                pairs
                    .into_iter()
                    .all(|((one, bare), bias)| (one - bare - bias).abs() < 1e-5)
            );
        }
    }
}
