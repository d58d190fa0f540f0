//! The idx files of MNIST and its successors.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use image::RgbImage;

use crate::{ClassId, Dataset, Error, Split};

/// The classes of Fashion-MNIST; the position is the [`ClassId`].
pub const FASHION_MNIST_CLASSES: [&str; 10] = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
];

/// The classes of MNIST, the digits; the position is the [`ClassId`].
pub const MNIST_CLASSES: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];

const MISSING_FASHION: &str = "download the four files of Fashion-MNIST ({train,t10k}-images-idx3-ubyte and \
    {train,t10k}-labels-idx1-ubyte, with or without .gz) from the data set's own page into this folder";

const MISSING_MNIST: &str = "download the four files of MNIST ({train,t10k}-images-idx3-ubyte and \
    {train,t10k}-labels-idx1-ubyte, with or without .gz) from the data set's own page into this folder";

/// Most that the pictures of one file may take: 4 GiB.
const MAX_BYTES: u64 = 1 << 32;

const GZIP: [u8; 2] = [0x1F, 0x8B];

/// Grey pictures with one label each from a pair of idx files, all held in memory.
#[derive(Debug, Clone)]
pub struct Idx {
    name: String,
    pixels: Vec<u8>,
    width: u32,
    height: u32,
    labels: Vec<ClassId>,
    class_names: Vec<String>,
}

impl Idx {
    /// Reads one split of Fashion-MNIST from the folder of its four files.
    ///
    /// # Errors
    /// [`Error::Missing`] with what to download; those of [`Self::open`].
    pub fn fashion_mnist(folder: impl AsRef<Path>, split: Split) -> Result<Self, Error> {
        let files = Files::find(folder.as_ref(), split, MISSING_FASHION)?;
        files.open(&FASHION_MNIST_CLASSES)
    }

    /// Reads one split of MNIST from the folder of its four files.
    ///
    /// # Errors
    /// [`Error::Missing`] with what to download; those of [`Self::open`].
    pub fn mnist(folder: impl AsRef<Path>, split: Split) -> Result<Self, Error> {
        Files::find(folder.as_ref(), split, MISSING_MNIST)?.open(&MNIST_CLASSES)
    }

    /// Reads a file of pictures (idx3, bytes) and the file of their labels (idx1, bytes), gzipped or
    /// not, which is told from the content.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Idx`] when a header, a length or a label is not what it should be.
    pub fn open(
        images: impl AsRef<Path>,
        labels: impl AsRef<Path>,
        class_names: Vec<String>,
    ) -> Result<Self, Error> {
        let (images, labels) = (images.as_ref(), labels.as_ref());
        let ([count, height, width], pixels) = read_idx::<3>(images)?;
        let ([label_count], label_bytes) = read_idx::<1>(labels)?;
        let fault = |path: &Path, found: String, expected: String| {
            Err(Error::Idx {
                path: path.into(),
                found,
                expected,
            })
        };
        if width == 0 || height == 0 {
            let found = format!("pictures of {width} x {height} px");
            return fault(images, found, "at least 1 x 1 px".into());
        }
        if label_count != count {
            let found = format!("{label_count} labels");
            return fault(
                labels,
                found,
                format!("{count}, as many as there are pictures"),
            );
        }
        if let Some(label) = label_bytes
            .iter()
            .find(|&&l| usize::from(l) >= class_names.len())
        {
            let expected = format!("labels below {}", class_names.len());
            return fault(labels, format!("the label {label}"), expected);
        }
        Ok(Self {
            name: images.to_string_lossy().into_owned(),
            pixels,
            width,
            height,
            labels: label_bytes.into_iter().map(|l| ClassId(l.into())).collect(),
            class_names,
        })
    }
}

impl Dataset for Idx {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        if index < self.len() {
            format!("{}#{index}", self.name).into()
        } else {
            "".into()
        }
    }

    fn image(&self, index: usize) -> Result<RgbImage, Error> {
        let size = self.width as usize * self.height as usize;
        let Some(grey) = self.pixels.chunks_exact(size).nth(index) else {
            return Err(Error::Index {
                index,
                len: self.len(),
            });
        };
        Ok(RgbImage::from_fn(self.width, self.height, |x, y| {
            image::Rgb([grey[y as usize * self.width as usize + x as usize]; 3])
        }))
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        self.labels.get(index).map_or(&[], std::slice::from_ref)
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }
}

/// The two files of one split.
struct Files {
    images: PathBuf,
    labels: PathBuf,
}

impl Files {
    /// The files under the names that MNIST gave them, with or without `.gz`.
    fn find(folder: &Path, split: Split, help: &'static str) -> Result<Self, Error> {
        let part = match split {
            Split::Train => "train",
            Split::Test => "t10k",
        };
        let find = |kind: &str| -> Result<PathBuf, Error> {
            let plain = folder.join(format!("{part}-{kind}-ubyte"));
            let zipped = folder.join(format!("{part}-{kind}-ubyte.gz"));
            if plain.is_file() {
                Ok(plain)
            } else if zipped.is_file() {
                Ok(zipped)
            } else {
                Err(Error::Missing { path: zipped, help })
            }
        };
        Ok(Self {
            images: find("images-idx3")?,
            labels: find("labels-idx1")?,
        })
    }

    fn open(&self, class_names: &[&str]) -> Result<Idx, Error> {
        let class_names = class_names.iter().map(ToString::to_string).collect();
        Idx::open(&self.images, &self.labels, class_names)
    }
}

