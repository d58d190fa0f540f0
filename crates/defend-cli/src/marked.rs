//! What somebody has marked in a table of results.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Column that holds the marks.
const MARK: &str = "mark";

/// Images by what they were marked as.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Marked {
    pub(crate) normal: Vec<PathBuf>,
    pub(crate) abnormal: Vec<PathBuf>,
}

impl Marked {
    /// Reads a CSV table of `score`, `sort` or `suspects` to which a column "mark" was added: `normal`, `abnormal` or nothing.
    pub(crate) fn read(table: &Path) -> Result<Self> {
        let said = || format!("cannot read {}", table.display());
        let mut reader = csv::Reader::from_path(table).with_context(said)?;
        let columns = reader.headers().with_context(said)?.clone();
        let column = |name: &str| {
            let place = columns.iter().position(|column| column.trim() == name);
            place.with_context(|| format!("{} has no column \"{name}\"", table.display()))
        };
        let (path, mark) = (column("path")?, column(MARK)?);
        let mut marked = Self::default();
        for (line, row) in reader.records().enumerate() {
            let row = row.with_context(said)?;
            let cell = |at| row.get(at).unwrap_or_default();
            let kind = match cell(mark).trim() {
                "" => continue,
                "normal" => &mut marked.normal,
                "abnormal" => &mut marked.abnormal,
                other => bail!(
                    "{}, row {}: the mark is \"{other}\", expected normal, abnormal or nothing",
                    table.display(),
                    line + 1
                ),
            };
            kind.push(PathBuf::from(cell(path)));
        }
        if marked == Self::default() {
            bail!(
                "{}: no image is marked; write normal or abnormal into the column \"{MARK}\"",
                table.display()
            );
        }
        Ok(marked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Marked, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("found.csv");
        std::fs::write(&path, text).unwrap();
        Marked::read(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn marks_become_lists_of_images() {
        let found =
            read("path,score,mark\na b.jpg,1.5,abnormal\nc.jpg,0.1,\n\"d,e.jpg\",2.0, normal\n");
        let expected = Marked {
            normal: vec!["d,e.jpg".into()],
            abnormal: vec!["a b.jpg".into()],
        };
        assert_eq!(found, Ok(expected));
    }

    #[test]
    fn faults_say_where() {
        let fault = |text: &str| read(text).unwrap_err();
        assert!(fault("path,score\na,1\n").contains("no column \"mark\""));
        assert!(fault("score,mark\n1,normal\n").contains("no column \"path\""));
        assert!(fault("path,mark\na,\n").contains("no image is marked"));
        let wrong = fault("path,mark\na,normal\nb,strange\n");
        assert!(
            wrong.contains("row 2") && wrong.contains("strange"),
            "{wrong}"
        );
    }
}
