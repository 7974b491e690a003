//! A server that is there and cannot do something.

use concord_common::code::ErrorCode;

use super::{
    held_up::{begun, was_held_up},
    *,
};
use crate::remote::FAULTS;

#[test]
fn an_object_that_the_server_cannot_keep_or_read_holds_the_job_up() {
    for (server, call) in [
        (Arc::new(FakeServer::new(SPEC)), "put_object"),
        (begun(40), "get_object"),
    ] {
        {
            let mut state = server.state();
            state.grants = 1;
            // More often than all threads of a worker together try.
            state.faults = Some((call, ErrorCode::Internal, 10 * FAULTS));
        }
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
        server.state().faults = None;
        was_held_up(&server, "INTERNAL");
    }
}

#[test]
fn a_fault_that_passes_and_a_server_that_is_full_or_stops_are_waited_for() {
    let wanted = undisturbed(SPEC).lasting_results();
    for (code, times) in [
        (ErrorCode::Internal, FAULTS - 1),
        (ErrorCode::Busy, 3 * FAULTS),
        (ErrorCode::ShuttingDown, 3 * FAULTS),
    ] {
        let server = Arc::new(FakeServer::new(SPEC));
        server.state().faults = Some(("append", code, times));
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
        succeeded(&server);
        let state = server.state();
        assert_eq!(state.releases.len(), 1, "{code}");
        assert_eq!(state.faults, Some(("append", code, 0)));
        drop(state);
        assert_eq!(server.lasting_results(), wanted);
    }
}

#[test]
fn a_state_that_a_kill_left_on_the_server_is_removed_when_the_job_is_taken_up() {
    for spec in [SPEC, per_pair::spec().as_str()] {
        let server = Arc::new(FakeServer::new(spec));
        // The lease is lost between a line and the removal of what it puts out of use.
        server.state().faults = Some(("remove_objects", ErrorCode::LeaseLost, 1));
        server.state().grants = 1;
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
        let checkpoints = events(&server, "checkpointed");
        let left = digest(&checkpoints[0]["result"]["state"]);
        assert_eq!(checkpoints.len(), 2);
        assert!(server.state().objects.contains_key(&left));
        // Another machine, which has never had it.
        server.state().grants = 1;
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
        succeeded(&server);
        let state = server.state();
        assert!(!state.objects.contains_key(&left));
    }
}
