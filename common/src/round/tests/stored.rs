//! Rounds, events and outcomes through a store and back.

use super::{after, contributed, contribution, declined, record, round, window};
use crate::{
    ErrorCode,
    round::{Effect, Event, Outcome, Record, RestoreError, Round, RoundPhase},
};

#[test]
fn a_round_restored_in_aggregation_still_knows_what_to_aggregate() {
    let mut before = round(&["a", "b", "c"], window(2, Some(2)));
    before.apply(contributed("c"), after(1)).unwrap();
    before.apply(contributed("a"), after(1)).unwrap();
    let records: Vec<_> = before.records().cloned().collect();
    let restored = Round::restore(before.spec().clone(), before.phase(), records).unwrap();
    assert_eq!(restored, before);
    assert_eq!(
        restored.contributions(),
        [contribution("a"), contribution("c")]
    );
}

#[test]
fn rows_that_no_round_leaves_behind_are_refused_on_restore() {
    let spec = round(&["a", "b"], window(2, None)).spec().clone();
    let restore = |phase, rows: Vec<Record>| Round::restore(spec.clone(), phase, rows).unwrap_err();
    let open = RoundPhase::Collecting;
    assert!(matches!(
        restore(open, vec![record("x", Outcome::Accepted)]),
        RestoreError::NotInCohort { .. }
    ));
    let row = record("a", Outcome::Accepted);
    assert!(matches!(
        restore(open, vec![row.clone(), row.clone()]),
        RestoreError::Twice { .. }
    ));
    assert!(matches!(
        restore(
            open,
            vec![Record {
                digest: None,
                ..row.clone()
            }]
        ),
        RestoreError::Digest { rule: "needs", .. }
    ));
    assert!(matches!(
        restore(
            open,
            vec![record("a", Outcome::Declined(ErrorCode::BadData))]
        ),
        RestoreError::Digest {
            rule: "cannot have",
            ..
        }
    ));
    assert!(matches!(
        restore(RoundPhase::Published, vec![row]),
        RestoreError::Phase {
            accepted: 1,
            needed: 2,
            ..
        }
    ));
}

#[test]
fn rounds_events_and_effects_survive_json() {
    let mut round = round(&["a", "b"], window(1, Some(1)));
    let event = declined("b");
    let text = serde_json::to_string(&event).unwrap();
    assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event);
    round.apply(event, after(1)).unwrap();
    let effects = round.apply(contributed("a"), after(1)).unwrap();
    let text = serde_json::to_string(&effects).unwrap();
    assert_eq!(serde_json::from_str::<Vec<Effect>>(&text).unwrap(), effects);
    let text = serde_json::to_string(&round).unwrap();
    assert_eq!(serde_json::from_str::<Round>(&text).unwrap(), round);
}

#[test]
fn names_of_phases_and_outcomes_survive_a_store() {
    for phase in RoundPhase::ALL {
        assert_eq!(phase.as_str().parse(), Ok(phase));
    }
    assert!("open".parse::<RoundPhase>().is_err());
    for outcome in [
        Outcome::Accepted,
        Outcome::Rejected(ErrorCode::NotFinite),
        Outcome::Discarded(ErrorCode::Late),
        Outcome::Declined(ErrorCode::PolicyRefused),
    ] {
        let reason = outcome.reason().map_or("", ErrorCode::as_str);
        assert_eq!(Outcome::from_parts(outcome.as_str(), reason), Ok(outcome));
    }
    for (name, reason) in [
        ("accepted", "LATE"),
        ("rejected", ""),
        ("rejected", "X"),
        ("lost", "LATE"),
    ] {
        assert!(
            Outcome::from_parts(name, reason).is_err(),
            "{name} {reason}"
        );
    }
}
