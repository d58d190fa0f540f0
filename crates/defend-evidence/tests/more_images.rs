//! Known abnormal images, folders that are scored together, suspects.
#![allow(clippy::unwrap_used, reason = "tests may panic")]

use defend_evidence::{ClosedForm, Embeddings, Error, EvidenceConfig, PatchTokens};
use defend_random::{Rng, standard_normal};
use ndarray::{Array2, Array3, Axis};

/// `n` images of two parts around the centre of a kind.
fn images(n: usize, kind: u64, seed: u64) -> Embeddings {
    let mut rng = Rng::seed(kind);
    let centre: Vec<f64> = (0..8).map(|_| standard_normal(&mut rng)).collect();
    let mut rng = Rng::stream(seed, 2);
    let mut part = || {
        Array2::from_shape_fn((n, 8), |(_, j)| {
            (centre[j] + 0.5 * standard_normal(&mut rng)) as f32
        })
    };
    Embeddings::new(vec![part(), part()]).unwrap()
}

fn joined(parts: &[&Embeddings]) -> Embeddings {
    let parts: Vec<Embeddings> = parts.iter().map(|e| (*e).clone()).collect();
    Embeddings::joined(&parts).unwrap()
}

fn fit(normal: &Embeddings) -> ClosedForm {
    ClosedForm::fit(normal, None, &EvidenceConfig::default()).unwrap()
}

