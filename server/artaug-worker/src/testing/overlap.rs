//! Meetings of the thread that draws with those that advise, score and write: work at the same time is shown and not timed.

use std::{
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use concord_artaug::engine::Order;

use super::HELD_OUT;

/// After so long nobody comes any more.
const LONGEST: Duration = Duration::from_mins(1);

/// Two threads: each goes on when the other has come.
#[derive(Debug, Default)]
struct Meeting {
    /// Whether the drawing has come, and whether the other has.
    come: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Meeting {
    /// The drawing comes and waits for the other.
    fn draw(&self, other: &str) {
        self.meet(|come| come.0 = true, |come| come.1, || {
            format!("nobody is {other} while the second batch is drawn: the drawing waits for nothing")
        });
    }

    /// The other comes and waits for the drawing.
    fn join(&self, who: &str) {
        self.meet(
            |come| come.1 = true,
            |come| come.0,
            || {
                format!(
                    "the second batch is not drawn while the first is in the hands of who is {who}"
                )
            },
        );
    }

    fn meet(
        &self,
        come: impl FnOnce(&mut (bool, bool)),
        is_there: impl Fn(&(bool, bool)) -> bool,
        sentence: impl FnOnce() -> String,
    ) {
        let mut state = self.come.lock().unwrap_or_else(PoisonError::into_inner);
        come(&mut state);
        self.changed.notify_all();
        let waited = self
            .changed
            .wait_timeout_while(state, LONGEST, |state| !is_there(state));
        let met = is_there(&waited.unwrap_or_else(PoisonError::into_inner).0);
        assert!(met, "{}", sentence());
    }

    fn took_place(&self) -> bool {
        *self.come.lock().unwrap_or_else(PoisonError::into_inner) == (true, true)
    }
}

/// The second batch of a kind is drawn only while the first is advised on, scored and written, and the other way round.
#[derive(Debug, Default)]
pub(crate) struct Overlap {
    writing: Meeting,
    advising: Meeting,
    scoring: Meeting,
    judging: Meeting,
    /// Batches begun: base, enhanced and held-out ones.
    begun: [AtomicUsize; 3],
}

impl Overlap {
    /// The engine begins a batch.
    pub(crate) fn drawing(&self, orders: &[Order]) {
        let kind = if orders
            .iter()
            .all(|order| HELD_OUT.contains(&order.prompt.as_str()))
        {
            2
        } else {
            usize::from(orders.iter().any(|order| !order.regions.is_empty()))
        };
        if self.begun[kind].fetch_add(1, Ordering::SeqCst) != 1 {
            return;
        }
        match kind {
            0 => {
                self.writing.draw("writing");
                self.advising.draw("advising");
            }
            1 => self.scoring.draw("scoring"),
            _ => self.judging.draw("judging"),
        }
    }

    /// The advisor is asked.
    pub(crate) fn advising(&self) {
        self.advising.join("advising");
    }

    /// A scorer is asked.
    pub(crate) fn scoring(&self, scorer: &str) {
        match scorer {
            "photometry" => self.scoring.join("scoring"),
            "statistics" => self.judging.join("judging"),
            _ => {}
        }
    }

    /// An image is brought to the server.
    pub(crate) fn writing(&self) {
        self.writing.join("writing");
    }

    /// Whether each has met the drawing.
    pub(crate) fn took_place(&self) -> bool {
        let meetings = [&self.writing, &self.advising, &self.scoring, &self.judging];
        meetings.into_iter().all(Meeting::took_place)
    }
}
