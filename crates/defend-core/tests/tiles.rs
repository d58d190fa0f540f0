//! Large images: tiles, regions of interest, and what does not fit them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod small;

use std::borrow::Cow;

use defend_core::data::{ClassId, GrayImage, Mask, Memory, Region, RgbImage};
use defend_core::evidence::EvidenceConfig;
use defend_core::nn::Rng;
use defend_core::prelude::*;
use defend_core::{
    Background, Error, MaskedConfig, ProfileSet, Scan, Student, TileMemory, Tiles, scan_with_maps,
};
use rand::RngExt;
use small::teacher;

const SIDE: u32 = 96;

/// A part: a checked ground, whose brightness is the image's own, and a fault of four pixels where there is one.
fn part(number: u32, fault: Option<(u32, u32)>) -> RgbImage {
    RgbImage::from_fn(SIDE, SIDE, |x, y| {
        let on = (x / 6 + y / 6).is_multiple_of(2);
        let value = if on { 150 } else { 90 } + (number * 7 % 23) as u8;
        let near = |at: u32, from: u32| (from..from + 4).contains(&at);
        match fault {
            Some((left, top)) if near(x, left) && near(y, top) => [255, 0, 0].into(),
            _ => [value, value, value].into(),
        }
    })
}

fn parts(numbers: std::ops::Range<u32>, fault: Option<(u32, u32)>) -> Memory {
    let mut memory = Memory::default();
    for number in numbers {
        memory.push(format!("{number}"), part(number, fault), vec![]);
    }
    memory
}

/// Settings under which patches always count.
fn settings(tiles: Option<Tiles>) -> DefendConfig {
    let mut evidence = EvidenceConfig::default();
    evidence.patches.alike_from = -1.0;
    DefendConfig {
        tiles,
        student: Student::ClosedForm(evidence),
        ..DefendConfig::default()
    }
}

fn settings_in(tiles: Tiles) -> DefendConfig {
    settings(Some(tiles))
}

fn fit(config: DefendConfig) -> Result<Detector, Error> {
    let fitted = Defend::builder()
        .teacher(teacher(7))
        .config(config)
        .fit(parts(0..24, None), &mut Silent)?;
    Ok(fitted.detector)
}

fn tiles(columns: usize, rows: usize, overlap: f64, memory: TileMemory) -> Tiles {
    Tiles {
        columns,
        rows,
        overlap,
        memory,
    }
}

fn scan_of(detector: &Detector, fault: Option<(u32, u32)>) -> Result<Scan, Error> {
    scan_with_maps(detector, parts(30..36, fault), &mut Silent)
}

/// Pixel of the image under the largest value of its map.
fn peak(scan: &Scan) -> (u32, u32) {
    let map = scan.findings[0].novelty.map.as_ref().unwrap();
    let largest = (0..map.values.len())
        .max_by(|&a, &b| map.values[a].total_cmp(&map.values[b]))
        .unwrap();
    let (row, column) = (largest / map.grid.columns, largest % map.grid.columns);
    let pixel = |at: usize, of: usize| (SIDE as usize * (2 * at + 1) / (2 * of)) as u32;
    (pixel(column, map.grid.columns), pixel(row, map.grid.rows))
}

#[test]
fn a_small_fault_is_found_in_its_tile_and_survives_a_file() -> Result<(), Error> {
    for (columns, rows, overlap, memory) in [
        (3, 3, 0.0, TileMemory::Shared),
        (3, 3, 0.25, TileMemory::PerPosition),
        (4, 2, 0.5, TileMemory::Shared),
    ] {
        let detector = fit(settings_in(tiles(columns, rows, overlap, memory)))?;
        let (normal, faulty) = (
            scan_of(&detector, None)?,
            scan_of(&detector, Some((66, 34)))?,
        );
        let least = |scan: &Scan| scan.scores().into_iter().fold(f64::INFINITY, f64::min);
        let most = |scan: &Scan| scan.scores().into_iter().fold(f64::NEG_INFINITY, f64::max);
        assert!(least(&faulty) > most(&normal), "{columns}x{rows}");
        let map = faulty.findings[0].novelty.map.as_ref().unwrap();
        let patches = |tiles: usize| 4 + (tiles - 1) * (4 - (4.0 * overlap) as usize);
        assert_eq!(
            (map.grid.columns, map.grid.rows),
            (patches(columns), patches(rows))
        );
        let (x, y) = peak(&faulty);
        assert!(x.abs_diff(68) <= 12 && y.abs_diff(36) <= 12, "({x}, {y})");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parts.defend");
        detector.save(&path)?;
        let loaded = Detector::load(&path, &Device::Cpu)?;
        assert_eq!(loaded.config(), detector.config());
        let again = scan_of(&loaded, Some((66, 34)))?;
        assert_eq!(again.scores(), faulty.scores());
        assert_eq!(
            again.findings[0].novelty.map,
            faulty.findings[0].novelty.map
        );
    }
    Ok(())
}

