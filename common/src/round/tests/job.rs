use std::collections::BTreeSet;

use super::{START, after, silo};
use crate::{
    RoundNumber, SiloId, Timestamp,
    job::{JobSpec, TrainingSpec},
    round::job::{JobState, Progress, Roster, Step, next_step},
};

fn spec(silos: &str) -> TrainingSpec {
    let text = format!(
        r#"
        kind = "federated-training"
        name = "demo"
        task = "reviews"
        silos = [{silos}]
        backbone = {{ name = "tiny", hidden = 8, layers = 2 }}
        adapter = {{ bottleneck = 2 }}
        algorithm = {{ name = "fedavg" }}
        rounds = {{ count = 3, min_silos = 2, max_time = "100s" }}
        "#
    );
    JobSpec::parse(&text).unwrap().training().clone()
}

fn silos(names: &[&str]) -> BTreeSet<SiloId> {
    names.iter().map(|name| silo(name)).collect()
}

fn step(
    spec: &TrainingSpec,
    declined: &[&str],
    active: &[&str],
    barred: &[&str],
    now: Timestamp,
) -> Step {
    let progress = Progress {
        published: 1,
        declined: silos(declined),
        idle_since: START,
    };
    let roster = Roster {
        active: silos(active),
        barred: silos(barred),
    };
    next_step(spec, &progress, &roster, now)
}

fn open(names: &[&str]) -> Step {
    Step::Open {
        number: RoundNumber(2),
        cohort: silos(names),
    }
}

#[test]
fn a_job_without_named_silos_asks_all_active_ones_that_did_not_decline() {
    let step = step(&spec(""), &["b"], &["a", "b", "c"], &["d"], START);
    assert_eq!(step, open(&["a", "c"]));
}

#[test]
fn a_job_asks_the_silos_it_names_even_before_they_were_ever_seen() {
    let named = spec(r#""a", "b", "c""#);
    assert_eq!(
        step(&named, &[], &["z"], &[], START),
        open(&["a", "b", "c"])
    );
    assert_eq!(step(&named, &[], &["z"], &["b"], START), open(&["a", "c"]));
}

#[test]
fn a_job_waits_for_silos_and_fails_when_none_come() {
    let everyone = spec("");
    assert_eq!(
        step(&everyone, &[], &["a"], &[], after(99)),
        Step::Wait { until: after(100) }
    );
    let Step::Fail { reason } = step(&everyone, &[], &["a"], &[], after(100)) else {
        panic!("the job must fail");
    };
    assert!(
        reason.contains("at least 2 silos and 1 can be asked"),
        "{reason}"
    );
}

#[test]
fn a_job_fails_at_once_when_too_many_of_the_silos_it_names_declined() {
    let named = spec(r#""a", "b", "c""#);
    let Step::Fail { reason } = step(&named, &["a", "b"], &[], &[], START) else {
        panic!("the job must fail");
    };
    assert!(reason.contains("2 declined"), "{reason}");
}

#[test]
fn a_job_waits_for_a_suspended_silo_that_it_names() {
    let named = spec(r#""a", "b""#);
    assert_eq!(
        step(&named, &[], &[], &["a"], START),
        Step::Wait { until: after(100) }
    );
}

#[test]
fn a_job_succeeds_after_its_last_round() {
    let progress = Progress {
        published: 3,
        declined: BTreeSet::new(),
        idle_since: START,
    };
    assert_eq!(
        next_step(&spec(""), &progress, &Roster::default(), START),
        Step::Succeed
    );
}

#[test]
fn names_of_states_survive_a_store() {
    for state in JobState::ALL {
        assert_eq!(state.as_str().parse(), Ok(state));
    }
    assert!("paused".parse::<JobState>().is_err());
}
