//! The line of work on images: one thread draws batches, helpers put them down, advise and score meanwhile.
//!
//! Everyone takes what the state machine says is to be done and nobody has in hand, so nothing waits longer than it must. Batches that
//! are begun and not put down yet are bounded, for a kill loses them; when helpers fall behind, the drawing waits for them.

use std::{
    any::Any,
    collections::{BTreeSet, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
};

use concord_artaug::{
    engine::{Drawn, Order},
    image::Image,
    machine::{Group, Machine},
};

use super::Studio;
use crate::{brake::Halt, desk::Desk};

/// Batches that are begun and not put down yet: one is drawn while the one before is put down.
const IN_HAND: usize = 2;

/// Images that are computed in one go.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Batch {
    /// Whether it is of enhanced images.
    pub(super) enhanced: bool,
    /// Its members.
    pub(super) group: Group,
}

impl Batch {
    /// Batches of a kind do not overlap, so the first member names one.
    fn key(&self) -> (bool, u32) {
        let first = self.group.members.first().copied();
        (self.enhanced, first.unwrap_or_default())
    }
}

/// What helpers do beside putting down batches. The first in this order goes first: it ends what is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Chore {
    /// Score an item.
    Score(u32),
    /// Get advice on an item.
    Advise(u32),
}

/// One image of a batch.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    /// Its item.
    pub(super) item: u32,
    /// The image.
    pub(super) image: Image,
    /// Its part of the forward passes.
    pub(super) forwards: u64,
    /// Its part of the time.
    pub(super) seconds: f64,
}

/// What a line works on. The methods are called from several threads.
pub(super) trait Line: Sync {
    /// Batches that may be drawn, the first first.
    fn batches(&self, machine: &Machine) -> Vec<Batch>;
    /// What to draw for each member of a batch.
    fn orders(&self, batch: &Batch) -> Result<Vec<Order>, Halt>;
    /// Chores that may be done.
    fn chores(&self, machine: &Machine) -> Vec<Chore>;
    /// Puts down the missing members of a batch.
    fn keep(&self, batch: &Batch, pieces: Vec<Piece>) -> Result<(), Halt>;
    /// Does a chore.
    fn act(&self, chore: Chore) -> Result<(), Halt>;
}

/// What is in whose hands.
#[derive(Debug, Default)]
struct Hands {
    drawn: VecDeque<(Batch, Vec<Piece>)>,
    /// Batches from the beginning of their drawing until they are put down.
    batches: BTreeSet<(bool, u32)>,
    chores: BTreeSet<Chore>,
    /// The drawing has ended, for whatever reason.
    closed: bool,
}

struct Floor<'a, L> {
    desk: &'a Desk<'a>,
    line: &'a L,
    hands: Mutex<Hands>,
}

/// What a helper takes up.
enum Task {
    Keep(Batch, Vec<Piece>),
    Act(Chore),
}

/// Works until nothing is left to do on the line, or the job halts.
pub(super) fn run<L: Line>(
    desk: &Desk<'_>,
    studio: &mut Studio<'_>,
    line: &L,
    helpers: usize,
) -> Result<(), Halt> {
    let floor = Floor {
        desk,
        line,
        hands: Mutex::default(),
    };
    thread::scope(|scope| {
        for number in 0..helpers.max(1) {
            let floor = &floor;
            let help = move || guarded(floor.desk, || floor.help());
            let started = thread::Builder::new()
                .name(format!("helper-{number}"))
                .spawn_scoped(scope, help);
            if let Err(error) = started {
                return Err(desk.trouble(format!("no thread can be started: {error}")));
            }
        }
        let result = guarded(desk, || floor.draw(studio));
        floor.hands().closed = true;
        desk.stir();
        result
    })?;
    // What a helper ran into has pulled the brake.
    desk.brake().check()
}

/// Runs something that may panic; a panic, like an error, pulls the brake.
pub(crate) fn guarded<T>(
    desk: &Desk<'_>,
    work: impl FnOnce() -> Result<T, Halt>,
) -> Result<T, Halt> {
    // What a panic leaves behind is not used any more: the job ends.
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(Halt::Failed(format!(
            "the worker ran into a fault of its own: {}",
            message_of(panic.as_ref())
        )))
    });
    if let Err(halt) = &result {
        desk.brake().pull(halt.clone());
        desk.stir();
    }
    result
}

fn message_of(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("without a message")
}

