//! Pauses and stops of a worker that finishes nothing more: in the middle of a training, and before a job has begun.

use concord_common::job::artaug::ArtaugSpec;

use super::*;
use crate::stages::Parts;

/// A job that is paused when this step of its first training is done, and may go on elsewhere.
pub(super) fn paused_at(spec: &str, step: u64) -> Arc<FakeServer> {
    let server = Arc::new(FakeServer::new(spec));
    let folder = tempfile::tempdir().unwrap();
    let mut hasty = worker(&server, folder.path());
    hasty.habits.stop_within = Duration::ZERO;
    hasty.workshop = Box::new(FakeWorkshop {
        pause_at: Some((step, Arc::clone(&server))),
        ..FakeWorkshop::default()
    });
    hasty.run();
    let (release, reason) = server.released();
    assert_eq!(release, JobRelease::Paused, "{reason}");
    server.resume();
    server
}

/// The steps whose states the first training has saved.
fn saved(server: &FakeServer) -> Vec<u64> {
    let checkpoints = events(server, "checkpointed").into_iter();
    checkpoints
        .filter(|event| training_of(event) == (1, "first".to_owned()))
        .map(|event| event["result"]["step"].as_u64().unwrap())
        .collect()
}

#[test]
fn a_pause_that_waits_no_longer_saves_the_step_that_the_training_is_at() {
    let per_pair = per_pair::spec();
    for (spec, step, before, after) in [
        (SPEC, 7, [].as_slice(), [10, 20].as_slice()),
        // The last one.
        (SPEC, 25, &[10, 20], &[]),
        // Of the second pair.
        (
            per_pair.as_str(),
            27,
            &[10, 20],
            &[30, 40, 50, 60, 70, 80, 90],
        ),
    ] {
        let server = paused_at(spec, step);
        let mut wanted = [before, &[step]].concat();
        assert_eq!(saved(&server), wanted);
        ends_as_undisturbed(&server);
        // The others are still those of `lora.checkpoint_every`.
        wanted.extend(after);
        assert_eq!(saved(&server), wanted);
    }
}

/// Has its worker told to stop while it sets a job up.
struct Interrupted(Arc<Stop>);

impl Workshop for Interrupted {
    fn parts(&self, spec: &ArtaugSpec, brake: &Brake) -> Result<Parts, PartsError> {
        self.0.tell();
        brake.check()?;
        FakeWorkshop::default().parts(spec, brake)
    }
}

#[test]
fn a_worker_that_is_told_to_stop_while_it_sets_a_job_up_gives_it_back() {
    let server = Arc::new(FakeServer::new(SPEC));
    let folder = tempfile::tempdir().unwrap();
    let mut stopped = worker(&server, folder.path());
    stopped.workshop = Box::new(Interrupted(Arc::clone(&stopped.stop)));
    assert_eq!(stopped.run(), Ended::Told);
    let (release, reason) = server.released();
    assert_eq!((release, reason.as_str()), (JobRelease::Stopped, ""));
    assert!(server.state().lines.is_empty());
    ends_as_undisturbed(&server);
}
