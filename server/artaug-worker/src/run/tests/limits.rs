//! Disk and time that a job may not have.

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

/// A clock that stands still until the pairs are filtered.
#[derive(Debug)]
struct HurriedInTraining(Arc<FakeServer>, Hurried);

impl Clock for HurriedInTraining {
    fn now(&self) -> concord_common::Timestamp {
        let is_filtered = {
            let state = self.0.state();
            let last = state.lines.last();
            last.is_some_and(|line| String::from_utf8_lossy(line).contains("\"filtered\""))
        };
        if is_filtered {
            self.1.now()
        } else {
            concord_common::Timestamp(0)
        }
    }
}

/// A clock that goes on by 20 ms with every look.
#[derive(Debug, Default)]
struct Hurried(std::sync::atomic::AtomicI64);

impl Clock for Hurried {
    fn now(&self) -> concord_common::Timestamp {
        concord_common::Timestamp(self.0.fetch_add(20, Ordering::SeqCst))
    }
}