impl<L: Line> Floor<'_, L> {
    fn hands(&self) -> MutexGuard<'_, Hands> {
        self.hands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine's thread.
    fn draw(&self, studio: &mut Studio<'_>) -> Result<(), Halt> {
        loop {
            let seen = self.desk.news();
            self.desk.check()?;
            if self.desk.is_out_of_time() {
                return Ok(()); // What to do about it is decided elsewhere.
            }
            let Some(batch) = self.next_batch() else {
                if self.is_idle() {
                    return Ok(());
                }
                self.desk.wait_for_news(seen);
                continue;
            };
            let orders = self.line.orders(&batch)?;
            let (drawn, seconds) = studio.draw(&orders)?;
            let pieces = pieces(&batch, drawn, seconds);
            self.hands().drawn.push_back((batch, pieces));
            self.desk.stir();
        }
    }

    /// Takes up a batch, if there is one and room for it.
    fn next_batch(&self) -> Option<Batch> {
        // Hands first, here and below: what leaves them is in the machine by then.
        let mut hands = self.hands();
        if hands.batches.len() >= IN_HAND {
            return None;
        }
        let batches = self.desk.look(|machine| self.line.batches(machine));
        let next = batches
            .into_iter()
            .find(|batch| !hands.batches.contains(&batch.key()))?;
        hands.batches.insert(next.key());
        Some(next)
    }

    /// Whether nothing is to be done and nothing in hand.
    fn is_idle(&self) -> bool {
        let hands = self.hands();
        hands.batches.is_empty()
            && hands.chores.is_empty()
            && self.desk.look(|machine| {
                self.line.batches(machine).is_empty() && self.line.chores(machine).is_empty()
            })
    }

    /// A helper's thread.
    fn help(&self) -> Result<(), Halt> {
        loop {
            let seen = self.desk.news();
            match self.next_task()? {
                Some(Task::Keep(batch, pieces)) => {
                    self.line.keep(&batch, pieces)?;
                    self.hands().batches.remove(&batch.key());
                }
                Some(Task::Act(chore)) => {
                    self.line.act(chore)?;
                    self.hands().chores.remove(&chore);
                }
                None if self.is_closed() => return Ok(()),
                None => {
                    self.desk.wait_for_news(seen);
                    continue;
                }
            }
            self.desk.stir();
        }
    }

    /// After the last batch is put down there may be chores left; the drawing waits for them unless it was halted.
    fn is_closed(&self) -> bool {
        let hands = self.hands();
        hands.closed && hands.drawn.is_empty()
    }

    fn next_task(&self) -> Result<Option<Task>, Halt> {
        self.desk.brake().check_now()?;
        let mut hands = self.hands();
        // What is drawn is put down also when the job is to stop; no chore is begun then.
        if let Some((batch, pieces)) = hands.drawn.pop_front() {
            return Ok(Some(Task::Keep(batch, pieces)));
        }
        if hands.closed || self.desk.brake().halt().is_some() {
            return Ok(None);
        }
        let chores = self.desk.look(|machine| self.line.chores(machine));
        let next = chores
            .into_iter()
            .filter(|chore| !hands.chores.contains(chore))
            .min();
        if let Some(chore) = next {
            hands.chores.insert(chore);
        }
        Ok(next.map(Task::Act))
    }
}

/// The images of a batch with their parts of what it cost; the first takes what cannot be divided.
fn pieces(batch: &Batch, drawn: Drawn, seconds: f64) -> Vec<Piece> {
    let members = drawn.images.len().max(1) as u64;
    let (part, rest) = (drawn.forwards / members, drawn.forwards % members);
    batch
        .group
        .members
        .iter()
        .zip(drawn.images)
        .enumerate()
        .map(|(place, (item, image))| Piece {
            item: *item,
            image,
            forwards: part + if place == 0 { rest } else { 0 },
            seconds: seconds / members as f64,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use concord_artaug::{folder::JobFolder, setup};
    use concord_common::{Digest, SystemClock, job::artaug::ArtaugSpec};
    use concord_proto::v1;

    use super::*;
    use crate::{
        brake::Brake,
        desk::Board,
        limits::MemoryLimit,
        remote::{Lease, Pace},
        testing::{FakeServer, SPEC},
    };

    /// Batches of one image each, and nothing else to do.
    struct Singles;

    impl Line for Singles {
        fn batches(&self, _machine: &Machine) -> Vec<Batch> {
            let of = |item| Batch {
                enhanced: false,
                group: Group {
                    members: vec![item],
                    missing: vec![item],
                },
            };
            (0..9).map(of).collect()
        }

        fn orders(&self, _batch: &Batch) -> Result<Vec<Order>, Halt> {
            Ok(Vec::new())
        }

        fn chores(&self, _machine: &Machine) -> Vec<Chore> {
            Vec::new()
        }

        fn keep(&self, _batch: &Batch, _pieces: Vec<Piece>) -> Result<(), Halt> {
            Ok(())
        }

        fn act(&self, _chore: Chore) -> Result<(), Halt> {
            Ok(())
        }
    }

    #[test]
    fn no_third_batch_is_begun_before_the_first_is_put_down() {
        let place = tempfile::tempdir().unwrap();
        let spec = ArtaugSpec::parse(SPEC).unwrap();
        let clock = Arc::new(SystemClock);
        let specification = Digest::of(SPEC.as_bytes());
        let (plan, quota) = (setup::plan(&spec), 1 << 20);
        let folder =
            JobFolder::adopt(place.path(), plan, specification, quota, clock.clone(), &[]).unwrap();
        let lease = Lease::new(
            Arc::new(FakeServer::new(SPEC)),
            &v1::WorkerLease::default(),
            Arc::new(Brake::new(Duration::ZERO)),
            Pace::default(),
        );
        let board = Board::default();
        let (memory, time) = (MemoryLimit(u64::MAX), Duration::from_hours(1));
        let desk = Desk::new(folder, &lease, &board, clock.as_ref(), memory, time, false);
        let floor = Floor {
            desk: &desk,
            line: &Singles,
            hands: Mutex::default(),
        };
        let first = floor.next_batch().unwrap();
        assert!(floor.next_batch().is_some());
        // Also one that a helper has taken from the drawn ones, or that the engine is at, is in hand.
        assert_eq!(floor.next_batch(), None);
        floor.hands().batches.remove(&first.key());
        assert!(floor.next_batch().is_some());
        assert_eq!(floor.next_batch(), None);
    }
}
