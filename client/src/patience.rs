//! Trying again: exponential delays with jitter, for as long as it takes or until the daemon is told to stop.

use std::{future::Future, time::Duration};

use backon::{BackoffBuilder as _, ConstantBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio_util::sync::CancellationToken;

use crate::coordinator::CallError;

/// How long to wait between two attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// After the first failure, on average.
    pub first: Duration,
    /// At most.
    pub longest: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(500),
            longest: Duration::from_mins(1),
        }
    }
}

/// Delays that double from failure to failure, each with jitter so that silos do not come back all at once.
#[derive(Debug)]
pub struct Delays(ExponentialBackoff, Duration);

impl Pace {
    /// Begins anew.
    pub fn delays(&self) -> Delays {
        let delays = ExponentialBuilder::new()
            .with_min_delay(self.first)
            .with_max_delay(self.longest)
            .with_jitter()
            .without_max_times()
            .build();
        Delays(delays, self.longest)
    }
}

impl Delays {
    /// The next delay: at least this side's own, and as long as the server wishes, up to the longest. The wish gets jitter too,
    /// because a busy server tells all silos the same.
    pub fn next(&mut self, error: &CallError) -> Duration {
        let own = self.0.next().unwrap_or(self.1);
        match error {
            CallError::Unavailable {
                retry_after: Some(wish),
                ..
            } => own.max(jittered((*wish).min(self.1))),
            _ => own,
        }
    }
}

/// Up to twice as long.
fn jittered(delay: Duration) -> Duration {
    ConstantBuilder::new()
        .with_delay(delay)
        .with_jitter()
        .build()
        .next()
        .unwrap_or(delay)
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Halt {
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    Stopped,
    /// The server refused, or does not keep to the protocol.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Calls until the answer is no transient failure. `what` stands in the log.
///
/// # Errors
/// [`Halt`].
pub async fn patiently<T, F: Future<Output = Result<T, CallError>>>(
    what: &'static str,
    pace: Pace,
    stop: &CancellationToken,
    mut call: impl FnMut() -> F,
) -> Result<T, Halt> {
    let mut delays = pace.delays();
    loop {
        let answer = tokio::select! {
            biased;
            () = stop.cancelled() => return Err(Halt::Stopped),
            answer = call() => answer,
        };
        match answer {
            Err(error) if error.is_transient() => {
                let delay = delays.next(&error);
                tracing::warn!(%error, what, delay_ms = delay.as_millis() as u64, "will try again");
                pause(delay, stop).await?;
            }
            answer => return Ok(answer?),
        }
    }
}

/// Waits, unless the daemon stops first.
///
/// # Errors
/// [`Halt::Stopped`].
pub async fn pause(delay: Duration, stop: &CancellationToken) -> Result<(), Halt> {
    tokio::select! {
        () = stop.cancelled() => Err(Halt::Stopped),
        () = tokio::time::sleep(delay) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use concord_common::{ErrorCode, code::Refusal};

    use super::*;

    fn unavailable(retry_after: Option<Duration>) -> CallError {
        CallError::Unavailable {
            reason: "gone".to_owned(),
            retry_after,
        }
    }

    #[test]
    fn delays_grow_to_the_longest_and_stay_there() {
        let pace = Pace {
            first: Duration::from_millis(100),
            longest: Duration::from_secs(2),
        };
        let mut delays = pace.delays();
        let seen: Vec<Duration> = (0..50).map(|_| delays.next(&unavailable(None))).collect();
        assert!(
            seen[0] >= pace.first && seen[0] <= 2 * pace.first,
            "{seen:?}"
        );
        assert!(
            seen[10..].iter().all(|delay| *delay >= pace.longest),
            "{seen:?}"
        );
        assert!(
            seen.iter().all(|delay| *delay <= 2 * pace.longest),
            "{seen:?}"
        );
    }

    /// First delays after a server's wish.
    fn after_wish(wish: Duration) -> Vec<Duration> {
        (0..20)
            .map(|_| Pace::default().delays().next(&unavailable(Some(wish))))
            .collect()
    }

    #[test]
    fn the_servers_wish_is_kept_and_silos_do_not_come_back_all_at_once() {
        let wish = Duration::from_secs(7);
        let seen = after_wish(wish);
        assert!(
            seen.iter().all(|delay| (wish..=2 * wish).contains(delay)),
            "{seen:?}"
        );
        assert!(seen.iter().any(|delay| *delay != seen[0]), "{seen:?}");
    }

    #[test]
    fn a_wish_for_no_delay_makes_no_hot_loop() {
        let own = Pace::default().first;
        assert!(after_wish(Duration::ZERO).iter().all(|delay| *delay >= own));
    }

    #[test]
    fn a_wish_for_years_is_cut_to_the_longest_delay() {
        let longest = Pace::default().longest;
        let seen = after_wish(Duration::from_secs(u64::MAX));
        assert!(
            seen.iter()
                .all(|delay| (longest..=2 * longest).contains(delay)),
            "{seen:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_comes_back_is_reached_without_a_limit_of_attempts() {
        let attempts = Cell::new(0);
        let answer = patiently(
            "test",
            Pace::default(),
            &CancellationToken::new(),
            || async {
                attempts.set(attempts.get() + 1);
                if attempts.get() < 100 {
                    Err(unavailable(None))
                } else {
                    Ok(7)
                }
            },
        )
        .await;
        assert_eq!(answer, Ok(7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_not_tried_again() {
        let refusal = CallError::Refused(Refusal::new(ErrorCode::UnknownJob, "no"));
        let attempts = Cell::new(0);
        let answer: Result<(), Halt> = patiently(
            "test",
            Pace::default(),
            &CancellationToken::new(),
            || async {
                attempts.set(attempts.get() + 1);
                Err(refusal.clone())
            },
        )
        .await;
        assert_eq!(answer, Err(Halt::Call(refusal.clone())));
        assert_eq!(attempts.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_ends_the_waiting() {
        let stop = CancellationToken::new();
        let stopper = async {
            tokio::time::sleep(Duration::from_secs(100)).await;
            stop.cancel();
        };
        let waiting = patiently("test", Pace::default(), &stop, || async {
            Err::<(), _>(unavailable(None))
        });
        let (answer, ()) = tokio::join!(waiting, stopper);
        assert_eq!(answer, Err(Halt::Stopped));
    }
}
