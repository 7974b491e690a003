//! The line of work on images: one thread draws batches, helpers put them down, advise and score meanwhile.
//!
//! Everyone takes what the state machine says is to be done and nobody has in hand, so nothing waits longer than it must. Batches that
//! are begun and not put down yet are bounded, for a kill loses them; when helpers fall behind, the drawing waits for them.

use std::{
    any::Any,
    collections::{BTreeMap, BTreeSet, VecDeque},
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
    /// How many of its texts are longer than the model reads of them.
    pub(super) cut: usize,
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
    /// The images of a batch in portions; several helpers put them down at the same time.
    fn portions(&self, pieces: Vec<Piece>) -> Vec<Vec<Piece>> {
        vec![pieces]
    }
    /// Puts down those of a portion that are missing.
    fn keep(&self, batch: &Batch, portion: Vec<Piece>) -> Result<(), Halt>;
    /// Does a chore.
    fn act(&self, chore: Chore) -> Result<(), Halt>;
}

/// What is in whose hands.
#[derive(Debug, Default)]
struct Hands {
    /// Portions that nobody has taken yet.
    drawn: VecDeque<(Batch, Vec<Piece>)>,
    /// Batches from the beginning of their drawing until they are put down, with the number of their portions that are not; one while
    /// they are drawn.
    batches: BTreeMap<(bool, u32), usize>,
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
            self.hand_over(&batch, pieces(&batch, drawn, seconds));
        }
    }

    /// Leaves a drawn batch to the helpers.
    fn hand_over(&self, batch: &Batch, pieces: Vec<Piece>) {
        let portions = self.line.portions(pieces);
        let mut hands = self.hands();
        hands.batches.insert(batch.key(), portions.len());
        let portions = portions.into_iter();
        hands
            .drawn
            .extend(portions.map(|portion| (batch.clone(), portion)));
        drop(hands);
        self.desk.stir();
    }

    /// A portion of a batch is put down.
    fn put_down(&self, batch: &Batch) {
        let mut hands = self.hands();
        if let Some(left) = hands.batches.get_mut(&batch.key()) {
            *left -= 1;
            if *left == 0 {
                hands.batches.remove(&batch.key());
            }
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
            .find(|batch| !hands.batches.contains_key(&batch.key()))?;
        hands.batches.insert(next.key(), 1);
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
                Some(Task::Keep(batch, portion)) => {
                    self.line.keep(&batch, portion)?;
                    self.put_down(&batch);
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
        if let Some((batch, portion)) = hands.drawn.pop_front() {
            return Ok(Some(Task::Keep(batch, portion)));
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
        .zip(drawn.images.into_iter().zip(drawn.cut))
        .enumerate()
        .map(|(place, (item, (image, cut)))| Piece {
            item: *item,
            image,
            cut,
            forwards: part + if place == 0 { rest } else { 0 },
            seconds: seconds / members as f64,
        })
        .collect()
}

#[cfg(test)]
mod tests;
