//! Signs of life of a service's main loops.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// The sign of life of one loop: it beats at each turn, and counts as stuck once it has not beaten for longer than it was
/// allowed. Clones are the same heart, so that a worker thread can beat for a loop that waits for it.
#[derive(Debug, Clone)]
pub struct Heartbeat(Arc<Heart>);

#[derive(Debug)]
struct Heart {
    name: &'static str,
    allowance: Duration,
    start: Instant,
    /// When the next beat is due, in milliseconds after `start`.
    due: AtomicU64,
}

impl Heartbeat {
    /// A heart that beats now and must beat again within each `allowance`.
    pub fn new(name: &'static str, allowance: Duration) -> Self {
        let heart = Self(Arc::new(Heart {
            name,
            allowance,
            start: Instant::now(),
            due: AtomicU64::new(0),
        }));
        heart.beat();
        heart
    }

    /// Whose heart it is.
    pub fn name(&self) -> &'static str {
        self.0.name
    }

    /// A turn of the loop; the next one is due within the allowance.
    pub fn beat(&self) {
        self.beat_within(self.0.allowance);
    }

    /// A turn after which the next beat may take `time`: for a step that is known to be longer than the others.
    pub fn beat_within(&self, time: Duration) {
        let due = self.0.start.elapsed().saturating_add(time);
        let millis = u64::try_from(due.as_millis()).unwrap_or(u64::MAX);
        self.0.due.store(millis, Ordering::Relaxed);
    }

    /// Whether the loop still turns: its next beat is not overdue.
    pub fn is_alive(&self) -> bool {
        let due = Duration::from_millis(self.0.due.load(Ordering::Relaxed));
        self.0.start.elapsed() <= due
    }
}
