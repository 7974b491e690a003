//! When somebody was last heard of: what is known of workers that hold no job. Only in memory; a start begins with nobody.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

use concord_common::Timestamp;

/// The last sign of life.
#[derive(Debug)]
pub struct LastSeen(AtomicI64);

impl Default for LastSeen {
    fn default() -> Self {
        Self(AtomicI64::new(i64::MIN))
    }
}

impl LastSeen {
    /// Somebody is there.
    pub fn note(&self, now: Timestamp) {
        self.0.fetch_max(now.as_millis(), Ordering::Relaxed);
    }

    /// Whether somebody was there within this time before `now`.
    pub fn within(&self, time: Duration, now: Timestamp) -> bool {
        let last = self.0.load(Ordering::Relaxed);
        last != i64::MIN && Timestamp(last) + time >= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_sign_of_life_counts_for_a_while() {
        let (seen, minute) = (LastSeen::default(), Duration::from_mins(1));
        assert!(!seen.within(minute, Timestamp(0)));
        seen.note(Timestamp(5_000));
        // A clock that was set back does not make it older.
        seen.note(Timestamp(4_000));
        assert!(seen.within(minute, Timestamp(65_000)));
        assert!(!seen.within(minute, Timestamp(65_001)));
    }
}
