//! `defend settings`, and the settings of a fit from a file and from flags.

mod comments;

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use defend_core::DefendConfig;
use serde_json::{Map, Value};

use crate::arguments::Settings;
use crate::exit::{Exit, usage};
use crate::say::tell;
use crate::settings::comments::comment;

/// Settings that have one of several forms: naming another form replaces the one that is there.
const FORMS: [&str; 7] = [
    "resize_mode",
    "dense.view",
    "dense.resampling",
    "student",
    "student.masked.distill.mask",
    "student.masked.distill.schedule",
    "student.masked.aggregation",
];

pub(crate) fn run(arguments: &Settings) -> Result<Exit> {
    let config = changed(arguments.recipe.config(), &arguments.set)?;
    if arguments.json {
        tell!("{}", serde_json::to_string_pretty(&config)?)?;
    } else {
        tell!("{}", as_toml(&config)?.trim_end())?;
    }
    Ok(Exit::default())
}

/// Reads settings, TOML or JSON by the content.
pub(crate) fn read(path: &Path) -> Result<DefendConfig> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the settings {}", path.display()))?;
    let invalid = || format!("the settings {} are not valid", path.display());
    if text.trim_start().starts_with('{') {
        return serde_json::from_str(&text).with_context(invalid);
    }
    toml::from_str(&text).with_context(invalid)
}

/// The settings with changes of the form `a.b=c`, the value as in TOML; `unset` takes it away, and what else is no TOML is a text.
pub(crate) fn changed(config: DefendConfig, changes: &[String]) -> Result<DefendConfig> {
    if changes.is_empty() {
        return Ok(config);
    }
    let mut settings = serde_json::to_value(&config)?;
    for change in changes {
        let Some((key, value)) = change.split_once('=') else {
            return Err(usage(format!(
                "--set {change}: expected KEY=VALUE, such as seed=7"
            )));
        };
        let key = key.trim();
        if comment(key).is_none() {
            return Err(usage(format!(
                "--set {change}: there is no setting {key}, see defend settings"
            )));
        }
        let value = match toml::from_str::<Map<String, Value>>(&format!("value = {value}")) {
            Ok(mut parsed) => parsed.remove("value").unwrap_or_default(),
            Err(_) if value.trim() == "unset" => Value::Null,
            Err(_) => Value::String(value.trim().to_owned()),
        };
        put(&mut settings, key, value);
    }
    // Together: some forms have two settings that need each other.
    serde_json::from_value(settings)
        .map_err(|error| usage(format!("--set {}: {error}", changes.join(" --set "))))
}

fn put(settings: &mut Value, key: &str, value: Value) {
    let (mut at, mut path) = (settings, String::new());
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        let Some(object) = at.as_object_mut() else {
            return;
        };
        if FORMS.contains(&path.as_str()) && !object.contains_key(part) {
            object.clear();
        }
        if parts.peek().is_none() {
            object.insert(part.to_owned(), value);
            return;
        }
        at = object.entry(part).or_insert(Value::Null);
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(part);
    }
}

/// TOML with a comment above each key.
fn as_toml(config: &DefendConfig) -> Result<String> {
    let mut text = String::from(
        "# Settings for defend fit --config FILE. What is left out has its default; defend fit --set KEY=VALUE changes a single one.\n",
    );
    if let Value::Object(settings) = serde_json::to_value(config)? {
        table(&mut text, "", &settings)?;
    }
    Ok(text)
}

fn table(text: &mut String, path: &str, settings: &Map<String, Value>) -> Result<()> {
    let key = |name: &str| {
        if path.is_empty() {
            name.to_owned()
        } else {
            format!("{path}.{name}")
        }
    };
    let (tables, values): (Vec<_>, Vec<_>) =
        settings.iter().partition(|(_, value)| value.is_object());
    if !values.is_empty() && !path.is_empty() {
        write!(text, "\n[{path}]\n")?;
    }
    for (name, value) in values {
        if let Some(comment) = comment(&key(name)) {
            write!(text, "\n# {comment}\n")?;
        }
        match value {
            Value::Null => writeln!(text, "# {name} is not set")?,
            value => writeln!(text, "{name} = {}", toml::Value::try_from(value)?)?,
        }
    }
    for (name, value) in tables {
        if let Value::Object(inner) = value {
            table(text, &key(name), inner)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::RecipeName;
    use clap::ValueEnum;

    fn keys(path: &str, value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(inner) => {
                for (name, value) in inner {
                    let dot = if path.is_empty() { "" } else { "." };
                    keys(&format!("{path}{dot}{name}"), value, found);
                }
            }
            _ => found.push(path.to_owned()),
        }
    }

    #[test]
    fn every_recipe_is_read_back_and_every_key_has_a_comment() {
        for recipe in RecipeName::value_variants() {
            let config = recipe.config();
            let text = as_toml(&config).unwrap();
            assert_eq!(toml::from_str::<DefendConfig>(&text).unwrap(), config);
            let mut found = Vec::new();
            keys("", &serde_json::to_value(&config).unwrap(), &mut found);
            for key in found {
                assert!(comment(&key).is_some(), "{key} has no comment");
                assert!(
                    text.contains(&format!("# {}", comment(&key).unwrap())),
                    "{key}"
                );
            }
        }
    }

    #[test]
    fn single_settings_can_be_changed() {
        let set = |changes: &[&str]| {
            let changes: Vec<String> = changes.iter().map(|c| (*c).to_owned()).collect();
            changed(DefendConfig::default(), &changes).map_err(|error| format!("{error:#}"))
        };
        let config = set(&["seed=7", "image_size = 384", "resize_mode=squash"]).unwrap();
        assert_eq!((config.seed, config.image_size), (7, Some(384)));
        let config = set(&["student.closed-form.posterior.ridge=0.2"]).unwrap();
        let expected = serde_json::to_value(&config).unwrap();
        assert_eq!(
            expected["student"]["closed-form"]["posterior"]["ridge"],
            0.2
        );
        // Another form replaces the one that is there, and what was not set is made.
        let config = set(&["student.masked.distill.epochs=3", "dense.epochs=2"]).unwrap();
        let expected = serde_json::to_value(&config).unwrap();
        assert_eq!(expected["student"]["masked"]["distill"]["epochs"], 3);
        assert_eq!(expected["dense"]["epochs"], 2);
        let two = [
            "dense.view.random.count=2",
            "dense.view.random.area=[0.2, 1.0]",
        ];
        assert!(set(&two).unwrap().dense.is_some());
        assert!(
            set(&["dense.epochs=2", "dense=unset"])
                .unwrap()
                .dense
                .is_none()
        );
        for (change, part) in [
            ("seed", "expected KEY=VALUE"),
            ("sead=7", "there is no setting sead"),
            ("seed=many", "--set seed=many"),
        ] {
            let error = set(&[change]).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
