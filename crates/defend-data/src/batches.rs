//! Decoding and resizing ahead of whoever uses the images.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, LazyLock};
use std::thread::{self, JoinHandle};

use image::RgbImage;
use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};

use crate::{Dataset, Error, Preprocess};

/// Apart from rayon's global pool: a consumer that runs on that one and waits for a batch would
/// otherwise hold the very thread that has to decode it.
static POOL: LazyLock<Option<ThreadPool>> = LazyLock::new(|| {
    ThreadPoolBuilder::new()
        // As many as whoever set up the global pool allows.
        .num_threads(rayon::current_num_threads())
        .thread_name(|i| format!("defend-decode-{i}"))
        .build()
        .ok()
});

/// Images that were read and resized together.
#[derive(Debug, Default)]
pub struct Batch {
    /// Position of each image in the data set.
    pub indices: Vec<usize>,
    /// Resized images, as many as `indices`; none when all of the batch failed.
    pub images: Vec<RgbImage>,
    /// What could not be read; the consumer decides what follows from it.
    pub failures: Vec<Failure>,
}

/// An image that could not be read or resized.
#[derive(Debug)]
pub struct Failure {
    /// Position in the data set.
    pub index: usize,
    /// Name in the data set.
    pub name: String,
    /// What is wrong with it.
    pub error: Error,
}

/// Iterator over resized images in the order asked for, at most two batches ahead.
///
/// Dropping it early stops the decoding.
///
/// # Panics
/// `next` hands on a panic of [`Dataset::image`], as if it had been called right there.
pub struct Batches {
    /// `None` once the end was reached or the drop began.
    receiver: Option<Receiver<Batch>>,
    producer: Option<JoinHandle<()>>,
    cancelled: Arc<AtomicBool>,
    remaining: usize,
}

impl Batches {
    /// Starts to read the images `indices` of `dataset` in groups of `batch_size`, the last may be
    /// smaller.
    ///
    /// # Errors
    /// [`Error::Config`] when `batch_size` is 0 or `preprocess` is out of range; [`Error::Thread`].
    pub fn new(
        dataset: Arc<dyn Dataset>,
        indices: Vec<usize>,
        preprocess: Preprocess,
        batch_size: usize,
    ) -> Result<Self, Error> {
        preprocess.validate()?;
        if batch_size == 0 {
            return Err(Error::Config {
                field: "batch_size",
                value: 0.0,
                expected: "at least 1",
            });
        }
        let remaining = indices.len().div_ceil(batch_size);
        // One batch waits in the channel while the producer holds the next: two ahead.
        let (sender, receiver) = sync_channel(1);
        let cancelled = Arc::new(AtomicBool::new(false));
        let source = Source {
            dataset,
            preprocess,
            cancelled: Arc::clone(&cancelled),
        };
        let producer = thread::Builder::new()
            .name("defend-batches".into())
            .spawn(move || source.send_all(&indices, batch_size, &sender))
            .map_err(|source| Error::Thread { source })?;
        Ok(Self {
            receiver: Some(receiver),
            producer: Some(producer),
            cancelled,
            remaining,
        })
    }
}

impl Iterator for Batches {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        if let Ok(batch) = self.receiver.as_ref()?.recv() {
            self.remaining = self.remaining.saturating_sub(1);
            return Some(batch);
        }
        self.receiver = None;
        self.remaining = 0;
        // The channel also closes when the producer dies, which must not look like the end.
        if let Some(Err(panic)) = self.producer.take().map(JoinHandle::join) {
            resume_unwind(panic);
        }
        None
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.remaining, Some(self.remaining))
    }
}

impl ExactSizeIterator for Batches {}

impl Drop for Batches {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        // Wakes a producer that waits to send.
        self.receiver = None;
        if let Some(producer) = self.producer.take() {
            // A panic of a data set that nobody waits for any more is of no consequence.
            drop(producer.join());
        }
    }
}

/// What the producer's thread works with.
struct Source {
    dataset: Arc<dyn Dataset>,
    preprocess: Preprocess,
    cancelled: Arc<AtomicBool>,
}

impl Source {
    fn send_all(&self, indices: &[usize], batch_size: usize, sender: &SyncSender<Batch>) {
        for group in indices.chunks(batch_size) {
            let read = || self.read(group);
            let Some(batch) = POOL.as_ref().map_or_else(read, |pool| pool.install(read)) else {
                return;
            };
            if sender.send(batch).is_err() {
                return;
            }
        }
    }

