//! `defend demo`: the whole job on images that it renders itself.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use defend_baselines::{MethodConfig, Teacher};
use defend_core::data::{ClassId, Dataset, ImageFolder};
use defend_core::metrics::{FalseAlarmRate, auroc};
use defend_core::vit::{CacheConfig, TrainScope};
use defend_core::{Defend, DefendConfig, Detector, Device, Maps, scan, scan_each};
use defend_scenes::{Object, SceneConfig, SceneSet};
use ndarray::ArrayView1;

use crate::arguments::{Demo, MapFormat};
use crate::evaluate::evaluate;
use crate::exit::Exit;
use crate::fit::summarize;
use crate::images::{find, make_folder};
use crate::maps::MapFolder;
use crate::progress::Progress;
use crate::say::tell;

/// Overlays of each test folder.
const OVERLAYS: usize = 8;

pub(crate) fn run(arguments: &Demo) -> Result<Exit> {
    let start = Instant::now();
    let (normal, seed) = (
        object(&arguments.normal)?,
        arguments.common.seed.unwrap_or(0),
    );
    let images = arguments.out.join("images");
    make_folder(&images)?;
    let scenes = SceneConfig {
        normal,
        seed,
        ..SceneConfig::default()
    };
    let rendered = SceneSet::render(&scenes)?;
    rendered.save(&images)?;
    tell!(
        "{}: rendered {} images of several objects each; normal = a {} is among them",
        images.display(),
        scenes.train + scenes.calibration + scenes.test,
        normal.name()
    )?;

    let (mut bar, device) = (Progress::new(), arguments.common.device()?);
    let folder = |name: &str| ImageFolder::open(images.join(name));
    let mut fitted = Defend::builder()
        .seed(seed)
        .device(device.clone())
        .fit(folder("train")?, &mut bar)?;
    summarize(&fitted);
    let rate = FalseAlarmRate::new(0.05)?;
    fitted
        .detector
        .calibrate(folder("calibration")?, rate, &mut bar)?;
    let model = arguments.out.join("model.defend");
    fitted.detector.save(&model)?;
    tell!("{}: the fitted and calibrated model", model.display())?;

    let detector = Detector::load(&model, &device)?;
    let normal_paths = folder("test/normal")?.paths().to_vec();
    let first_abnormal = normal_paths.len();
    let paths = [normal_paths, folder("test/abnormal")?.paths().to_vec()].concat();
    let test: Arc<dyn Dataset> = Arc::new(ImageFolder::from_paths(paths));
    evaluate(
        &detector,
        &test,
        first_abnormal,
        &arguments.common,
        &mut bar,
    )?
    .print()?;
    print_references(folder("train")?, &test, first_abnormal, &device, &mut bar)?;

    let pointing = Pointing::measure(&detector, rendered, &mut bar)?;
    tell!(
        "maps point at it: in {} of {} abnormal images the largest value lies inside the box of a novel object ({:.0} %)",
        pointing.inside,
        pointing.images,
        100.0 * pointing.inside as f64 / pointing.images as f64
    )?;
    let maps = arguments.out.join("maps");
    write_overlays(&detector, &images, &maps)?;
    tell!("{}: where the novelty is, image by image", maps.display())?;
    tell!("done in {:.0} s", start.elapsed().as_secs_f64())?;
    Ok(Exit::default())
}

/// How often the largest value of a map lies in the box of an object that no normal image shows.
struct Pointing {
    inside: usize,
    images: usize,
}

impl Pointing {
    fn measure(detector: &Detector, scenes: SceneSet, bar: &mut Progress) -> Result<Self> {
        let normal = &scenes.train;
        let known: HashSet<ClassId> = (0..normal.len())
            .flat_map(|i| normal.classes(i).iter().copied())
            .collect();
        let abnormal: Arc<dyn Dataset> = Arc::new(scenes.test_abnormal);
        let mut found = Self {
            inside: 0,
            images: 0,
        };
        scan_each::<anyhow::Error>(detector, &abnormal, Maps::Wanted, bar, &mut |outcome| {
            let Ok((finding, _)) = outcome else {
                return Ok(());
            };
            let map = finding.novelty.map.as_ref();
            if let Some([x, y]) = map.and_then(|map| detector.map_scale().peak(map)) {
                let boxes = abnormal.boxes(finding.index).iter();
                let mut novel = boxes.filter(|object| !known.contains(&object.class));
                found.inside += usize::from(novel.any(|object| object.contains(x, y)));
                found.images += 1;
            }
            Ok(())
        })?;
        Ok(found)
    }
}

fn object(name: &str) -> Result<Object> {
    let known = || Object::ALL.map(Object::name).join(", ");
    let found = Object::ALL.into_iter().find(|o| o.name() == name);
    found.with_context(|| format!("no object \"{name}\", expected one of: {}", known()))
}

/// What simpler detectors get from the same backbone's untouched features.
fn print_references(
    train: ImageFolder,
    test: &Arc<dyn Dataset>,
    first_abnormal: usize,
    device: &Device,
    bar: &mut Progress,
) -> Result<()> {
    let vit = defend_core::embedded_backbone().load(TrainScope::Frozen, device)?;
    let resize_mode = DefendConfig::default().resize_mode;
    let teacher = Teacher::new(vit, 1, resize_mode, device, CacheConfig::default())?;
    let train: Arc<dyn Dataset> = Arc::new(train);
    let abnormal: Vec<bool> = (0..test.len()).map(|i| i >= first_abnormal).collect();
    tell!("beside it, on the same backbone's untouched features:")?;
    for reference in MethodConfig::references() {
        let method = reference.method();
        let detector = method.fit(&teacher, train.clone(), 0, bar)?;
        let scores = scan(&*detector, test.clone(), bar)?.scores();
        let value = auroc(ArrayView1::from(&scores), ArrayView1::from(&abnormal))?;
        tell!("  {:<20} AUROC {value:.4}", method.name())?;
    }
    Ok(())
}

fn write_overlays(detector: &Detector, images: &Path, maps: &Path) -> Result<()> {
    let all = find(&[images.join("test")], true, None)?;
    let first_of = |kind: &'static str| {
        let numbered = all.inside.iter().enumerate();
        let of_kind = numbered.filter(move |(_, inside)| inside.starts_with(kind));
        of_kind.map(|(position, _)| position).take(OVERLAYS)
    };
    let chosen: Vec<usize> = first_of("abnormal").chain(first_of("normal")).collect();
    let found = all.at(&chosen);
    let mut folder = MapFolder::make(maps, MapFormat::Overlay, detector, &found)?;
    let some = found.dataset();
    scan_each::<anyhow::Error>(
        detector,
        &some,
        Maps::Wanted,
        &mut Progress::hidden(),
        &mut |outcome| {
            if let Ok((finding, resized)) = outcome {
                folder.write(&finding, &some, &resized)?;
            }
            Ok(())
        },
    )?;
    Ok(())
}
