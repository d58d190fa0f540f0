//! A table in the formats that people paste.

use std::fmt::Write as _;

/// A table of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Name for files.
    pub name: String,
    /// Heading.
    pub title: String,
    /// What the figures are and how they were made.
    pub note: String,
    /// Names of the columns.
    pub header: Vec<String>,
    /// Rows as wide as the header; the first cell names the row.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// As Markdown, with heading and note.
    pub fn markdown(&self) -> String {
        let mut text = format!("## {}\n\n{}\n\n", self.title, self.note);
        let escape = |cell: &String| cell.replace('|', "\\|");
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(escape).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        text += &line(&self.header);
        let _ = writeln!(text, "|{}", "---|".repeat(self.header.len()));
        for row in &self.rows {
            text += &line(row);
        }
        text
    }

    /// As CSV, quoted where a cell needs it.
    pub fn csv(&self) -> String {
        let quoted = |cell: &String| {
            if cell.contains([',', '"', '\n']) {
                format!("\"{}\"", cell.replace('"', "\"\""))
            } else {
                cell.clone()
            }
        };
        let line =
            |cells: &Vec<String>| cells.iter().map(quoted).collect::<Vec<_>>().join(",") + "\n";
        std::iter::once(&self.header)
            .chain(&self.rows)
            .map(line)
            .collect()
    }

    /// As a LaTeX table for `booktabs`.
    pub fn latex(&self) -> String {
        let escape = |cell: &String| {
            let mut text = String::new();
            for c in cell.chars() {
                match c {
                    '&' | '%' | '$' | '#' | '_' | '{' | '}' => text.extend(['\\', c]),
                    '\\' => text += "\\textbackslash{}",
                    '~' => text += "\\textasciitilde{}",
                    '^' => text += "\\textasciicircum{}",
                    '±' => text += "$\\pm$",
                    '–' => text += "--",
                    _ => text.push(c),
                }
            }
            text
        };
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(escape).collect();
            format!("{} \\\\\n", cells.join(" & "))
        };
        let columns = "r".repeat(self.header.len().saturating_sub(1));
        let body: String = self.rows.iter().map(|row| line(row)).collect();
        format!(
            "\\begin{{table}}\n\\caption{{{}. {}}}\n\\begin{{tabular}}{{l{columns}}}\n\\toprule\n{}\\midrule\n{body}\
             \\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n",
            escape(&self.title),
            escape(&self.note),
            line(&self.header),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table {
            name: "t".into(),
            title: "A & B".into(),
            note: "AUROC, %".into(),
            header: vec!["method".into(), "cat, dog".into()],
            rows: vec![vec!["a|b".into(), "9.0 ± 1".into()]],
        }
    }

    #[test]
    fn every_format_escapes_its_own_marks() {
        assert!(
            table()
                .markdown()
                .ends_with("| method | cat, dog |\n|---|---|\n| a\\|b | 9.0 ± 1 |\n")
        );
        assert_eq!(table().csv(), "method,\"cat, dog\"\na|b,9.0 ± 1\n");
        let latex = table().latex();
        assert!(latex.contains("\\caption{A \\& B. AUROC, \\%}"), "{latex}");
        assert!(latex.contains("a|b & 9.0 $\\pm$ 1 \\\\\n"), "{latex}");
    }
}
