//! One detector scored from many threads, with damaged images among them and reloads meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod kinds;
mod small;

use std::io::Cursor;
use std::sync::RwLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use defend_core::prelude::*;
use image::ImageFormat;
use kinds::{image, images};
use small::teacher;

/// Threads that score at the same time.
const THREADS: usize = 32;

/// How long they do; `DEFEND_LOAD_SECONDS` says another time: ten minutes in `.ci/full`.
fn duration() -> Duration {
    let seconds = std::env::var("DEFEND_LOAD_SECONDS");
    Duration::from_secs(seconds.map_or(2, |seconds| seconds.parse().unwrap()))
}

/// Most memory that this process ever had, in bytes.
#[cfg(target_os = "linux")]
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kilobytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    1024 * kilobytes
}

#[test]
fn every_score_from_every_thread_is_that_of_a_single_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let builder = Defend::builder().teacher(teacher(7));
    let fitted = builder.fit(images(0, 0..30, 0), &mut Silent).unwrap();
    fitted.detector.save(&path).unwrap();
    // Every fifth is damaged.
    let files: Vec<Vec<u8>> = (0..40)
        .map(|number| {
            let mut bytes = Cursor::new(Vec::new());
            let picture = image(number % 4, number, 0);
            picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
            let mut bytes = bytes.into_inner();
            if number % 5 == 0 {
                bytes.truncate(bytes.len() / 2);
            }
            bytes
        })
        .collect();
    let score = |detector: &Detector, bytes: &[u8]| detector.score_encoded(bytes, "image").ok();
    let expected: Vec<_> = files.iter().map(|f| score(&fitted.detector, f)).collect();
    assert_eq!(
        expected.iter().filter(|novelty| novelty.is_none()).count(),
        8
    );

    let shared = RwLock::new(std::sync::Arc::new(fitted.detector));
    let (scored, reloads) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let start = Instant::now();
    #[cfg(target_os = "linux")]
    let warm = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (shared, files, expected, scored) = (&shared, &files, &expected, &scored);
            scope.spawn(move || {
                let mut number = thread;
                while start.elapsed() < duration() {
                    let detector = std::sync::Arc::clone(&shared.read().unwrap());
                    let at = number % files.len();
                    assert_eq!(score(&detector, &files[at]), expected[at], "image {at}");
                    scored.fetch_add(1, Ordering::Relaxed);
                    number += 7;
                }
            });
        }
        scope.spawn(|| {
            while start.elapsed() < duration() {
                let again = Detector::load(&path, &Device::Cpu).unwrap();
                *shared.write().unwrap() = std::sync::Arc::new(again);
                let done = reloads.fetch_add(1, Ordering::Relaxed);
                #[cfg(target_os = "linux")]
                if done == 20 {
                    warm.store(peak() as usize, Ordering::Relaxed);
                }
                let _ = done;
                std::thread::sleep(Duration::from_millis(10));
            }
        });
    });
    let (scored, reloads) = (scored.into_inner(), reloads.into_inner());
    assert!(
        scored > THREADS && reloads > 1,
        "{scored} scores, {reloads} reloads"
    );
    #[cfg(target_os = "linux")]
    if let warm @ 1.. = warm.into_inner() {
        let grown = peak() as usize - warm;
        assert!(
            grown < 64 << 20,
            "{grown} bytes more after {scored} scores and {reloads} reloads"
        );
        println!("{scored} scores, {reloads} reloads, {grown} bytes more");
    }
}
