//! Any image file to 8-bit RGB.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

use crate::{Error, jpeg, walk};

/// Memory that one decoded image may take: 1 GiB, enough for 10,000 x 10,000 px in any format.
pub const MAX_DECODED_BYTES: u64 = 1 << 30;

/// Reads an image file, see [`decode_image`].
///
/// # Errors
/// [`Error::Read`], and those of [`decode_image`] with the path as origin.
pub fn read_image(path: impl AsRef<Path>) -> Result<RgbImage, Error> {
    let path = path.as_ref();
    let bytes = content_of(path)?;
    decode_image(&bytes, &path.to_string_lossy())
}

fn content_of(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Read {
        path: path.into(),
        source,
    })
}

/// As [`read_image`], possibly in a smaller size: see [`decode_image_at_least`].
///
/// # Errors
/// Those of [`read_image`].
pub fn read_image_at_least(path: impl AsRef<Path>, least: [u32; 2]) -> Result<RgbImage, Error> {
    let path = path.as_ref();
    let bytes = content_of(path)?;
    decode_image_at_least(&bytes, &path.to_string_lossy(), least)
}

/// Decodes an image file's content to 8-bit RGB, upright.
///
/// The format is told from the content. Grey is repeated over the channels, 16 bits are scaled to
/// 8, CMYK and YCCK are converted, the Exif orientation is applied, and of an animation the first
/// frame is taken. Alpha is dropped and not composited, as Pillow's `convert("RGB")` does; colour
/// profiles are not applied.
///
/// JPEG values are not bit for bit Pillow's: over 24 photos resized to 224 px the mean difference of
/// sampled values is at most 0.21 grey levels with full-resolution colour and 0.6 with 4:2:0.
///
/// `origin` names the image in errors.
/// # Errors
/// [`Error::EmptyFile`], [`Error::UnknownFormat`], [`Error::Truncated`] for a JPEG without its end,
/// [`Error::TooLarge`] above [`MAX_DECODED_BYTES`], else [`Error::Decode`] or
/// [`Error::DecoderPanic`].
pub fn decode_image(bytes: &[u8], origin: &str) -> Result<RgbImage, Error> {
    if bytes.is_empty() {
        return Err(Error::EmptyFile {
            origin: origin.into(),
        });
    }
    caught(origin, || decode(bytes, origin, None))
}

/// As [`decode_image`], but a large JPEG comes out at a half, a quarter or an eighth of its size, as long as width and height stay
/// at least `least`: it is reduced in the frequency domain, which takes about 60 % of the time. Other files, and JPEGs of other
/// than grey or YCbCr values, come out as [`decode_image`] gives them.
///
/// # Errors
/// Those of [`decode_image`].
pub fn decode_image_at_least(
    bytes: &[u8],
    origin: &str,
    least: [u32; 2],
) -> Result<RgbImage, Error> {
    if bytes.is_empty() {
        return Err(Error::EmptyFile {
            origin: origin.into(),
        });
    }
    caught(origin, || decode(bytes, origin, Some(least)))
}

/// Decoders of this many formats do panic now and then; one damaged file must not end a run over a million.
fn caught<T>(origin: &str, decode: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|_| {
        Err(Error::DecoderPanic {
            origin: origin.into(),
        })
    })
}

/// Writes an image as a PNG. `image`'s own saving does not notice that a disk is full.
///
/// # Errors
/// Those of the encoder and of the file system; a file that was there before then stays as it was.
pub fn write_png(
    path: impl AsRef<Path>,
    image: impl Into<DynamicImage>,
) -> Result<(), std::io::Error> {
    let mut bytes = Cursor::new(Vec::new());
    let encoded = image.into().write_to(&mut bytes, ImageFormat::Png);
    encoded.map_err(std::io::Error::other)?;
    defend_files::write(path.as_ref(), bytes.get_ref())
}

/// A mask as shades of grey, which has to be as large as its image.
pub(crate) fn mask_of(image: &Path, path: &Path, mask: &RgbImage) -> Result<GrayImage, Error> {
    let (image_width, image_height) = read_dimensions(image)?;
    let (width, height) = mask.dimensions();
    if (width, height) != (image_width, image_height) {
        return Err(Error::MaskSize {
            path: path.to_owned(),
            width,
            height,
            image_width,
            image_height,
        });
    }
    Ok(image::imageops::grayscale(mask))
}

