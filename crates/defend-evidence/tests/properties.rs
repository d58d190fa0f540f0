//! What has to hold of any embeddings, and the defined answers of hard cases.
#![allow(clippy::unwrap_used, reason = "tests may panic")]

use defend_evidence::{
    ClosedForm, Contrast, CoreSet, Embeddings, Error, EvidenceConfig, ExactPosterior, Groups,
    PatchMemory, PatchTokens,
};
use defend_random::{Rng, standard_normal};
use ndarray::{Array2, Array3, Axis};
use proptest::prelude::*;

/// `n` images of two parts with six channels around a centre of the seed.
fn images(n: usize, spread: f64, seed: u64) -> Embeddings {
    let mut rng = Rng::seed(seed / 100);
    let centre: Vec<f64> = (0..6).map(|_| standard_normal(&mut rng)).collect();
    let mut rng = Rng::stream(seed, 1);
    let mut part = || {
        Array2::from_shape_fn((n, 6), |(_, j)| {
            (centre[j] + spread * standard_normal(&mut rng)) as f32
        })
    };
    Embeddings::new(vec![part(), part()]).unwrap()
}

fn patches(n: usize, seed: u64) -> PatchTokens {
    let mut rng = Rng::seed(seed);
    let block = Array3::from_shape_simple_fn((n, 9, 5), || standard_normal(&mut rng) as f32);
    PatchTokens::new(vec![block]).unwrap()
}

fn joined(a: &Embeddings, b: &Embeddings) -> Embeddings {
    let pairs = a.parts().iter().zip(b.parts());
    Embeddings::new(
        pairs
            .map(|(a, b)| ndarray::concatenate![Axis(0), *a, *b])
            .collect(),
    )
    .unwrap()
}

/// Groups of one, two or three rows.
fn some_groups(rows: usize) -> Groups {
    let of: Vec<usize> = (0..rows)
        .map(|row| [row, row - row % 2, row - row % 3][row / 6 % 3])
        .collect();
    let mut leaders: Vec<usize> = of.clone();
    leaders.sort_unstable();
    leaders.dedup();
    let of = of
        .iter()
        .map(|row| leaders.binary_search(row).unwrap())
        .collect();
    Groups { leaders, of }
}

/// All rows but those of a group.
fn without(groups: &Groups, group: usize) -> (Vec<usize>, Groups) {
    let rows: Vec<usize> = (0..groups.of.len())
        .filter(|&row| groups.of[row] != group)
        .collect();
    let single = Groups::single(rows.len());
    (rows, single)
}

fn scores(form: &ClosedForm, images: &Embeddings) -> Vec<f64> {
    form.evaluate(images, None)
        .unwrap()
        .iter()
        .map(|j| j.score)
        .collect()
}

/// The default without patches, which these narrow clouds would ask for.
fn without_patches() -> EvidenceConfig {
    let mut config = EvidenceConfig::default();
    config.patches.weight = 0.0;
    config
}

