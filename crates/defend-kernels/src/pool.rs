//! Memory of the kernels, used again from call to call.
//!
//! A training step needs the same large buffers as the step before. Fresh ones cost twice: the operating system clears
//! their pages, and `vec![0.0; n]` clears them again. Measured on the student step: a sixth of its time.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

static IDLE: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

thread_local! {
    static OWN: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

fn idle() -> MutexGuard<'static, Vec<Vec<f32>>> {
    // Each buffer is whole at any time, so a poisoned lock does no harm.
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Values that are used again when they are dropped.
#[derive(Debug)]
pub struct Buffer {
    values: Vec<f32>,
    len: usize,
    home: Home,
}

/// Where a buffer's values go when it is dropped.
#[derive(Debug)]
enum Home {
    Pool,
    Thread,
    Nowhere,
}

impl Buffer {
    /// `len` values; what they hold is left over from earlier use.
    pub fn recycled(len: usize) -> Self {
        let mut idle = idle();
        let fitting = (0..idle.len()).filter(|&i| (len..=2 * len).contains(&idle[i].len()));
        let smallest = fitting.min_by_key(|&i| idle[i].len());
        let values = smallest.map(|i| idle.swap_remove(i));
        drop(idle);
        let values = values.unwrap_or_else(|| vec![0.0; len]);
        #[cfg(test)]
        let values = tests::spoilt(values);
        Self {
            values,
            len,
            home: Home::Pool,
        }
    }

    /// The same from the calling thread's own memory, for short work that would wait for the pool's lock where there are many
    /// threads. A thread keeps as many values as it needed at most.
    pub fn of_thread(len: usize) -> Self {
        let mut values = OWN.take();
        if values.len() < len {
            values = vec![0.0; len];
        }
        #[cfg(test)]
        let values = tests::spoilt(values);
        Self {
            values,
            len,
            home: Home::Thread,
        }
    }

    /// Keeps the values for good: they take no more memory than they need, and do not go back.
    pub fn keep(&mut self) {
        self.values.truncate(self.len);
        self.values.shrink_to_fit();
        self.home = Home::Nowhere;
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        match self.home {
            Home::Pool if self.len > 0 => idle().push(values),
            Home::Thread => OWN.set(values),
            Home::Pool | Home::Nowhere => (),
        }
    }
}

/// Gives the memory that operations on the CPU keep for their next call back, forward passes as well, but for some 100 to 400 KB a
/// thread; training loops do so at their end.
pub fn release_memory() {
    idle().clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In this crate's tests what is left over is never a number, so that nothing can come of it unnoticed.
    pub(super) fn spoilt(mut values: Vec<f32>) -> Vec<f32> {
        values.fill(f32::NAN);
        values
    }

    #[test]
    fn buffers_come_back_in_a_size_that_fits() {
        // A size that no other test asks for.
        const LEN: usize = 1_234_567;
        let buffer = Buffer::recycled(LEN);
        let memory = buffer.as_ptr();
        drop(buffer);
        assert_ne!(Buffer::recycled(LEN / 4).as_ptr(), memory);
        let smaller = Buffer::recycled(LEN - 1);
        assert_eq!((smaller.len(), smaller.as_ptr()), (LEN - 1, memory));
        let mut kept = smaller;
        kept.keep();
        let memory = kept.as_ptr();
        let another = Buffer::recycled(LEN - 1);
        drop(kept);
        assert_ne!(another.as_ptr(), memory);
        assert_ne!(Buffer::recycled(LEN - 1).as_ptr(), memory);
    }
}