fn scores(form: &ClosedForm, images: &Embeddings) -> Vec<f64> {
    let judged = form.evaluate(images, None).unwrap();
    judged.iter().map(|j| j.score).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn known_abnormal_images_speak_against_their_kind_and_for_none() {
    let mut form = fit(&images(60, 1, 1));
    let queries = joined(&[&images(20, 1, 2), &images(20, 5, 3)]);
    let before = scores(&form, &queries);
    form.learn_abnormal(&images(5, 5, 4)).unwrap();
    assert_eq!(form.known_abnormal(), 5);
    let judged = form.evaluate(&queries, None).unwrap();
    assert!(judged.iter().all(|j| j.known.unwrap().z >= 0.0));
    let gain: Vec<f64> = judged
        .iter()
        .zip(&before)
        .map(|(j, b)| j.score - b)
        .collect();
    assert!(
        mean(&gain[20..]) > 5.0 * (1.0 + mean(&gain[..20])),
        "{gain:?}"
    );
}

#[test]
fn known_abnormal_images_are_learnt_in_any_order_and_saved() {
    let normal = images(40, 1, 1);
    let (few, more) = (images(3, 5, 4), images(4, 6, 5));
    let queries = images(9, 5, 7);
    let learn = |lessons: &[&Embeddings]| {
        let mut form = fit(&normal);
        for lesson in lessons {
            form.learn_abnormal(lesson).unwrap();
        }
        form
    };
    let one_by_one = learn(&[&few, &more, &few]);
    let reversed = learn(&[&joined(&[&more, &few])]);
    assert_eq!(one_by_one.known_abnormal(), 7);
    assert_eq!(scores(&one_by_one, &queries), scores(&reversed, &queries));
    assert_eq!(one_by_one.left_out(), reversed.left_out());
    let restored = ClosedForm::from_state(one_by_one.state()).unwrap();
    assert_eq!(scores(&restored, &queries), scores(&reversed, &queries));
    assert_eq!(restored.left_out(), reversed.left_out());
    // A restored form learns as the one it was made of.
    let mut again = ClosedForm::from_state(learn(&[&few]).state()).unwrap();
    again.learn_abnormal(&more).unwrap();
    assert_eq!(scores(&again, &queries), scores(&reversed, &queries));
    assert_eq!(again.left_out(), reversed.left_out());
}

#[test]
fn an_abnormal_image_that_is_normal_is_refused() {
    let normal = images(30, 1, 1);
    let mut form = fit(&normal);
    let mixed = joined(&[&images(2, 5, 4), &normal.select(&[7])]);
    let queries = images(5, 5, 6);
    let before = scores(&form, &queries);
    let error = form.learn_abnormal(&mixed).unwrap_err();
    assert_eq!(error, Error::AlsoNormal { image: 2 });
    assert_eq!(scores(&form, &queries), before, "nothing changed");
    let narrow = Embeddings::new(vec![Array2::ones((1, 8))]).unwrap();
    assert!(matches!(
        form.learn_abnormal(&narrow),
        Err(Error::Shape { .. })
    ));
}

#[test]
fn a_single_normal_image_can_have_abnormal_ones_beside_it() {
    let mut form = fit(&images(1, 1, 1));
    form.learn_abnormal(&images(2, 5, 4)).unwrap();
    let found = scores(&form, &joined(&[&images(3, 1, 8), &images(3, 5, 9)]));
    assert!(found.iter().all(|s| s.is_finite()), "{found:?}");
    assert!(form.left_out().is_empty());
    let together = form.together(&images(3, 5, 9), &found[3..], None).unwrap();
    assert_eq!(
        (together.weight, together.scores),
        (0.0, found[3..].to_vec())
    );
}

/// Probability that an abnormal image, of those after the first `normal`, scores higher.
fn auroc(scores: &[f64], normal: usize) -> f64 {
    let (normal, abnormal) = scores.split_at(normal);
    let wins = abnormal
        .iter()
        .flat_map(|a| normal.iter().map(move |n| f64::from(u8::from(a > n))));
    wins.sum::<f64>() / (normal.len() * abnormal.len()) as f64
}

#[test]
fn a_folder_with_many_abnormal_images_is_sorted_better_together() {
    let form = fit(&images(100, 1, 1));
    // Abnormal images so near to the normal ones that each alone is hard to tell.
    let near = |n: usize, seed: u64| {
        let (a, b) = (images(n, 1, seed), images(n, 5, seed));
        let parts = a.parts().iter().zip(b.parts());
        Embeddings::new(parts.map(|(a, b)| 0.62 * a + 0.38 * b).collect()).unwrap()
    };
    let folder = joined(&[&images(200, 1, 2), &near(150, 3)]);
    let alone = scores(&form, &folder);
    let together = form.together(&folder, &alone, None).unwrap();
    let (before, after) = (auroc(&alone, 200), auroc(&together.scores, 200));
    assert!(after > before + 0.02, "{before} {after}");
    let share = together.abnormal;
    assert!(
        share.low <= 150.0 / 350.0 && 150.0 / 350.0 <= share.high,
        "{share:?}"
    );

    // Few abnormal ones are no reason to change anything.
    let folder = joined(&[&images(200, 1, 2), &near(2, 3)]);
    let alone = scores(&form, &folder);
    let together = form.together(&folder, &alone, None).unwrap();
    assert_eq!((together.weight, &together.scores), (0.0, &alone));
    assert_eq!(together.abnormal.low, 0.0);
    let wanted = form.together(&folder, &alone, Some(0.3)).unwrap();
    assert_eq!(wanted.weight, 1.0);
    for wrong in [0.0, 1.0, f64::NAN] {
        let error = form.together(&folder, &alone, Some(wrong));
        assert!(matches!(error, Err(Error::Config { .. })));
    }
    let short = form.together(&folder, &alone[1..], None);
    assert!(matches!(short, Err(Error::Shape { .. })));
}

#[test]
fn an_image_of_another_kind_is_the_first_suspect() {
    let normal = joined(&[&images(40, 1, 1), &images(1, 5, 2)]);
    let form = fit(&normal);
    let suspects = form.suspects(3).unwrap();
    assert_eq!(suspects.len(), 3);
    assert_eq!(form.kept()[suspects[0].image], 40);
    assert!(
        suspects
            .windows(2)
            .all(|pair| pair[0].score >= pair[1].score)
    );
    assert!((suspects[1].rank - 2.0 / 41.0).abs() < 1e-12);
    // Its explanation is what a refit without it gives.
    for suspect in &suspects {
        let rows: Vec<usize> = (0..41)
            .filter(|row| *row != form.kept()[suspect.image])
            .collect();
        let mut config = EvidenceConfig::default();
        let others = normal.select(&rows);
        // The refit has a kernel of its own width; held here.
        config.posterior.width *= form.summary().width / fit(&others).summary().width;
        let refit = ClosedForm::fit(&others, None, &config).unwrap();
        let image = normal.select(&[form.kept()[suspect.image]]);
        let judged = refit.evaluate(&image, None).unwrap();
        for (found, expected) in suspect.nearest.iter().zip(&judged[0].explained_by) {
            assert_eq!(form.kept()[found.0], rows[refit.kept()[expected.0]]);
            assert!(
                (found.1 - expected.1).abs() < 1e-6,
                "{found:?} {expected:?}"
            );
        }
    }
    let restored = ClosedForm::from_state(form.state()).unwrap();
    assert_eq!(restored.suspects(3).unwrap(), suspects);
    assert_eq!(form.suspects(1000).unwrap().len(), 41);
}

#[test]
fn suspects_of_many_images_and_of_near_copies() {
    let mut config = EvidenceConfig::default();
    config.posterior.exact_images = 60;
    config.posterior.neighbours = 20;
    let odd = images(1, 5, 2);
    let normal = joined(&[&images(150, 1, 1), &odd]);
    let form = ClosedForm::fit(&normal, None, &config).unwrap();
    let suspects = form.suspects(5).unwrap();
    assert!(
        suspects
            .iter()
            .all(|s| !s.nearest.is_empty() && s.nearest.iter().all(|n| n.0 != s.image))
    );
    // A burst of the odd image is one suspect, explained by other groups.
    let copies: Vec<_> = odd
        .parts()
        .iter()
        .map(|part| {
            let mut rng = Rng::seed(3);
            let near =
                Array2::from_shape_simple_fn((6, 8), || 0.003 * standard_normal(&mut rng) as f32);
            &near + &part.index_axis(Axis(0), 0)
        })
        .collect();
    let form = fit(&joined(&[
        &images(40, 1, 1),
        &Embeddings::new(copies).unwrap(),
    ]));
    let kind = |row: usize| form.kept()[row] >= 40;
    let mut of_odd: Vec<usize> = (0..46)
        .filter(|row| kind(*row))
        .map(|row| form.groups().of[row])
        .collect();
    of_odd.dedup();
    assert_eq!(of_odd.len(), 1);
    let suspects = form.suspects(2).unwrap();
    assert!(kind(suspects[0].image) && !kind(suspects[1].image));
    assert!(suspects[0].nearest.iter().all(|n| !kind(n.0)));
}

#[test]
fn learning_on_and_forgetting_is_a_fit_from_scratch() {
    let (first, second) = (images(40, 1, 1), images(25, 1, 9));
    let background = joined(&[&images(60, 1, 20), &images(240, 5, 21)]);
    let abnormal = images(3, 6, 5);
    let queries = joined(&[&images(10, 1, 7), &images(10, 5, 8)]);
    let all = joined(&[&first, &second]);
    let fit = |normal: &Embeddings| {
        let mut form =
            ClosedForm::fit(normal, Some(&background), &EvidenceConfig::default()).unwrap();
        form.learn_abnormal(&abnormal).unwrap();
        form
    };
    let same = |a: &ClosedForm, b: &ClosedForm| {
        assert!(a.contrast_weight() > 0.0, "the contrast counts here");
        assert_eq!(a.contrast_weight(), b.contrast_weight());
        assert_eq!(scores(a, &queries), scores(b, &queries));
        assert_eq!(a.left_out(), b.left_out());
        assert_eq!(a.summary(), b.summary());
    };
    let form = fit(&first);
    let rows: Vec<usize> = (0..40).collect();
    let longer = form.refit(&rows, Some(&second)).unwrap();
    same(&longer, &fit(&all));
    // Saved in between, one image at a time, and back again.
    let mut steps = ClosedForm::from_state(form.state()).unwrap();
    for i in 0..3 {
        let rows: Vec<usize> = (0..40 + i).collect();
        steps = steps.refit(&rows, Some(&second.select(&[i]))).unwrap();
    }
    same(&steps, &fit(&joined(&[&first, &second.select(&[0, 1, 2])])));
    let of_first: Vec<usize> = (0..longer.kept().len())
        .filter(|row| longer.kept()[*row] < 40)
        .collect();
    same(&longer.refit(&of_first, None).unwrap(), &form);

    let error = form.refit(&rows, Some(&abnormal)).unwrap_err();
    assert_eq!(error, Error::AlsoAbnormal { image: 0 });
    assert!(matches!(form.refit(&[], None), Err(Error::Empty { .. })));
}

#[test]
fn what_patches_decide_needs_the_images_and_maps_lose_what_is_forgotten() {
    let mut rng = Rng::seed(5);
    let tokens = |n: usize, rng: &mut Rng| {
        let block = Array3::from_shape_simple_fn((n, 9, 5), || standard_normal(rng) as f32);
        PatchTokens::new(vec![block]).unwrap()
    };
    let normal = images(30, 1, 1);
    let mut config = EvidenceConfig::default();
    config.patches.alike_from = -2.0;
    let mut form = ClosedForm::fit(&normal, None, &config).unwrap();
    form.remember(&tokens(30, &mut rng), &mut Rng::seed(1))
        .unwrap();
    let rows: Vec<usize> = (0..30).collect();
    let error = form.refit(&rows, Some(&images(2, 1, 3))).unwrap_err();
    assert!(matches!(error, Error::NeedsImages { .. }), "{error}");

    config.patches.weight = 0.0;
    let mut form = ClosedForm::fit(&normal, None, &config).unwrap();
    assert_eq!((form.patch_images().len(), form.patch_share()), (0, 0.0));
    let groups = form.groups_of(&normal).unwrap();
    let own: Vec<usize> = form.kept().iter().map(|&image| groups[image]).collect();
    assert_eq!(own, form.groups().of);
    let groups = form.groups().of.clone();
    form.remember_objects(&tokens(30, &mut rng), &groups, None, &mut Rng::seed(1))
        .unwrap();
    let forgotten = form.groups().of[4];
    let left: Vec<usize> = (0..30)
        .filter(|row| form.groups().of[*row] != forgotten)
        .collect();
    let after = form.refit(&left, None).unwrap();
    let [before, after_normal] = [&form, &after].map(|form| form.objects().unwrap().normal());
    let own = before
        .groups
        .iter()
        .filter(|group| **group == forgotten)
        .count();
    assert!(own > 0);
    assert_eq!(after_normal.patches.nrows(), before.patches.nrows() - own);
    assert!(
        after_normal
            .groups
            .iter()
            .all(|group| *group < after.groups().len())
    );
    // With a single group left there is no scale, and no map.
    let one: Vec<usize> = (0..30)
        .filter(|row| form.groups().of[*row] == form.groups().of[0])
        .collect();
    assert!(form.refit(&one, None).unwrap().objects().is_none());
    let judged = after.evaluate(&images(1, 1, 8), None).unwrap();
    let maps = after.maps(&judged, Some(&tokens(1, &mut rng))).unwrap();
    let map = maps[0].as_ref().unwrap();
    assert!(map.len() == 9 && map.iter().all(|z| z.is_finite()));
}

/// Places around one of two directions: normal images show the first, ordinary ones both.
fn places(n: usize, second: impl Fn(usize) -> bool, rng: &mut Rng) -> PatchTokens {
    let block = Array3::from_shape_fn((n, 9, 5), |(image, place, j)| {
        let centre = usize::from(second(image * 9 + place));
        f32::from(j == centre) + 0.2 * standard_normal(rng) as f32
    });
    PatchTokens::new(vec![block]).unwrap()
}

#[test]
fn maps_show_the_place_that_is_novel() {
    let mut rng = Rng::seed(8);
    let (normal, queries) = (images(30, 1, 1), images(4, 1, 2));
    let query_places = places(4, |i| i % 9 == 6, &mut rng);
    let normal_places = places(30, |_| false, &mut rng);
    let ordinary = places(30, |i| i % 2 == 0, &mut rng).blocks()[0]
        .to_shape((270, 5))
        .unwrap()
        .into_owned();
    // Ordinary images that the posterior takes for normal, so that they count.
    let background = images(300, 1, 9);
    let mut config = EvidenceConfig::default();
    config.patches.weight = 0.0;
    for background in [None, Some(&background)] {
        let mut form = ClosedForm::fit(&normal, background, &config).unwrap();
        assert_eq!(form.contrast_weight() > 0.0, background.is_some());
        let left = form
            .remember_objects(
                &normal_places,
                &form.groups().of.clone(),
                Some(ordinary.clone()),
                &mut Rng::seed(1),
            )
            .unwrap();
        let left: Vec<f64> = left.concat().into_iter().map(f64::from).collect();
        // Standard deviations of normal places.
        let spread = left.iter().map(|z| z * z).sum::<f64>() / left.len() as f64;
        assert!(
            mean(&left).abs() < 0.1 && (spread - 1.0).abs() < 0.2,
            "{} {spread}",
            mean(&left)
        );
        let judged = form.evaluate(&queries, None).unwrap();
        let maps = form.maps(&judged, Some(&query_places)).unwrap();
        for map in maps.into_iter().flatten() {
            let others = map.iter().enumerate().filter(|(place, _)| *place != 6);
            let highest = others.map(|(_, z)| *z).fold(f32::MIN, f32::max);
            assert!(map[6] > highest && map[6] > 4.0, "{map:?}");
        }
        let restored = ClosedForm::from_state(form.state()).unwrap();
        assert_eq!(
            restored.maps(&judged, Some(&query_places)).unwrap(),
            form.maps(&judged, Some(&query_places)).unwrap()
        );
        // Not without the places.
        assert_eq!(form.maps(&judged, None).unwrap(), vec![None; 4]);
        assert!(form.maps(&judged[..2], Some(&query_places)).is_err());
        assert!(
            form.remember_objects(&query_places, &[0; 3], None, &mut rng)
                .is_err()
        );
    }
}

#[test]
fn between_the_gates_maps_are_added_on_one_scale() {
    let mut rng = Rng::seed(9);
    let normal = images(30, 1, 1);
    let mut config = EvidenceConfig::default();
    // A quarter of the way to the whole weight.
    let alike = ClosedForm::fit(&normal, None, &config)
        .unwrap()
        .summary()
        .alike;
    config.patches.alike_from = alike - config.patches.alike_over / 4.0;
    let mut form = ClosedForm::fit(&normal, None, &config).unwrap();
    assert!((form.patch_share() - 0.25).abs() < 1e-9);
    let mut tokens = || {
        let block = Array3::from_shape_simple_fn((30, 9, 5), || standard_normal(&mut rng) as f32);
        PatchTokens::new(vec![block]).unwrap()
    };
    assert_eq!(form.patch_images().len(), 30);
    let broken = form.remember(&tokens(), &mut Rng::seed(1)).unwrap();
    let objects = form
        .remember_objects(
            &tokens(),
            &form.groups().of.clone(),
            None,
            &mut Rng::seed(1),
        )
        .unwrap();
    let alone = |objects: &Vec<f32>, broken: &Vec<f32>| form.map_of(Some(objects), Some(broken));
    let zeros = vec![0.0; 9];
    for (object, broken) in objects.iter().zip(&broken) {
        let (both, only) = (
            alone(object, broken).unwrap(),
            alone(&zeros, broken).unwrap(),
        );
        for ((both, only), object) in both.iter().zip(&only).zip(object) {
            assert!((both - only - 0.75 * object).abs() < 1e-5);
        }
    }
    assert_eq!(form.map_of(None, Some(&broken[0])), None);
    assert_eq!(form.map_of(Some(&objects[0]), None), None);
}
