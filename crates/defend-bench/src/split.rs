//! Which images train and which test: seeded, free of leaks, written down.

use std::collections::{BTreeMap, HashMap, HashSet};

use defend_core::data::{ClassId, ContentHash, Dataset, content_hashes};
use defend_core::nn::Rng;
use rand::RngExt;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::data::Halves;
use crate::protocol::Experiment;
use crate::{Error, Subset};

/// The images of an experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Split {
    /// Training images, all normal, by position in the training half.
    pub train: Vec<usize>,
    /// Test images by position in the test half.
    pub test: Vec<usize>,
    /// Whether each test image is abnormal.
    pub abnormal: Vec<bool>,
    /// Training images left out since the same image is in the test half.
    pub leaks: Vec<usize>,
    /// Training images left out since they cannot be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<usize>,
    /// Short hash of the images' pixels and labels, wherever their files are: other images, another part or another
    /// protocol is another split.
    pub fingerprint: String,
}

fn fingerprint<'a>(
    train: impl Iterator<Item = &'a ContentHash>,
    test: &[ContentHash],
    abnormal: &[bool],
) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut count = 0u64;
    for hash in train {
        hasher.update(hash.as_bytes());
        count += 1;
    }
    hasher.update(&count.to_le_bytes());
    for (hash, &abnormal) in test.iter().zip(abnormal) {
        hasher.update(hash.as_bytes());
        hasher.update(&[abnormal.into()]);
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// Makes splits of one data set; hashes each image once.
pub(crate) struct Splitter<'a> {
    data: &'a str,
    halves: &'a Halves,
    subset: Subset,
    test: Vec<usize>,
    test_hashes: Vec<ContentHash>,
    tested: HashSet<ContentHash>,
    /// `None` for what cannot be read.
    trained: HashMap<usize, Option<ContentHash>>,
}

impl<'a> Splitter<'a> {
    /// `left_out` hears of each image that cannot be read.
    pub(crate) fn new(
        data: &'a str,
        halves: &'a Halves,
        subset: Subset,
        left_out: &mut dyn FnMut(&Error),
    ) -> Self {
        let all: Vec<usize> = (0..halves.test.len()).collect();
        let drawn = sample(&*halves.test, all, subset.test, subset.seed);
        let (mut test, mut test_hashes) = (Vec::new(), Vec::new());
        for (index, hash) in hashes(data, &*halves.test, &drawn, left_out) {
            if let Some(hash) = hash {
                test.push(index);
                test_hashes.push(hash);
            }
        }
        Self {
            data,
            halves,
            subset,
            test,
            tested: test_hashes.iter().copied().collect(),
            test_hashes,
            trained: HashMap::new(),
        }
    }

    /// The test images, the same in every experiment.
    pub(crate) fn test(&self) -> &[usize] {
        &self.test
    }

    /// The split of an experiment for one of the benchmark's seeds; `left_out` hears of each image that cannot be read, once.
    pub(crate) fn split(
        &mut self,
        experiment: &Experiment,
        seed: u64,
        left_out: &mut dyn FnMut(&Error),
    ) -> Result<Split, Error> {
        let set = &*self.halves.train;
        let normal = experiment.protocol.train(set);
        let seed = self.subset.train_seed(seed);
        let chosen = sample(set, normal, self.subset.train, seed);
        let unknown: Vec<usize> = chosen
            .iter()
            .copied()
            .filter(|i| !self.trained.contains_key(i))
            .collect();
        self.trained
            .extend(hashes(self.data, set, &unknown, left_out));
        let (mut train, mut leaks, mut unreadable) = (Vec::new(), Vec::new(), Vec::new());
        for index in chosen {
            match self.trained.get(&index).copied().flatten() {
                Some(hash) if self.tested.contains(&hash) => leaks.push(index),
                Some(_) => train.push(index),
                None => unreadable.push(index),
            }
        }
        let abnormal = experiment.labels(&*self.halves.test, &self.test);
        let novel = abnormal.iter().filter(|a| **a).count();
        if train.is_empty() || novel == 0 || novel == abnormal.len() {
            return Err(Error::EmptySplit {
                experiment: experiment.name.clone(),
                train: train.len(),
                leaks: leaks.len(),
                normal: abnormal.len() - novel,
                abnormal: novel,
            });
        }
        let hash = |index| self.trained.get(index)?.as_ref();
        let hashes = train.iter().filter_map(hash);
        Ok(Split {
            fingerprint: fingerprint(hashes, &self.test_hashes, &abnormal),
            train,
            test: self.test.clone(),
            abnormal,
            leaks,
            unreadable,
        })
    }
}

/// The hash of each image, `None` for what cannot be read, of which `left_out` hears.
fn hashes(
    data: &str,
    set: &dyn Dataset,
    indices: &[usize],
    left_out: &mut dyn FnMut(&Error),
) -> Vec<(usize, Option<ContentHash>)> {
    let found = indices.iter().copied().zip(content_hashes(set, indices));
    found
        .map(|(index, hash)| match hash {
            Ok(hash) => (index, Some(hash)),
            Err(source) => {
                left_out(&Error::Image {
                    data: data.into(),
                    name: set.name(index).into_owned(),
                    source: Box::new(source),
                });
                (index, None)
            }
        })
        .collect()
}

