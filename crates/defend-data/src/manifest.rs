//! A list of files with labels, as CSV or JSON.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use image::RgbImage;
use serde::Deserialize;

use crate::published::{expect_images, is_inside};
use crate::{ClassId, Dataset, Error, dataset::sample, read_image, read_image_at_least};

/// Where the images of a list may be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ListedPaths {
    /// In the list's folder and below it: a list from somewhere else cannot name other files of this machine.
    #[default]
    Inside,
    /// Anywhere: absolute paths, and those that begin with `..`.
    Anywhere,
}

/// Images that a list names, with the classes of the objects they show.
///
/// A CSV has the header `path,labels` or `path,labels,split`, labels apart by `;` or `|`; where `;` is between the columns, labels
/// are apart by `,` or `|`. A JSON file is a list of `{"path": .., "labels": [..], "split": ..}`. Relative paths are relative to the
/// list's own folder, with slashes of either kind.
#[derive(Debug, Clone)]
pub struct Manifest {
    samples: Vec<(PathBuf, Vec<ClassId>)>,
    class_names: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    path: PathBuf,
    #[serde(default)]
    labels: String,
    #[serde(default)]
    split: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    path: PathBuf,
    #[serde(default)]
    labels: Vec<String>,
    #[serde(default)]
    split: Option<String>,
}

impl Manifest {
    /// Reads a list whose name ends in `.csv` or `.json`; `split` picks the entries of that split, `None` all. Class
    /// names are those of the whole list, sorted, so that all its splits agree. `paths` says where the images may be.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Csv`] and [`Error::Json`] with the place; [`Error::Manifest`] for an empty path or
    /// label, a path outside of the list's folder where that is not allowed, and for another ending; [`Error::NoImages`] when no entry is left; [`Error::MissingImages`] when some images are not
    /// there.
    pub fn open(
        path: impl AsRef<Path>,
        split: Option<&str>,
        paths: ListedPaths,
    ) -> Result<Self, Error> {
        let path = path.as_ref();
        let entries = read_entries(path, paths)?;
        let names: BTreeSet<&str> = entries
            .iter()
            .flat_map(|e| &e.labels)
            .map(String::as_str)
            .collect();
        let class_names: Vec<String> = names.into_iter().map(String::from).collect();
        let folder = path.parent().unwrap_or(Path::new("."));
        let chosen = entries
            .iter()
            .filter(|e| split.is_none() || e.split.as_deref() == split);
        let samples: Vec<(PathBuf, Vec<ClassId>)> = chosen
            .map(|entry| {
                let mut classes: Vec<ClassId> = (entry.labels.iter())
                    .filter_map(|label| class_names.binary_search(label).ok())
                    .map(|class| ClassId(class as u32))
                    .collect();
                classes.sort_unstable();
                classes.dedup();
                (placed(folder, &entry.path), classes)
            })
            .collect();
        if samples.is_empty() {
            return Err(Error::NoImages {
                path: path.into(),
                expected: "one entry for each image, and entries of the split that is asked for",
            });
        }
        expect_images(path, samples.iter().map(|(image, _)| image.as_path()))?;
        Ok(Self {
            samples,
            class_names,
        })
    }
}

/// Where a path of the list is; backslashes are slashes, unless there is a file whose name has them.
fn placed(folder: &Path, path: &Path) -> PathBuf {
    let whole = folder.join(path);
    match path.to_str() {
        Some(text) if text.contains('\\') && !whole.exists() => {
            folder.join(text.replace('\\', "/"))
        }
        _ => whole,
    }
}

fn read_entries(path: &Path, paths: ListedPaths) -> Result<Vec<Entry>, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
        path: path.into(),
        source,
    })?;
    // A byte order mark, as Windows' editors write it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let fault = |at: usize, found: &str, expected: &'static str| Error::Manifest {
        path: path.into(),
        at,
        found: found.into(),
        expected,
    };
    let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase());
    let mut entries = Vec::new();
    match ending.as_deref() {
        Some("csv") => {
            let wrong = |source| Error::Csv {
                path: path.into(),
                source,
            };
            // Spreadsheets of many countries have `;` between columns.
            let header = text.lines().next().unwrap_or_default();
            let (column, label) = if header.contains(';') && !header.contains(',') {
                (b';', ',')
            } else {
                (b',', ';')
            };
            let mut reader = csv::ReaderBuilder::new()
                .delimiter(column)
                .trim(csv::Trim::All)
                .from_reader(text.as_bytes());
            for line in reader.deserialize::<Line>() {
                let Line {
                    path,
                    labels,
                    split,
                } = line.map_err(wrong)?;
                let labels = match labels.as_str() {
                    "" => Vec::new(),
                    some => some
                        .split([label, '|'])
                        .map(|label| label.trim().into())
                        .collect(),
                };
                entries.push(Entry {
                    path,
                    labels,
                    split,
                });
            }
        }
        Some("json") => {
            entries = serde_json::from_str(text).map_err(|source| Error::Json {
                path: path.into(),
                source,
            })?;
        }
        _ => {
            return Err(fault(
                0,
                "another ending of its name",
                "a list that ends in .csv or .json",
            ));
        }
    }
    for (i, entry) in entries.iter().enumerate() {
        // A CSV has its header in line 1.
        let at = i + if ending.as_deref() == Some("csv") {
            2
        } else {
            1
        };
        if entry.path.as_os_str().is_empty() {
            return Err(fault(at, "no path", "the path of an image"));
        }
        if paths == ListedPaths::Inside && !is_inside(&entry.path) {
            return Err(fault(
                at,
                "a path outside of its folder",
                "paths below the list's folder, unless others are allowed",
            ));
        }
        if entry.labels.iter().any(String::is_empty) {
            return Err(fault(at, "an empty label", "labels apart by one ; or |"));
        }
    }
    Ok(entries)
}