/// Left-out values of the fit and scores are made in the same way: new normal parts are as far from normal as left-out ones.
#[test]
fn tiles_of_new_parts_are_judged_as_those_of_left_out_ones() -> Result<(), Error> {
    // Noise, so that each image is a group of its own and its worst patches are in several tiles.
    let mut rng = Rng::seed(1);
    let mut speckled = |count: u32| {
        let mut memory = Memory::default();
        for number in 0..count {
            let image = RgbImage::from_fn(SIDE, SIDE, |_, _| rng.random::<[u8; 3]>().into());
            memory.push(format!("{number}"), image, vec![]);
        }
        memory
    };
    let fitted = Defend::builder()
        .teacher(teacher(7))
        .config(settings_in(tiles(3, 3, 0.0, TileMemory::Shared)))
        .fit(speckled(60), &mut Silent)?;
    let found = scan(&fitted.detector, speckled(60), &mut Silent)?.findings;
    let z = found.iter().map(|finding| {
        let explained = finding.novelty.explanation.as_ref().unwrap();
        explained.patches.expect("patches count").z
    });
    let mean = z.sum::<f64>() / found.len() as f64;
    assert!(mean.abs() < 0.5, "{mean}");
    Ok(())
}

/// With a memory for each position a patch is never explained by one of another tile.
#[test]
fn what_is_normal_elsewhere_is_not_normal_here() -> Result<(), Error> {
    // The upper left corner of all normal images is red.
    let with_corner = |number: u32, x: u32, y: u32| {
        let mut image = part(number, None);
        for (dx, dy) in (0..16).flat_map(|x| (0..16).map(move |y| (x, y))) {
            image.put_pixel(x + dx, y + dy, [255, 0, 0].into());
        }
        image
    };
    let set = |numbers: std::ops::Range<u32>, moved: bool| {
        let mut memory = Memory::default();
        for number in numbers {
            let at = if moved { 72 } else { 8 };
            memory.push(format!("{number}"), with_corner(number, at, at), vec![]);
        }
        memory
    };
    let patches_z = |memory: TileMemory| -> Result<f64, Error> {
        let fitted = Defend::builder()
            .teacher(teacher(7))
            .config(settings_in(tiles(3, 3, 0.0, memory)))
            .fit(set(0..24, false), &mut Silent)?;
        let found = scan(&fitted.detector, set(30..36, true), &mut Silent)?;
        let explained = found.findings[0].novelty.explanation.as_ref().unwrap();
        Ok(explained.patches.expect("patches count").z)
    };
    let (shared, own) = (
        patches_z(TileMemory::Shared)?,
        patches_z(TileMemory::PerPosition)?,
    );
    assert!(own > shared + 1.0, "{own} beside {shared}");
    Ok(())
}

#[test]
fn a_region_is_all_that_is_looked_at() -> Result<(), Error> {
    let rectangle = Region::Rectangle {
        x: 0,
        y: 0,
        width: 64,
        height: 96,
    };
    let mask = GrayImage::from_fn(48, 48, |x, _| [if x < 32 { 255 } else { 0 }].into());
    let mask = Region::Mask(Mask::new(&mask).unwrap());
    for region in [rectangle, mask] {
        let config = DefendConfig {
            region: Some(region),
            ..settings(None)
        };
        let detector = fit(config)?;
        let normal = scan_of(&detector, None)?;
        assert_eq!(
            scan_of(&detector, Some((80, 40)))?.scores(),
            normal.scores()
        );
        assert_ne!(
            scan_of(&detector, Some((20, 40)))?.scores(),
            normal.scores()
        );
    }
    Ok(())
}

/// Faulty parts with masks of their faults.
struct Faulty(Memory, Vec<(u32, u32)>);

impl Dataset for Faulty {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn name(&self, index: usize) -> Cow<'_, str> {
        self.0.name(index)
    }

    fn image(&self, index: usize) -> Result<RgbImage, defend_core::data::Error> {
        self.0.image(index)
    }

    fn classes(&self, _: usize) -> &[ClassId] {
        &[]
    }

    fn mask(&self, index: usize) -> Result<Option<GrayImage>, defend_core::data::Error> {
        let (left, top) = self.1[index];
        let inside = |at: u32, from: u32| (from..from + 8).contains(&at);
        Ok(Some(GrayImage::from_fn(SIDE, SIDE, |x, y| {
            [if inside(x, left) && inside(y, top) {
                255
            } else {
                0
            }]
            .into()
        })))
    }

    fn class_names(&self) -> &[String] {
        &[]
    }
}

/// A part with a faint fault.
fn faint(number: u32, (left, top): (u32, u32)) -> RgbImage {
    let mut image = part(number, None);
    for (x, y) in (left..left + 8).flat_map(|x| (top..top + 8).map(move |y| (x, y))) {
        let pixel = image.get_pixel_mut(x, y);
        pixel.0[0] = pixel.0[0].saturating_add(30);
    }
    image
}

