//! CIFAR-10 and CIFAR-100 in their binary versions.

use std::borrow::Cow;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use image::{Rgb, RgbImage};

use crate::published::{open_file, read_text};
use crate::{ClassId, Dataset, Error, Split};

const MISSING_10: &str = "download the binary version of CIFAR-10 (cifar-10-binary.tar.gz) from the data \
    set's own page and unpack it, so that the folder cifar-10-batches-bin which you open holds \
    data_batch_1.bin to data_batch_5.bin, test_batch.bin and batches.meta.txt";

const MISSING_100: &str = "download the binary version of CIFAR-100 (cifar-100-binary.tar.gz) from the \
    data set's own page and unpack it, so that the folder cifar-100-binary which you open holds \
    train.bin, test.bin, fine_label_names.txt and coarse_label_names.txt";

/// Width and height of every image.
const SIDE: u32 = 32;
const PLANE: usize = (SIDE * SIDE) as usize;
const PIXEL_BYTES: usize = 3 * PLANE;

/// Which of the two labels of CIFAR-100 are the classes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CifarLabels {
    /// The 100 classes.
    #[default]
    Fine,
    /// The 20 superclasses.
    Coarse,
}

/// One split of CIFAR-10 or CIFAR-100; labels are held in memory, pixels are read when asked for.
#[derive(Debug, Clone)]
pub struct Cifar {
    files: Vec<Part>,
    record: Record,
    labels: Vec<ClassId>,
    class_names: Vec<String>,
    help: &'static str,
}

/// A file of records.
#[derive(Debug, Clone)]
struct Part {
    path: PathBuf,
    /// Position of its first image in the data set.
    start: usize,
}

/// What stands before the pixels of each image.
#[derive(Debug, Clone, Copy)]
struct Record {
    /// Number of label bytes.
    labels: usize,
    /// Which of them is the class.
    class: usize,
}

impl Record {
    fn bytes(self) -> usize {
        self.labels + PIXEL_BYTES
    }
}

impl Cifar {
    /// Opens a split of CIFAR-10 from the folder `cifar-10-batches-bin`.
    ///
    /// # Errors
    /// [`Error::Missing`] with what to download; [`Error::Read`]; [`Error::Content`] for a file that
    /// holds no whole records, a label out of range or another number of class names than 10.
    pub fn cifar10(folder: impl AsRef<Path>, split: Split) -> Result<Self, Error> {
        let files: &[&str] = match split {
            Split::Train => &[
                "data_batch_1.bin",
                "data_batch_2.bin",
                "data_batch_3.bin",
                "data_batch_4.bin",
                "data_batch_5.bin",
            ],
            Split::Test => &["test_batch.bin"],
        };
        let folder = folder.as_ref();
        let names = class_names(&folder.join("batches.meta.txt"), 10, MISSING_10)?;
        let record = Record {
            labels: 1,
            class: 0,
        };
        Self::open(folder, files, record, names, MISSING_10)
    }

    /// Opens a split of CIFAR-100 from the folder `cifar-100-binary`.
    ///
    /// # Errors
    /// [`Error::Missing`] with what to download; [`Error::Read`]; [`Error::Content`] for a file that
    /// holds no whole records, a label out of range or another number of class names than 100 fine
    /// or 20 coarse ones.
    pub fn cifar100(
        folder: impl AsRef<Path>,
        split: Split,
        labels: CifarLabels,
    ) -> Result<Self, Error> {
        let file = match split {
            Split::Train => "train.bin",
            Split::Test => "test.bin",
        };
        // The coarse label stands first.
        let (class, names, count) = match labels {
            CifarLabels::Coarse => (0, "coarse_label_names.txt", 20),
            CifarLabels::Fine => (1, "fine_label_names.txt", 100),
        };
        let folder = folder.as_ref();
        let names = class_names(&folder.join(names), count, MISSING_100)?;
        let record = Record { labels: 2, class };
        Self::open(folder, &[file], record, names, MISSING_100)
    }

    fn open(
        folder: &Path,
        files: &[&str],
        record: Record,
        class_names: Vec<String>,
        help: &'static str,
    ) -> Result<Self, Error> {
        let mut set = Self {
            files: Vec::new(),
            record,
            labels: Vec::new(),
            class_names,
            help,
        };
        for file in files {
            let path = folder.join(file);
            let start = set.labels.len();
            let labels = read_labels(&path, record, set.class_names.len(), help)?;
            set.labels.extend(labels);
            set.files.push(Part { path, start });
        }
        Ok(set)
    }

    /// The file that holds an image and its place there.
    fn place(&self, index: usize) -> Result<(&Path, usize), Error> {
        let len = self.labels.len();
        let after = self.files.partition_point(|part| part.start <= index);
        match after.checked_sub(1).and_then(|part| self.files.get(part)) {
            Some(part) if index < len => Ok((&part.path, index - part.start)),
            _ => Err(Error::Index { index, len }),
        }
    }
}