impl Dataset for Manifest {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        self.samples
            .get(index)
            .map_or(Cow::Borrowed(""), |(path, _)| path.to_string_lossy())
    }

    fn image(&self, index: usize) -> Result<RgbImage, Error> {
        read_image(&sample(&self.samples, index)?.0)
    }

    fn image_at_least(&self, index: usize, least: [u32; 2]) -> Result<RgbImage, Error> {
        read_image_at_least(&sample(&self.samples, index)?.0, least)
    }

    fn classes(&self, index: usize) -> &[ClassId] {
        self.samples.get(index).map_or(&[], |(_, classes)| classes)
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(name: &str, text: &str, split: Option<&str>) -> Result<Manifest, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::create_dir(folder.path().join("b")).unwrap();
        for image in ["a", "a.jpg", "b/c.jpg", "d.jpg"] {
            std::fs::write(folder.path().join(image), "no image").unwrap();
        }
        Manifest::open(path, split, ListedPaths::Inside)
    }

    #[test]
    fn a_list_names_no_files_of_other_folders_unless_it_may() {
        for path in [
            "/etc/passwd",
            "../a.jpg",
            "b/../../a.jpg",
            "b\\..\\..\\a.jpg",
            "C:\\a.jpg",
        ] {
            let json = serde_json::json!([{ "path": path }]).to_string();
            let error = open("list.json", &json, None).unwrap_err().to_string();
            assert!(
                error.contains("outside of its folder at 1"),
                "{path}: {error}"
            );
        }
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("lists");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(folder.path().join("a.jpg"), "").unwrap();
        std::fs::write(inside.join("l.csv"), "path,labels\n../a.jpg,dog\n").unwrap();
        assert!(Manifest::open(inside.join("l.csv"), None, ListedPaths::Inside).is_err());
        assert!(Manifest::open(inside.join("l.csv"), None, ListedPaths::Anywhere).is_ok());
        assert!(open("l.csv", "path,labels\nb/../a.jpg,dog\n", None).is_ok());
    }

    const CSV: &str = "path,labels,split\na.jpg,dog;cat,train\nb/c.jpg, cat ,test\nd.jpg,,test\n";
    const WINDOWS: &str =
        "\u{feff}path;labels;split\r\na.jpg;dog,cat;train\r\nb\\c.jpg;cat;test\r\nd.jpg;;test\r\n";
    const JSON: &str = r#"[{"path": "a.jpg", "labels": ["dog", "cat"], "split": "train"},
        {"path": "b/c.jpg", "labels": ["cat"], "split": "test"}, {"path": "d.jpg", "split": "test"}]"#;

    #[test]
    fn csv_and_json_say_the_same() {
        let json = format!("\u{feff}{JSON}");
        for (name, text) in [
            ("list.csv", CSV),
            ("list.csv", WINDOWS),
            ("list.json", JSON),
            ("list.json", &json),
        ] {
            let all = open(name, text, None).unwrap();
            assert_eq!(
                (all.len(), all.class_names()),
                (3, &["cat".to_owned(), "dog".into()][..])
            );
            assert_eq!(all.classes(0), [ClassId(0), ClassId(1)]);
            let test = open(name, text, Some("test")).unwrap();
            assert_eq!((test.len(), test.classes(0)), (2, &[ClassId(0)][..]));
            assert!(test.name(0).ends_with("b/c.jpg") && test.name(1).ends_with("d.jpg"));
            assert!(test.classes(1).is_empty());
            assert!(matches!(test.image(0), Err(Error::Read { .. })));
        }
    }

    #[test]
    fn a_list_without_splits() {
        let all = open("list.csv", "path,labels\na.jpg,dog\n", None).unwrap();
        assert_eq!(all.len(), 1);
    }

    #[test]
    fn faults_are_placed() {
        let fails = |name: &str, text: &str, reason: &str| {
            let error = open(name, text, None).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(reason), "{error}");
        };
        fails("l.csv", "path,labels\n,dog\n", "no path at 2");
        fails("l.csv", "path,labels\na.jpg,dog;;cat\n", "empty label");
        fails("l.csv", "path,label\na.jpg,dog\n", "label");
        fails("l.json", r#"[{"path": "a"}, {"path": ""}]"#, "no path at 2");
        fails("l.json", r#"[{"file": "a"}]"#, "file");
        fails("l.txt", "", ".csv or .json");
        fails(
            "l.csv",
            "path,labels\nnone.jpg,dog\na.jpg,\n",
            "1 of the 2 images",
        );
        fails("l.csv", "path,labels\n", "no image");
    }
}