    /// `None` when the consumer has gone.
    fn read(&self, indices: &[usize]) -> Option<Batch> {
        let images: Option<Vec<_>> = indices
            .par_iter()
            .map(|&index| {
                let go_on = !self.cancelled.load(Ordering::Relaxed);
                go_on.then(|| (index, self.preprocess.read(&*self.dataset, index)))
            })
            .collect();
        let mut batch = Batch::default();
        for (index, image) in images? {
            match image {
                Ok(image) => {
                    batch.indices.push(index);
                    batch.images.push(image);
                }
                Err(error) => {
                    let name = self.dataset.name(index).into_owned();
                    batch.failures.push(Failure { index, name, error });
                }
            }
        }
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use image::Rgb;

    use super::*;
    use crate::ClassId;

    /// Counts what is read; sample 3 is broken, and so are those past the end.
    struct Counting {
        reads: AtomicUsize,
        panics_at: Option<usize>,
    }

    impl Dataset for Counting {
        fn len(&self) -> usize {
            100
        }

        fn name(&self, index: usize) -> Cow<'_, str> {
            format!("image {index}").into()
        }

        fn image(&self, index: usize) -> Result<RgbImage, Error> {
            self.reads.fetch_add(1, Ordering::SeqCst);
            assert!(self.panics_at != Some(index), "sample {index} is cursed");
            if index == 3 || index >= 100 {
                return Err(Error::Index { index, len: 100 });
            }
            Ok(RgbImage::from_pixel(
                1 + index as u32,
                2,
                Rgb([index as u8; 3]),
            ))
        }

        fn classes(&self, _index: usize) -> &[ClassId] {
            &[]
        }

        fn class_names(&self) -> &[String] {
            &[]
        }
    }

    fn counting(panics_at: Option<usize>) -> Arc<Counting> {
        Arc::new(Counting {
            reads: AtomicUsize::new(0),
            panics_at,
        })
    }

    fn batches(dataset: &Arc<Counting>, indices: Vec<usize>, batch: usize) -> Batches {
        let preprocess = Preprocess::new(2, [0.5; 3], [0.5; 3]);
        Batches::new(
            Arc::clone(dataset) as Arc<dyn Dataset>,
            indices,
            preprocess,
            batch,
        )
        .unwrap()
    }

    #[test]
    fn keeps_the_order_and_reports_failures() {
        let mut all = batches(&counting(None), vec![5, 3, 1, 200, 0], 2);
        assert_eq!(all.len(), 3);
        let first = all.next().unwrap();
        assert_eq!((first.indices, first.failures[0].index), (vec![5], 3));
        assert_eq!(first.failures[0].name, "image 3");
        assert_eq!(first.images, [RgbImage::from_pixel(2, 2, Rgb([5; 3]))]);
        let second = all.next().unwrap();
        assert_eq!((second.indices, second.failures.len()), (vec![1], 1));
        assert_eq!(all.next().unwrap().indices, [0]);
        assert!(all.next().is_none() && all.next().is_none());
    }

    #[test]
    fn no_index_no_batch() {
        assert!(batches(&counting(None), vec![], 4).next().is_none());
    }

    #[test]
    fn stays_two_batches_ahead_and_stops_when_dropped() {
        let dataset = counting(None);
        let mut all = batches(&dataset, (4..100).collect(), 4);
        drop(all.next());
        thread::sleep(Duration::from_millis(200));
        // One taken, two ahead.
        assert_eq!(dataset.reads.load(Ordering::SeqCst), 12);
        drop(all);
        assert_eq!(dataset.reads.load(Ordering::SeqCst), 12);
        // The thread has let go of the data set.
        assert_eq!(Arc::strong_count(&dataset), 1);
    }

    #[test]
    fn works_from_within_a_pool_of_one() {
        let pool = ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let count = pool.install(|| batches(&counting(None), (0..50).collect(), 4).count());
        assert_eq!(count, 13);
    }

    #[test]
    fn a_panic_is_not_an_end() {
        let mut all = batches(&counting(Some(2)), (0..4).collect(), 2);
        assert!(all.next().is_some());
        assert!(catch_unwind(AssertUnwindSafe(|| all.next())).is_err());
        assert!(all.next().is_none());
    }

    #[test]
    fn refuses_batches_of_nothing() {
        let preprocess = Preprocess::new(2, [0.5; 3], [0.5; 3]);
        let result = Batches::new(counting(None), vec![0], preprocess.clone(), 0);
        assert!(matches!(
            result,
            Err(Error::Config {
                field: "batch_size",
                ..
            })
        ));
        let bad = Preprocess {
            size: 0,
            ..preprocess
        };
        assert!(Batches::new(counting(None), vec![0], bad, 1).is_err());
    }
}
