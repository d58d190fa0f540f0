//! Names for images by what they show, to find one image in two places.

use std::collections::HashMap;
use std::fmt;

use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Dataset, Error};

/// BLAKE3 of an image's size and pixels: equal images have equal hashes, whatever their files are called.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// A hash that was kept as bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The hash's bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// The hash of a decoded image.
pub fn content_hash(image: &RgbImage) -> ContentHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&image.width().to_le_bytes());
    hasher.update(&image.height().to_le_bytes());
    hasher.update(image.as_raw());
    ContentHash(*hasher.finalize().as_bytes())
}

/// Hashes of some images, in the order asked for, or what [`Dataset::image`] says of them; decoded in parallel, one image in
/// memory a thread.
pub fn content_hashes(set: &dyn Dataset, indices: &[usize]) -> Vec<Result<ContentHash, Error>> {
    let hash = |&index: &usize| Ok(content_hash(&set.image(index)?));
    indices.par_iter().map(hash).collect()
}

/// Equal images in two sets: positions in `train_indices` and in `test_indices`.
///
/// # Errors
/// Those of [`Dataset::image`].
pub fn leaks(
    train: &dyn Dataset,
    train_indices: &[usize],
    test: &dyn Dataset,
    test_indices: &[usize],
) -> Result<Vec<(usize, usize)>, Error> {
    let tested = content_hashes(test, test_indices).into_iter().enumerate();
    let tested = tested.map(|(at, hash)| Ok((hash?, at)));
    let tested = tested.collect::<Result<HashMap<ContentHash, usize>, Error>>()?;
    let trained = content_hashes(train, train_indices);
    let trained = trained.into_iter().collect::<Result<Vec<_>, Error>>()?;
    let pairs = trained.iter().enumerate();
    Ok(pairs
        .filter_map(|(at, hash)| Some((at, *tested.get(hash)?)))
        .collect())
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from(self.0).to_hex())
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for ContentHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ContentHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let hash = blake3::Hash::from_hex(&text)
            .map_err(|_| serde::de::Error::custom(Error::ContentHash { found: text }))?;
        Ok(Self(*hash.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;

    fn image(width: u32, height: u32, shade: u8) -> RgbImage {
        RgbImage::from_pixel(width, height, image::Rgb([shade; 3]))
    }

    #[test]
    fn equal_images_only_are_equal() {
        let hash = content_hash(&image(2, 3, 7));
        assert_eq!(hash, content_hash(&image(2, 3, 7)));
        assert_ne!(hash, content_hash(&image(3, 2, 7)));
        assert_ne!(hash, content_hash(&image(2, 3, 8)));
        let json = serde_json::to_string(&hash).unwrap();
        assert_eq!(json, format!("\"{hash}\""));
        assert_eq!(serde_json::from_str::<ContentHash>(&json).unwrap(), hash);
        let error = serde_json::from_str::<ContentHash>("\"12\"").unwrap_err();
        assert!(error.to_string().contains("64 hexadecimal"), "{error}");
    }

    #[test]
    fn leaks_are_found_under_other_names() {
        let set = |shades: &[u8]| {
            let mut set = Memory::default();
            for (i, &shade) in shades.iter().enumerate() {
                set.push(format!("{i}"), image(2, 2, shade), vec![]);
            }
            set
        };
        let (train, test) = (set(&[1, 2, 3, 4]), set(&[9, 4, 2]));
        assert_eq!(
            leaks(&train, &[3, 0, 1], &test, &[0, 1, 2]).unwrap(),
            [(0, 1), (2, 2)]
        );
        assert!(leaks(&train, &[0], &test, &[0, 1, 2]).unwrap().is_empty());
        assert!(matches!(
            leaks(&train, &[7], &test, &[]),
            Err(Error::Index { .. })
        ));
    }
}
