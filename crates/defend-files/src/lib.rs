//! Files that appear whole or not at all, and that notice when they are damaged.
//!
//! Models, checkpoints and caches of `defend` are written so that a reader never sees half a file, and that a full disk, an error or
//! a killed process leaves the file that was there before.
//!
//! ```
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("model");
//! defend_files::write(&path, b"first")?;
//! defend_files::write(&path, b"second")?;
//! assert_eq!(std::fs::read(&path)?, b"second");
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! [`seal()`] puts a checksum of the whole file into a safetensors file, which other readers take for metadata.

mod seal;

use std::fs::File;
use std::io::{Error, Write};
use std::path::Path;

pub use seal::{check_seal, is_sealed, seal};

/// Writes `bytes` to `path`, which has its old content or all of the new one at any time, also after a loss of power.
///
/// # Errors
/// Those of the file system, as for a folder that does not exist or a full disk; the old file is then left as it was.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    write_with(path, |file| file.write_all(bytes))
}

/// As [`write()`], with a function that writes the content into a temporary file in the same folder.
///
/// # Errors
/// Those of `content` and of the file system.
pub fn write_with<E: From<Error>>(
    path: &Path,
    content: impl FnOnce(&mut File) -> Result<(), E>,
) -> Result<(), E> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new()
        .prefix(".defend-")
        .tempfile_in(folder)?;
    content(file.as_file_mut())?;
    file.as_file().sync_all()?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are private; a model is as readable as any file, or as the one that it replaces.
        let mode = std::fs::metadata(path).map_or(0o644, |old| old.permissions().mode());
        file.as_file()
            .set_permissions(std::fs::Permissions::from_mode(mode))?;
    }
    file.persist(path).map_err(|e| e.error)?;
    // The name is in the folder only once the folder is on the disk.
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_file_keeps_its_mode() -> Result<(), Error> {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("model");
        let mode =
            |path: &Path| Ok::<_, Error>(std::fs::metadata(path)?.permissions().mode() & 0o777);
        write(&path, b"first")?;
        assert_eq!(mode(&path)?, 0o644);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640))?;
        write(&path, b"second")?;
        assert_eq!(mode(&path)?, 0o640);
        Ok(())
    }

    #[test]
    fn a_failure_leaves_the_old_file_and_nothing_else() -> Result<(), Error> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("model");
        write(&path, b"old")?;
        let failed = write_with(&path, |file| {
            file.write_all(b"half")?;
            Err(Error::other("no space"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no space");
        assert_eq!(std::fs::read(&path)?, b"old");
        assert_eq!(std::fs::read_dir(folder.path())?.count(), 1);
        assert!(write(&folder.path().join("none/model"), b"").is_err());
        Ok(())
    }
}
