//! Disk and time that a job may not have.

use std::sync::atomic::AtomicI64;

use concord_common::{Timestamp, clock::MockClock, code::ErrorCode};

use super::*;

#[test]
fn a_job_that_fills_its_disk_is_ended() {
    let server = run_by(&limited("disk = \"1 MiB\""), |worker| {
        worker.workshop = faulty("large");
    });
    let (release, reason) = server.released();
    assert_eq!(release, JobRelease::Failed);
    assert!(reason.contains("limits.disk"), "{reason}");
}

#[test]
fn a_job_whose_time_is_up_ends_with_what_it_has() {
    let server = run_by(&limited("time = \"1s\""), |worker| {
        worker.clock = Arc::new(Hurried::default());
    });
    succeeded(&server);
    let card = text_of(&server, "MODEL_CARD.md");
    assert!(card.contains("time of 1 s is used up"), "{card}");
}

#[test]
fn a_training_whose_time_is_up_ends_at_once() {
    let spec = spec_with(&[
        ("first_steps = 25", "first_steps = 2000"),
        ("checkpoint_every = 10", "checkpoint_every = 2000"),
        ("[output]", "[limits]\ntime = \"10s\"\n[output]"),
    ]);
    let server = Arc::new(FakeServer::new(&spec));
    let folder = tempfile::tempdir().unwrap();
    let mut late = worker(&server, folder.path());
    late.clock = Arc::new(HurriedInTraining(Arc::clone(&server), Hurried::default()));
    late.run();
    succeeded(&server);
    let has = |event| !events(&server, event).is_empty();
    assert!(has("filtered") && has("decided"));
    assert!(!has("checkpointed") && !has("trained"));
}

/// The results of a job during which no time passes.
fn in_no_time(spec: &str) -> BTreeMap<String, Vec<u8>> {
    let server = run_by(spec, |worker| {
        worker.clock = Arc::new(MockClock::new(Timestamp(0)));
    });
    succeeded(&server);
    server.lasting_results()
}

#[test]
fn waiting_for_a_server_without_room_takes_none_of_the_time() {
    let spec = limited("time = \"1h\"");
    let server = Arc::new(FakeServer::new(&spec));
    server.state().faults = Some(("append", ErrorCode::Busy, REFUSALS));
    let folder = tempfile::tempdir().unwrap();
    let mut patient = worker(&server, folder.path());
    patient.clock = Arc::new(GoesOnWhileRefused(Arc::clone(&server)));
    patient.run();
    succeeded(&server);
    assert_eq!(server.lasting_results(), in_no_time(&spec));
    assert!(patient.clock.now() > Timestamp(0) + Duration::from_hours(1));
    let state = server.state();
    let line = |line: &Vec<u8>| serde_json::from_slice::<Value>(line).unwrap();
    let mut lines = state.lines.iter().map(line);
    assert!(lines.all(|line| line["worked"] == 0));
}

#[test]
fn a_clock_that_is_set_forward_takes_none_of_the_time() {
    let spec = limited("time = \"1s\"");
    let server = run_by(&spec, |worker| {
        worker.clock = Arc::new(SetAgainAndAgain(AtomicI64::new(0)));
    });
    succeeded(&server);
    assert_eq!(server.lasting_results(), in_no_time(&spec));
}

/// How often the server says that it has no room.
const REFUSALS: usize = 5;

/// A clock that goes on by ten hours with every refusal but the first: with that one the wait begins.
#[derive(Debug)]
struct GoesOnWhileRefused(Arc<FakeServer>);

impl Clock for GoesOnWhileRefused {
    fn now(&self) -> Timestamp {
        let left = self.0.state().faults.map_or(0, |(_, _, left)| left);
        let passed = (REFUSALS - 1).saturating_sub(left) as u32;
        Timestamp(0) + Duration::from_hours(10) * passed
    }
}

/// A clock that somebody sets forward by an hour before every look, and no time passes.
#[derive(Debug)]
struct SetAgainAndAgain(AtomicI64);

impl Clock for SetAgainAndAgain {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.fetch_add(3_600_000, Ordering::SeqCst))
    }

    fn steady(&self) -> Duration {
        Duration::ZERO
    }
}

/// A clock that stands still until the pairs are filtered.
#[derive(Debug)]
struct HurriedInTraining(Arc<FakeServer>, Hurried);

impl Clock for HurriedInTraining {
    fn now(&self) -> Timestamp {
        let is_filtered = {
            let state = self.0.state();
            let last = state.lines.last();
            last.is_some_and(|line| String::from_utf8_lossy(line).contains("\"filtered\""))
        };
        if is_filtered {
            self.1.now()
        } else {
            Timestamp(0)
        }
    }
}

/// A clock that goes on by 20 ms with every look.
#[derive(Debug, Default)]
struct Hurried(AtomicI64);

impl Clock for Hurried {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.fetch_add(20, Ordering::SeqCst))
    }
}
