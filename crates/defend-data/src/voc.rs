//! PASCAL VOC: several objects an image.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

use image::RgbImage;
use rayon::prelude::*;
use roxmltree::{Document, Node, ParsingOptions};

use crate::published::{
    expect_images, is_inside, read_bytes, read_published, read_published_at_least,
};
use crate::{ClassId, Dataset, Error, ObjectBox, dataset::sample};

/// The classes of PASCAL VOC since 2007; the position is the [`ClassId`].
pub const VOC_CLASSES: [&str; 20] = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
];

const MISSING: &str = "download the train/val archive of PASCAL VOC (VOCtrainval_11-May-2012.tar, or \
    VOCtrainval_06-Nov-2007.tar) from the challenge's own page and unpack it, so that the folder VOCdevkit/VOC2012 \
    (or VOC2007) which you open holds ImageSets, Annotations, JPEGImages and SegmentationClass";

const LAYOUT: &str = "expected the layout of PASCAL VOC below the folder that is opened: ImageSets/Main/<split>.txt, \
    Annotations/<name>.xml and JPEGImages/<name>.jpg (VOC itself unpacks to VOCdevkit/VOC2012 or VOC2007)";

/// What helps where a file is missing: where it is VOC itself, what to download.
fn help(root: &Path) -> &'static str {
    let name = root.file_name().unwrap_or_default().to_string_lossy();
    if name.starts_with("VOC") {
        MISSING
    } else {
        LAYOUT
    }
}

/// Whether objects that VOC marks as difficult to recognise count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Difficult {
    /// They count: they are in the image.
    #[default]
    Counted,
    /// They are passed over, as in VOC's own evaluation.
    Ignored,
}

/// One split of PASCAL VOC with the classes of all annotated objects.
#[derive(Debug, Clone)]
pub struct Voc {
    samples: Vec<Sample>,
    class_names: Vec<String>,
    help: &'static str,
}

#[derive(Debug, Clone)]
struct Sample {
    image: PathBuf,
    objects: Objects,
}

/// What is in an image.
#[derive(Debug, Clone, Default)]
struct Objects {
    classes: Vec<ClassId>,
    boxes: Vec<ObjectBox>,
}

impl Voc {
    /// Reads the split `ImageSets/Main/<split>.txt` and its annotations under `root`, usually
    /// `VOCdevkit/VOC2012`.
    ///
    /// # Errors
    /// [`Error::Missing`] with what to download, or with the layout where the folder is not VOC's own; [`Error::Read`];
    /// [`Error::Xml`] and [`Error::Annotation`] with the file at fault; [`Error::NoImages`] for an empty split;
    /// [`Error::MissingImages`] when some of its images are not there.
    pub fn open(root: impl AsRef<Path>, split: &str, difficult: Difficult) -> Result<Self, Error> {
        let root = root.as_ref();
        Self::listed(root, "Main", split, |id| {
            let annotation = root.join("Annotations").join(format!("{id}.xml"));
            objects_in(
                &text_in(read_bytes(&annotation, help(root))?),
                &annotation,
                difficult,
            )
        })
    }

    /// Reads the split `ImageSets/Segmentation/<split>.txt`; a class is present where
    /// `SegmentationClass/<id>.png` has a pixel of its colour. All masks are read here, in parallel.
    ///
    /// # Errors
    /// [`Error::Missing`] with what to download; those of [`crate::read_image`] for a mask;
    /// [`Error::Content`] for a colour that is no class's; [`Error::NoImages`] for an empty split.
    pub fn open_segmentation(root: impl AsRef<Path>, split: &str) -> Result<Self, Error> {
        let root = root.as_ref();
        Self::listed(root, "Segmentation", split, |id| {
            let path = root.join("SegmentationClass").join(format!("{id}.png"));
            Ok(Objects {
                classes: classes_of_mask(&read_published(&path, help(root))?, &path)?,
                boxes: Vec::new(),
            })
        })
    }

