//! The book in docs/ and the READMEs: links lead somewhere, chapters are in the summary, code is what tests have seen.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests may panic"
)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// The pages, by their path from the root.
fn pages() -> BTreeMap<PathBuf, String> {
    let root = root();
    let mut folders = vec![root.clone(), root.join("docs")];
    folders.extend(
        fs::read_dir(root.join("crates"))
            .unwrap()
            .map(|e| e.unwrap().path()),
    );
    let files = folders
        .iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "md"));
    files
        .map(|path| (path.clone(), fs::read_to_string(path).unwrap()))
        .collect()
}

/// What a page links to, and the anchors of its headings.
#[derive(Default)]
struct Page {
    links: Vec<String>,
    anchors: BTreeSet<String>,
}

fn parse(text: &str) -> Page {
    let mut page = Page::default();
    let mut heading: Option<String> = None;
    let mut used: HashMap<String, usize> = HashMap::new();
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                page.links.push(dest_url.into_string());
            }
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::Text(part) | Event::Code(part) => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&part);
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                let anchor = anchor(&heading.take().unwrap());
                let before = used.entry(anchor.clone()).or_default();
                page.anchors.insert(match *before {
                    0 => anchor,
                    n => format!("{anchor}-{n}"),
                });
                *before += 1;
            }
            _ => {}
        }
    }
    page
}

/// Of a heading: lower case, hyphens for spaces, no punctuation.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept
        .chars()
        .filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_leads_somewhere() {
    let pages = pages();
    let parsed: HashMap<PathBuf, Page> = pages
        .iter()
        .map(|(path, text)| (path.clone(), parse(text)))
        .collect();
    let (mut faults, mut checked) = (Vec::new(), 0);
    for (path, page) in &parsed {
        for link in &page.links {
            if link.contains("://") {
                continue;
            }
            checked += 1;
            let (file, fragment) = link
                .split_once('#')
                .map_or((link.as_str(), None), |(f, a)| (f, Some(a)));
            let target = match file {
                "" => path.clone(),
                file => path.parent().unwrap().join(file),
            };
            let Ok(target) = target.canonicalize() else {
                faults.push(format!("{}: {link}", path.display()));
                continue;
            };
            let known = |page: &Page| fragment.is_none_or(|anchor| page.anchors.contains(anchor));
            if fragment.is_some() && !parsed.get(&target).is_some_and(known) {
                faults.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(
        faults.is_empty(),
        "links that lead nowhere:\n{}",
        faults.join("\n")
    );
    assert!(checked > 100, "{checked} links were found");
}

#[test]
fn every_page_of_the_book_is_in_its_summary() {
    let docs = root().join("docs");
    let summary = parse(&fs::read_to_string(docs.join("SUMMARY.md")).unwrap());
    let listed: BTreeSet<String> = summary.links.into_iter().collect();
    let there: BTreeSet<String> = fs::read_dir(&docs)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| {
            Path::new(name).extension().is_some_and(|e| e == "md") && name != "SUMMARY.md"
        })
        .collect();
    assert_eq!(listed, there);
}

/// The book's pages are not compiled, so what they show stands, line for line, in a file that is.
#[test]
fn code_in_the_book_is_code_that_is_tested() {
    let mut checked = 0;
    for (path, text) in pages()
        .iter()
        .filter(|(path, _)| path.parent().unwrap().ends_with("docs"))
    {
        let (mut source, mut code): (Option<String>, Option<String>) = (None, None);
        for event in Parser::new(text) {
            match event {
                Event::Html(comment) => {
                    let named = comment.trim().strip_prefix("<!-- from ");
                    let named = named.and_then(|rest| rest.split([',', ' ']).next());
                    source = named.map(|file| fs::read_to_string(root().join(file)).unwrap());
                }
                Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(language)))
                    if language.starts_with("rust") =>
                {
                    code = Some(String::new());
                }
                Event::Text(part) => {
                    if let Some(code) = &mut code {
                        code.push_str(&part);
                    }
                }
                Event::End(TagEnd::CodeBlock) => {
                    let Some(code) = code.take() else { continue };
                    let Some(source) = source.take() else {
                        panic!(
                            "{} does not say where its code is tested:\n{code}",
                            path.display()
                        );
                    };
                    for line in code.lines().map(str::trim).filter(|line| !line.is_empty()) {
                        assert!(source.contains(line), "{}: {line}", path.display());
                    }
                    checked += 1;
                }
                _ => {}
            }
        }
    }
    assert!(checked > 3, "{checked} blocks were found");
}
