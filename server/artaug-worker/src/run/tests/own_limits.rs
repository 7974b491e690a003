//! Limits of this worker's own settings: a job that wants more is given back, and another worker runs it.

use concord_common::job::artaug::ArtaugSpec;

use super::*;
use crate::{limits::MemoryLimit, stages::Parts};

/// Gives no job what it wants.
struct Little;

impl Workshop for Little {
    fn parts(&self, _spec: &ArtaugSpec) -> Result<Parts, PartsError> {
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
