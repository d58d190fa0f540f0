//! Every stage against PyTorch in f64 (`tools/golden_evidence.py`).
#![allow(clippy::unwrap_used, clippy::cast_lossless, reason = "tests may panic")]

use arrays::Set;
use defend_evidence::{
    ClosedForm, Contrast, CoreSet, Embeddings, Error, EvidenceConfig, ExactPosterior, Groups,
    KnownFaults, ObjectMemory, PatchMemory, PatchTokens, StateArray, kernel_width, leaders,
    nearest_leaders, similarity, unlike_normals,
};
use ndarray::{Array2, Array3, Axis};

/// How golden tensors become arrays.
mod arrays {
    use defend_testing::Golden;
    use ndarray::{Array2, Array3};

    pub(crate) struct Set {
        golden: Golden,
        name: &'static str,
    }

    impl Set {
        pub(crate) fn read(name: &'static str) -> Self {
            let golden = Golden::read(env!("CARGO_MANIFEST_DIR"), "evidence");
            Self { golden, name }
        }

        fn tensor(&self, key: &str) -> candle_core::Tensor {
            self.golden.get(&format!("{}.{key}", self.name))
        }

        pub(crate) fn numbers(&self, key: &str) -> Vec<f64> {
            self.tensor(key).flatten_all().unwrap().to_vec1().unwrap()
        }

        pub(crate) fn indices(&self, key: &str) -> Vec<usize> {
            let values: Vec<u32> = self.tensor(key).to_vec1().unwrap();
            values.into_iter().map(|i| i as usize).collect()
        }

        pub(crate) fn matrix(&self, key: &str) -> Array2<f32> {
            let tensor = self.tensor(key);
            Array2::from_shape_vec(
                tensor.dims2().unwrap(),
                tensor.flatten_all().unwrap().to_vec1().unwrap(),
            )
            .unwrap()
        }

        pub(crate) fn cube(&self, key: &str) -> Array3<f32> {
            let tensor = self.tensor(key);
            Array3::from_shape_vec(
                tensor.dims3().unwrap(),
                tensor.flatten_all().unwrap().to_vec1().unwrap(),
            )
            .unwrap()
        }
    }
}

const SETS: [&str; 2] = ["varied", "alike"];

fn embeddings(set: &Set, name: &str) -> Embeddings {
    Embeddings::new((0..3).map(|i| set.matrix(&format!("{name}.{i}"))).collect()).unwrap()
}

fn tokens(set: &Set, name: &str) -> PatchTokens {
    let blocks: Vec<Array3<f32>> = (0..2)
        .map(|i| set.cube(&format!("patches.{name}.{i}")))
        .collect();
    PatchTokens::new(blocks).unwrap()
}

fn close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let scale = expected.abs().max(1.0);
        assert!(
            (found - expected).abs() <= tolerance * scale,
            "{what} {i}: {found}, expected {expected}"
        );
    }
}

/// Groups by leader's row, whatever their numbers.
fn led_by(groups: &Groups) -> Vec<usize> {
    groups.of.iter().map(|&g| groups.leaders[g]).collect()
}

#[test]
fn groups_width_and_similarity() {
    for name in SETS {
        let set = Set::read(name);
        let x = embeddings(&set, "train").phi(1.5);
        let groups = leaders(x.view(), 0.2);
        assert_eq!(groups.leaders, set.indices("leaders"), "{name}");
        assert_eq!(groups.of, set.indices("groups"), "{name}");
        assert!(groups.len() < x.nrows(), "copies share groups");
        let numbers = set.numbers("numbers");
        let nearest = nearest_leaders(x.view(), &groups, 5);
        close(
            &[kernel_width(&nearest, 1.5).unwrap()],
            &numbers[..1],
            1e-9,
            "width",
        );
        let plain = embeddings(&set, "train").features(3);
        let nearest = nearest_leaders(plain.view(), &groups, 5);
        close(&[similarity(&nearest)], &numbers[2..3], 1e-9, "similarity");
    }
}

