//! MS COCO: several objects an image, all annotations in one file.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use image::RgbImage;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::published::{
    expect_folder, expect_images, listed_image, open_file, read_published, read_published_at_least,
};
use crate::{ClassId, Dataset, Error, ObjectBox, dataset::sample};

const MISSING: &str = "download the images (train2017.zip, val2017.zip) and the annotations \
    (annotations_trainval2017.zip, or those of 2014) of MS COCO from the data set's own page and unpack \
    them, then open a file such as annotations/instances_val2017.json with its folder of images, val2017";

/// Whether regions that COCO marks as a crowd of one class count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Crowd {
    /// They count: objects of the class are in the image.
    #[default]
    Counted,
    /// They are passed over, as in COCO's own evaluation.
    Ignored,
}

/// One split of MS COCO with the classes of all annotated objects.
///
/// Images stand in the order of the file; those without annotations have no class. The classes are the
/// categories in the order of their ids, so that 1 to 90 with gaps become 0 to 79; categories of one name are one class.
#[derive(Debug, Clone)]
pub struct Coco {
    samples: Vec<Sample>,
    class_names: Vec<String>,
}

#[derive(Debug, Clone)]
struct Sample {
    image: PathBuf,
    classes: Vec<ClassId>,
    boxes: Vec<ObjectBox>,
}

impl Coco {
    /// Reads an `instances_*.json` of 2014 or 2017; `images` is the folder of its images.
    ///
    /// The file is read as a stream, in any order of its parts: of each annotation no more stays than
    /// that this category is in this image and its box, so memory does not grow with the
    /// outlines, which are most of the file's 450 MB.
    ///
    /// # Errors
    /// [`Error::Missing`] with what to download; [`Error::Read`]; [`Error::Json`] with line and column;
    /// [`Error::Content`] for an annotation of an unknown image or category and for an id that comes
    /// twice; [`Error::NoImages`] when the file lists no image; [`Error::MissingImages`] when some of them are not there.
    pub fn open(
        annotations: impl AsRef<Path>,
        images: impl AsRef<Path>,
        crowd: Crowd,
    ) -> Result<Self, Error> {
        let (path, folder) = (annotations.as_ref(), images.as_ref());
        let mut file = BufReader::with_capacity(1 << 16, open_file(path, MISSING)?);
        // A byte order mark, as Windows' editors write it.
        if file
            .fill_buf()
            .is_ok_and(|start| start.starts_with(b"\xEF\xBB\xBF"))
        {
            file.consume(3);
        }
        expect_folder(folder, MISSING)?;
        let instances: Instances = serde_json::from_reader(file).map_err(|source| {
            let path = path.into();
            if source.is_io() {
                let source = source.into();
                Error::Read { path, source }
            } else {
                Error::Json { path, source }
            }
        })?;
        if instances.images.is_empty() {
            return Err(Error::NoImages {
                path: path.into(),
                expected: "one entry for each image under \"images\"",
            });
        }
        instances.into_set(path, folder, crowd)
    }
}

impl Dataset for Coco {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        self.samples
            .get(index)
            .map_or(Cow::Borrowed(""), |s| s.image.to_string_lossy())
    }

    fn image(&self, index: usize) -> Result<RgbImage, Error> {
        read_published(&sample(&self.samples, index)?.image, MISSING)
    }

    fn image_at_least(&self, index: usize, least: [u32; 2]) -> Result<RgbImage, Error> {
        read_published_at_least(&sample(&self.samples, index)?.image, least, MISSING)
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        self.samples.get(index).map_or(&[], |s| &s.classes)
    }

    fn boxes(&self, index: usize) -> &[ObjectBox] {
        self.samples.get(index).map_or(&[], |s| &s.boxes)
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }
}

/// What is kept of the file; serde skips all other fields without storing them.
#[derive(Deserialize)]
struct Instances {
    images: Vec<Image>,
    annotations: Annotations,
    categories: Vec<Category>,
}

#[derive(Deserialize)]
struct Image {
    id: u64,
    file_name: String,
    /// Pixels; without them and the height there are no boxes.
    #[serde(default)]
    width: Option<f64>,
    #[serde(default)]
    height: Option<f64>,
}

