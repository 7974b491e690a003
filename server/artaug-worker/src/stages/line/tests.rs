use std::{
    sync::{Arc, Condvar},
    time::Duration,
};

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

/// Whoever waits longer for another thread waits for nobody.
const LONGEST: Duration = Duration::from_mins(1);

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

    fn keep(&self, _batch: &Batch, _portion: Vec<Piece>) -> Result<(), Halt> {
        Ok(())
    }

    fn act(&self, _chore: Chore) -> Result<(), Halt> {
        Ok(())
    }
}

/// One batch, whose images are put down by three helpers or not at all.
#[derive(Default)]
struct Together {
    here: Mutex<usize>,
    changed: Condvar,
}

impl Line for Together {
    fn batches(&self, _machine: &Machine) -> Vec<Batch> {
        Vec::new()
    }

    fn orders(&self, _batch: &Batch) -> Result<Vec<Order>, Halt> {
        Ok(Vec::new())
    }

    fn chores(&self, _machine: &Machine) -> Vec<Chore> {
        Vec::new()
    }

    fn portions(&self, pieces: Vec<Piece>) -> Vec<Vec<Piece>> {
        pieces.into_iter().map(|piece| vec![piece]).collect()
    }

    fn keep(&self, _batch: &Batch, portion: Vec<Piece>) -> Result<(), Halt> {
        assert_eq!(portion.len(), 1);
        let mut here = self.here.lock().unwrap();
        *here += 1;
        self.changed.notify_all();
        let (here, _) = self
            .changed
            .wait_timeout_while(here, LONGEST, |here| *here < 3)
            .unwrap();
        assert_eq!(*here, 3, "the helpers put images down one after the other");
        Ok(())
    }

    fn act(&self, _chore: Chore) -> Result<(), Halt> {
        Ok(())
    }
}

/// Runs a test on a floor for a line.
fn on_floor<L: Line>(line: &L, test: impl FnOnce(&Floor<'_, L>)) {
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
    test(&Floor {
        desk: &desk,
        line,
        hands: Mutex::default(),
    });
}

#[test]
fn no_third_batch_is_begun_before_the_first_is_put_down() {
    on_floor(&Singles, |floor| {
        let first = floor.next_batch().unwrap();
        assert!(floor.next_batch().is_some());
        // Also one that a helper has taken from the drawn ones, or that the engine is at, is in hand.
        assert_eq!(floor.next_batch(), None);
        floor.put_down(&first);
        assert!(floor.next_batch().is_some());
        assert_eq!(floor.next_batch(), None);
    });
}

#[test]
fn helpers_put_the_portions_of_a_batch_down_at_the_same_time() {
    let line = Together::default();
    on_floor(&line, |floor| {
        let members = vec![0, 1, 2];
        let batch = Batch {
            enhanced: false,
            group: Group {
                members: members.clone(),
                missing: members.clone(),
            },
        };
        let piece = |item| Piece {
            item,
            image: Image::filled(8, 8, [0; 3]).unwrap(),
            cut: 0,
            forwards: 1,
            seconds: 0.0,
        };
        floor.hand_over(&batch, members.into_iter().map(piece).collect());
        assert_eq!(floor.hands().batches.len(), 1);
        floor.hands().closed = true;
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| floor.help().unwrap());
            }
        });
        assert_eq!(*line.here.lock().unwrap(), 3);
        assert!(floor.hands().batches.is_empty());
    });
}
