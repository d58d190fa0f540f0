//! Scores each image once that appears in a folder, as a camera writes them:
//! `cargo run --example watch_folder -- NORMAL INCOMING [SECONDS]`. Without SECONDS it goes on for ever.

use std::collections::HashSet;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use defend_core::prelude::*;

/// How often the folder is looked at.
const PAUSE: Duration = Duration::from_millis(500);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (normal, incoming, seconds) = match arguments.as_slice() {
        [normal, incoming] => (normal, incoming, None),
        [normal, incoming, seconds] => (normal, incoming, Some(seconds.parse()?)),
        _ => return Err("expected NORMAL INCOMING [SECONDS]".into()),
    };
    let end = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let detector = Defend::builder()
        .fit(ImageFolder::open(normal)?, &mut Silent)?
        .detector;
    println!("watching {incoming}");
    let mut seen = HashSet::<PathBuf>::new();
    while end.is_none_or(|end| Instant::now() < end) {
        // An empty folder is no error here: images come later.
        let found = ImageFolder::open(incoming).map_or_else(|_| Vec::new(), |f| f.paths().to_vec());
        let new: Vec<PathBuf> = found
            .into_iter()
            .filter(|path| !seen.contains(path))
            .collect();
        if new.is_empty() {
            sleep(PAUSE);
            continue;
        }
        let scanned = scan(&detector, ImageFolder::from_paths(new.clone()), &mut Silent)?;
        for finding in &scanned.findings {
            let novelty = &finding.novelty;
            println!(
                "{:.3} {:?} {}",
                novelty.score, novelty.verdict, finding.name
            );
        }
        // A file that is still being written cannot be read yet: it is tried again.
        let unread: HashSet<&str> = scanned.skipped.iter().map(|s| s.name.as_str()).collect();
        let read = |path: &PathBuf| !unread.contains(&*path.to_string_lossy());
        seen.extend(new.into_iter().filter(read));
        sleep(PAUSE);
    }
    Ok(())
}
