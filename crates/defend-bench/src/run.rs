//! Running what a configuration asks for and what is not there yet.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use defend_baselines::Teacher;
use defend_core::data::{Dataset, Label, Preprocess, ResizeMode};
use defend_core::metrics::{auroc, average_precision};
use defend_core::vit::{CacheConfig, Encoder, ImageSource, TrainScope, weights_hash};
use defend_core::{
    Device, Error as CoreError, MapScale, Novelty, NoveltyDetector, Observer, PatchMap,
    ResizedImages,
};
use ndarray::ArrayView1;

use crate::data::Halves;
use crate::objects::object_figures;
use crate::pixels::{masks, pixel_figures};
use crate::protocol::Experiment;
use crate::record::{Figures, Record, RunKey, Scored, Software, Worst, file_name, write_json};
use crate::split::{Split, Splitter};
use crate::{BenchConfig, DataConfig, DataEntry, Error, MethodEntry};

/// Errors of each kind whose maps are kept.
const WORST: usize = 6;

/// Memory for the resized test images of a data set.
const IMAGE_BYTES: usize = 4 << 30;

/// Role: hears how far a benchmark is.
pub trait Progress: Observer {
    /// A run ended, or was there already.
    fn run(&mut self, state: &RunState<'_>);

    /// The benchmark goes on without something: an image that cannot be read ([`Error::Image`]), an experiment of a class that has
    /// no images ([`Error::EmptySplit`]), a damaged record whose run is done again ([`Error::Record`]).
    fn left_out(&mut self, what: &Error) {
        let _ = what;
    }
}

/// How far a benchmark is.
#[derive(Debug, Clone, Copy)]
pub struct RunState<'a> {
    /// Runs that are there, this one included.
    pub done: usize,
    /// All runs of the configuration.
    pub total: usize,
    /// The run.
    pub record: &'a Record,
    /// Whether it was there already.
    pub known: bool,
    /// Seconds since the benchmark began.
    pub seconds: f64,
}

/// Does every run whose record is missing. Killed at any moment and started again, it goes on.
///
/// Goes on without images that cannot be read, classes without images and damaged records ([`Progress::left_out`]).
///
/// # Errors
/// The first other one met; the records written until then stay.
pub fn run(
    config: &BenchConfig,
    device: &Device,
    progress: &mut dyn Progress,
) -> Result<(), Error> {
    let vit = config.weights()?.load(TrainScope::Frozen, device)?;
    let depth = vit.spec().architecture.depth;
    let weights = weights_hash(&vit)?;
    let layers = config
        .methods
        .iter()
        .map(|s| s.config.method().layers(depth));
    let cache = CacheConfig {
        memory_bytes: (config.feature_memory_gib * f64::from(1 << 30)) as usize,
        folder: config.features.clone(),
        ..CacheConfig::default()
    };
    let mut bench = Bench {
        config,
        weights,
        teacher: Teacher::new(
            vit,
            layers.max().unwrap_or(1),
            config.resize_mode,
            device,
            cache,
        )?
        .with_background(config.background()?),
        start: Instant::now(),
        done: 0,
        total: 0,
    };
    let halves = config
        .data
        .iter()
        .map(|data| data.source.open(&config.root))
        .collect::<Result<Vec<_>, _>>()?;
    // Names are checked and runs are counted before hours of work.
    for (data, halves) in config.data.iter().zip(&halves) {
        for protocol in &data.protocols {
            let boxed = |index| !halves.test.boxes(index).is_empty();
            if protocol.judges_objects() && !(0..halves.test.len()).any(boxed) {
                let data = data.name.clone();
                return Err(Error::NoBoxes { data });
            }
            let experiments = protocol.experiments(&data.name, &*halves.train)?.len();
            let methods = config.methods.iter();
            let methods = methods.filter(|s| s.runs_on(&data.name, protocol.name()));
            let seeds = config.seeds.iter();
            let runs: usize = methods
                .map(|s| seeds.clone().filter(|seed| s.runs_with(**seed)).count())
                .sum();
            bench.total += experiments * runs;
        }
    }
    let mut place = 0;
    for (data, halves) in config.data.iter().zip(&halves) {
        bench.data_set(data, halves, &mut place, progress)?;
    }
    Ok(())
}

struct Bench<'a> {
    config: &'a BenchConfig,
    weights: String,
    teacher: Teacher,
    start: Instant,
    done: usize,
    total: usize,
}

/// The test images of a data set, resized once for all runs.
struct TestSet<'a> {
    source: &'a DataConfig,
    halves: &'a Halves,
    /// As the data set has them.
    originals: Arc<dyn Dataset>,
    images: ResizedImages,
    masks: Option<Vec<Option<Vec<bool>>>>,
}