    /// The images of an image set, with what `objects` finds for each id.
    fn listed(
        root: &Path,
        kind: &str,
        split: &str,
        objects: impl Fn(&str) -> Result<Objects, Error> + Sync,
    ) -> Result<Self, Error> {
        let list = root
            .join("ImageSets")
            .join(kind)
            .join(format!("{split}.txt"));
        let text = text_in(read_bytes(&list, help(root))?);
        // The class lists of VOC ("dog_train.txt") have a second column.
        let ids: Vec<&str> = text
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        if let Some(outside) = ids.iter().find(|id| !is_inside(Path::new(id))) {
            return Err(Error::Content {
                path: list,
                found: format!("the name {outside:?}"),
                expected: "names of images in JPEGImages".into(),
            });
        }
        let sample = |id: &&str| {
            let image = root.join("JPEGImages").join(format!("{id}.jpg"));
            Ok(Sample {
                image,
                objects: objects(id)?,
            })
        };
        let samples = ids
            .par_iter()
            .map(sample)
            .collect::<Result<Vec<_>, Error>>()?;
        if samples.is_empty() {
            return Err(Error::NoImages {
                path: list,
                expected: "one image name a line",
            });
        }
        expect_images(&list, samples.iter().map(|sample| sample.image.as_path()))?;
        Ok(Self {
            samples,
            class_names: VOC_CLASSES.map(String::from).to_vec(),
            help: help(root),
        })
    }
}

impl Dataset for Voc {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        self.samples
            .get(index)
            .map_or(Cow::Borrowed(""), |s| s.image.to_string_lossy())
    }

    fn image(&self, index: usize) -> Result<RgbImage, Error> {
        read_published(&sample(&self.samples, index)?.image, self.help)
    }

    fn image_at_least(&self, index: usize, least: [u32; 2]) -> Result<RgbImage, Error> {
        read_published_at_least(&sample(&self.samples, index)?.image, least, self.help)
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        self.samples.get(index).map_or(&[], |s| &s.objects.classes)
    }

    fn boxes(&self, index: usize) -> &[ObjectBox] {
        self.samples.get(index).map_or(&[], |s| &s.objects.boxes)
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }
}

/// The text in a file, without a byte order mark. What is not UTF-8 is Latin-1, as old programs write it.
fn text_in(bytes: Vec<u8>) -> String {
    let text = String::from_utf8(bytes)
        .unwrap_or_else(|error| error.into_bytes().into_iter().map(char::from).collect());
    match text.strip_prefix('\u{feff}') {
        Some(text) => text.to_owned(),
        None => text,
    }
}

/// The objects in an annotation: classes each once, ascending, and the boxes of those that have one.
fn objects_in(text: &str, path: &Path, difficult: Difficult) -> Result<Objects, Error> {
    // A document type is read over; the parser limits what entities may grow to.
    let options = ParsingOptions {
        allow_dtd: true,
        nodes_limit: 1 << 20,
        ..ParsingOptions::default()
    };
    let document = Document::parse_with_options(text, options).map_err(|source| Error::Xml {
        path: path.into(),
        source,
    })?;
    let root = document.root_element();
    if root.tag_name().name() != "annotation" {
        return Err(Error::Annotation {
            path: path.into(),
            found: format!("a root element <{}>", root.tag_name().name()),
            expected: "<annotation>",
        });
    }
    let size = child(root, "size").and_then(|size| numbers(size, ["width", "height"]));
    let mut objects = Objects::default();
    for object in root.children().filter(|node| node.has_tag_name("object")) {
        if difficult == Difficult::Ignored && text_of(object, "difficult") == Some("1") {
            continue;
        }
        // Direct children only: the parts of a person have names of their own.
        let name = text_of(object, "name").unwrap_or_default();
        let Some(class) = VOC_CLASSES.iter().position(|known| *known == name) else {
            return Err(Error::Annotation {
                path: path.into(),
                found: format!("an object named {name:?}"),
                expected: "one of the 20 classes of PASCAL VOC",
            });
        };
        let class = ClassId(class as u32);
        objects.classes.push(class);
        let corners = child(object, "bndbox")
            .and_then(|corners| numbers(corners, ["xmin", "ymin", "xmax", "ymax"]));
        if let (Some(corners), Some(size)) = (corners, size) {
            let found = ObjectBox::of_pixels(class, corners, size);
            objects.boxes.extend(found);
        }
    }
    objects.classes.sort_unstable();
    objects.classes.dedup();
    Ok(objects)
}

/// The numbers in some elements; `None` unless all are there.
fn numbers<const N: usize>(node: Node<'_, '_>, tags: [&str; N]) -> Option<[f64; N]> {
    let mut numbers = [0.0; N];
    for (number, tag) in numbers.iter_mut().zip(tags) {
        *number = text_of(node, tag)?.parse().ok()?;
    }
    Some(numbers)
}

fn child<'a, 'b>(node: Node<'a, 'b>, tag: &str) -> Option<Node<'a, 'b>> {
    node.children().find(|node| node.has_tag_name(tag))
}

