//! A checksum inside a safetensors file, over all of it.

use std::io::{Error, ErrorKind};

/// What the metadata of a sealed file begins with.
const START: &[u8] = b"{\"__metadata__\":{\"defend.checksum\":\"";
/// Hexadecimal digits of a BLAKE3 hash.
const DIGITS: usize = 64;
/// Bytes of the header's length, which come first.
const LENGTH: usize = 8;
/// Where the digits are.
const AT: std::ops::Range<usize> = LENGTH + START.len()..LENGTH + START.len() + DIGITS;

/// The content of a safetensors file with a checksum as the first entry of its metadata: BLAKE3 of the sealed file with zeros in place
/// of the checksum's digits.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for bytes that are no safetensors file, or one that is sealed already.
pub fn seal(bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let invalid = |reason| Error::new(ErrorKind::InvalidInput, reason);
    let whole = "no safetensors file";
    let (length, rest) = bytes
        .split_first_chunk::<LENGTH>()
        .ok_or_else(|| invalid(whole))?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| invalid(whole))?;
    let (header, data) = rest
        .split_at_checked(length)
        .ok_or_else(|| invalid(whole))?;
    if header.starts_with(&START[..START.len() - 1]) {
        return Err(invalid("it has a checksum already"));
    }
    let header = header.trim_ascii_end();
    let mut sealed = vec![0; LENGTH];
    sealed.extend(START);
    sealed.extend([b'0'; DIGITS]);
    sealed.push(b'"');
    match (
        header.strip_prefix(b"{\"__metadata__\":{"),
        header.strip_prefix(b"{"),
    ) {
        // Other entries follow, or none.
        (Some(others), _) => {
            sealed.extend(if others.starts_with(b"}") {
                &b""[..]
            } else {
                b","
            });
            sealed.extend(others);
        }
        (None, Some(tensors)) => {
            sealed.extend(if tensors.starts_with(b"}") {
                &b"}"[..]
            } else {
                b"},"
            });
            sealed.extend(tensors);
        }
        (None, None) => return Err(invalid(whole)),
    }
    // As the format asks for: the tensors begin at a multiple of eight.
    sealed.resize(sealed.len().next_multiple_of(8), b' ');
    let length = (sealed.len() - LENGTH) as u64;
    sealed[..LENGTH].copy_from_slice(&length.to_le_bytes());
    sealed.extend(data);
    let hash = blake3::hash(&sealed).to_hex();
    sealed[AT].copy_from_slice(hash.as_bytes());
    Ok(sealed)
}

/// Whether bytes are those of a sealed file, unharmed or not.
pub fn is_sealed(bytes: &[u8]) -> bool {
    bytes
        .get(LENGTH..)
        .is_some_and(|header| header.starts_with(START))
}

/// Checks a file that was sealed: one changed bit anywhere is found. `older`: the metadata entry that unsealed files of earlier versions
/// begin with, which are let through.
///
/// # Errors
/// [`ErrorKind::InvalidData`] for a damaged file, and for one that is neither sealed nor of an earlier version.
pub fn check_seal(bytes: &[u8], older: Option<&str>) -> Result<(), Error> {
    let invalid = |reason| Err(Error::new(ErrorKind::InvalidData, reason));
    if !is_sealed(bytes) {
        let header = bytes.get(LENGTH..).unwrap_or_default();
        let begins =
            |key| header.starts_with(format!("{{\"__metadata__\":{{\"{key}\":").as_bytes());
        return if older.is_some_and(begins) {
            Ok(())
        } else {
            invalid("it has no checksum, so that it is damaged or no file of defend")
        };
    }
    let (Some(digits), Some(before), Some(after)) =
        (bytes.get(AT), bytes.get(..AT.start), bytes.get(AT.end..))
    else {
        return invalid("it is cut short");
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(before);
    hasher.update(&[b'0'; DIGITS]);
    hasher.update(after);
    if hasher.finalize().to_hex().as_bytes() == digits {
        Ok(())
    } else {
        invalid("its checksum is another: the file is damaged")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    const TENSOR: &str = "\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]}";

    #[test]
    fn every_bit_counts() {
        for header in [
            format!("{{{TENSOR}}}   "),
            format!("{{\"__metadata__\":{{\"key\":\"value\"}},{TENSOR}}}"),
            format!("{{\"__metadata__\":{{}},{TENSOR}}}"),
        ] {
            let sealed = seal(&file(&header, b"abc")).unwrap();
            assert!(is_sealed(&sealed));
            check_seal(&sealed, None).unwrap();
            let length = u64::from_le_bytes(*sealed.first_chunk().unwrap()) as usize;
            assert_eq!(&sealed[8 + length..], b"abc");
            assert!((8 + length).is_multiple_of(8));
            let text = std::str::from_utf8(&sealed[8..8 + length]).unwrap();
            assert!(
                text.contains(TENSOR) && text.trim_end().ends_with('}'),
                "{text}"
            );
            for bit in 0..8 * sealed.len() {
                let mut changed = sealed.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                assert!(check_seal(&changed, Some("key")).is_err(), "bit {bit}");
            }
            for length in 0..sealed.len() {
                assert!(check_seal(&sealed[..length], Some("key")).is_err());
            }
            assert!(seal(&sealed).is_err(), "a seal of a seal");
        }
    }

    #[test]
    fn files_of_earlier_versions_are_let_through_and_others_are_not() {
        let old = file(
            &format!("{{\"__metadata__\":{{\"key\":\"v\"}},{TENSOR}}}"),
            b"abc",
        );
        check_seal(&old, Some("key")).unwrap();
        assert!(check_seal(&old, None).is_err());
        assert!(check_seal(&old, Some("other")).is_err());
        for bytes in [&b""[..], b"abc", b"\x08\0\0\0\0\0\0\0{}"] {
            assert!(check_seal(bytes, Some("key")).is_err());
            assert!(seal(bytes).is_err());
        }
    }
}
