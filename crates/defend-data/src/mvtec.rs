//! MVTec AD: industrial images with the masks of their defects.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use image::{GrayImage, RgbImage};

use crate::dataset::sample;
use crate::decode::{find_mask, mask_of};
use crate::published::{expect_folder, read_published, read_published_at_least};
use crate::{ClassFolder, ClassId, Dataset, Error, Split};

const MISSING: &str = "download MVTec AD (mvtec_anomaly_detection.tar.xz, or one category of it) from its authors' \
    page and open a category's folder such as mvtec/screw, which holds train, test and ground_truth";

/// Name of the class without a defect.
const GOOD: &str = "good";

/// One split of a category: the class `good` first, then its defects by name.
#[derive(Debug, Clone)]
pub struct MvtecAd {
    samples: Vec<Sample>,
    class_names: Vec<String>,
}

#[derive(Debug, Clone)]
struct Sample {
    image: PathBuf,
    class: [ClassId; 1],
    /// Where the mask belongs, for images with a defect.
    mask: Option<PathBuf>,
}

impl MvtecAd {
    /// Reads `train/good` or `test/*` of a category's folder.
    ///
    /// # Errors
    /// [`Error::Missing`] with what to download; those of [`ClassFolder::open`]; [`Error::Content`] when there is no
    /// folder of good images.
    pub fn open(category: impl AsRef<Path>, split: Split) -> Result<Self, Error> {
        let category = category.as_ref();
        let folder = category.join(match split {
            Split::Train => "train",
            Split::Test => "test",
        });
        expect_folder(&folder, MISSING)?;
        let found = ClassFolder::open(&folder)?;
        let mut class_names = found.class_names().to_vec();
        let Some(good) = found.class(GOOD) else {
            return Err(Error::Content {
                path: folder,
                found: format!("the folders {class_names:?}"),
                expected: format!("one called {GOOD:?}"),
            });
        };
        // Good comes first and the defects stay in their order.
        class_names.remove(good.0 as usize);
        class_names.insert(0, GOOD.into());
        let renumbered = |class: ClassId| match class.0 {
            number if number == good.0 => ClassId(0),
            number if number < good.0 => ClassId(number + 1),
            number => ClassId(number),
        };
        let samples = (0..found.len())
            .map(|index| {
                let class = found
                    .classes(index)
                    .first()
                    .copied()
                    .map_or(ClassId(0), renumbered);
                let image = PathBuf::from(found.name(index).as_ref());
                let stem = image.file_stem().unwrap_or_default().to_string_lossy();
                let defect = class_names.get(class.0 as usize).filter(|_| class.0 > 0);
                let mask = defect.map(|defect| {
                    let folder = category.join("ground_truth").join(defect);
                    // A mask that is not there is missed when it is asked for.
                    find_mask(&folder, &stem)
                        .unwrap_or_else(|| folder.join(format!("{stem}_mask.png")))
                });
                Sample {
                    class: [class],
                    mask,
                    image,
                }
            })
            .collect();
        Ok(Self {
            samples,
            class_names,
        })
    }
}

impl Dataset for MvtecAd {
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
        self.samples.get(index).map_or(&[], |s| &s.class)
    }

    fn mask(&self, index: usize) -> Result<Option<GrayImage>, Error> {
        let found = sample(&self.samples, index)?;
        let Some(path) = &found.mask else {
            return Ok(None);
        };
        let mask = read_published(path, MISSING)?;
        Ok(Some(mask_of(&found.image, path, &mask)?))
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn category(mask_side: u32) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let save = |path: &str, side: u32, value: u8| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            RgbImage::from_pixel(side, side, image::Rgb([value; 3]))
                .save(path)
                .unwrap();
        };
        save("train/good/000.png", 4, 1);
        save("test/bent/000.png", 4, 2);
        save("test/good/000.png", 4, 3);
        save("test/scratch/000.png", 4, 4);
        save("test/dent/000.png", 4, 5);
        save("test/dent/001.png", 4, 6);
        save("ground_truth/bent/000_mask.png", mask_side, 255);
        save("ground_truth/dent/000.png", 4, 255);
        save("ground_truth/dent/001_mask.BMP", 4, 0);
        folder
    }

    #[test]
    fn good_comes_first_and_defects_have_masks() {
        let folder = category(4);
        let train = MvtecAd::open(folder.path(), Split::Train).unwrap();
        assert_eq!((train.len(), train.classes(0)), (1, &[ClassId(0)][..]));
        let test = MvtecAd::open(folder.path(), Split::Test).unwrap();
        assert_eq!(test.class_names(), ["good", "bent", "dent", "scratch"]);
        let classes: Vec<u32> = (0..5).map(|i| test.classes(i)[0].0).collect();
        assert_eq!(classes, [1, 2, 2, 0, 3]);
        for (image, value) in [(0, 255), (1, 255), (2, 0)] {
            let mask = test.mask(image).unwrap().unwrap();
            assert_eq!(mask.get_pixel(3, 3).0, [value]);
        }
        assert!(test.mask(3).unwrap().is_none());
        let error = test.mask(4).unwrap_err();
        assert!(matches!(error, Error::Missing { .. }), "{error}");
        assert!(error.to_string().contains("000_mask.png"), "{error}");
        assert!(matches!(test.mask(5), Err(Error::Index { .. })));
    }

    #[test]
    fn faults_are_named() {
        let folder = category(5);
        let test = MvtecAd::open(folder.path(), Split::Test).unwrap();
        assert!(matches!(
            test.mask(0),
            Err(Error::MaskSize {
                width: 5,
                image_width: 4,
                ..
            })
        ));
        std::fs::remove_dir_all(folder.path().join("test/good")).unwrap();
        let error = MvtecAd::open(folder.path(), Split::Test).unwrap_err();
        assert!(matches!(error, Error::Content { .. }), "{error}");
        let error = MvtecAd::open(folder.path().join("nut"), Split::Test).unwrap_err();
        assert!(error.to_string().contains("download"), "{error}");
    }
}