/// The mask of an image `NAME.*` in a folder: `NAME_mask` or `NAME`, as PNG, BMP or TIFF.
pub fn find_mask(folder: &Path, name: &str) -> Option<PathBuf> {
    let endings = ["png", "bmp", "tif", "tiff", "PNG", "BMP", "TIF", "TIFF"];
    ["_mask", ""].iter().find_map(|mark| {
        let named = |ending: &&str| folder.join(format!("{name}{mark}.{ending}"));
        endings.iter().map(named).find(|path| path.is_file())
    })
}

/// Width and height of the image in a file as [`read_image`] gives it, from the file's header.
///
/// # Errors
/// Those of [`read_image`].
pub(crate) fn read_dimensions(path: &Path) -> Result<(u32, u32), Error> {
    let origin = path.to_string_lossy();
    let bytes = content_of(path)?;
    caught(&origin, || {
        let mut decoder = open_decoder(&bytes, &origin)?;
        let (width, height) = decoder.dimensions();
        Ok(if turns(upright(&mut decoder)) {
            (height, width)
        } else {
            (width, height)
        })
    })
}

/// Whether width and height change places.
fn turns(orientation: Orientation) -> bool {
    matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    )
}

fn decode(bytes: &[u8], origin: &str, least: Option<[u32; 2]>) -> Result<RgbImage, Error> {
    let mut decoder = open_decoder(bytes, origin)?;
    if decoder.total_bytes() > MAX_DECODED_BYTES {
        let (width, height) = decoder.dimensions();
        return Err(Error::TooLarge {
            origin: origin.into(),
            width,
            height,
            bytes: decoder.total_bytes(),
            limit: MAX_DECODED_BYTES,
        });
    }
    let orientation = upright(&mut decoder);
    let least = least.map(|[width, height]| {
        if turns(orientation) {
            [height, width]
        } else {
            [width, height]
        }
    });
    if let Some(least) = least
        && let Some(mut reduced) = jpeg::reduced(bytes, decoder.dimensions(), least)
    {
        reduced.apply_orientation(orientation);
        return Ok(reduced.into_rgb8());
    }
    let mut image = DynamicImage::from_decoder(decoder).map_err(|source| Error::Decode {
        origin: origin.into(),
        source,
    })?;
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

/// Reads the header.
fn open_decoder<'a>(bytes: &'a [u8], origin: &str) -> Result<impl ImageDecoder + 'a, Error> {
    let fault = |source| Error::Decode {
        origin: origin.into(),
        source,
    };
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|source| fault(source.into()))?;
    match reader.format() {
        None if let Some((format, convert)) = walk::unsupported(bytes) => {
            return Err(Error::NotSupported {
                origin: origin.into(),
                format,
                convert,
            });
        }
        None => {
            return Err(Error::UnknownFormat {
                origin: origin.into(),
            });
        }
        Some(ImageFormat::Jpeg) if !jpeg::is_complete(bytes) => {
            return Err(Error::Truncated {
                origin: origin.into(),
                bytes: bytes.len(),
            });
        }
        Some(_) => {}
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    reader.limits(limits);
    reader.into_decoder().map_err(fault)
}

/// What turns the image upright.
fn upright(decoder: &mut impl ImageDecoder) -> Orientation {
    // Damaged metadata is no reason to lose the image.
    decoder.orientation().unwrap_or(Orientation::NoTransforms)
}

#[cfg(test)]
mod tests {
    use image::{GrayAlphaImage, GrayImage, ImageBuffer, Luma, LumaA, Rgb, Rgba, RgbaImage};

    use super::*;

    fn encode(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.into().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    fn first_pixel(bytes: &[u8]) -> [u8; 3] {
        decode_image(bytes, "test").unwrap().get_pixel(0, 0).0
    }

    fn gradient(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([x as u8, y as u8, (x + y) as u8]))
    }

    #[test]
    fn every_pixel_layout_becomes_rgb() {
        let png = ImageFormat::Png;
        let grey = GrayImage::from_pixel(2, 2, Luma([77]));
        assert_eq!(first_pixel(&encode(grey, png)), [77; 3]);
        let grey_alpha = GrayAlphaImage::from_pixel(2, 2, LumaA([77, 0]));
        assert_eq!(first_pixel(&encode(grey_alpha, png)), [77; 3]);
        let transparent = RgbaImage::from_pixel(2, 2, Rgba([10, 20, 30, 0]));
        assert_eq!(first_pixel(&encode(transparent, png)), [10, 20, 30]);
        let deep = ImageBuffer::from_pixel(2, 2, Rgb([0_u16, 0x8000, 0xFFFF]));
        assert_eq!(
            first_pixel(&encode(DynamicImage::ImageRgb16(deep), png)),
            [0, 128, 255]
        );
        let deep_grey = ImageBuffer::from_pixel(2, 2, Luma([0x8080_u16]));
        assert_eq!(
            first_pixel(&encode(DynamicImage::ImageLuma16(deep_grey), png)),
            [128; 3]
        );
    }

