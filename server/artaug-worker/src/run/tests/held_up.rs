//! What only this worker lacks: the job is given back and goes on elsewhere.

use super::*;

/// A job with so many lines or a few more, of which nobody has a copy.
pub(super) fn begun(lines: usize) -> Arc<FakeServer> {
    begun_of(SPEC, lines)
}

/// The same of another job.
pub(super) fn begun_of(spec: &str, lines: usize) -> Arc<FakeServer> {
    let server = Arc::new(FakeServer::new(spec));
    while server.state().lines.len() < lines {
        {
            let mut state = server.state();
            state.loss = Loss::After(5);
            state.grants = 1;
        }
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
    }
    {
        let mut state = server.state();
        state.loss = Loss::Never;
        state.grants = 1;
        assert!(state.releases.is_empty());
    }
    server
}

/// A job that was killed after every single write until it was where it should be, and the worker's copy of it in the folder.
pub(super) fn stopped_when(
    spec: &str,
    folder: &Path,
    is_there: impl Fn(&FakeServer) -> bool,
) -> Arc<FakeServer> {
    let server = Arc::new(FakeServer::new(spec));
    while !is_there(&server) {
        {
            let mut state = server.state();
            state.loss = Loss::After(1);
            state.grants = 1;
        }
        worker(&server, folder).run();
    }
    {
        let mut state = server.state();
        state.loss = Loss::Never;
        state.grants = 1;
        assert!(state.releases.is_empty());
    }
    server
}

/// The job was given back for a reason with this word, and the next worker brings it to the end that it would have had.
pub(super) fn was_held_up(server: &Arc<FakeServer>, word: &str) {
    let (release, reason) = server.released();
    assert_eq!(release, JobRelease::Stopped, "{reason}");
    assert!(reason.contains(word), "{reason}");
    ends_as_undisturbed(server);
}

#[test]
fn a_worker_whose_own_disk_is_too_small_holds_the_job_up() {
    let server = Arc::new(FakeServer::new(SPEC));
    server.state().grants = 1;
    let folder = tempfile::tempdir().unwrap();
    let mut small = worker(&server, folder.path());
    small.habits.disk = 2000;
    small.run();
    was_held_up(&server, "the worker's settings");
}

#[test]
fn a_worker_that_lacks_what_a_begun_job_needs_holds_it_up() {
    let server = begun(30);
    let folder = tempfile::tempdir().unwrap();
    let mut bare = worker(&server, folder.path());
    bare.workshop = Box::new(FakeWorkshop {
        is_bare: true,
        ..FakeWorkshop::default()
    });
    bare.run();
    was_held_up(&server, "[allowed.endpoints.vision]");
}

#[test]
fn a_base_that_cannot_be_read_in_the_middle_of_a_job_holds_it_up() {
    let server = Arc::new(FakeServer::new(SPEC));
    server.state().grants = 1;
    let folder = tempfile::tempdir().unwrap();
    let mut away = worker(&server, folder.path());
    away.workshop = faulty("away");
    away.run();
    // The first model of the job was there.
    assert_eq!(events(&server, "fused").len(), 1);
    was_held_up(&server, "stale network file handle");
}

#[test]
fn a_worker_whose_file_system_refuses_holds_the_job_up() {
    let server = begun(30);
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("jobs/job-1");
    std::fs::create_dir_all(&own).unwrap();
    std::fs::write(own.join("objects"), b"no folder").unwrap();
    worker(&server, folder.path()).run();
    was_held_up(&server, "objects");
}

#[test]
fn a_worker_that_cannot_read_a_line_holds_the_job_up() {
    let server = begun(30);
    let line = server.state().lines.pop().unwrap();
    let newer = String::from_utf8(line.clone()).unwrap();
    let newer = newer.replacen("\"event\":{", "\"event\":{\"more\":1,", 1);
    server.state().lines.push(newer.into_bytes());
    let folder = tempfile::tempdir().unwrap();
    worker(&server, folder.path()).run();
    *server.state().lines.last_mut().unwrap() = line;
    was_held_up(&server, "another version");
}