#[derive(Deserialize)]
struct Category {
    id: u64,
    name: String,
}

#[derive(Deserialize)]
struct Annotation {
    image_id: u64,
    category_id: u64,
    #[serde(default)]
    iscrowd: Option<IsCrowd>,
    /// Left, top, width and height, pixels.
    #[serde(default)]
    bbox: Option<Vec<f64>>,
}

/// COCO has 0 and 1, other programs write true, false and null.
#[derive(Deserialize)]
#[serde(untagged)]
enum IsCrowd {
    Number(f64),
    Flag(bool),
}

impl IsCrowd {
    fn holds(&self) -> bool {
        match self {
            Self::Number(number) => *number != 0.0,
            Self::Flag(flag) => *flag,
        }
    }
}

#[derive(Default)]
struct Annotations {
    /// Which category is in which image: (image, category, whether it is a crowd), each once.
    presences: BTreeSet<(u64, u64, bool)>,
    /// The same, and where.
    boxes: Vec<(u64, u64, bool, [f64; 4])>,
}

impl<'de> Deserialize<'de> for Annotations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Fold)
    }
}

/// Takes the annotations one by one, so that a list of them never exists.
struct Fold;

impl<'de> Visitor<'de> for Fold {
    type Value = Annotations;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of annotations")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut annotations: A) -> Result<Annotations, A::Error> {
        let mut all = Annotations::default();
        while let Some(found) = annotations.next_element::<Annotation>()? {
            let is_crowd = found.iscrowd.is_some_and(|crowd| crowd.holds());
            let (image, category) = (found.image_id, found.category_id);
            all.presences.insert((image, category, is_crowd));
            if let Some(corners) = found.bbox.and_then(|corners| corners.try_into().ok()) {
                all.boxes.push((image, category, is_crowd, corners));
            }
        }
        Ok(all)
    }
}