/// What is fitted and judged in a run.
struct Task<'a> {
    method: &'a MethodEntry,
    split: &'a Split,
    /// Where objects are to be judged: what is normal.
    experiment: Option<&'a Experiment>,
}

impl Bench<'_> {
    fn data_set(
        &mut self,
        data: &DataEntry,
        halves: &Halves,
        place: &mut usize,
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        let mut splitter = Splitter::new(&data.name, halves, data.subset, &mut |what| {
            progress.left_out(what);
        });
        let images: Arc<dyn Dataset> = Arc::new(defend_core::data::Subset::new(
            halves.test.clone(),
            splitter.test().to_vec(),
        )?);
        // Maps lie over the whole image only when it was squashed: with another resize mode there are no figures over pixels.
        let masks = match self.config.resize_mode {
            ResizeMode::Squash => masks(&*halves.test, splitter.test())?,
            ResizeMode::CenterCrop { .. } => None,
        };
        let test = TestSet {
            source: &data.source,
            halves,
            masks,
            images: self.read(&images, self.teacher.preprocess(), progress)?,
            originals: images,
        };
        for protocol in &data.protocols {
            for experiment in protocol.experiments(&data.name, &*halves.train)? {
                let runs = |method: &MethodEntry| {
                    let seeds = self.config.seeds.iter();
                    seeds.filter(|seed| method.runs_with(**seed)).count()
                };
                let mut splits = Vec::new();
                for &seed in &self.config.seeds {
                    let split =
                        splitter.split(&experiment, seed, &mut |what| progress.left_out(what));
                    let split = match split {
                        Ok(split) => split,
                        Err(empty @ Error::EmptySplit { .. }) if protocol.takes_all() => {
                            progress.left_out(&empty);
                            splits.clear();
                            break;
                        }
                        Err(error) => return Err(error),
                    };
                    let draw = if data.subset.redraw {
                        format!("-draw{seed}")
                    } else {
                        String::new()
                    };
                    let name = format!(
                        "{}-{}-{}{draw}.json",
                        file_name(&data.name),
                        protocol.name(),
                        file_name(&experiment.name)
                    );
                    write_json(&self.config.output.join("splits").join(name), &split)?;
                    splits.push(split);
                }
                let methods = self.config.methods.iter().enumerate();
                for (method_place, method) in
                    methods.filter(|(_, s)| s.runs_on(&data.name, protocol.name()))
                {
                    if splits.is_empty() {
                        self.total -= runs(method);
                        continue;
                    }
                    let seeds = self.config.seeds.iter().zip(&splits);
                    for (&seed, split) in seeds.filter(|(seed, _)| method.runs_with(**seed)) {
                        let key = RunKey {
                            data: data.name.clone(),
                            protocol: protocol.name().into(),
                            experiment: experiment.name.clone(),
                            classes: experiment.classes.clone(),
                            subset: data.subset,
                            method: method.name(),
                            settings: method.config.clone(),
                            weights: self.weights.clone(),
                            resize_mode: self.config.resize_mode,
                            split: split.fingerprint.clone(),
                            seed,
                        };
                        let order = [*place, method_place];
                        let task = Task {
                            method,
                            split,
                            experiment: protocol.judges_objects().then_some(&experiment),
                        };
                        self.run(key, order, &task, &test, progress)?;
                    }
                }
                *place += 1;
            }
        }
        Ok(())
    }

    /// The images of a test set as a detector wants them.
    fn read(
        &self,
        images: &Arc<dyn Dataset>,
        preprocess: &Preprocess,
        progress: &mut dyn Progress,
    ) -> Result<ResizedImages, Error> {
        Ok(ResizedImages::read(
            Arc::clone(images),
            preprocess.clone(),
            self.teacher.device(),
            IMAGE_BYTES,
            true,
            progress,
        )?)
    }

    fn run(
        &mut self,
        key: RunKey,
        order: [usize; 2],
        task: &Task<'_>,
        test: &TestSet<'_>,
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        let path = key.path(&self.config.output);
        self.done += 1;
        let known = match path.exists().then(|| Record::read(&path)) {
            Some(Err(damaged @ Error::Record { .. })) => {
                progress.left_out(&damaged);
                None
            }
            found => found.transpose()?,
        };
        let (record, known) = if let Some(mut record) = known {
            if record.key != key {
                return Err(Error::Record {
                    path,
                    reason: "it was made with other settings; give the method another name, or the benchmark \
                             another output folder"
                        .into(),
                });
            }
            // Data sets or methods came before it in the configuration: tables follow the new order.
            if record.order != order {
                record.order = order;
                record.write(&path)?;
            }
            (record, true)
        } else {
            let record = self.fit_and_score(key, order, task, test, progress)?;
            record.write(&path)?;
            (record, false)
        };
        progress.run(&RunState {
            done: self.done,
            total: self.total,
            record: &record,
            known,
            seconds: self.start.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    fn fit_and_score(
        &self,
        key: RunKey,
        order: [usize; 2],
        task: &Task<'_>,
        test: &TestSet<'_>,
        progress: &mut dyn Progress,
    ) -> Result<Record, Error> {
        let split = task.split;
        let start = Instant::now();
        let normal =
            defend_core::data::Subset::new(test.halves.train.clone(), split.train.clone())?;
        let method = task.method.config.method();
        let detector = method.fit(&self.teacher, Arc::new(normal), key.seed, progress)?;
        let fit_seconds = start.elapsed().as_secs_f64();

        // Images of another size, or in tiles, are read once more.
        let own = if detector.preprocess() == self.teacher.preprocess() {
            None
        } else {
            Some(self.read(&test.originals, detector.preprocess(), progress)?)
        };
        let images = own.as_ref().unwrap_or(&test.images);
        let start = Instant::now();
        let with_maps = test.masks.is_some() || task.experiment.is_some();
        let novelties = score(&*detector, images, with_maps)?;
        let score_seconds = start.elapsed().as_secs_f64();
        let scores: Vec<Scored> = (split.test.iter().zip(&split.abnormal).zip(&novelties))
            .map(|((&index, &abnormal), novelty)| Scored {
                index,
                name: test.halves.test.name(index).into_owned(),
                abnormal,
                score: novelty.score,
            })
            .collect();
        if let Some(wrong) = scores.iter().find(|scored| !scored.score.is_finite()) {
            return Err(CoreError::NonFiniteScore {
                name: wrong.name.clone(),
                score: wrong.score,
            }
            .into());
        }
        let values: Vec<f64> = scores.iter().map(|s| s.score).collect();
        let (values, truth) = (ArrayView1::from(&values), ArrayView1::from(&split.abnormal));
        let maps: Vec<Option<&PatchMap>> = novelties.iter().map(|n| n.map.as_ref()).collect();
        let all_maps: Option<Vec<&PatchMap>> = maps.iter().copied().collect();
        let pixels = pixel_figures(test.masks.as_deref(), &maps)?;
        let objects = match task.experiment {
            Some(experiment) => {
                let normal = |class| experiment.protocol.label(&[class]) == Label::Normal;
                object_figures(&*test.halves.test, &split.test, &normal, &maps)?
            }
            None => None,
        };
        Ok(Record {
            figures: Figures {
                auroc: auroc(values, truth)?,
                average_precision: average_precision(values, truth)?,
                pixel_auroc: pixels.map(|p| p.auroc),
                pro: pixels.map(|p| p.pro),
                object_auroc: objects.map(|o| o.pooled),
                object_auroc_within: objects.map(|o| o.within),
            },
            worst: worst(&*detector, images, &scores, &novelties)?,
            map_scale: all_maps.map(|maps| MapScale::from_maps(&maps, 1.0)),
            deviations: method.deviations().into(),
            source: test.source.clone(),
            backbone: self.config.backbone.clone(),
            software: Software::this(self.teacher.device()),
            finished: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |time| time.as_secs()),
            train_images: split.train.len(),
            key,
            order,
            fit_seconds,
            score_seconds,
            scores,
        })
    }
}

/// Scores all images, with maps where they cost nothing or pixels are to be judged.
fn score(
    detector: &dyn NoveltyDetector,
    images: &ResizedImages,
    with_maps: bool,
) -> Result<Vec<Novelty>, Error> {
    let indices: Vec<usize> = (0..images.len()).collect();
    let mut all = Vec::with_capacity(indices.len());
    for batch in indices.chunks(detector.batch_size()) {
        let images = images.images(batch)?;
        all.extend(if with_maps {
            detector.score_with_maps(&images)?
        } else {
            detector.score(&images)?
        });
    }
    Ok(all)
}

/// The normal images with the highest scores and the abnormal ones with the lowest, worst first, with their maps.
fn worst(
    detector: &dyn NoveltyDetector,
    images: &ResizedImages,
    scores: &[Scored],
    novelties: &[Novelty],
) -> Result<Vec<Worst>, Error> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].score.total_cmp(&scores[b].score));
    let misses = order.iter().filter(|&&i| scores[i].abnormal);
    let alarms = order.iter().rev().filter(|&&i| !scores[i].abnormal);
    let kept = |&place: &usize| -> Result<Worst, Error> {
        let mut map = novelties.get(place).and_then(|n| n.map.clone());
        if map.is_none() {
            let mut again = detector.score_with_maps(&images.images(&[place])?)?;
            map = again.pop().and_then(|novelty| novelty.map);
        }
        Ok(Worst {
            place,
            grid: map.as_ref().map(|map| map.grid),
            map: map.map(|map| map.values).unwrap_or_default(),
        })
    };
    let errors = alarms.take(WORST).chain(misses.take(WORST));
    errors.map(kept).collect()
}
