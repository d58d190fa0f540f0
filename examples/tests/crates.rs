//! The drawing of the crates in docs/ARCHITECTURE.md is what cargo says.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

const BEGIN: &str = "<!-- crates: drawn by examples/tests/crates.rs -->\n```mermaid\n";
const END: &str = "```\n<!-- end of crates -->";

/// The crates of each crate, without those that another of them brings along.
fn drawn() -> String {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo metadata");
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = |value: &serde_json::Value| value["name"].as_str().unwrap().to_owned();
        let normal = package["dependencies"].as_array().unwrap().iter();
        let normal = normal
            .filter(|dependency| dependency["kind"].is_null())
            .map(name);
        let known = normal.filter(|used| used.starts_with("defend-"));
        uses.insert(name(package), known.collect());
    }
    uses.retain(|name, _| {
        !["defend-examples", "defend-benches", "defend-testing"].contains(&&**name)
    });
    let mut lines = vec!["graph LR".to_owned()];
    for (name, direct) in &uses {
        let behind: BTreeSet<&String> = direct
            .iter()
            .flat_map(|used| all_behind(used, &uses))
            .collect();
        for used in direct.iter().filter(|used| !behind.contains(used)) {
            lines.push(format!("    {name} --> {used}"));
        }
    }
    lines.join("\n") + "\n"
}

/// What a crate uses, directly or not.
fn all_behind<'a>(
    name: &str,
    uses: &'a BTreeMap<String, BTreeSet<String>>,
) -> BTreeSet<&'a String> {
    let mut behind = BTreeSet::new();
    for used in uses.get(name).into_iter().flatten() {
        behind.insert(used);
        behind.extend(all_behind(used, uses));
    }
    behind
}

#[test]
fn the_drawing_of_the_crates_is_true() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ARCHITECTURE.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the place of the drawing");
    let (found, after) = rest.split_once(END).expect("its end");
    let expected = drawn();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{expected}{END}{after}")).unwrap();
    } else {
        assert_eq!(
            found, expected,
            "UPDATE=1 cargo test -p defend-examples --test crates"
        );
    }
}