impl Dataset for Cifar {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        self.place(index).map_or(Cow::Borrowed(""), |(path, at)| {
            format!("{}#{at}", path.to_string_lossy()).into()
        })
    }

    fn image(&self, index: usize) -> Result<RgbImage, Error> {
        let (path, at) = self.place(index)?;
        let fault = |source| Error::Read {
            path: path.into(),
            source,
        };
        // Opened anew each time: a shared handle has one position for all threads.
        let mut file = open_file(path, self.help)?;
        let start = at as u64 * self.record.bytes() as u64 + self.record.labels as u64;
        file.seek(SeekFrom::Start(start)).map_err(fault)?;
        let mut planes = [0; PIXEL_BYTES];
        file.read_exact(&mut planes).map_err(fault)?;
        let (red, rest) = planes.split_at(PLANE);
        let (green, blue) = rest.split_at(PLANE);
        Ok(RgbImage::from_fn(SIDE, SIDE, |x, y| {
            let at = (y * SIDE + x) as usize;
            Rgb([red[at], green[at], blue[at]])
        }))
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        self.labels.get(index).map_or(&[], std::slice::from_ref)
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }
}

/// The names in a file with one a line.
fn class_names(path: &Path, count: usize, help: &'static str) -> Result<Vec<String>, Error> {
    let text = read_text(path, help)?;
    let lines = text.lines().map(str::trim).filter(|name| !name.is_empty());
    let names: Vec<_> = lines.map(String::from).collect();
    if names.len() == count {
        Ok(names)
    } else {
        Err(Error::Content {
            path: path.into(),
            found: format!("{} class names", names.len()),
            expected: format!("{count}, one a line"),
        })
    }
}

