//! Whether a JPEG is whole.

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