/// At most `count` of `indices`, ascending, in the proportions of the images' classes.
fn sample(set: &dyn Dataset, indices: Vec<usize>, count: Option<usize>, seed: u64) -> Vec<usize> {
    let Some(count) = count.filter(|count| *count < indices.len()) else {
        return indices;
    };
    let mut groups: BTreeMap<&[ClassId], Vec<usize>> = BTreeMap::new();
    for &index in &indices {
        groups.entry(set.classes(index)).or_default().push(index);
    }
    let mut rng = Rng::seed(seed);
    let mut rare = Rng::stream(seed, 1);
    let mut ranked = Vec::with_capacity(indices.len());
    for group in groups.values_mut() {
        group.shuffle(&mut rng);
        let size = group.len() as f64;
        // A combination of classes too rare for one whole image is drawn by chance: without that, one that comes once
        // would be in the middle of the order, always or never drawn.
        let start = if size * (count as f64) < indices.len() as f64 {
            rare.random::<f64>()
        } else {
            0.5
        };
        // The k-th of a group comes at its share of the group: any first part of the order has the groups' proportions.
        let at = |(k, &index): (usize, &usize)| ((k as f64 + start) / size, index);
        ranked.extend(group.iter().enumerate().map(at));
    }
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut chosen: Vec<usize> = ranked
        .into_iter()
        .take(count)
        .map(|(_, index)| index)
        .collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests may panic")]

    use std::sync::Arc;

    use defend_core::data::{Memory, MultiObject, RgbImage};

    use super::*;

    fn set(classes: &[u32], first_shade: u8) -> Arc<dyn Dataset> {
        let mut set = Memory::new(vec!["a".into(), "b".into(), "c".into()]);
        for (i, &class) in classes.iter().enumerate() {
            let image = RgbImage::from_pixel(2, 2, image::Rgb([first_shade + i as u8; 3]));
            set.push(format!("{i}"), image, vec![ClassId(class)]);
        }
        Arc::new(set)
    }

    fn experiment(class: u32) -> Experiment {
        Experiment {
            name: "a".into(),
            classes: vec!["a".into()],
            protocol: Box::new(MultiObject {
                normal: vec![ClassId(class)],
            }),
        }
    }

    #[test]
    fn a_part_keeps_the_proportions() {
        let classes: Vec<u32> = (0..100)
            .map(|i| u32::from(i % 10 >= 6) + u32::from(i % 10 == 9))
            .collect();
        let set = set(&classes, 0);
        let all: Vec<usize> = (0..100).collect();
        let chosen = sample(&*set, all.clone(), Some(20), 1);
        let count = |class: u32| chosen.iter().filter(|&&i| classes[i] == class).count();
        assert_eq!([count(0), count(1), count(2)], [12, 6, 2]);
        assert!(chosen.is_sorted());
        assert_eq!(chosen, sample(&*set, all.clone(), Some(20), 1));
        assert_ne!(chosen, sample(&*set, all.clone(), Some(20), 2));
        assert_eq!(sample(&*set, all.clone(), Some(500), 1), all);
    }

    #[test]
    fn what_comes_once_is_drawn_as_often_as_the_rest() {
        // 160 images of one class and forty combinations that come once: a quarter of each is asked for.
        let mut set = Memory::new((0..40).map(|i| format!("{i}")).collect());
        for i in 0..200 {
            let classes = if i < 160 {
                vec![ClassId(0)]
            } else {
                vec![ClassId(0), ClassId(i - 160 + 1)]
            };
            set.push(format!("{i}"), RgbImage::new(1, 1), classes);
        }
        let rare = |seed| {
            let chosen = sample(&set, (0..200).collect(), Some(50), seed);
            assert_eq!(chosen.len(), 50);
            chosen.into_iter().filter(|i| *i >= 160).count()
        };
        let found: usize = (0..40).map(rare).sum();
        assert!(
            (340..460).contains(&found),
            "{found} of 1600, expected about 400"
        );
    }

    fn none(error: &Error) {
        panic!("{error}");
    }

    #[test]
    fn what_is_tested_does_not_train() {
        // Training shades 0 to 5, test shades 3 to 6: training images 3, 4 and 5 are in both.
        let halves = Halves {
            train: set(&[0, 1, 0, 0, 0, 1], 0),
            test: set(&[0, 0, 1, 1], 3),
        };
        let mut splitter = Splitter::new("set", &halves, Subset::default(), &mut none);
        let split = splitter.split(&experiment(0), 0, &mut none).unwrap();
        assert_eq!((split.train, split.leaks), (vec![0, 2], vec![3, 4]));
        assert_eq!(split.abnormal, [false, false, true, true]);

        // The same images elsewhere are the same split; one other image or label is another.
        let fingerprint = |train: &[u32], shade, test: &[u32]| {
            let halves = Halves {
                train: set(train, shade),
                test: set(test, 3),
            };
            let mut splitter = Splitter::new("set", &halves, Subset::default(), &mut none);
            splitter
                .split(&experiment(0), 0, &mut none)
                .unwrap()
                .fingerprint
        };
        let same = fingerprint(&[0, 1, 0], 0, &[0, 0, 1, 1]);
        assert_eq!(split.fingerprint, same);
        assert_ne!(
            split.fingerprint,
            fingerprint(&[0, 1, 0], 100, &[0, 0, 1, 1])
        );
        assert_ne!(split.fingerprint, fingerprint(&[0, 1, 0], 0, &[0, 1, 1, 1]));
        assert!(matches!(
            splitter.split(&experiment(2), 0, &mut none),
            Err(Error::EmptySplit {
                train: 0,
                leaks: 0,
                normal: 0,
                abnormal: 4,
                ..
            })
        ));
    }
}