    #[test]
    fn every_format_is_told_from_its_content() {
        let image = gradient(5, 4);
        for format in [
            ImageFormat::Png,
            ImageFormat::WebP,
            ImageFormat::Bmp,
            ImageFormat::Tiff,
            ImageFormat::Pnm,
        ] {
            let bytes = encode(image.clone(), format);
            assert_eq!(decode_image(&bytes, "test").unwrap(), image, "{format:?}");
        }
        for format in [ImageFormat::Jpeg, ImageFormat::Gif] {
            let bytes = encode(image.clone(), format);
            assert_eq!(
                decode_image(&bytes, "test").unwrap().dimensions(),
                (5, 4),
                "{format:?}"
            );
        }
    }

    #[test]
    fn a_png_named_jpg_and_a_single_pixel_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.jpg");
        std::fs::write(&path, encode(gradient(1, 1), ImageFormat::Png)).unwrap();
        assert_eq!(read_image(&path).unwrap(), gradient(1, 1));
        assert_eq!(read_dimensions(&path).unwrap(), (1, 1));
        std::fs::write(&path, encode(gradient(1, 1), ImageFormat::Jpeg)).unwrap();
        assert_eq!(read_image(&path).unwrap().dimensions(), (1, 1));
    }

    #[test]
    fn dimensions_are_those_of_the_upright_image() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lying.jpg");
        let plain = encode(gradient(16, 8), ImageFormat::Jpeg);
        // After the start marker: an Exif segment with orientation 6, to be turned by 90 degrees.
        let mut exif = b"\xFF\xE1\0\x22Exif\0\0MM\0*\0\0\0\x08\0\x01".to_vec();
        exif.extend(b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0");
        let bytes = [&plain[..2], &exif, &plain[2..]].concat();
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(read_image(&path).unwrap().dimensions(), (8, 16));
        assert_eq!(read_dimensions(&path).unwrap(), (8, 16));
        std::fs::write(&path, "no image").unwrap();
        let error = read_dimensions(&path).unwrap_err();
        assert!(matches!(error, Error::UnknownFormat { .. }), "{error}");
    }

    #[test]
    fn damage_is_named_with_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broken.jpg");
        let fails = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let error = read_image(&path).unwrap_err();
            assert!(error.to_string().contains("broken.jpg"), "{error}");
            error
        };
        assert!(matches!(fails(b""), Error::EmptyFile { .. }));
        assert!(matches!(
            fails(b"this is no image"),
            Error::UnknownFormat { .. }
        ));
        let png = encode(gradient(64, 64), ImageFormat::Png);
        assert!(matches!(fails(&png[..png.len() / 2]), Error::Decode { .. }));
        let jpeg = encode(gradient(64, 64), ImageFormat::Jpeg);
        for cut in [3, 20, jpeg.len() / 2, jpeg.len() - 1] {
            assert!(
                matches!(fails(&jpeg[..cut]), Error::Truncated { .. }),
                "cut at {cut}"
            );
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(read_image(&path), Err(Error::Read { .. })));
    }

    #[test]
    fn bytes_after_a_jpeg_do_not_matter() {
        let mut jpeg = encode(gradient(8, 8), ImageFormat::Jpeg);
        jpeg.extend_from_slice(b"\0\0trailing");
        assert!(decode_image(&jpeg, "test").is_ok());
    }

    #[test]
    fn monsters_are_refused_before_they_are_decoded() {
        // A BMP header alone: 40,000 x 40,000 px at 24 bits.
        let mut bmp = b"BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0".to_vec();
        bmp.extend(40_000_i32.to_le_bytes());
        bmp.extend(40_000_i32.to_le_bytes());
        bmp.extend([1, 0, 24, 0]);
        bmp.extend([0; 24]);
        let error = decode_image(&bmp, "monster").unwrap_err();
        assert!(
            matches!(
                error,
                Error::TooLarge {
                    width: 40_000,
                    height: 40_000,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn ten_thousand_pixels_square_pass_the_limit() {
        let white = GrayImage::from_pixel(10_000, 10_000, Luma([255]));
        let bytes = encode(white, ImageFormat::Png);
        assert_eq!(
            decode_image(&bytes, "large").unwrap().dimensions(),
            (10_000, 10_000)
        );
    }

    #[test]
    fn any_damage_is_an_error_and_no_panic() {
        let whole = encode(gradient(32, 32), ImageFormat::Jpeg);
        for at in 2..whole.len() - 2 {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x5A;
            drop(decode_image(&bytes, "damaged"));
        }
    }

    /// Noise on a gradient, as a JPEG.
    fn photo(width: u32, height: u32) -> Vec<u8> {
        let image = RgbImage::from_fn(width, height, |x, y| {
            let noise = (x * 7919 + y * 104_729) % 23;
            Rgb([
                (x * 200 / width + noise) as u8,
                (y * 200 / height + noise) as u8,
                (noise * 5) as u8,
            ])
        });
        encode(image, ImageFormat::Jpeg)
    }

    fn mean_difference(a: &RgbImage, b: &RgbImage) -> f64 {
        assert_eq!(a.dimensions(), b.dimensions());
        let pairs = a.as_raw().iter().zip(b.as_raw());
        pairs.map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.as_raw().len() as f64
    }

    #[test]
    fn large_jpegs_come_out_at_the_smallest_part_that_is_large_enough() {
        let bytes = photo(801, 603);
        for (least, size) in [
            ([800, 600], (801, 603)),
            ([401, 302], (401, 302)),
            ([402, 302], (801, 603)),
            ([202, 100], (401, 302)),
            ([201, 100], (201, 151)),
            ([100, 151], (201, 151)),
            ([101, 76], (101, 76)),
            ([1, 1], (101, 76)),
        ] {
            let image = decode_image_at_least(&bytes, "test", least).unwrap();
            assert_eq!(image.dimensions(), size, "{least:?}");
        }
        // What becomes of it is what becomes of the whole, but for rounding.
        let whole = decode_image(&bytes, "test").unwrap();
        for least in [[200, 150], [400, 300]] {
            let part = decode_image_at_least(&bytes, "test", least).unwrap();
            let small = |image: &RgbImage| {
                image::imageops::resize(image, 80, 60, image::imageops::FilterType::Triangle)
            };
            let difference = mean_difference(&small(&whole), &small(&part));
            assert!(difference < 1.5, "{least:?}: {difference}");
        }
    }

    #[test]
    fn reduced_images_are_upright_and_grey_ones_are_grey() {
        let bytes = photo(640, 320);
        // An Exif segment with the orientation 6: a quarter turn.
        let exif = [
            &[0xFF, 0xE1, 0, 34][..],
            b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
        ];
        let turned = [&bytes[..2], &exif.concat(), &bytes[2..]].concat();
        let whole = decode_image(&turned, "test").unwrap();
        assert_eq!(whole.dimensions(), (320, 640));
        let part = decode_image_at_least(&turned, "test", [80, 160]).unwrap();
        assert_eq!(part.dimensions(), (80, 160));
        let small = image::imageops::thumbnail(&whole, 80, 160);
        assert!(mean_difference(&small, &part) < 3.0);
        // The width of the upright image is what counts.
        let other = decode_image_at_least(&turned, "test", [160, 80]).unwrap();
        assert_eq!(other.dimensions(), (160, 320));

        let grey = GrayImage::from_fn(400, 400, |x, _| Luma([(x / 2) as u8]));
        let bytes = encode(grey, ImageFormat::Jpeg);
        let part = decode_image_at_least(&bytes, "test", [50, 50]).unwrap();
        assert_eq!(part.dimensions(), (50, 50));
        assert!(part.pixels().all(|p| p.0[0] == p.0[1] && p.0[1] == p.0[2]));
    }

    #[test]
    fn other_files_and_damaged_ones_are_as_ever() {
        let png = encode(gradient(400, 300), ImageFormat::Png);
        let image = decode_image_at_least(&png, "test", [10, 10]).unwrap();
        assert_eq!(image, decode_image(&png, "test").unwrap());
        let bytes = photo(400, 300);
        let cut = &bytes[..bytes.len() / 2];
        for least in [[10, 10], [400, 300]] {
            let error = decode_image_at_least(cut, "test", least).unwrap_err();
            assert!(matches!(error, Error::Truncated { .. }), "{error}");
            assert!(decode_image_at_least(b"", "test", least).is_err());
        }
    }
}
