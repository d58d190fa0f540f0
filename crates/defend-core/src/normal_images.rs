//! What a model holds of its normal images beside their features: names, hashes, and small copies where these were asked for.

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::io::Cursor;

use defend_data::{ContentHash, RgbImage};
use image::DynamicImage;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::FilterType;

/// Longest side of a small copy, pixels.
pub(crate) const THUMBNAIL_SIDE: u32 = 128;
/// Quality of a small copy.
const QUALITY: u8 = 80;
/// Bytes of a hash.
const HASH: usize = 32;

/// A normal image.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NormalImage {
    /// In the data set of the fit.
    pub(crate) name: String,
    /// Of the image as the network sees it; models of earlier versions and fits on features have none.
    pub(crate) hash: Option<ContentHash>,
    /// A JPEG.
    pub(crate) thumbnail: Option<Vec<u8>>,
}

/// A small copy of an image as a JPEG; none where it cannot be made.
pub(crate) fn thumbnail(image: &RgbImage) -> Option<Vec<u8>> {
    let small = if image.width().max(image.height()) > THUMBNAIL_SIDE {
        let image = DynamicImage::ImageRgb8(image.clone());
        image
            .resize(THUMBNAIL_SIDE, THUMBNAIL_SIDE, FilterType::Triangle)
            .into_rgb8()
    } else {
        image.clone()
    };
    let mut bytes = Cursor::new(Vec::new());
    small
        .write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, QUALITY))
        .ok()?;
    Some(bytes.into_inner())
}

/// Which images a detector was fitted on.
#[derive(Debug, Default)]
pub(crate) struct FittedOn(HashSet<ContentHash>);

impl FittedOn {
    pub(crate) fn new<'a>(
        kept: impl Iterator<Item = &'a NormalImage>,
        others: &[ContentHash],
    ) -> Self {
        let kept = kept.filter_map(|image| image.hash);
        Self(kept.chain(others.iter().copied()).collect())
    }

    pub(crate) fn contains(&self, image: &ContentHash) -> bool {
        self.0.contains(image)
    }
}

/// Arrays of bytes, by their names in a model file.
pub(crate) type Bytes = BTreeMap<&'static str, Vec<u8>>;

/// Hashes of the kept images, zeros where there is none.
const HASHES: &str = "hashes";
/// Hashes of the others that were fitted on.
const OTHERS: &str = "others";
/// Small copies of the kept images, one behind the other.
const THUMBNAILS: &str = "thumbnails";
/// Length of each, four bytes.
const LENGTHS: &str = "thumbnail_lengths";

/// What goes into a model file beside the names.
pub(crate) fn to_bytes(kept: &[NormalImage], others: &[ContentHash]) -> Bytes {
    let mut bytes = Bytes::new();
    let mut add = |name, content: Vec<u8>| {
        if !content.is_empty() {
            bytes.insert(name, content);
        }
    };
    if kept.iter().any(|image| image.hash.is_some()) {
        let hashes = kept
            .iter()
            .flat_map(|image| image.hash.map_or([0; HASH], |hash| *hash.as_bytes()));
        add(HASHES, hashes.collect());
    }
    add(
        OTHERS,
        others.iter().flat_map(|hash| *hash.as_bytes()).collect(),
    );
    if kept.iter().any(|image| image.thumbnail.is_some()) {
        let copy = |image: &NormalImage| image.thumbnail.clone().unwrap_or_default();
        add(THUMBNAILS, kept.iter().flat_map(copy).collect());
        let length = |image: &NormalImage| (copy(image).len() as u32).to_le_bytes();
        add(LENGTHS, kept.iter().flat_map(length).collect());
    }
    bytes
}