/// The classes of all records of a file.
fn read_labels(
    path: &Path,
    record: Record,
    classes: usize,
    help: &'static str,
) -> Result<Vec<ClassId>, Error> {
    let io = |source| Error::Read {
        path: path.into(),
        source,
    };
    let fault = |found: String, expected: String| Error::Content {
        path: path.into(),
        found,
        expected,
    };
    let file = open_file(path, help)?;
    let bytes = file.metadata().map_err(io)?.len();
    let record_bytes = record.bytes() as u64;
    if bytes == 0 || bytes % record_bytes != 0 {
        let expected = format!("one or more records of {record_bytes} bytes");
        return Err(fault(format!("{bytes} bytes"), expected));
    }
    let mut reader = BufReader::with_capacity(1 << 18, file);
    let mut content = vec![0; record.bytes()];
    (0..bytes / record_bytes)
        .map(|at| {
            reader.read_exact(&mut content).map_err(io)?;
            let label = content[record.class];
            if usize::from(label) < classes {
                Ok(ClassId(label.into()))
            } else {
                let found = format!("the label {label} in record {at}");
                Err(fault(found, format!("labels below {classes}")))
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rayon::prelude::*;
    use tempfile::TempDir;

    use super::*;

    /// Red counts up from `first`, green down from it, blue is `first`.
    fn record(labels: &[u8], first: u8) -> Vec<u8> {
        let mut bytes = labels.to_vec();
        bytes.extend((0..PLANE).map(|i| first.wrapping_add(i as u8)));
        bytes.extend((0..PLANE).map(|i| first.wrapping_sub(i as u8)));
        bytes.extend([first; PLANE]);
        bytes
    }

    fn names(count: usize) -> String {
        let names: Vec<String> = (0..count).map(|i| format!("class {i}\n")).collect();
        names.concat()
    }

    fn cifar10() -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("batches.meta.txt"), names(10) + "\n").unwrap();
        for batch in 1..=5 {
            let bytes = [record(&[batch], 10 * batch), record(&[0], batch)].concat();
            let name = format!("data_batch_{batch}.bin");
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        fs::write(folder.path().join("test_batch.bin"), record(&[9], 200)).unwrap();
        folder
    }

    fn cifar100() -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, bytes: Vec<u8>| fs::write(folder.path().join(name), bytes).unwrap();
        write("fine_label_names.txt", names(100).into());
        write("coarse_label_names.txt", names(20).into());
        write(
            "train.bin",
            [record(&[19, 99], 7), record(&[3, 4], 8)].concat(),
        );
        write("test.bin", record(&[1, 2], 9));
        folder
    }

    #[test]
    fn the_five_batches_are_one_set() {
        let folder = cifar10();
        let train = Cifar::cifar10(folder.path(), Split::Train).unwrap();
        assert_eq!((train.len(), train.class_names().len()), (10, 10));
        let labels: Vec<_> = (0..10).map(|i| train.classes(i)[0].0).collect();
        assert_eq!(labels, [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]);
        assert_eq!(train.class("class 9"), Some(ClassId(9)));
        assert!(
            train.name(3).ends_with("data_batch_2.bin#1"),
            "{}",
            train.name(3)
        );
        assert!(train.name(10).is_empty() && train.classes(10).is_empty());
        let error = train.image(10).unwrap_err();
        assert!(matches!(error, Error::Index { index: 10, len: 10 }));
        let test = Cifar::cifar10(folder.path(), Split::Test).unwrap();
        assert_eq!((test.len(), test.classes(0)), (1, &[ClassId(9)][..]));
    }

    #[test]
    fn planes_become_pixels_from_any_thread() {
        let folder = cifar10();
        let train = Cifar::cifar10(folder.path(), Split::Train).unwrap();
        (0..1000_usize).into_par_iter().for_each(|i| {
            let image = train.image(i % 10).unwrap();
            let batch = 1 + (i % 10 / 2) as u8;
            let first = if i % 2 == 0 { 10 * batch } else { batch };
            assert_eq!(image.dimensions(), (32, 32));
            assert_eq!(image.get_pixel(0, 0).0, [first; 3]);
            let right = [first.wrapping_add(1), first.wrapping_sub(1), first];
            assert_eq!(image.get_pixel(1, 0).0, right);
            let below = [first.wrapping_add(32), first.wrapping_sub(32), first];
            assert_eq!(image.get_pixel(0, 1).0, below);
        });
    }

    #[test]
    fn cifar100_has_two_kinds_of_labels() {
        let folder = cifar100();
        let open = |split, labels| Cifar::cifar100(folder.path(), split, labels).unwrap();
        let fine = open(Split::Train, CifarLabels::Fine);
        assert_eq!(
            (fine.classes(0), fine.classes(1)),
            (&[ClassId(99)][..], &[ClassId(4)][..])
        );
        let coarse = open(Split::Train, CifarLabels::Coarse);
        assert_eq!(
            (coarse.classes(0), coarse.class_names().len()),
            (&[ClassId(19)][..], 20)
        );
        assert_eq!(fine.image(1).unwrap().get_pixel(1, 0).0, [9, 7, 8]);
        let test = open(Split::Test, CifarLabels::default());
        assert_eq!((test.len(), test.classes(0)), (1, &[ClassId(2)][..]));
    }

    #[test]
    fn faults_name_their_file() {
        let folder = cifar10();
        let fails = |name: &str, bytes: Option<Vec<u8>>, says: &str| {
            let path = folder.path().join(name);
            let before = fs::read(&path).unwrap();
            bytes
                .map_or_else(|| fs::remove_file(&path), |bytes| fs::write(&path, bytes))
                .unwrap();
            let error = Cifar::cifar10(folder.path(), Split::Train).unwrap_err();
            fs::write(&path, before).unwrap();
            let text = error.to_string();
            assert!(text.contains(name) && text.contains(says), "{text}");
            error
        };
        let missing = fails("data_batch_5.bin", None, "cifar-10-binary.tar.gz");
        assert!(matches!(missing, Error::Missing { .. }));
        let missing = fails("batches.meta.txt", None, "download");
        assert!(matches!(missing, Error::Missing { .. }));
        for cut in [vec![], vec![0; 3072], vec![0; 3074]] {
            let says = format!("{} bytes, expected one or more records of 3073", cut.len());
            fails("data_batch_2.bin", Some(cut), &says);
        }
        fails(
            "data_batch_3.bin",
            Some([record(&[0], 0), record(&[10], 0)].concat()),
            "the label 10 in record 1, expected labels below 10",
        );
        fails(
            "batches.meta.txt",
            Some(names(9).into()),
            "9 class names, expected 10",
        );
        let set = Cifar::cifar10(folder.path(), Split::Test).unwrap();
        fs::write(folder.path().join("test_batch.bin"), [0; 100]).unwrap();
        assert!(matches!(set.image(0), Err(Error::Read { .. })));

        let folder = cifar100();
        fs::write(folder.path().join("train.bin"), record(&[20, 99], 0)).unwrap();
        let open = |labels| Cifar::cifar100(folder.path(), Split::Train, labels);
        assert!(open(CifarLabels::Fine).is_ok());
        let error = open(CifarLabels::Coarse).unwrap_err();
        assert!(error.to_string().contains("the label 20"), "{error}");
        let nowhere = folder.path().join("nowhere");
        let error = Cifar::cifar100(nowhere, Split::Test, CifarLabels::Fine).unwrap_err();
        assert!(
            error.to_string().contains("cifar-100-binary.tar.gz"),
            "{error}"
        );
    }
}