fn fit(normal: &Embeddings, background: Option<&Embeddings>) -> ClosedForm {
    ClosedForm::fit(normal, background, &without_patches()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_left_out_group_is_what_a_refit_without_it_says(n in 4usize..24, seed in 0u64..1000, width in 0.5f64..8.0) {
        let x = images(n, 0.8, seed).features(2);
        let groups = some_groups(n);
        prop_assume!(groups.len() > 1);
        let left_out = ExactPosterior::fit(x.clone(), &groups, width, 0.1).unwrap().left_out(&groups, 0.1).unwrap().unwrap();
        for (group, members) in groups.members().into_iter().enumerate() {
            let (rows, single) = without(&groups, group);
            let refit = ExactPosterior::fit(x.select(Axis(0), &rows), &single, width, 0.1).unwrap();
            for (row, judged) in members.iter().zip(refit.evaluate(x.select(Axis(0), &members).view())) {
                prop_assert!((left_out[*row] - judged.log_variance).abs() < 1e-6, "{} {}", left_out[*row], judged.log_variance);
            }
        }
    }

    /// The weights of the classes are those of the whole fit: without the group, the normal images weigh less in all.
    #[test]
    fn a_left_out_group_of_the_contrast_is_what_a_refit_says(n in 4usize..16, seed in 0u64..1000) {
        let (x, b) = (images(n, 0.8, seed).features(2), images(30, 1.5, seed + 100).features(2));
        let groups = some_groups(n);
        let (_, left_out) = Contrast::fit(x.view(), &groups, b.view(), None, 1.0, 1.0).unwrap();
        let total = (n + 30) as f64;
        for (group, members) in groups.members().into_iter().enumerate() {
            let rows = without(&groups, group).0;
            let points = ndarray::concatenate![Axis(0), x.select(Axis(0), &rows), b];
            // Solved by a few thousand steps of Gauss-Seidel: another way than the one under test.
            let k = |a: usize, b: usize| (-(2.0 - 2.0 * points.row(a).dot(&points.row(b))).max(0.0)).exp();
            let count = points.nrows();
            let kernel = Array2::from_shape_fn((count, count), |(a, b)| k(a, b));
            let mut alpha = vec![0.0; count];
            for _ in 0..3000 {
                for i in 0..count {
                    let (y, weight) = if i < rows.len() { (1.0, total * 0.5 / n as f64) } else { (-1.0, total * 0.5 / 30.0) };
                    let rest: f64 = (0..count).filter(|j| *j != i).map(|j| kernel[[i, j]] * alpha[j]).sum();
                    alpha[i] = (y - rest) / (kernel[[i, i]] + 1.0 / weight);
                }
            }
            for &row in &members {
                let value: f64 = (0..count)
                    .map(|j| (-(2.0 - 2.0 * x.row(row).dot(&points.row(j))).max(0.0)).exp() * alpha[j])
                    .sum();
                let found = left_out.normal[row];
                prop_assert!((found + value).abs() < 1e-6, "{found} {}", -value);
            }
        }
    }

    #[test]
    fn patches_of_a_left_out_group_are_compared_with_the_others(n in 3usize..10, seed in 0u64..1000) {
        let tokens = patches(n, seed);
        let groups = some_groups(n);
        prop_assume!(groups.len() > 1);
        let all = |images: &[usize]| CoreSet {
            patches: tokens.blocks()[0].select(Axis(0), images).into_shape_with_order((images.len() * 9, 5)).unwrap(),
            groups: images.iter().flat_map(|&i| [groups.of[i]; 9]).collect(),
        };
        let every: Vec<usize> = (0..n).collect();
        let left_out = PatchMemory::new(vec![all(&every)], 5).distances(&tokens, Some(&groups.of)).unwrap();
        for (group, members) in groups.members().into_iter().enumerate() {
            let refit = PatchMemory::new(vec![all(&without(&groups, group).0)], 5).distances(&tokens, None).unwrap();
            for row in members {
                prop_assert!((left_out[row].log_worst - refit[row].log_worst).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn another_image_never_raises_the_variance(n in 2usize..20, seed in 0u64..1000, width in 0.5f64..8.0) {
        let x = images(n, 0.8, seed).features(2);
        let queries = images(8, 1.2, seed + 1).features(2);
        let judge = |count: usize| {
            let some = x.slice(ndarray::s![..count, ..]).to_owned();
            ExactPosterior::fit(some, &Groups::single(count), width, 0.1).unwrap().evaluate(queries.view())
        };
        for (fewer, more) in judge(n - 1).iter().zip(judge(n)) {
            prop_assert!(more.log_variance <= fewer.log_variance + 1e-9);
        }
    }

    /// Bit for bit: images are put into an order of their own, and equal ones are merged.
    #[test]
    fn neither_the_order_nor_doubled_images_matter(n in 2usize..30, seed in 0u64..1000, by in 1usize..30) {
        let (normal, background) = (images(n, 0.6, seed), images(280, 1.0, seed + 1));
        let queries = images(6, 1.0, seed + 2);
        let expected = fit(&normal, Some(&background));
        let mut order: Vec<usize> = (0..n).collect();
        order.rotate_left(by % n);
        order.extend([0, by % n, 0]);
        let mut ordinary: Vec<usize> = (0..280).rev().collect();
        ordinary.extend([3, 4]);
        let found = fit(&normal.select(&order), Some(&background.select(&ordinary)));
        prop_assert_eq!(scores(&found, &queries), scores(&expected, &queries));
        prop_assert_eq!(found.left_out(), expected.left_out());
        prop_assert_eq!(found.summary().images, n + 3);
        prop_assert_eq!(found.summary().distinct, n);
    }

    #[test]
    fn scores_depend_neither_on_the_batch_nor_on_being_saved(n in 1usize..40, seed in 0u64..1000) {
        let form = fit(&images(n, 0.6, seed), Some(&images(300, 0.9, seed + 1)));
        let queries = images(11, 1.0, seed + 2);
        let whole = scores(&form, &queries);
        let alone: Vec<f64> = (0..11).flat_map(|i| scores(&form, &queries.select(&[i]))).collect();
        prop_assert_eq!(&alone, &whole);
        let restored = ClosedForm::from_state(form.state()).unwrap();
        prop_assert_eq!(scores(&restored, &queries), whole);
        prop_assert_eq!(restored.left_out(), form.left_out());
    }
}

#[test]
fn a_handful_of_images_has_an_answer() {
    let background = images(300, 1.5, 7001);
    for n in 1..=20 {
        let normal = images(n, 0.4, 7000);
        let form = fit(&normal, Some(&background));
        let far = scores(&form, &images(5, 0.4, 9000));
        let near = scores(&form, &images(5, 0.4, 7003));
        assert!(far.iter().chain(&near).all(|s| s.is_finite()), "{n} images");
        let lowest = far.iter().copied().fold(f64::INFINITY, f64::min);
        let mean = near.iter().sum::<f64>() / 5.0;
        assert!(lowest > mean, "{n} images: {far:?} {near:?}");
        // One image alone has nothing to be left out of.
        assert_eq!(
            form.left_out().len(),
            if n == 1 { 0 } else { form.groups().len() }
        );
        if n == 1 {
            assert_eq!(form.contrast_weight(), 0.0);
        }
    }
}

#[test]
fn identical_and_constant_images() {
    let one = images(1, 0.4, 1);
    let same = one.select(&[0; 30]);
    let form = fit(&same, None);
    assert_eq!(
        (
            form.summary().images,
            form.summary().distinct,
            form.summary().groups
        ),
        (30, 1, 1)
    );
    let queries = images(4, 0.8, 2);
    assert_eq!(scores(&form, &queries), scores(&fit(&one, None), &queries));
    // Features without any direction, and a single channel.
    let nothing = Embeddings::new(vec![Array2::zeros((20, 4))]).unwrap();
    assert!(
        scores(&fit(&nothing, None), &nothing)
            .iter()
            .all(|s| s.is_finite())
    );
    let constant = Embeddings::new(vec![Array2::ones((20, 1))]).unwrap();
    assert!(
        scores(&fit(&constant, None), &constant)
            .iter()
            .all(|s| s.is_finite())
    );
    // Two images are equally far from each other: no spread.
    let two = fit(&images(2, 0.4, 3), None);
    assert!(
        scores(&two, &queries)
            .iter()
            .all(|s| s.is_finite() && s.abs() < 20.0)
    );
}

/// Far from all normal images the variance is 1 to the last bit, and the distance to the nearest decides.
#[test]
fn images_that_no_kernel_reaches_still_have_an_order() {
    let at = |angles: &[f64]| {
        let rows = Array2::from_shape_fn((angles.len(), 2), |(i, j)| if j == 0 { angles[i].cos() } else { angles[i].sin() } as f32);
        Embeddings::new(vec![rows]).unwrap()
    };
    let angles: Vec<f64> = (0..50).map(|i| f64::from(i) * 1e-3).collect();
    let form = fit(&at(&angles), None);
    assert!(form.summary().width > 1e4);
    let found = scores(&form, &at(&[1.0, 1.1, 1.5, 2.0, 3.0]));
    assert!(found.is_sorted_by(|a, b| a < b), "{found:?}");
}

#[test]
fn one_photo_of_ten_is_no_large_share() {
    let normal = images(60, 0.6, 500);
    let weight = |photos: usize| {
        // Half of the photos are like the normal images.
        let some = joined(
            &images(photos / 2, 0.6, 501),
            &images(photos - photos / 2, 0.6, 900),
        );
        fit(&normal, Some(&some)).contrast_weight()
    };
    assert_eq!(weight(600), 2.0);
    assert_eq!(weight(100), 2.0);
    let few = weight(4);
    assert!(few > 0.0 && few < 1.0, "{few}");
    let single = images(1, 0.6, 501);
    let form = fit(&normal, Some(&single));
    assert!(scores(&form, &single).iter().all(|s| s.is_finite()));
}

/// Beyond the exact limit images are judged given their nearest ones: nearly the same scores, and honest left-out values.
#[test]
fn many_images_are_judged_by_their_nearest() {
    let normal = images(300, 0.7, 100);
    let mut limited = without_patches();
    limited.posterior.exact_images = 120;
    limited.posterior.neighbours = 64;
    let local = ClosedForm::fit(&normal, None, &limited).unwrap();
    let exact = fit(&normal, None);
    assert!(!local.summary().exact && exact.summary().exact);
    assert_eq!(local.summary().left_out, 60);
    let queries = joined(&images(40, 0.7, 101), &images(40, 1.0, 900));
    let variance = |form: &ClosedForm| -> Vec<f64> {
        form.evaluate(&queries, None)
            .unwrap()
            .iter()
            .map(|j| j.posterior.z)
            .collect()
    };
    let ranks = |values: Vec<f64>| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
        order
    };
    let (a, b) = (ranks(variance(&local)), ranks(variance(&exact)));
    let place = |image: &usize| b.iter().position(|other| other == image).unwrap();
    let moved: usize = a
        .iter()
        .enumerate()
        .map(|(i, image)| place(image).abs_diff(i))
        .sum();
    assert!(moved <= 3 * a.len(), "{moved}");
    let restored = ClosedForm::from_state(local.state()).unwrap();
    assert_eq!(variance(&restored), variance(&local));
}

#[test]
fn patches_are_needed_where_they_count() {
    let normal = images(40, 0.05, 300);
    let mut form = ClosedForm::fit(&normal, None, &EvidenceConfig::default()).unwrap();
    assert_eq!(form.patch_weight(), 2.0);
    let queries = images(3, 0.05, 301);
    // Without any memory the other pieces stand alone.
    assert_eq!(form.evaluate(&queries, None).unwrap()[0].patches, None);
    let wanted = form.patch_images();
    assert!(matches!(
        form.remember(&patches(3, 1), &mut Rng::seed(0)),
        Err(Error::Shape { .. })
    ));
    let before = form.left_out().to_vec();
    let maps = form
        .remember(&patches(wanted.len(), 1), &mut Rng::seed(0))
        .unwrap();
    assert_eq!((maps.len(), maps[0].len()), (wanted.len(), 9));
    assert_ne!(form.left_out(), before);
    assert!(matches!(
        form.evaluate(&queries, None),
        Err(Error::Empty { .. })
    ));
    let judged = form.evaluate(&queries, Some(&patches(3, 2))).unwrap();
    for judgement in &judged {
        let sum = judgement.posterior.z + 2.0 * judgement.patches.unwrap().z;
        assert_eq!(judgement.score, sum);
        assert_eq!(judgement.map.as_ref().unwrap().len(), 9);
    }
    let restored = ClosedForm::from_state(form.state()).unwrap();
    assert_eq!(
        restored.evaluate(&queries, Some(&patches(3, 2))).unwrap(),
        judged
    );
    let wrong = PatchTokens::new(vec![Array3::ones((3, 9, 4))]).unwrap();
    assert!(matches!(
        form.evaluate(&queries, Some(&wrong)),
        Err(Error::Shape { .. })
    ));
}

#[test]
fn damaged_states_are_refused() {
    let form = fit(&images(20, 0.6, 1), Some(&images(300, 0.9, 2)));
    assert!(form.contrast_weight() > 0.0);
    let state = form.state();
    for name in state.arrays.keys() {
        let mut damaged = state.clone();
        damaged.arrays.remove(name);
        let part = name
            .rsplit_once('.')
            .is_some_and(|(start, i)| i == "1" && start != "contrast");
        let error = ClosedForm::from_state(damaged);
        // Without its second part the first stays an embedding of its own, which nothing else fits.
        assert!(error.is_err() || part, "{name}");
    }
    let mut more = state.clone();
    more.arrays.insert(
        "other".into(),
        defend_evidence::StateArray::Numbers(vec![1.0]),
    );
    assert!(matches!(
        ClosedForm::from_state(more),
        Err(Error::State { .. })
    ));
}

#[test]
fn other_widths_are_refused() {
    let form = fit(&images(20, 0.6, 1), None);
    let other = Embeddings::new(vec![Array2::ones((2, 6))]).unwrap();
    assert!(matches!(
        form.evaluate(&other, None),
        Err(Error::Shape { .. })
    ));
    let background = ClosedForm::fit(
        &images(20, 0.6, 1),
        Some(&other),
        &EvidenceConfig::default(),
    );
    assert!(matches!(background, Err(Error::Shape { .. })));
}
