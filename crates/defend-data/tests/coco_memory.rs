//! Alone in its process, so that the process's peak is that of reading the file.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::fs::{self, File};
use std::io::{BufWriter, Write};

use defend_data::{Coco, Crowd, Dataset};

/// Most memory that this process ever had, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kilobytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    1024 * kilobytes
}

#[test]
fn a_large_file_takes_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("instances.json");
    let mut file = BufWriter::new(File::create(&path).unwrap());
    let outline = "123.25, 45.5, ".repeat(60);
    write!(file, "{{\"annotations\": [").unwrap();
    for i in 0..40_000 {
        let comma = if i == 0 { "" } else { "," };
        let (image, category) = (i % 1000, i % 7);
        write!(
            file,
            "{comma}{{\"segmentation\": [[{outline}1, 1], [{outline}2, 2]], \"area\": 12.5, \
             \"image_id\": {image}, \"bbox\": [1, 2, 3, 4], \"category_id\": {category}, \"id\": {i}}}"
        )
        .unwrap();
    }
    for i in 0..1000 {
        File::create(folder.path().join(format!("{i}.jpg"))).unwrap();
    }
    let images: Vec<_> = (0..1000)
        .map(|i| format!("{{\"id\": {i}, \"file_name\": \"{i}.jpg\"}}"))
        .collect();
    let categories: Vec<_> = (0..7)
        .map(|i| format!("{{\"id\": {i}, \"name\": \"{i}\"}}"))
        .collect();
    let (images, categories) = (images.join(","), categories.join(","));
    write!(
        file,
        "], \"images\": [{images}], \"categories\": [{categories}]}}"
    )
    .unwrap();
    file.flush().unwrap();
    assert!(fs::metadata(&path).unwrap().len() > 60_000_000);

    let before = peak();
    let set = Coco::open(&path, folder.path(), Crowd::Counted).unwrap();
    let grown = peak() - before;
    assert_eq!((set.len(), set.classes(0).len()), (1000, 7));
    assert!(grown < 4_000_000, "{grown} bytes more");
}
