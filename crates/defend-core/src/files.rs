//! Files that are read whole, and written whole or not at all.

use std::path::Path;

use defend_files::check_seal;
use safetensors::SafeTensors;
use serde::de::DeserializeOwned;

use crate::Error;

/// The content of a file; `action` is named in the error.
pub(crate) fn read(path: &Path, action: &'static str) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        action,
        source,
    })
}

/// Writes a safetensors file with a checksum, which appears whole or not at all; `action` is named in the error.
pub(crate) fn write(path: &Path, bytes: &[u8], action: &'static str) -> Result<(), Error> {
    let sealed = defend_files::seal(bytes);
    let written = sealed.and_then(|bytes| defend_files::write(path, &bytes));
    written.map_err(|source| Error::Io {
        path: path.to_owned(),
        action,
        source,
    })
}

/// The tensors of a safetensors file of this library, a `kind` of file, and its header: JSON under `key` in the metadata. An error is
/// a reason.
pub(crate) fn with_header<'a, H: DeserializeOwned>(
    bytes: &'a [u8],
    key: &str,
    kind: &str,
) -> Result<(SafeTensors<'a>, H), String> {
    let damaged = |e: safetensors::SafeTensorError| format!("no complete safetensors file: {e}");
    let tensors = SafeTensors::deserialize(bytes).map_err(damaged)?;
    check_seal(bytes, Some(key)).map_err(|e| e.to_string())?;
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let json = metadata.metadata().as_ref().and_then(|m| m.get(key));
    let json =
        json.ok_or_else(|| format!("no {kind} of this library: no \"{key}\" in its metadata"))?;
    let header = serde_json::from_str(json).map_err(|e| format!("{key}: {e}"))?;
    Ok((tensors, header))
}
