//! The images of a whole experiment.

use std::path::Path;

use defend_data::{ClassId, Dataset, Memory, ObjectBox, write_png};
use defend_random::Rng;
use rand::RngExt;
use rand::seq::SliceRandom;
use rayon::prelude::*;

use crate::{Error, Object, Placed, Scene, render};

/// What to render.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SceneConfig {
    /// The object that makes an image normal.
    pub normal: Object,
    /// Side of the images, pixels.
    pub size: u32,
    /// Fewest objects in an image.
    pub fewest: usize,
    /// Most objects in an image, at most 8.
    pub most: usize,
    /// How many other objects may stand beside the normal one; which, the seed decides. The rest never
    /// appears in a normal image, and every abnormal image shows one of them.
    pub familiar: usize,
    /// Normal images to learn from.
    pub train: usize,
    /// Normal images to calibrate on.
    pub calibration: usize,
    /// Test images, half of them normal.
    pub test: usize,
    /// Seed of everything.
    pub seed: u64,
}

impl Default for SceneConfig {
    fn default() -> Self {
        Self {
            normal: Object::Boat,
            size: 224,
            fewest: 2,
            most: 4,
            familiar: 4,
            train: 240,
            calibration: 100,
            test: 200,
            seed: 0,
        }
    }
}

/// Rendered images, split as an experiment wants them; classes are the objects' names.
#[derive(Debug, Clone)]
pub struct SceneSet {
    /// Normal images to learn from.
    pub train: Memory,
    /// Normal images to calibrate on.
    pub calibration: Memory,
    /// Test images that show the normal object.
    pub test_normal: Memory,
    /// Test images that do not.
    pub test_abnormal: Memory,
}

impl SceneSet {
    /// Renders all images; each depends on the seed, its split and its number only.
    ///
    /// # Errors
    /// [`Error::Config`] for a size outside `32..=4096` or a range of objects outside `1..=8`.
    pub fn render(config: &SceneConfig) -> Result<Self, Error> {
        if config.fewest == 0 || config.most < config.fewest || config.most > 8 {
            return Err(Error::Config {
                field: "fewest..=most",
                value: format!("{}..={}", config.fewest, config.most),
                expected: "a range within 1..=8".into(),
            });
        }
        if config.familiar + 1 < config.most || config.familiar + 2 > Object::ALL.len() {
            return Err(Error::Config {
                field: "familiar",
                value: config.familiar.to_string(),
                expected: format!(
                    "a number in {}..={}: enough for a full image, and one object left over",
                    config.most - 1,
                    Object::ALL.len() - 2
                ),
            });
        }
        let others = Others::choose(config);
        let split = |name: &str, number: u64, count: usize, shows: bool| -> Result<Memory, Error> {
            let render_one = |i: usize| -> Result<Scene, Error> {
                let mut rng = Rng::stream(config.seed, number << 32 | i as u64);
                let objects = others.image(config, shows, &mut rng);
                render(&objects, config.size, &mut rng)
            };
            let scenes: Result<Vec<Scene>, Error> =
                (0..count).into_par_iter().map(render_one).collect();
            let mut memory = Memory::new(Object::ALL.iter().map(|o| o.name().to_owned()).collect());
            for (i, scene) in scenes?.into_iter().enumerate() {
                let boxes = scene
                    .objects
                    .iter()
                    .map(|placed| object_box(placed, config.size));
                let name = format!("{name}/{i:04}.png");
                memory.push_with_boxes(name, scene.image, boxes.collect());
            }
            Ok(memory)
        };
        Ok(Self {
            train: split("train", 0, config.train, true)?,
            calibration: split("calibration", 1, config.calibration, true)?,
            test_normal: split("test/normal", 2, config.test.div_ceil(2), true)?,
            test_abnormal: split("test/abnormal", 3, config.test / 2, false)?,
        })
    }

    /// Writes all images under `folder`: `train/`, `calibration/`, `test/normal/`, `test/abnormal/`.
    ///
    /// # Errors
    /// [`Error::Folder`] and [`Error::Write`], naming the path.
    pub fn save(&self, folder: &Path) -> Result<(), Error> {
        for memory in [
            &self.train,
            &self.calibration,
            &self.test_normal,
            &self.test_abnormal,
        ] {
            for i in 0..memory.len() {
                let path = folder.join(memory.name(i).as_ref());
                if let Some(parent) = path.parent() {
                    let parent = parent.to_owned();
                    std::fs::create_dir_all(&parent).map_err(|source| Error::Folder {
                        path: parent,
                        source,
                    })?;
                }
                if let Ok(image) = memory.image(i) {
                    write_png(&path, image).map_err(|source| Error::Write { path, source })?;
                }
            }
        }
        Ok(())
    }
}

/// The square that an object is drawn in.
fn object_box(placed: &Placed, size: u32) -> ObjectBox {
    let share = |at: f32| (at / size as f32).clamp(0.0, 1.0);
    let [x, y] = placed.centre;
    ObjectBox {
        class: class_of(placed.object),
        left: share(x - placed.radius),
        top: share(y - placed.radius),
        right: share(x + placed.radius),
        bottom: share(y + placed.radius),
    }
}

fn class_of(object: Object) -> ClassId {
    let position = Object::ALL.iter().position(|&o| o == object);
    ClassId(position.map_or(u32::MAX, |p| p as u32))
}

/// The objects that are not the normal one.
struct Others {
    familiar: Vec<Object>,
    novel: Vec<Object>,
}

