//! Limits of this worker's own settings: a job that wants more is given back, and another worker runs it.

use concord_common::job::artaug::ArtaugSpec;

use super::{held_up::stopped_when, *};
use crate::{limits::MemoryLimit, stages::Parts};

/// Gives no job what it wants.
struct Little;

impl Workshop for Little {
    fn parts(&self, _spec: &ArtaugSpec, _brake: &Brake) -> Result<Parts, PartsError> {
        Err(PartsError::Limit {
            key: "limits.threads",
            what: "the job wants 2 threads, and this worker gives 1".to_owned(),
        })
    }
}

/// A worker with a limit gives the job back with this word each time, and ends as it says; the next one brings the job to its end.
fn is_run_elsewhere(limit: impl Fn(&mut Worker), word: &str, (times, ended): (usize, Ended)) {
    let server = Arc::new(FakeServer::new(SPEC));
    server.state().grants = 2;
    let folder = tempfile::tempdir().unwrap();
    let mut small = worker(&server, folder.path());
    limit(&mut small);
    assert_eq!(small.run(), ended);
    assert_eq!(server.state().releases.len(), times);
    let (release, reason) = server.released();
    assert_eq!(release, JobRelease::Stopped, "{reason}");
    assert!(reason.contains(word), "{reason}");
    server.state().grants = 1;
    let folder = tempfile::tempdir().unwrap();
    worker(&server, folder.path()).run();
    succeeded(&server);
    let wanted = undisturbed(SPEC).lasting_results();
    assert_eq!(server.lasting_results(), wanted);
}

#[test]
fn a_job_that_wants_more_than_this_worker_gives_runs_elsewhere_also_if_it_has_not_begun() {
    is_run_elsewhere(
        |small| small.workshop = Box::new(Little),
        "`limits.threads`: the job wants 2 threads",
        (2, Ended::Idle),
    );
}

#[test]
fn a_job_that_holds_more_memory_than_this_worker_may_runs_elsewhere() {
    is_run_elsewhere(
        |small| small.habits.memory = MemoryLimit(1),
        "`limits.memory`",
        // What the process holds does not come back, so it would give back every other job too.
        (1, Ended::Heavy),
    );
}

#[test]
fn a_worker_looks_at_its_limits_between_two_images_that_it_reads_to_learn_from() {
    let folder = tempfile::tempdir().unwrap();
    let server = stopped_when(SPEC, folder.path(), |server| {
        !events(server, "filtered").is_empty()
    });
    let kept = events(&server, "filtered")[0]["kept"].take();
    assert!(kept.as_array().unwrap().len() > 1, "{kept}");
    // A worker without a copy, which is told to stop while it fetches the first: that is seen where the memory is looked at.
    let folder = tempfile::tempdir().unwrap();
    let stopped = worker(&server, folder.path());
    {
        let mut state = server.state();
        state.fetched = 0;
        state.stop = Some(Arc::clone(&stopped.stop));
    }
    stopped.run();
    assert_eq!(server.state().fetched, 1);
    server.state().stop = None;
    ends_as_undisturbed(&server);
}