#[test]
fn posterior_and_left_out_values() {
    for name in SETS {
        let set = Set::read(name);
        let x = embeddings(&set, "train").phi(1.5);
        let groups = leaders(x.view(), 0.2);
        let posterior = ExactPosterior::fit(x, &groups, set.numbers("numbers")[0], 0.1).unwrap();
        let left_out = posterior.left_out(&groups, 0.1).unwrap().unwrap();
        close(
            &left_out,
            &set.numbers("posterior.left_out"),
            1e-6,
            "left-out log variances",
        );
        for (images, expected) in [("test", "posterior"), ("ordinary", "posterior.ordinary")] {
            let judged = posterior.evaluate(embeddings(&set, images).phi(1.5).view());
            let found: Vec<f64> = judged.iter().map(|e| e.log_variance).collect();
            close(&found, &set.numbers(expected), 1e-6, expected);
            for explained in judged {
                let total: f64 = explained.shares.iter().map(|(_, share)| share).sum();
                assert!(total <= 1.0 + 1e-12 && explained.shares.is_sorted_by(|a, b| a.1 >= b.1));
            }
        }
    }
}

#[test]
fn contrast_and_left_out_values() {
    for name in SETS {
        let set = Set::read(name);
        let train = embeddings(&set, "train");
        let groups = leaders(train.phi(1.5).view(), 0.2);
        let (x, b) = (train.features(2), embeddings(&set, "ordinary").features(2));
        let kept = unlike_normals(x.view(), b.view(), 0.1);
        assert_eq!(kept.len(), 270);
        let b = b.select(ndarray::Axis(0), &kept);
        let (contrast, left_out) =
            Contrast::fit(x.view(), &groups, b.view(), None, 1.0, 1.0).unwrap();
        close(
            &left_out.normal,
            &set.numbers("contrast.left_out"),
            1e-6,
            "left-out contrast",
        );
        let found = contrast.evaluate(embeddings(&set, "test").features(2).view());
        close(&found, &set.numbers("contrast"), 1e-6, "contrast");
    }
}

#[test]
fn patch_distances_from_the_same_core_set() {
    for name in SETS {
        let set = Set::read(name);
        let groups = set.indices("groups");
        let memory = memory(&set, &groups);
        let left_out = memory
            .distances(&tokens(&set, "train"), Some(&groups))
            .unwrap();
        let found: Vec<f64> = left_out.iter().map(|d| d.log_worst).collect();
        close(
            &found,
            &set.numbers("worst.left_out"),
            1e-6,
            "left-out patches",
        );
        let distances = memory.distances(&tokens(&set, "test"), None).unwrap();
        let found: Vec<f64> = distances.iter().map(|d| d.log_worst).collect();
        close(&found, &set.numbers("worst"), 1e-6, "patches");
    }
}

/// The golden core sets; `groups` of the training images.
fn memory(set: &Set, groups: &[usize]) -> PatchMemory {
    let core = |i: usize| -> CoreSet {
        let patches: Array2<f32> = set.matrix(&format!("core.{i}"));
        let images = set.indices(&format!("core.{i}.images"));
        CoreSet {
            patches,
            groups: images.into_iter().map(|image| groups[image]).collect(),
        }
    };
    PatchMemory::new(vec![core(0), core(1)], 5)
}

