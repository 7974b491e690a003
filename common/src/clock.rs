//! Time as a parameter: everything that needs "now" takes a [`Clock`].

use std::{
    fmt,
    ops::{Add, Sub},
    sync::{LazyLock, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

/// A moment, in milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// Milliseconds since the Unix epoch.
    pub fn as_millis(self) -> i64 {
        self.0
    }

    /// Time from `earlier` to `self`; zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0 - earlier.0).unwrap_or(0))
    }

    /// The protobuf form.
    pub fn to_proto(self) -> prost_types::Timestamp {
        prost_types::Timestamp {
            seconds: self.0.div_euclid(1000),
            nanos: (self.0.rem_euclid(1000) * 1_000_000) as i32,
        }
    }

    /// From the protobuf form, rounded down to milliseconds.
    pub fn from_proto(proto: &prost_types::Timestamp) -> Self {
        Self(
            proto
                .seconds
                .saturating_mul(1000)
                .saturating_add(i64::from(proto.nanos) / 1_000_000),
        )
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)),
        )
    }
}

impl Sub<Duration> for Timestamp {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)),
        )
    }
}

/// 9999-12-31T23:59:59Z, the last second that RFC 3339 can write.
const LAST_SECOND: u64 = 253_402_300_799;

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since_epoch = Duration::from_millis(u64::try_from(self.0).unwrap_or(0));
        if since_epoch.as_secs() > LAST_SECOND {
            return write!(f, "{} s after 1970", since_epoch.as_secs());
        }
        let time = UNIX_EPOCH + since_epoch;
        write!(f, "{}", humantime::format_rfc3339_seconds(time))
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Where "now" comes from.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The present moment.
    fn now(&self) -> Timestamp;

    /// Time since a moment that stays the same as long as the process lives, to measure how long something takes. Whoever sets the
    /// machine's clock does not change it, and while the machine sleeps it stands still. Clocks that nobody sets can leave it as it is.
    fn steady(&self) -> Duration {
        self.now().since(Timestamp(0))
    }
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that reads the machine's clock"
    )]
    fn now(&self) -> Timestamp {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Timestamp(i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX))
    }

    fn steady(&self) -> Duration {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        START.elapsed()
    }
}

/// A clock that stands still until it is told to move; for tests and simulation.
#[derive(Debug)]
pub struct MockClock(Mutex<Shown>);

#[derive(Debug)]
struct Shown {
    now: Timestamp,
    steady: Duration,
}

impl MockClock {
    /// A clock that shows `start`.
    pub fn new(start: Timestamp) -> Self {
        Self(Mutex::new(Shown {
            now: start,
            steady: Duration::ZERO,
        }))
    }

    /// Moves the clock forward: time passes.
    pub fn advance(&self, by: Duration) {
        let mut shown = self.lock();
        shown.now = shown.now + by;
        shown.steady += by;
    }

    /// Sets the clock forward or back, and no time passes.
    pub fn set(&self, now: Timestamp) {
        self.lock().now = now;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shown> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Clock for MockClock {
    fn now(&self) -> Timestamp {
        self.lock().now
    }

    fn steady(&self) -> Duration {
        self.lock().steady
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_moment_can_be_written() {
        let written = |millis| Timestamp(millis).to_string();
        assert_eq!(written(1_700_000_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(written(-1), "1970-01-01T00:00:00Z");
        assert_eq!(written(253_402_300_799_999), "9999-12-31T23:59:59Z");
        assert_eq!(written(253_402_300_800_000), "253402300800 s after 1970");
        assert_eq!(written(i64::MAX), "9223372036854775 s after 1970");
    }

    #[test]
    fn a_clock_that_is_set_goes_on_steadily() {
        let clock = MockClock::new(Timestamp(5));
        clock.advance(Duration::from_secs(2));
        for set in [Timestamp(9_000_000), Timestamp(1)] {
            clock.set(set);
            assert_eq!((clock.now(), clock.steady()), (set, Duration::from_secs(2)));
        }
        let before = SystemClock.steady();
        assert!(SystemClock.steady() >= before);
        // Not the time since 1970, which somebody can set.
        assert!(before < Duration::from_hours(24 * 365));
    }
}
