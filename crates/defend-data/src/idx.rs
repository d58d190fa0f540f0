//! The idx files of MNIST and its successors.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::read::MultiGzDecoder;
use image::RgbImage;
use tempfile::{NamedTempFile, TempPath};

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

/// Most that the images of one file may take: 4 GiB.
const MAX_BYTES: u64 = 1 << 32;

const GZIP: [u8; 2] = [0x1F, 0x8B];

/// Grey images with one label each from a pair of idx files, read one by one when they are asked for; those of a gzipped
/// file from an unzipped temporary one.
#[derive(Debug, Clone)]
pub struct Idx {
    name: String,
    pixels: Pixels,
    width: u32,
    height: u32,
    labels: Vec<ClassId>,
    class_names: Vec<String>,
}

/// Where the images' bytes lie one after the other.
#[derive(Debug, Clone)]
enum Pixels {
    /// The data set's own file, behind its header.
    Own { path: PathBuf, start: u64 },
    /// A file that goes when the last clone does.
    Unzipped(Arc<TempPath>),
}

impl Pixels {
    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Error> {
        let (path, start) = match self {
            Self::Own { path, start } => (path.as_path(), *start),
            Self::Unzipped(path) => (&***path, 0),
        };
        // Opened anew each time: a shared handle has one position for all threads.
        let mut read = || {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(start + at))?;
            file.read_exact(into)
        };
        read().map_err(|source| Error::Read {
            path: path.into(),
            source,
        })
    }
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

    /// Reads a file of images (idx3, bytes) and the file of their labels (idx1, bytes), gzipped or
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
        let opened = Opened::<3>::open(images)?;
        let [count, height, width] = opened.dimensions;
        let pixels = opened.place()?;
        let labelled = Opened::<1>::open(labels)?;
        let [label_count] = labelled.dimensions;
        let label_bytes = labelled.read()?;
        let fault = |path: &Path, found: String, expected: String| {
            Err(Error::Idx {
                path: path.into(),
                found,
                expected,
            })
        };
        if width == 0 || height == 0 {
            let found = format!("images of {width} x {height} px");
            return fault(images, found, "at least 1 x 1 px".into());
        }
        if label_count != count {
            let found = format!("{label_count} labels");
            return fault(
                labels,
                found,
                format!("{count}, as many as there are images"),
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
        if index >= self.len() {
            return Err(Error::Index {
                index,
                len: self.len(),
            });
        }
        let mut grey = vec![0; self.width as usize * self.height as usize];
        self.pixels
            .read(index as u64 * grey.len() as u64, &mut grey)?;
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

/// An idx file of bytes with `N` dimensions, read up to its content.
struct Opened<'a, const N: usize> {
    path: &'a Path,
    dimensions: [u32; N],
    /// Bytes of content that the header promises.
    declared: u64,
    content: Content,
}

enum Content {
    Plain(BufReader<File>),
    Zipped(Box<MultiGzDecoder<BufReader<File>>>),
}

impl Read for Content {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Plain(file) => file.read(into),
            Self::Zipped(decoder) => decoder.read(into),
        }
    }
}

impl<'a, const N: usize> Opened<'a, N> {
    fn open(path: &'a Path) -> Result<Self, Error> {
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
        let mut content = if zipped {
            Content::Zipped(Box::new(MultiGzDecoder::new(file)))
        } else {
            Content::Plain(file)
        };
        let mut word = || -> Result<[u8; 4], Error> {
            let mut word = [0; 4];
            content.read_exact(&mut word).map_err(io)?;
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
        Ok(Self {
            path,
            dimensions,
            declared,
            content,
        })
    }

    fn io(&self, source: std::io::Error) -> Error {
        Error::Read {
            path: self.path.into(),
            source,
        }
    }

    /// Whether there are as many bytes as the header promises.
    fn check(&self, found: u64) -> Result<(), Error> {
        if found == self.declared {
            return Ok(());
        }
        let found = if found > self.declared {
            "more bytes".into()
        } else {
            format!("{found} bytes")
        };
        let (declared, dimensions) = (self.declared, self.dimensions);
        Err(Error::Idx {
            path: self.path.into(),
            found,
            expected: format!("{declared} after a header with {dimensions:?}"),
        })
    }

    /// The content in memory.
    fn read(mut self) -> Result<Vec<u8>, Error> {
        let mut content = Vec::new();
        // One more than declared, to see whether the file goes on.
        let mut rest = (&mut self.content).take(self.declared + 1);
        let found = rest.read_to_end(&mut content);
        let found = found.map_err(|e| self.io(e))?;
        self.check(found as u64)?;
        Ok(content)
    }

    /// The content in a file, which it is copied to when this one is gzipped.
    fn place(mut self) -> Result<Pixels, Error> {
        if let Content::Plain(file) = &self.content {
            let bytes = file.get_ref().metadata().map_err(|e| self.io(e))?.len();
            let start = 4 + 4 * N as u64;
            self.check(bytes.saturating_sub(start))?;
            let path = self.path.into();
            return Ok(Pixels::Own { path, start });
        }
        let copy = |content: &mut dyn Read, declared| {
            let mut file = NamedTempFile::new()?;
            let found = std::io::copy(&mut content.take(declared + 1), &mut file)?;
            Ok((file, found))
        };
        let copied = copy(&mut self.content, self.declared);
        let (file, found) = copied.map_err(|e| self.io(e))?;
        self.check(found)?;
        Ok(Pixels::Unzipped(Arc::new(file.into_temp_path())))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const IMAGES: &[u8] = &[
        0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2, 10, 20, 30, 40,
    ];
    const LABELS: &[u8] = &[0, 0, 8, 1, 0, 0, 0, 2, 1, 0];

    fn open(images: &[u8], labels: &[u8]) -> Result<(Idx, tempfile::TempDir), Error> {
        let folder = tempfile::tempdir().unwrap();
        let (i, l) = (folder.path().join("images"), folder.path().join("labels"));
        std::fs::write(&i, images).unwrap();
        std::fs::write(&l, labels).unwrap();
        Ok((Idx::open(i, l, vec!["a".into(), "b".into()])?, folder))
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
        let (plain, folder) = open(IMAGES, LABELS).unwrap();
        check(&plain);
        drop(folder);
        assert!(matches!(plain.image(0), Err(Error::Read { .. })));
        let zip = |bytes: &[u8]| {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let (unzipped, folder) = open(&zip(IMAGES), &zip(LABELS)).unwrap();
        drop(folder);
        check(&unzipped);
        let Pixels::Unzipped(path) = &unzipped.pixels else {
            unreachable!("the file was gzipped")
        };
        let path = path.to_path_buf();
        assert!(path.is_file());
        drop(unzipped);
        assert!(!path.exists(), "the temporary file stays behind");
        let cut = zip(&IMAGES[..19]);
        assert!(matches!(open(&cut, LABELS), Err(Error::Idx { .. })));
    }

    #[test]
    fn faults_name_their_file() {
        let fails = |images: &[u8], labels: &[u8], file: &str| {
            let error = open(images, labels).map(|_| ()).unwrap_err();
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