#[test]
fn gates_and_sum() {
    for name in SETS {
        let set = Set::read(name);
        let train = embeddings(&set, "train");
        let config = EvidenceConfig::default();
        let mut form =
            ClosedForm::fit(&train, Some(&embeddings(&set, "ordinary")), &config).unwrap();
        let numbers = set.numbers("numbers");
        let (summary, close) = (*form.summary(), |found, i: usize, what| {
            close(&[found], &numbers[i..=i], 1e-9, what);
        });
        close(
            summary.accepted,
            1,
            "share of ordinary images taken for normal",
        );
        close(summary.alike, 2, "similarity");
        close(form.contrast_weight(), 3, "weight of the contrast");
        close(form.patch_weight(), 4, "weight of the patches");

        // The form has the images in an order of its own.
        let place = |image: usize| form.kept().iter().position(|i| *i == image).unwrap();
        let led: Vec<usize> = led_by(form.groups())
            .into_iter()
            .map(|row| form.kept()[row])
            .collect();
        let expected = set.indices("leaders");
        for (row, &image) in form.kept().iter().enumerate() {
            assert_eq!(led[row], expected[set.indices("groups")[image]]);
        }
        let of_image: Vec<usize> = (0..train.len())
            .map(|image| form.groups().of[place(image)])
            .collect();
        let patches = tokens(&set, "train");
        if form.patch_weight() > 0.0 {
            let memory = memory(&set, &of_image);
            let wanted: Vec<usize> = form
                .patch_images()
                .into_iter()
                .map(|row| form.kept()[row])
                .collect();
            assert_eq!(wanted.len(), train.len());
            let blocks = patches
                .blocks()
                .iter()
                .map(|block| block.select(ndarray::Axis(0), &wanted));
            form.remember_these(&PatchTokens::new(blocks.collect()).unwrap(), memory)
                .unwrap();
        }
        let (test, patches) = (embeddings(&set, "test"), tokens(&set, "test"));
        let patches = (form.patch_weight() > 0.0).then_some(&patches);
        let found: Vec<f64> = form
            .evaluate(&test, patches)
            .unwrap()
            .iter()
            .map(|j| j.score)
            .collect();
        self::close(&found, &set.numbers("sum"), 1e-6, "sum");
        let all = set.numbers("sum.left_out");
        let mut expected: Vec<f64> = set
            .indices("leaders")
            .into_iter()
            .map(|image| all[image])
            .collect();
        let mut found = form.left_out().to_vec();
        expected.sort_by(f64::total_cmp);
        found.sort_by(f64::total_cmp);
        self::close(&found, &expected, 1e-6, "left-out sums");
    }
}

#[test]
fn known_abnormal_images_and_a_folder_scored_together() {
    for name in SETS {
        let set = Set::read(name);
        let (train, ordinary) = (embeddings(&set, "train"), embeddings(&set, "ordinary"));
        let mut form =
            ClosedForm::fit(&train, Some(&ordinary), &EvidenceConfig::default()).unwrap();
        let folder = embeddings(&set, "folder");
        let scores = set.numbers("folder.scores");
        let alone: Vec<f64> = (form.evaluate(&folder, None).unwrap().iter())
            .map(|j| j.score)
            .collect();
        close(&alone, &scores, 1e-6, "scores one by one");
        let together = form.together(&folder, &scores, None).unwrap();
        close(
            &together.p_values,
            &set.numbers("together.p"),
            1e-12,
            "p-values",
        );
        let found = [1.0 - together.abnormal.estimate, together.weight];
        close(
            &found,
            &set.numbers("together.numbers"),
            1e-9,
            "share and weight",
        );
        close(&together.scores, &set.numbers("together"), 1e-6, "together");
        let forced = form.together(&folder, &scores, Some(0.3)).unwrap();
        close(
            &forced.scores,
            &set.numbers("together.forced"),
            1e-6,
            "expected share",
        );

        let before = form.left_out().to_vec();
        form.learn_abnormal(&embeddings(&set, "abnormal")).unwrap();
        let judged = form.evaluate(&embeddings(&set, "test"), None).unwrap();
        let known: Vec<f64> = judged
            .iter()
            .map(|j| j.known.unwrap())
            .map(|k| k.weight * k.z)
            .collect();
        close(&known, &set.numbers("known"), 1e-6, "known");
        let mut expected: Vec<f64> = set
            .indices("leaders")
            .into_iter()
            .map(|image| set.numbers("known.left_out")[image])
            .collect();
        let mut found: Vec<f64> = form
            .left_out()
            .iter()
            .zip(&before)
            .map(|(a, b)| a - b)
            .collect();
        expected.sort_by(f64::total_cmp);
        found.sort_by(f64::total_cmp);
        close(&found, &expected, 1e-6, "left-out known");
        assert!(expected.last().unwrap() > &0.0);
    }
}