/// Dimensions and content of an idx file of bytes with `N` dimensions.
fn read_idx<const N: usize>(path: &Path) -> Result<([u32; N], Vec<u8>), Error> {
    let io = |source| Error::Read {
        path: path.into(),
        source,
    };
    let fault = |found: String, expected: String| {
        Err(Error::Idx {
            path: path.into(),
            found,
            expected,
        })
    };
    let mut file = BufReader::new(File::open(path).map_err(io)?);
    let mut start = [0; 2];
    let zipped = file.read(&mut start).map_err(io)? == 2 && start == GZIP;
    file.rewind().map_err(io)?;
    let mut reader: Box<dyn Read> = if zipped {
        Box::new(MultiGzDecoder::new(file))
    } else {
        Box::new(file)
    };

    let mut word = || -> Result<[u8; 4], Error> {
        let mut word = [0; 4];
        reader.read_exact(&mut word).map_err(io)?;
        Ok(word)
    };
    let magic = word()?;
    if magic != [0, 0, 8, N as u8] {
        return fault(
            format!("the magic number {:#010x}", u32::from_be_bytes(magic)),
            format!("0x0000080{N}: bytes with {N} dimensions"),
        );
    }
    let mut dimensions = [0; N];
    for dimension in &mut dimensions {
        *dimension = u32::from_be_bytes(word()?);
    }
    let declared = dimensions
        .iter()
        .try_fold(1_u64, |product, &d| product.checked_mul(d.into()))
        .filter(|&bytes| bytes <= MAX_BYTES);
    let Some(declared) = declared else {
        return fault(
            format!("a header with {dimensions:?} bytes"),
            format!("at most {MAX_BYTES}"),
        );
    };
    let mut content = Vec::new();
    // One more than declared, to see whether the file goes on.
    reader
        .take(declared + 1)
        .read_to_end(&mut content)
        .map_err(io)?;
    if content.len() as u64 != declared {
        let longer = content.len() as u64 > declared;
        let found = if longer {
            "more bytes".into()
        } else {
            format!("{} bytes", content.len())
        };
        return fault(
            found,
            format!("{declared} after a header with {dimensions:?}"),
        );
    }
    Ok((dimensions, content))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const IMAGES: &[u8] = &[
        0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2, 10, 20, 30, 40,
    ];
    const LABELS: &[u8] = &[0, 0, 8, 1, 0, 0, 0, 2, 1, 0];

    fn open(images: &[u8], labels: &[u8]) -> Result<Idx, Error> {
        let folder = tempfile::tempdir().unwrap();
        let (i, l) = (folder.path().join("images"), folder.path().join("labels"));
        std::fs::write(&i, images).unwrap();
        std::fs::write(&l, labels).unwrap();
        Idx::open(i, l, vec!["a".into(), "b".into()])
    }

    fn check(found: &Idx) {
        assert_eq!(found.len(), 2);
        assert_eq!(found.image(1).unwrap().as_raw(), &[30, 30, 30, 40, 40, 40]);
        assert_eq!(found.classes(0), [ClassId(1)]);
        assert!(found.name(1).ends_with("#1") && found.name(2).is_empty());
        assert!(matches!(
            found.image(2),
            Err(Error::Index { index: 2, len: 2 })
        ));
    }

    #[test]
    fn plain_and_gzipped_files_are_one() {
        check(&open(IMAGES, LABELS).unwrap());
        let zip = |bytes: &[u8]| {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        check(&open(&zip(IMAGES), &zip(LABELS)).unwrap());
    }

    #[test]
    fn faults_name_their_file() {
        let fails = |images: &[u8], labels: &[u8], file: &str| {
            let error = open(images, labels).unwrap_err();
            assert!(error.to_string().contains(file), "{error}");
            error
        };
        assert!(matches!(fails(LABELS, LABELS, "images"), Error::Idx { .. }));
        assert!(matches!(
            fails(&IMAGES[..19], LABELS, "images"),
            Error::Idx { .. }
        ));
        assert!(matches!(
            fails(&[IMAGES, &[0]].concat(), LABELS, "images"),
            Error::Idx { .. }
        ));
        assert!(matches!(
            fails(&IMAGES[..5], LABELS, "images"),
            Error::Read { .. }
        ));
        assert!(matches!(fails(b"", LABELS, "images"), Error::Read { .. }));
        let huge = [&[0, 0, 8, 3][..], &[0xFF; 12]].concat();
        assert!(matches!(fails(&huge, LABELS, "images"), Error::Idx { .. }));
        let one = [0, 0, 8, 1, 0, 0, 0, 1, 0];
        assert!(matches!(fails(IMAGES, &one, "labels"), Error::Idx { .. }));
        let unknown = [0, 0, 8, 1, 0, 0, 0, 2, 0, 2];
        assert!(
            fails(IMAGES, &unknown, "labels")
                .to_string()
                .contains("the label 2")
        );
        let folder = tempfile::tempdir().unwrap();
        let missing = Idx::fashion_mnist(folder.path(), Split::Test).unwrap_err();
        assert!(
            missing.to_string().contains("t10k-images-idx3-ubyte.gz"),
            "{missing}"
        );
        assert!(missing.to_string().contains("Fashion-MNIST"), "{missing}");
        let missing = Idx::mnist(folder.path(), Split::Train).unwrap_err();
        assert!(missing.to_string().contains("files of MNIST"), "{missing}");
    }

    #[test]
    fn mnist_is_found_by_its_file_names() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes| std::fs::write(folder.path().join(name), bytes).unwrap();
        write("train-images-idx3-ubyte", IMAGES);
        write("train-labels-idx1-ubyte", LABELS);
        let set = Idx::mnist(folder.path(), Split::Train).unwrap();
        check(&set);
        assert_eq!(set.class("1"), Some(ClassId(1)));
        assert_eq!(set.class_names().len(), 10);
    }
}