/// Classes with a pixel in a segmentation of VOC's colours, ascending; background and the undecided border are none.
fn classes_of_mask(mask: &RgbImage, path: &Path) -> Result<Vec<ClassId>, Error> {
    const UNDECIDED: [u8; 3] = [224, 224, 192];
    let mut present = [false; VOC_CLASSES.len() + 1];
    let colours: HashSet<[u8; 3]> = mask.pixels().map(|pixel| pixel.0).collect();
    for colour in colours.into_iter().filter(|colour| *colour != UNDECIDED) {
        let known = (0..present.len()).find(|&i| voc_colour(i as u8) == colour);
        match known.and_then(|i| present.get_mut(i)) {
            Some(present) => *present = true,
            None => {
                return Err(Error::Content {
                    path: path.into(),
                    found: format!("pixels of the colour {colour:?}"),
                    expected: "the colours of VOC's 20 classes, its background and its border"
                        .into(),
                });
            }
        }
    }
    let classes = present.iter().skip(1).enumerate();
    Ok(classes
        .filter(|(_, present)| **present)
        .map(|(i, _)| ClassId(i as u32))
        .collect())
}

/// VOC's colour of a label: its bits, lowest first, go in turn to the highest free bits of red, green and blue.
fn voc_colour(label: u8) -> [u8; 3] {
    let mut colour = [0; 3];
    for bit in 0..8 {
        let channel: &mut u8 = &mut colour[bit % 3];
        *channel |= ((label >> bit) & 1) << (7 - bit / 3);
    }
    colour
}