#[test]
fn known_faults_are_learnt_and_kept() -> Result<(), Error> {
    let places = [(8, 8), (64, 8), (32, 48), (72, 72), (8, 64), (48, 24)];
    let faulty = |first: u32, places: &[(u32, u32)]| {
        let mut memory = Memory::default();
        for (number, place) in (first..).zip(places) {
            memory.push(format!("faulty {number}"), faint(number, *place), vec![]);
        }
        memory
    };
    // 144 patches of the whole image, or 64 of each tile, so that the worst five are few.
    for (tiled, size) in [(None, 96), (Some(tiles(2, 2, 0.5, TileMemory::Shared)), 64)] {
        let build = || {
            let config = DefendConfig {
                image_size: Some(size),
                ..settings(tiled)
            };
            Defend::builder().teacher(teacher(7)).config(config)
        };
        let without = build().fit(parts(0..24, None), &mut Silent)?.detector;
        let known = Faulty(faulty(40, &places), places.to_vec());
        let with = build()
            .abnormal(known)
            .fit(parts(0..24, None), &mut Silent)?
            .detector;
        assert_eq!(with.evidence().unwrap().memory().unwrap().faults().len(), 2);
        // How far new faulty parts lie above new normal ones, by their patches.
        let gap = |detector: &Detector| -> Result<f64, Error> {
            let mean = |set: Memory| -> Result<f64, Error> {
                let found = scan(detector, set, &mut Silent)?.findings;
                let z = found.iter().map(|finding| {
                    let explained = finding.novelty.explanation.as_ref().unwrap();
                    explained.patches.unwrap().z
                });
                Ok(z.sum::<f64>() / found.len() as f64)
            };
            let new = [(40, 8), (16, 40), (80, 32), (24, 80)];
            Ok(mean(faulty(60, &new))? - mean(parts(60..64, None))?)
        };
        let (before, after) = (gap(&without)?, gap(&with)?);
        assert!(before > 0.0 && after > 0.0, "{before}, {after}");
        assert_ne!(before, after);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parts.defend");
        with.save(&path)?;
        let loaded = Detector::load(&path, &Device::Cpu)?;
        assert_eq!(gap(&loaded)?, after);
    }
    // Without masks the worst patches are taken for faulty.
    let guessed = Defend::builder()
        .teacher(teacher(7))
        .config(settings(None))
        .abnormal(faulty(40, &places))
        .fit(parts(0..24, None), &mut Silent)?
        .detector;
    assert_eq!(
        guessed.evidence().unwrap().memory().unwrap().faults().len(),
        2
    );
    Ok(())
}

#[test]
fn what_does_not_fit_is_named_and_nothing_is_lost() -> Result<(), Error> {
    let detector = fit(settings_in(tiles(2, 2, 0.0, TileMemory::Shared)))?;
    let mut small = parts(30..32, None);
    small.push("too small", RgbImage::new(31, 96), vec![]);
    let found = scan(&detector, small, &mut Silent)?;
    assert_eq!((found.findings.len(), found.skipped.len()), (2, 1));
    let reason = &found.skipped[0].reason;
    assert!(
        reason.contains("31 x 96") && reason.contains("32 px"),
        "{reason}"
    );

    let outside = DefendConfig {
        region: Some(Region::Rectangle {
            x: 90,
            y: 0,
            width: 10,
            height: 10,
        }),
        ..settings(None)
    };
    let error = fit(outside).err().unwrap().to_string();
    assert!(error.contains("96 x 96"), "{error}");

    let masked = DefendConfig {
        student: Student::Masked(MaskedConfig::default()),
        ..settings_in(tiles(2, 2, 0.0, TileMemory::Shared))
    };
    assert!(fit(masked).err().unwrap().to_string().contains("tiles"));
    let config = settings_in(tiles(2, 2, 0.0, TileMemory::Shared));
    let builder = || Defend::builder().teacher(teacher(7)).config(config.clone());
    let error = builder()
        .embed(parts(0..4, None), &mut Silent)
        .err()
        .unwrap();
    assert!(error.to_string().contains("tiles"), "{error}");

    let other = fit(settings_in(tiles(2, 2, 0.0, TileMemory::PerPosition)))?;
    let set = ProfileSet::new(vec![("a".into(), detector), ("b".into(), other)]);
    let error = set.err().unwrap().to_string();
    assert!(
        error.starts_with("b looks") && error.contains("tiles"),
        "{error}"
    );
    Ok(())
}

/// A background is of whole images, whatever the tiles.
#[test]
fn tiles_share_the_background_of_whole_images() -> Result<(), Error> {
    let photos = parts(100..130, Some((10, 10)));
    let background: Background = Defend::builder().teacher(teacher(7)).look_at_background(
        photos,
        "parts with faults",
        &mut Silent,
    )?;
    let fitted = Defend::builder()
        .teacher(teacher(7))
        .config(settings_in(tiles(2, 2, 0.0, TileMemory::Shared)))
        .background(background)
        .fit(parts(0..24, None), &mut Silent)?;
    let report = fitted.closed_form().unwrap();
    assert_eq!(report.background.as_deref(), Some("parts with faults"));
    Ok(())
}