/// Splits have smaller numbers.
const OTHERS_STREAM: u64 = u64::MAX;

impl Others {
    fn choose(config: &SceneConfig) -> Self {
        let others = Object::ALL.into_iter().filter(|&o| o != config.normal);
        let mut familiar: Vec<Object> = others.collect();
        familiar.shuffle(&mut Rng::stream(config.seed, OTHERS_STREAM));
        let novel = familiar.split_off(config.familiar.min(familiar.len()));
        Self { familiar, novel }
    }

    /// Different objects in random order: the normal one and familiar ones, or a novel one and any but
    /// the normal one.
    fn image(&self, config: &SceneConfig, shows: bool, rng: &mut Rng) -> Vec<Object> {
        let (mut beside, mut novel) = (self.familiar.clone(), self.novel.clone());
        novel.shuffle(rng);
        let first = if shows { None } else { novel.pop() }.unwrap_or(config.normal);
        if !shows {
            beside.extend(novel);
        }
        beside.shuffle(rng);
        let count = rng.random_range(config.fewest..=config.most);
        beside.truncate(count - 1);
        beside.push(first);
        beside.shuffle(rng);
        beside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> SceneConfig {
        SceneConfig {
            train: 6,
            calibration: 2,
            test: 8,
            size: 96,
            ..SceneConfig::default()
        }
    }

    #[test]
    fn normal_images_show_the_object_and_abnormal_ones_do_not() {
        let set = SceneSet::render(&small()).unwrap();
        let normal = class_of(small().normal);
        for i in 0..4 {
            assert!(set.test_normal.classes(i).contains(&normal));
            assert!(!set.test_abnormal.classes(i).contains(&normal));
            assert!(set.test_abnormal.classes(i).len() >= small().fewest);
        }
    }

    #[test]
    fn every_object_lies_in_its_box() {
        let set = SceneSet::render(&small()).unwrap();
        for i in 0..set.test_abnormal.len() {
            let boxes = set.test_abnormal.boxes(i);
            let classes: Vec<ClassId> = boxes.iter().map(|found| found.class).collect();
            assert!(
                set.test_abnormal
                    .classes(i)
                    .iter()
                    .all(|c| classes.contains(c))
            );
            for found in boxes {
                let (width, height) = (found.right - found.left, found.bottom - found.top);
                assert!(width > 0.1 && width < 0.5 && (width - height).abs() < 1e-5);
            }
        }
        // A single object against the same background without it: what differs lies in the box.
        let render = |objects: &[Object]| render(objects, 128, &mut Rng::seed(5)).unwrap();
        for object in Object::ALL {
            let scene = render(&[object]);
            let mut place = object_box(&scene.objects[0], 128);
            // Tips may reach a pixel and a half beyond.
            let margin = 1.5 / 128.0;
            place.left -= margin;
            place.top -= margin;
            place.right += margin;
            place.bottom += margin;
            let bare = render(&[]);
            for (x, y, pixel) in scene.image.enumerate_pixels() {
                let (fx, fy) = ((x as f32 + 0.5) / 128.0, (y as f32 + 0.5) / 128.0);
                let other = bare.image.get_pixel(x, y);
                let far = pixel.0.iter().zip(other.0).any(|(a, b)| a.abs_diff(b) > 24);
                assert!(!far || place.contains(fx, fy), "{object:?} at {x} {y}");
            }
        }
    }

    #[test]
    fn abnormal_images_show_what_no_normal_one_does() {
        let set = SceneSet::render(&SceneConfig {
            train: 60,
            size: 32,
            ..small()
        })
        .unwrap();
        let mut seen: Vec<ClassId> = (0..60)
            .flat_map(|i| set.train.classes(i).to_vec())
            .collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 1 + small().familiar);
        for i in 0..4 {
            let novel = |class: &ClassId| !seen.contains(class);
            assert!(set.test_abnormal.classes(i).iter().any(novel));
            assert!(!set.test_normal.classes(i).iter().any(novel));
        }
    }

    #[test]
    fn the_seed_decides_every_pixel() {
        let (a, b) = (
            SceneSet::render(&small()).unwrap(),
            SceneSet::render(&small()).unwrap(),
        );
        let other = SceneSet::render(&SceneConfig { seed: 1, ..small() }).unwrap();
        for i in 0..6 {
            assert_eq!(a.train.image(i).unwrap(), b.train.image(i).unwrap());
            assert_ne!(a.train.image(i).unwrap(), other.train.image(i).unwrap());
        }
    }

    #[test]
    fn images_are_saved_where_the_command_looks_for_them() {
        let folder = tempfile::tempdir().unwrap();
        SceneSet::render(&small())
            .unwrap()
            .save(folder.path())
            .unwrap();
        let count = |sub: &str| std::fs::read_dir(folder.path().join(sub)).unwrap().count();
        assert_eq!(
            (count("train"), count("test/normal"), count("test/abnormal")),
            (6, 4, 4)
        );
    }

    #[test]
    fn senseless_settings_are_refused() {
        for wrong in [
            SceneConfig {
                fewest: 0,
                ..small()
            },
            SceneConfig { most: 9, ..small() },
            SceneConfig { size: 8, ..small() },
            SceneConfig {
                familiar: 9,
                ..small()
            },
            SceneConfig {
                familiar: 2,
                ..small()
            },
        ] {
            assert!(matches!(
                SceneSet::render(&wrong),
                Err(Error::Config { .. })
            ));
        }
    }
}