fn text_of<'a>(object: Node<'a, '_>, tag: &str) -> Option<&'a str> {
    child(object, tag)?.text().map(str::trim)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::fs;

    use super::*;

    #[test]
    fn classes_from_a_segmentation() {
        // The colours that VOC's documentation names: aeroplane, bicycle, person, tvmonitor, border.
        let named = [
            (1, [128, 0, 0]),
            (2, [0, 128, 0]),
            (15, [192, 128, 128]),
            (20, [0, 64, 128]),
        ];
        for (label, colour) in named {
            assert_eq!(voc_colour(label), colour);
        }
        assert_eq!(voc_colour(255), [224, 224, 192]);
        let folder = tempfile::tempdir().unwrap();
        let sub = |name: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        };
        fs::write(sub("ImageSets/Segmentation/val.txt"), "1\n2\n").unwrap();
        let save = |name: &str, colours: &[[u8; 3]]| {
            let mask = RgbImage::from_fn(colours.len() as u32, 1, |x, _| {
                image::Rgb(colours[x as usize])
            });
            mask.save(sub(&format!("SegmentationClass/{name}.png")))
                .unwrap();
        };
        save(
            "1",
            &[
                [0; 3],
                [192, 128, 128],
                [224, 224, 192],
                [128, 0, 0],
                [128, 0, 0],
            ],
        );
        save("2", &[[0; 3]]);
        for image in ["1", "2"] {
            fs::write(sub(&format!("JPEGImages/{image}.jpg")), "").unwrap();
        }
        let open = || Voc::open_segmentation(folder.path(), "val");
        let found = open().unwrap();
        assert_eq!(found.classes(0), [ClassId(0), ClassId(14)]);
        assert!(found.classes(1).is_empty() && found.name(1).ends_with("2.jpg"));
        save("2", &[[1, 2, 3]]);
        assert!(matches!(open(), Err(Error::Content { .. })));
        fs::remove_file(sub("SegmentationClass/2.png")).unwrap();
        assert!(matches!(open(), Err(Error::Missing { .. })));
    }

    const TWO_DOGS: &str = "<annotation><size><width>200</width><height>100</height></size>
        <object><name>person</name><difficult>1</difficult><part><name>head</name></part>
            <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>
        <object><name>dog</name><difficult>0</difficult>
            <bndbox><xmin>50</xmin><ymin>20.5</ymin><xmax>250</xmax><ymax>100</ymax></bndbox></object>
        <object><name> dog </name></object></annotation>";

    fn voc(annotation: Option<&str>) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let main = root.path().join("ImageSets/Main");
        fs::create_dir_all(&main).unwrap();
        for folder in ["Annotations", "JPEGImages"] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        fs::write(root.path().join("JPEGImages/a.jpg"), "").unwrap();
        fs::write(main.join("train.txt"), "a  1\n\n").unwrap();
        fs::write(main.join("none.txt"), "\n").unwrap();
        if let Some(text) = annotation {
            fs::write(root.path().join("Annotations/a.xml"), text).unwrap();
        }
        root
    }

    #[test]
    fn objects_become_classes_once() {
        let root = voc(Some(TWO_DOGS));
        let all = Voc::open(root.path(), "train", Difficult::Counted).unwrap();
        assert_eq!(
            (all.len(), all.classes(0)),
            (1, &[ClassId(11), ClassId(14)][..])
        );
        assert_eq!(all.class("dog"), Some(ClassId(11)));
        assert!(all.name(0).ends_with("a.jpg"));
        let easy = Voc::open(root.path(), "train", Difficult::Ignored).unwrap();
        assert_eq!(easy.classes(0), [ClassId(11)]);
        // Up to the image's edge; the second dog has no box.
        let dog = ObjectBox {
            class: ClassId(11),
            left: 0.25,
            top: 0.205,
            right: 1.0,
            bottom: 1.0,
        };
        assert_eq!((easy.boxes(0), all.boxes(0).len()), (&[dog][..], 2));
        assert!(dog.contains(0.3, 0.3) && !dog.contains(0.3, 0.2));
        assert!(all.boxes(1).is_empty());
    }

    #[test]
    fn annotations_of_other_programs_are_read() {
        let typed = format!("\u{feff}<?xml version=\"1.0\"?><!DOCTYPE annotation>{TWO_DOGS}");
        let found = Voc::open(voc(Some(&typed)).path(), "train", Difficult::Counted).unwrap();
        assert_eq!(found.classes(0), [ClassId(11), ClassId(14)]);

        let root = voc(None);
        let text = TWO_DOGS.replace("<size>", "<owner>Andr\u{e9}</owner><size>");
        let latin: Vec<u8> = format!("<?xml version=\"1.0\" encoding=\"ISO-8859-1\"?>{text}")
            .chars()
            .map(|c| u8::try_from(u32::from(c)).unwrap())
            .collect();
        fs::write(root.path().join("Annotations/a.xml"), latin).unwrap();
        let found = Voc::open(root.path(), "train", Difficult::Counted).unwrap();
        assert_eq!(found.classes(0), [ClassId(11), ClassId(14)]);
    }

    #[test]
    fn entities_do_not_fill_the_memory() {
        let mut bomb = String::from("<!DOCTYPE annotation [<!ENTITY a0 \"dog\">");
        for i in 1..40 {
            let before = format!("&a{};", i - 1).repeat(10);
            let _ = write!(bomb, "<!ENTITY a{i} \"{before}\">");
        }
        bomb.push_str("]><annotation><object><name>&a39;</name></object></annotation>");
        let error = Voc::open(voc(Some(&bomb)).path(), "train", Difficult::Counted).unwrap_err();
        assert!(matches!(error, Error::Xml { .. }), "{error}");
    }

    #[test]
    fn faults_name_their_file() {
        let fails = |annotation, split| {
            Voc::open(voc(annotation).path(), split, Difficult::Counted).unwrap_err()
        };
        let missing = fails(None, "test");
        assert!(matches!(missing, Error::Missing { .. }));
        let text = missing.to_string();
        assert!(
            text.contains("test.txt") && text.contains("Annotations/<name>.xml"),
            "{text}"
        );
        assert!(
            !text.contains("download"),
            "it may be a data set of one's own: {text}"
        );
        let own = voc(None);
        let renamed = own.path().join("VOC2007");
        fs::create_dir(&renamed).unwrap();
        let missing = Voc::open(&renamed, "train", Difficult::Counted).unwrap_err();
        assert!(missing.to_string().contains("download"), "{missing}");
        fs::write(own.path().join("Annotations/a.xml"), TWO_DOGS).unwrap();
        fs::remove_file(own.path().join("JPEGImages/a.jpg")).unwrap();
        let absent = Voc::open(own.path(), "train", Difficult::Counted).unwrap_err();
        assert!(
            matches!(
                absent,
                Error::MissingImages {
                    missing: 1,
                    total: 1,
                    ..
                }
            ),
            "{absent}"
        );
        assert!(matches!(fails(None, "train"), Error::Missing { .. }));
        assert!(matches!(fails(None, "none"), Error::NoImages { .. }));
        let xml = fails(Some("<annotation><object>"), "train");
        assert!(
            matches!(xml, Error::Xml { .. }) && xml.to_string().contains("a.xml"),
            "{xml}"
        );
        assert!(matches!(
            fails(Some("<html/>"), "train"),
            Error::Annotation { .. }
        ));
        let unknown = fails(
            Some("<annotation><object><name>yeti</name></object></annotation>"),
            "train",
        );
        assert!(unknown.to_string().contains("\"yeti\""), "{unknown}");
    }
}
