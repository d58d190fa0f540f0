//! Files of a model on the Hugging Face hub, through its local cache.

use std::path::PathBuf;

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};

use crate::Error;

/// Paths of the files in the hub's cache (`HF_HOME` or `~/.cache/huggingface`), downloaded with a
/// progress bar when they are not there yet; a cached model needs no network.
pub(crate) fn fetch<const N: usize>(
    model: &str,
    revision: &str,
    files: [&str; N],
) -> Result<[PathBuf; N], Error> {
    fetch_from(&Cache::from_env(), model, revision, files)
}

fn fetch_from<const N: usize>(
    cache: &Cache,
    model: &str,
    revision: &str,
    files: [&str; N],
) -> Result<[PathBuf; N], Error> {
    let repo = || Repo::with_revision(model.into(), RepoType::Model, revision.into());
    let mut paths = files.map(|_| PathBuf::new());
    for (path, file) in paths.iter_mut().zip(files) {
        *path = match cache.repo(repo()).get(file) {
            Some(cached) => cached,
            None => ApiBuilder::from_cache(cache.clone())
                .with_progress(true)
                .build()
                .and_then(|api| api.repo(repo()).get(file))
                .map_err(|e| Error::Hub {
                    model: model.into(),
                    file: file.into(),
                    reason: e.to_string(),
                })?,
        };
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_model_is_found_without_a_network() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().to_owned());
        let repo = cache.repo(Repo::with_revision(
            "timm/tiny".into(),
            RepoType::Model,
            "main".into(),
        ));
        repo.create_ref("abc").unwrap();
        let pointer = repo.pointer_path("abc");
        std::fs::create_dir_all(&pointer).unwrap();
        std::fs::write(pointer.join("config.json"), "{}").unwrap();
        let [path] = fetch_from(&cache, "timm/tiny", "main", ["config.json"]).unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "{}");
    }
}
