//! Whether a JPEG is whole, and large ones at a part of their size.

use image::{DynamicImage, GrayImage, RgbImage};
use jpeg_decoder::{Decoder, PixelFormat};

use crate::decode::MAX_DECODED_BYTES;

const END_OF_IMAGE: u8 = 0xD9;

/// Whether an end-of-image marker closes the image; bytes after it do not matter.
///
/// The decoder fills what a cut file lacks with grey and reports success, so this is looked at
/// before. Segments are skipped by their length: the thumbnail in an Exif segment has an end marker
/// of its own.
pub(crate) fn is_complete(bytes: &[u8]) -> bool {
    let mut at = 2; // past the start-of-image marker
    while let (Some(&first), Some(&second)) = (bytes.get(at), bytes.get(at + 1)) {
        match (first, second) {
            (0xFF, END_OF_IMAGE) => return true,
            // A fill byte before a marker.
            (0xFF, 0xFF) => at += 1,
            // In a scan: a stuffed 0xFF. Restart markers and TEM have no length either.
            (0xFF, 0x00 | 0x01 | 0xD0..=0xD8) => at += 2,
            (0xFF, _) => {
                let (Some(&high), Some(&low)) = (bytes.get(at + 2), bytes.get(at + 3)) else {
                    return false;
                };
                at += 2 + usize::from(u16::from_be_bytes([high, low]));
            }
            // Data of a scan, or junk between segments, which decoders skip too.
            _ => match memchr::memchr(0xFF, &bytes[at..]) {
                Some(skipped) => at += skipped,
                None => return false,
            },
        }
    }
    false
}

/// Eighths of the size that the decoder can give, smallest first; the whole is not its business.
const EIGHTHS: [u32; 3] = [1, 2, 4];

/// A JPEG of the size `full` at the smallest part of it that is at least `least`, not yet upright; `None` for what is no JPEG, has
/// other than grey or YCbCr values, would have to be decoded whole, or is damaged, which the usual decoder names.
pub(crate) fn reduced(bytes: &[u8], full: (u32, u32), least: [u32; 2]) -> Option<DynamicImage> {
    if !bytes.starts_with(&[0xFF, 0xD8]) {
        return None;
    }
    let part = |eighths: u32| {
        let side = |side: u32| (u64::from(side) * u64::from(eighths)).div_ceil(8) as u32;
        [side(full.0), side(full.1)]
    };
    let fits = |[width, height]: &[u32; 2]| *width >= least[0] && *height >= least[1];
    let [width, height] = EIGHTHS.into_iter().map(part).find(fits)?;
    let mut decoder = Decoder::new(bytes);
    decoder.set_max_decoding_buffer_size(MAX_DECODED_BYTES as usize);
    decoder.read_info().ok()?;
    let format = decoder.info()?.pixel_format;
    let (width, height) = (u16::try_from(width).ok()?, u16::try_from(height).ok()?);
    let (width, height) = decoder.scale(width, height).ok()?;
    let (width, height) = (u32::from(width), u32::from(height));
    // Its own choice of the part has to be ours.
    if !fits(&[width, height]) {
        return None;
    }
    match format {
        PixelFormat::RGB24 => {
            let pixels = decoder.decode().ok()?;
            RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8)
        }
        PixelFormat::L8 => {
            let pixels = decoder.decode().ok()?;
            GrayImage::from_raw(width, height, pixels).map(DynamicImage::ImageLuma8)
        }
        _ => None,
    }
}