impl Instances {
    fn into_set(self, path: &Path, folder: &Path, crowd: Crowd) -> Result<Coco, Error> {
        let fault = |found: String, expected: &str| Error::Content {
            path: path.into(),
            found,
            expected: expected.into(),
        };
        let mut categories = self.categories;
        categories.sort_by_key(|category| category.id);
        let (mut class_of, mut class_names) = (HashMap::new(), Vec::<String>::new());
        for category in categories {
            let known = class_names.iter().position(|name| *name == category.name);
            let class = known.unwrap_or(class_names.len());
            if known.is_none() {
                class_names.push(category.name);
            }
            if class_of
                .insert(category.id, ClassId(class as u32))
                .is_some()
            {
                let found = format!("two categories with the id {}", category.id);
                return Err(fault(found, "an id for each"));
            }
        }
        let mut classes_of = HashMap::new();
        for image in &self.images {
            if classes_of.insert(image.id, Vec::new()).is_some() {
                let found = format!("two images with the id {}", image.id);
                return Err(fault(found, "an id for each"));
            }
        }
        for (image, category, is_crowd) in self.annotations.presences {
            let Some(&class) = class_of.get(&category) else {
                let found = format!("an annotation of the category {category}");
                return Err(fault(found, "only those under \"categories\""));
            };
            let Some(classes) = classes_of.get_mut(&image) else {
                let found = format!("an annotation of the image {image}");
                return Err(fault(found, "only those under \"images\""));
            };
            if !is_crowd || crowd == Crowd::Counted {
                classes.push(class);
            }
        }
        for classes in classes_of.values_mut() {
            classes.sort_unstable();
            classes.dedup();
        }
        let sizes: HashMap<u64, [f64; 2]> = self
            .images
            .iter()
            .map(|image| {
                let size = [image.width, image.height].map(Option::unwrap_or_default);
                (image.id, size)
            })
            .collect();
        let mut boxes_of: HashMap<u64, Vec<ObjectBox>> = HashMap::new();
        for (image, category, is_crowd, [left, top, width, height]) in self.annotations.boxes {
            // Each has its presence, which was checked.
            if let (Some(&class), Some(&size)) = (class_of.get(&category), sizes.get(&image))
                && (!is_crowd || crowd == Crowd::Counted)
            {
                let corners = [left, top, left + width, top + height];
                let found = ObjectBox::of_pixels(class, corners, size);
                boxes_of.entry(image).or_default().extend(found);
            }
        }
        let samples = self.images.into_iter().map(|image| Sample {
            image: listed_image(folder, &image.file_name),
            classes: classes_of.remove(&image.id).unwrap_or_default(),
            boxes: boxes_of.remove(&image.id).unwrap_or_default(),
        });
        let samples: Vec<Sample> = samples.collect();
        let mut seen = HashSet::new();
        if let Some(twice) = samples.iter().find(|sample| !seen.insert(&sample.image)) {
            let found = format!("two images at {}", twice.image.display());
            return Err(fault(found, "a file for each"));
        }
        expect_images(path, samples.iter().map(|sample| sample.image.as_path()))?;
        Ok(Coco {
            samples,
            class_names,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    const IMAGES: &str = r#""images": [
        {"id": 7, "file_name": "7.png", "width": 4, "height": 2, "license": 1},
        {"id": 3, "file_name": "3.png"}, {"id": 5, "file_name": "5.png"}]"#;
    const ANNOTATIONS: &str = r#""annotations": [
        {"id": 1, "image_id": 7, "category_id": 90, "iscrowd": 0, "segmentation": [[1.5, 2], [3, 4]]},
        {"id": 2, "image_id": 7, "category_id": 2, "iscrowd": 1,
         "segmentation": {"counts": [0, 9], "size": [3, 3]}, "bbox": [0, 0, 3, 3]},
        {"id": 3, "image_id": 7, "category_id": 90, "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": 90},
        {"id": 5, "image_id": 3, "category_id": 17, "caption": "a \"cat\""}]"#;
    const CATEGORIES: &str = r#""categories": [
        {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
        {"id": 2, "name": "bicycle"}, {"id": 17, "name": "cat"}]"#;

    fn file(parts: &[&str]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let text = format!("{{\"info\": {{\"year\": [2017]}}, {}}}", parts.join(", "));
        fs::write(folder.path().join("instances.json"), text).unwrap();
        for id in [3, 5, 7] {
            let image = folder.path().join(format!("{id}.png"));
            RgbImage::new(2, 1).save(image).unwrap();
        }
        folder
    }

    fn open(folder: &TempDir, crowd: Crowd) -> Result<Coco, Error> {
        Coco::open(folder.path().join("instances.json"), folder.path(), crowd)
    }

    #[test]
    fn categories_become_classes_in_any_order_of_the_file() {
        for parts in [
            [IMAGES, ANNOTATIONS, CATEGORIES],
            [ANNOTATIONS, CATEGORIES, IMAGES],
            [CATEGORIES, IMAGES, ANNOTATIONS],
        ] {
            let folder = file(&parts);
            let set = open(&folder, Crowd::Counted).unwrap();
            assert_eq!(set.class_names(), ["bicycle", "cat", "toothbrush"]);
            assert_eq!(set.len(), 3);
            assert_eq!(set.classes(0), [ClassId(0), ClassId(2)]);
            assert_eq!(set.classes(1), [ClassId(1)]);
            assert!(set.classes(2).is_empty() && set.classes(3).is_empty());
            assert!(set.name(1).ends_with("3.png"));
            // Cut at the image's edge.
            let corners = set
                .boxes(0)
                .iter()
                .map(|b| (b.class, [b.left, b.top, b.right, b.bottom]));
            let expected = [(ClassId(0), [0.0, 0.0, 0.75, 1.0])];
            assert_eq!(corners.collect::<Vec<_>>(), expected);
            assert!(set.boxes(1).is_empty());
            let single = open(&folder, Crowd::Ignored).unwrap();
            assert_eq!(single.classes(0), [ClassId(2)]);
            assert!(single.boxes(0).is_empty());
        }
    }

    #[test]
    fn images_are_read_when_asked_for() {
        let folder = file(&[IMAGES, ANNOTATIONS, CATEGORIES]);
        let set = open(&folder, Crowd::Counted).unwrap();
        assert_eq!(set.image(0).unwrap().dimensions(), (2, 1));
        fs::remove_file(folder.path().join("7.png")).unwrap();
        let missing = set.image(0).unwrap_err();
        assert!(
            missing.to_string().contains("7.png") && missing.to_string().contains("train2017.zip"),
            "{missing}"
        );
        let absent = open(&folder, Crowd::Counted).unwrap_err().to_string();
        assert!(absent.contains("1 of the 3 images"), "{absent}");
        assert!(matches!(
            set.image(3),
            Err(Error::Index { index: 3, len: 3 })
        ));
    }

    #[test]
    fn what_other_programs_write_is_read_alike() {
        let images = r#""images": [{"id": 7, "file_name": "train\\7.png"}, {"id": 3, "file_name": "images/3.png"},
            {"id": 5, "file_name": "5.png"}]"#;
        let annotations = r#""annotations": [
            {"image_id": 7, "category_id": 4, "iscrowd": false}, {"image_id": 7, "category_id": 1, "iscrowd": null},
            {"image_id": 7, "category_id": 2, "iscrowd": true}, {"image_id": 3, "category_id": 2, "iscrowd": 0.0},
            {"image_id": 5, "category_id": 3}]"#;
        let categories = r#""categories": [{"id": 0, "name": "animals"}, {"id": 1, "name": "dog"},
            {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 4, "name": "cat"}]"#;
        let folder = file(&[images, annotations, categories]);
        let json = folder.path().join("instances.json");
        let text = fs::read_to_string(&json).unwrap();
        fs::write(&json, format!("\u{feff}{text}")).unwrap();
        let set = open(&folder, Crowd::Ignored).unwrap();
        assert_eq!(set.class_names(), ["animals", "dog", "cat"]);
        assert_eq!(set.classes(0), [ClassId(1), ClassId(2)]);
        assert_eq!(set.classes(1), [ClassId(2)]);
        assert_eq!(set.classes(2), [ClassId(1)]);
        assert!(set.name(0).ends_with("7.png") && set.image(0).is_ok());
    }

    #[test]
    fn faults_name_the_file_and_the_id() {
        let fails = |parts: &[&str], says: &str| {
            let error = open(&file(parts), Crowd::Ignored).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains("instances.json") && text.contains(says),
                "{text}"
            );
            error
        };
        let annotation = |text: &str| format!("\"annotations\": [{text}]");
        let stray = annotation(r#"{"image_id": 8, "category_id": 2, "iscrowd": 1}"#);
        let error = fails(
            &[IMAGES, CATEGORIES, &stray],
            "an annotation of the image 8",
        );
        assert!(matches!(error, Error::Content { .. }));
        let stray = annotation(r#"{"image_id": 7, "category_id": 12}"#);
        fails(&[&stray, IMAGES, CATEGORIES], "the category 12");
        let twice = r#""images": [{"id": 7, "file_name": "a"}, {"id": 7, "file_name": "b"}]"#;
        fails(
            &[twice, ANNOTATIONS, CATEGORIES],
            "two images with the id 7",
        );
        let twice = r#""categories": [{"id": 2, "name": "a"}, {"id": 2, "name": "b"}]"#;
        fails(
            &[IMAGES, ANNOTATIONS, twice],
            "two categories with the id 2",
        );
        let none = fails(&[r#""images": []"#, &annotation(""), CATEGORIES], "image");
        assert!(matches!(none, Error::NoImages { .. }));
        let json = fails(&[IMAGES, CATEGORIES], "missing field `annotations`");
        assert!(matches!(json, Error::Json { .. }));
        let bad = annotation(r#"{"image_id": "seven"}"#);
        fails(&[IMAGES, CATEGORIES, &bad], "line 5 column");
        fails(&[IMAGES, ANNOTATIONS, "\"categories\": ["], "column");
        fails(&["\"annotations\": 3"], "a list of annotations");
    }

    #[test]
    fn missing_parts_say_what_to_download() {
        let folder = file(&[IMAGES, ANNOTATIONS, CATEGORIES]);
        let json = folder.path().join("instances.json");
        let nowhere = folder.path().join("nowhere");
        for (json, images) in [(&nowhere, folder.path()), (&json, &nowhere)] {
            let error = Coco::open(json, images, Crowd::Counted).unwrap_err();
            assert!(matches!(error, Error::Missing { .. }));
            assert!(
                error.to_string().contains("nowhere")
                    && error.to_string().contains("annotations_trainval2017.zip"),
                "{error}"
            );
        }
    }
}
