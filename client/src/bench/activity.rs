//! Signs that the torch thread gets on with its work.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

/// Whether a torch job runs, and a number that grows when one begins, makes a training step, evaluates a batch, has read a file or ends.
#[derive(Debug, Default)]
pub struct Activity {
    running: AtomicUsize,
    turns: AtomicU64,
}

impl Activity {
    /// Whether a job is running.
    pub fn is_busy(&self) -> bool {
        self.running.load(Ordering::Relaxed) > 0
    }

    /// Grows with every sign of life.
    pub fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// A sign of life.
    pub(crate) fn turn(&self) {
        self.turns.fetch_add(1, Ordering::Relaxed);
    }

    /// A job begins; it ends, or panics, when the answer is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> Running {
        self.running.fetch_add(1, Ordering::Relaxed);
        self.turn();
        Running(Arc::clone(self))
    }
}

/// A running job.
#[derive(Debug)]
pub(crate) struct Running(Arc<Activity>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
        self.0.turn();
    }
}