#[test]
fn maps_of_objects() {
    for name in SETS {
        let set = Set::read(name);
        let images = set.indices("core.0.images");
        let groups: Vec<usize> = images.iter().map(|&i| set.indices("groups")[i]).collect();
        let own = groups[0];
        let normal = CoreSet {
            patches: set.matrix("core.0"),
            groups,
        };
        let places = normal.patches.clone();
        let ordinary = set.matrix("objects.ordinary");
        let memory = ObjectMemory::new(normal, Some(ordinary), 6.0);
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
        let tokens = set.cube("patches.test.0");
        let image = tokens.index_axis(Axis(0), 5);
        for (weight, key) in [
            (0.0, "objects.0.0"),
            (0.5, "objects.0.5"),
            (1.0, "objects.1.0"),
        ] {
            let found = wide(memory.values(image, weight, None));
            close(&found, &set.numbers(key), 1e-5, key);
        }
        let found = wide(memory.values(places.view(), 1.0, Some(own)));
        close(
            &found,
            &set.numbers("objects.left_out"),
            1e-5,
            "left-out places",
        );
    }
}

#[test]
fn known_faults() {
    let set = Set::read("alike");
    let train = embeddings(&set, "train");
    let config = EvidenceConfig::default();
    let mut form = ClosedForm::fit(&train, Some(&embeddings(&set, "ordinary")), &config).unwrap();
    let place = |image: usize| form.kept().iter().position(|i| *i == image).unwrap();
    let of_image: Vec<usize> = (0..train.len())
        .map(|image| form.groups().of[place(image)])
        .collect();
    let images = form.patch_images();
    let wanted: Vec<usize> = images.iter().map(|row| form.kept()[*row]).collect();
    let patches = tokens(&set, "train").select(&wanted);
    form.remember_these(&patches, memory(&set, &of_image))
        .unwrap();
    let faulty = tokens(&set, "faulty");
    let marked = [
        Some(vec![2, 3]),
        None,
        Some(vec![7]),
        Some(Vec::new()),
        Some(vec![0, 1, 9]),
    ];
    let faults = KnownFaults {
        tokens: &faulty,
        marked: &marked,
    };
    let before = form.clone();
    form.learn_faults(&patches, faults).unwrap();
    let memory = form.memory().unwrap();
    let values = |tokens: &PatchTokens, left_out: Option<&[usize]>| -> Vec<f64> {
        let distances = memory.distances(tokens, left_out).unwrap();
        distances.iter().map(|d| d.log_worst).collect()
    };
    close(
        &values(&tokens(&set, "test"), None),
        &set.numbers("faults"),
        1e-5,
        "patches with faults",
    );
    close(
        &values(&tokens(&set, "train"), Some(&of_image)),
        &set.numbers("faults.left_out"),
        1e-5,
        "left-out patches with faults",
    );

    // A restored form judges the same, and faults that are learnt twice are the same as once.
    let test = embeddings(&set, "test");
    let judge = |form: &ClosedForm| -> Vec<f64> {
        let judged = form.evaluate(&test, Some(&tokens(&set, "test"))).unwrap();
        judged.iter().map(|j| j.score).collect()
    };
    let restored = ClosedForm::from_state(form.state()).unwrap();
    assert_eq!(judge(&restored), judge(&form));
    assert_eq!(restored.left_out(), form.left_out());
    let mut again = form.clone();
    again.learn_faults(&patches, faults).unwrap();
    assert_eq!(judge(&again), judge(&form));
    assert_ne!(judge(&before), judge(&form));

    let mut state = form.state();
    let array = state.arrays.get_mut("patches.1.fault").unwrap();
    *array = StateArray::Numbers(vec![0.0; 3]);
    assert!(ClosedForm::from_state(state).is_err());
    let none = KnownFaults {
        tokens: &faulty,
        marked: &marked[..4],
    };
    assert!(matches!(
        again.learn_faults(&patches, none),
        Err(Error::Shape { .. })
    ));
    assert_eq!(judge(&again), judge(&form), "nothing changed");
}
