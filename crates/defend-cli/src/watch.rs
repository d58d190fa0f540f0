//! `defend watch`

use std::collections::HashMap;
use std::io::stdout;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, bail};
use defend_core::data::{Dataset, Error, ImageFolder};
use defend_core::{Maps, scan_each};

use crate::arguments::Watch;
use crate::exit::Exit;
use crate::progress::{Progress, is_stopped};
use crate::say::say;
use crate::score::{Lines, Record};

pub(crate) fn run(arguments: &Watch) -> Result<Exit> {
    let every = Duration::from_secs_f64(arguments.every);
    let idle = arguments.until_idle.map(Duration::from_secs_f64);
    if !arguments.folder.is_dir() {
        bail!("{} is no folder", arguments.folder.display());
    }
    let detector = arguments.common.load(&arguments.model)?;
    let mut folder = Folder::new(arguments.folder.clone());
    if !arguments.existing {
        folder.ignore_what_is_there()?;
    }
    let mut lines = Lines::new(arguments.format, stdout().lock());
    let (mut exit, mut unreadable) = (Exit::default(), 0);
    let mut last = Instant::now();
    say!("watching {}", arguments.folder.display());
    while !is_stopped() {
        let ready = folder.ready()?;
        if ready.is_empty() {
            if idle.is_some_and(|idle| last.elapsed() >= idle && !folder.waits()) {
                break;
            }
            sleep(every);
            continue;
        }
        let images: Arc<dyn Dataset> = Arc::new(ImageFolder::from_paths(ready));
        let done = scan_each::<anyhow::Error>(
            &detector,
            &images,
            Maps::Free,
            &mut Progress::hidden(),
            &mut |outcome| {
                if outcome.is_err() {
                    unreadable += 1;
                    exit.unreadable = true;
                }
                let record = Record::of_outcome(&outcome, detector.calibration());
                exit.novel |= record.is_novel();
                lines.write(&record)
            },
        );
        match done {
            Err(_) if is_stopped() => break,
            done => done?,
        }
        last = Instant::now();
        if unreadable > arguments.common.max_unreadable() {
            bail!("{unreadable} images could not be read (--strict or --max-unreadable)");
        }
    }
    Ok(exit)
}

/// Sleeps, and wakes up for Ctrl-C.
fn sleep(time: Duration) {
    const SLICE: Duration = Duration::from_millis(200);
    let start = Instant::now();
    while !is_stopped() && start.elapsed() < time {
        std::thread::sleep(SLICE.min(time.saturating_sub(start.elapsed())));
    }
}

/// Length and time of change of a file.
type Look = (u64, Option<SystemTime>);

/// The images of a folder that have been seen.
struct Folder {
    path: PathBuf,
    /// The last look at each file that is there, and whether it was handed out since.
    seen: HashMap<PathBuf, (Look, bool)>,
}

impl Folder {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            seen: HashMap::new(),
        }
    }

    /// Whether a file has been seen that is still being written.
    fn waits(&self) -> bool {
        let mut seen = self.seen.values();
        seen.any(|((length, _), done)| !done && *length > 0)
    }

    fn ignore_what_is_there(&mut self) -> Result<()> {
        let there = self.look()?;
        self.seen = there
            .into_iter()
            .map(|(path, look)| (path, (look, true)))
            .collect();
        Ok(())
    }

    /// Files that are new or have changed, and have not changed between the last two looks; sorted.
    fn ready(&mut self) -> Result<Vec<PathBuf>> {
        let mut ready = Vec::new();
        let mut seen = HashMap::new();
        for (path, look) in self.look()? {
            // Files that are gone are forgotten, so that memory grows with the folder and not with time.
            let done = match self.seen.get(&path) {
                Some((before, done)) if *before == look => {
                    if !done && look.0 > 0 {
                        ready.push(path.clone());
                    }
                    *done || look.0 > 0
                }
                _ => false,
            };
            seen.insert(path, (look, done));
        }
        self.seen = seen;
        Ok(ready)
    }

    fn look(&self) -> Result<Vec<(PathBuf, Look)>> {
        let folder = match ImageFolder::open(&self.path) {
            Ok(folder) => folder,
            Err(Error::NoImages { .. } | Error::NotSupported { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let look = |path: &PathBuf| {
            // It may be gone again.
            let file = std::fs::metadata(path).ok()?;
            Some((path.clone(), (file.len(), file.modified().ok())))
        };
        Ok(folder.paths().iter().filter_map(look).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_handed_out_once_and_not_while_it_grows() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("old.png"), "old").unwrap();
        let mut watched = Folder::new(folder.path().to_owned());
        watched.ignore_what_is_there().unwrap();
        let mut ready = || watched.ready().unwrap();
        assert!(ready().is_empty());
        std::fs::write(at("new.png"), "").unwrap();
        assert!(
            ready().is_empty() && ready().is_empty(),
            "an empty file is still to come"
        );
        std::fs::write(at("new.png"), "half").unwrap();
        assert!(ready().is_empty());
        std::fs::write(at("new.png"), "all of it").unwrap();
        assert!(ready().is_empty());
        assert_eq!(ready(), [at("new.png")]);
        assert!(ready().is_empty());
        std::fs::write(at("new.png"), "another image").unwrap();
        assert!(ready().is_empty());
        assert_eq!(ready(), [at("new.png")]);
        std::fs::remove_file(at("new.png")).unwrap();
        std::fs::remove_file(at("old.png")).unwrap();
        assert!(ready().is_empty());
        assert!(watched.seen.is_empty());
    }
}
