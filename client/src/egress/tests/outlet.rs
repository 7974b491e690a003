//! What passes the outlet, and when it is logged.

use std::time::Duration;

use super::*;
use crate::{
    coordinator::{CallError, Coordinator as _},
    daemon::Daemon,
    session::SessionError,
    testing::{Call, Deed, Fault, Faulty, Home, federation, job, spec},
};

#[tokio::test]
async fn all_that_leaves_through_the_outlet_is_in_the_log_first_and_each_attempt_again() {
    let home = Home::new("north");
    let federation = federation(&spec("fedmcp", 1, ""), &["north", "south"]);
    let faulty = Faulty::new(federation.coordinator(home.silo.clone()));
    faulty.plan(Call::Claim, Fault::Unreachable);
    faulty.plan(Call::Report, Fault::Unreachable);
    faulty.plan(Call::Begin, Fault::LostAnswer);
    let gate = home.gate();
    let mut session = home.session(
        Outlet::new(faulty.clone(), Arc::clone(&gate)),
        &federation.receipt_key(),
    );
    session.gate = Arc::clone(&gate);
    session.round(&job(), RoundNumber(1)).await.unwrap();
    assert_eq!(faulty.left(), 0);
    let kinds = |from: usize| -> Vec<String> {
        let lines = home.egress_log();
        let kind = |line: &serde_json::Value| line["kind"].as_str().unwrap().to_owned();
        lines[from..].iter().map(kind).collect()
    };
    assert_eq!(
        kinds(0),
        [
            "claim",
            "claim",
            "metrics",
            "metrics",
            "metrics",
            "announcement",
            "announcement",
            "contribution"
        ]
    );
    let lines = home.egress_log();
    assert_eq!(lines[3]["attempt"], 2);
    assert_eq!(lines[6]["digest"], lines[7]["digest"]);

    faulty.plan(Call::Decline, Fault::Unreachable);
    let refusal = Refusal::new(ErrorCode::UnknownTask, "no such task");
    let decline = gate.decline(&job(), &refusal).unwrap();
    assert!(session.coordinator.decline(&decline).await.is_err());
    let _ = session.coordinator.decline(&decline).await;
    assert_eq!(kinds(8), ["decline", "decline"]);
    assert_eq!(home.egress_log()[9]["attempt"], 2);
}

#[tokio::test]
async fn nothing_goes_through_the_outlet_without_its_line() {
    let home = Home::new("north");
    let federation = federation(&spec("fedmcp", 1, ""), &["north", "south"]);
    let faulty = Faulty::new(federation.coordinator(home.silo.clone()));
    let gate = home.gate();
    gate.break_log();
    let outlet = Outlet::new(faulty.clone(), gate);
    let error = outlet.claim(&job(), RoundNumber(1)).await.unwrap_err();
    assert!(error.is_transient(), "there may be room later: {error}");
    let error = outlet.claim(&job(), RoundNumber(1)).await.unwrap_err();
    assert!(
        matches!(error, CallError::Egress(EgressError::Broken { .. })) && !error.is_transient(),
        "{error}"
    );
    assert_eq!(faulty.calls(), 0);
}

/// How a daemon ends whose gate is `gate`; it has an hour.
async fn end_of_a_daemon(
    home: &Home,
    server: Faulty,
    gate: &Arc<EgressGate>,
) -> Result<(), SessionError> {
    let mut session = home.session(Outlet::new(server, Arc::clone(gate)), &[]);
    session.gate = Arc::clone(gate);
    let daemon = Daemon::new(session, "memory".to_owned(), Duration::from_secs(1));
    tokio::time::timeout(Duration::from_hours(1), daemon.run())
        .await
        .expect("it does not go on for ever")
}

#[tokio::test(start_paused = true)]
async fn a_broken_log_ends_the_daemon() {
    let home = Home::new("north");
    let federation = federation(&spec("fedmcp", 1, ""), &["north", "south"]);
    let server = Faulty::new(federation.coordinator(home.silo.clone()));
    let gate = home.gate();
    gate.break_log();
    let error = end_of_a_daemon(&home, server, &gate).await.unwrap_err();
    assert!(
        matches!(error, SessionError::Egress(EgressError::Broken { .. })),
        "{error}"
    );
}

#[tokio::test]
async fn a_log_that_breaks_in_the_middle_of_a_round_ends_the_daemon() {
    for call in [Call::Claim, Call::Report, Call::Begin] {
        let home = Home::new("north");
        let federation = federation(&spec("fedmcp", 1, ""), &["north", "south"]);
        let server = Faulty::new(federation.coordinator(home.silo.clone()));
        let gate = home.gate();
        let breaks = Arc::clone(&gate);
        let deed = Deed::new(move || breaks.break_log());
        server.plan(call, Fault::First(deed));
        let error = end_of_a_daemon(&home, server, &gate).await.unwrap_err();
        assert!(
            matches!(error, SessionError::Egress(EgressError::Broken { .. })),
            "{call:?}: {error}"
        );
    }
}