/// The kept images of these names, and the hashes of the others.
///
/// # Errors
/// What does not fit the names.
pub(crate) fn from_bytes(
    names: Vec<String>,
    bytes: &BTreeMap<String, Vec<u8>>,
) -> Result<(Vec<NormalImage>, Vec<ContentHash>), String> {
    let unknown = |name: &&String| ![HASHES, OTHERS, THUMBNAILS, LENGTHS].contains(&name.as_str());
    if let Some(name) = bytes.keys().find(unknown) {
        return Err(format!("its normal images have an unknown part \"{name}\""));
    }
    let hashes = |name: &str| -> Result<Vec<ContentHash>, String> {
        let all = bytes
            .get(name)
            .map_or(&[][..], Vec::as_slice)
            .as_chunks::<HASH>();
        if !all.1.is_empty() {
            return Err(format!("\"{name}\" of its normal images is cut short"));
        }
        Ok(all
            .0
            .iter()
            .map(|hash| ContentHash::from_bytes(*hash))
            .collect())
    };
    let (kept, others) = (hashes(HASHES)?, hashes(OTHERS)?);
    let lengths = bytes
        .get(LENGTHS)
        .map_or(&[][..], Vec::as_slice)
        .as_chunks::<4>()
        .0;
    for (what, found) in [(HASHES, kept.len()), (LENGTHS, lengths.len())] {
        if found != 0 && found != names.len() {
            return Err(format!(
                "\"{what}\" of its normal images has {found} entries, expected {}",
                names.len()
            ));
        }
    }
    let mut copies = bytes.get(THUMBNAILS).map_or(&[][..], Vec::as_slice);
    let mut images = Vec::with_capacity(names.len());
    for (i, name) in names.into_iter().enumerate() {
        let length = lengths
            .get(i)
            .map_or(0, |length| u32::from_le_bytes(*length) as usize);
        let Some((copy, rest)) = copies.split_at_checked(length) else {
            return Err("the small copies of its normal images are cut short".into());
        };
        copies = rest;
        let none = ContentHash::from_bytes([0; HASH]);
        images.push(NormalImage {
            name,
            hash: kept.get(i).copied().filter(|hash| *hash != none),
            thumbnail: (length > 0).then(|| copy.to_vec()),
        });
    }
    if !copies.is_empty() {
        return Err("it holds more small copies than normal images".into());
    }
    Ok((images, others))
}

#[cfg(test)]
mod tests {
    use super::*;
    use defend_data::content_hash;

    fn image(shade: u8, whole: bool) -> NormalImage {
        let pixels = RgbImage::from_pixel(200, 100, image::Rgb([shade; 3]));
        NormalImage {
            name: format!("{shade}.jpg"),
            hash: whole.then(|| content_hash(&pixels)),
            thumbnail: thumbnail(&pixels).filter(|_| whole),
        }
    }

    fn read(
        images: &[NormalImage],
        bytes: Bytes,
    ) -> Result<(Vec<NormalImage>, Vec<ContentHash>), String> {
        let names = images.iter().map(|image| image.name.clone()).collect();
        let bytes = bytes
            .into_iter()
            .map(|(name, bytes)| (name.to_owned(), bytes))
            .collect();
        from_bytes(names, &bytes)
    }

    #[test]
    fn images_are_read_as_they_were_written() {
        let other = content_hash(&RgbImage::new(3, 3));
        for images in [
            vec![image(1, true), image(2, false), image(3, true)],
            vec![image(4, false)],
            Vec::new(),
        ] {
            for others in [vec![], vec![other]] {
                let read = read(&images, to_bytes(&images, &others)).unwrap();
                assert_eq!(read, (images.clone(), others));
            }
        }
        let copy = image(1, true).thumbnail.unwrap();
        let copy = image::load_from_memory(&copy).unwrap();
        assert_eq!((copy.width(), copy.height()), (128, 64));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let images = [image(1, true), image(2, true)];
        let whole = to_bytes(&images, &[]);
        for (name, change, says) in [
            (HASHES, 1, "cut short"),
            (HASHES, 32, "1 entries"),
            (LENGTHS, 4, "1 entries"),
            (THUMBNAILS, 1, "cut short"),
        ] {
            let mut bytes = whole.clone();
            let content = bytes.get_mut(name).unwrap();
            content.truncate(content.len() - change);
            let error = read(&images, bytes).unwrap_err();
            assert!(error.contains(says), "{name}: {error}");
        }
        let mut bytes = whole;
        bytes.get_mut(THUMBNAILS).unwrap().push(0);
        assert!(
            read(&images, bytes)
                .unwrap_err()
                .contains("more small copies")
        );
    }
}
