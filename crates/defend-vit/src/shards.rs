//! Weights in several files: the hub's `*.index.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::Deserialize;

use crate::Error;

#[derive(Deserialize)]
struct Index {
    /// The file of each tensor.
    weight_map: BTreeMap<String, String>,
}

/// The file of each tensor, all of them in the folder of the index.
pub(crate) fn weight_map(index: &Path) -> Result<BTreeMap<String, String>, Error> {
    let text = std::fs::read_to_string(index).map_err(|source| Error::Io {
        path: index.to_owned(),
        source,
    })?;
    let config = |reason| Error::Config {
        origin: index.display().to_string(),
        reason,
    };
    let Index { weight_map } = serde_json::from_str(&text)
        .map_err(|e| config(format!("not an index of weights (\"weight_map\"): {e}")))?;
    for file in weight_map.values() {
        let path = Path::new(file);
        let mut parts = path.components();
        let is_name = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        );
        if !is_name || path.extension().is_some_and(|e| e == "json") {
            return Err(config(format!(
                "{file:?} is no name of a weight file in the folder of the index"
            )));
        }
    }
    Ok(weight_map)
}

/// The names of the files, each once.
pub(crate) fn files(weight_map: &BTreeMap<String, String>) -> BTreeSet<&str> {
    weight_map.values().map(String::as_str).collect()
}
