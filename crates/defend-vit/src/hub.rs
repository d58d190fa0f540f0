//! Files of a model on the Hugging Face hub, through its local cache.

use std::path::PathBuf;

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};

use crate::Error;

/// A model's file, for networks that this crate does not read itself.
///
/// It is taken from the hub's cache (`HF_HUB_CACHE`, `HF_HOME` or `~/.cache/huggingface`), or else downloaded with a progress
/// bar: a cached model needs no network.
///
/// # Errors
/// [`Error::Hub`].
pub fn hub_file(model: &str, revision: &str, file: &str) -> Result<PathBuf, Error> {
    fetch(model, revision, &[file])
}

/// The first of the files that is in the cache, or else that the hub has.
pub(crate) fn fetch(model: &str, revision: &str, files: &[&str]) -> Result<PathBuf, Error> {
    fetch_from(&cache(), model, revision, files)
}

/// The hub's cache: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or `~/.cache/huggingface/hub`.
fn cache() -> Cache {
    match std::env::var_os("HF_HUB_CACHE").filter(|path| !path.is_empty()) {
        Some(path) => Cache::new(path.into()),
        None => Cache::from_env(),
    }
}

fn fetch_from(
    cache: &Cache,
    model: &str,
    revision: &str,
    files: &[&str],
) -> Result<PathBuf, Error> {
    let repo = || Repo::with_revision(model.into(), RepoType::Model, revision.into());
    if let Some(cached) = files.iter().find_map(|file| cache.repo(repo()).get(file)) {
        return Ok(cached);
    }
    let failed = |reason: String| Error::Hub {
        model: model.into(),
        file: files.join(" or "),
        reason,
    };
    let api = ApiBuilder::from_cache(cache.clone())
        // The token lies beside the usual cache, wherever the files go.
        .with_token(Cache::from_env().token())
        .with_progress(true)
        .build()
        .map_err(|e| failed(e.to_string()))?;
    let mut reasons = Vec::new();
    for file in files {
        match api.repo(repo()).get(file) {
            Ok(path) => return Ok(path),
            Err(e) => reasons.push(e.to_string()),
        }
    }
    Err(failed(reasons.join("; ")))
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
        let path = fetch_from(&cache, "timm/tiny", "main", &["config.json"]).unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "{}");
    }
}
