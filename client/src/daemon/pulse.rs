//! The daemon's sign of life for the watchdog.

use std::time::Duration;

use concord_common::lifecycle::Heartbeat;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::bench::Activity;

/// Between two beats.
const EVERY: Duration = Duration::from_secs(1);
/// How long the torch thread may work without a sign: it gives one at each training step, each batch of an evaluation and each file
/// or split that it makes ready. A large backbone takes minutes. It is long because a restart would begin the same work anew.
pub const TORCH_SILENCE: Duration = Duration::from_hours(1);

/// Beats for as long as the task that waits for this is polled and the torch thread gets on with its work, if it has any. Never
/// ends: the caller runs it beside the loop that it speaks for.
pub(super) async fn beat(heart: &Heartbeat, torch: &Activity) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = (torch.turns(), Instant::now());
    let mut told = false;
    loop {
        ticks.tick().await;
        let turns = torch.turns();
        if !torch.is_busy() || turns != seen.0 {
            seen = (turns, Instant::now());
            told = false;
        }
        if seen.1.elapsed() <= TORCH_SILENCE {
            heart.beat();
        } else if !told {
            tracing::error!(
                minutes = TORCH_SILENCE.as_secs() / 60,
                "the torch thread has given no sign for too long; the daemon counts as stuck"
            );
            told = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::{select, time::sleep};

    use super::*;

    const ALLOWANCE: Duration = Duration::from_secs(30);

    /// Whether the heart has beaten, after `time` of a torch thread that `act` has dealt with.
    async fn is_alive_after(
        time: Duration,
        act: impl Future<Output = ()>,
        torch: &Activity,
    ) -> bool {
        let heart = Heartbeat::new("daemon", ALLOWANCE);
        select! {
            () = beat(&heart, torch) => unreachable!("it never ends"),
            () = async { tokio::join!(act, sleep(time)); } => heart.is_alive(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_daemon_beats() {
        let torch = Activity::default();
        assert!(is_alive_after(10 * TORCH_SILENCE, async {}, &torch).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_round_beats_while_its_steps_go_on() {
        let torch = Arc::new(Activity::default());
        let training = async {
            let _running = torch.begin();
            for _ in 0..10 {
                sleep(TORCH_SILENCE / 2).await;
                torch.turn();
            }
        };
        assert!(is_alive_after(Duration::ZERO, training, &torch).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_trainer_that_hangs_stops_the_beats_and_one_that_goes_on_begins_them_again() {
        let torch = Arc::new(Activity::default());
        let _running = torch.begin();
        let half = TORCH_SILENCE / 2;
        assert!(is_alive_after(half, async {}, &torch).await);
        let long = TORCH_SILENCE + 2 * ALLOWANCE;
        assert!(!is_alive_after(long, async {}, &torch).await);
        let late = async {
            sleep(long).await;
            torch.turn();
        };
        assert!(is_alive_after(long + Duration::from_secs(2), late, &torch).await);
    }
}
