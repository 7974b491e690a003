//! What a silo's message gets for an answer, and whether it counts.

use super::{
    accepted, after, close, contributed, contribution, declined, record, rejected, round, silo,
    window,
};
use crate::{
    Digest, ErrorCode,
    round::{Contribution, Effect, Event, Outcome, RoundPhase},
};

#[test]
fn the_same_contribution_again_gets_the_same_answer_and_counts_once() {
    let mut round = round(&["a", "b", "c"], window(1, None));
    round.apply(contributed("a"), after(1)).unwrap();
    let again = vec![Effect::Repeat(record("a", Outcome::Accepted))];
    assert_eq!(round.apply(contributed("a"), after(2)), Ok(again.clone()));
    assert_eq!(
        round.apply(Event::Tick, after(100)),
        Ok(vec![close(&["a"])])
    );
    assert_eq!(round.apply(contributed("a"), after(101)), Ok(again));
    assert_eq!(round.accepted(), 1);
}

#[test]
fn a_second_contribution_with_other_bytes_is_refused_and_changes_nothing() {
    let mut round = round(&["a", "b"], window(1, None));
    round.apply(contributed("a"), after(1)).unwrap();
    let before = round.clone();
    let other = Contribution {
        digest: Digest::of(b"other"),
        ..contribution("a")
    };
    let refusal = round
        .apply(Event::Contributed(other), after(500))
        .unwrap_err();
    assert_eq!(refusal.code, ErrorCode::DuplicateContribution);
    assert!(refusal.message.contains("`a`"), "{refusal}");
    assert_eq!(round, before);
}

#[test]
fn a_silo_outside_the_cohort_is_refused_in_every_way() {
    let mut round = round(&["a"], window(1, None));
    for event in [contributed("x"), rejected("x"), declined("x")] {
        let refusal = round.apply(event, after(1)).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::NotInCohort);
    }
    assert_eq!(round.records().count(), 0);
}

#[test]
fn a_contribution_without_examples_is_refused() {
    let mut round = round(&["a"], window(1, None));
    let empty = Contribution {
        examples: 0,
        ..contribution("a")
    };
    let refusal = round
        .apply(Event::Contributed(empty), after(1))
        .unwrap_err();
    assert_eq!(refusal.code, ErrorCode::BadWeight);
    assert_eq!(round.phase(), RoundPhase::Announced);
}

#[test]
fn late_contribution_is_discarded_with_receipt() {
    let mut round = round(&["a", "b", "c"], window(1, Some(1)));
    round.apply(contributed("a"), after(1)).unwrap();
    let discarded = record("b", Outcome::Discarded(ErrorCode::Late));
    assert_eq!(
        round.apply(contributed("b"), after(2)),
        Ok(vec![Effect::Record(discarded.clone())])
    );
    assert_eq!(
        round.apply(contributed("b"), after(3)),
        Ok(vec![Effect::Repeat(discarded)])
    );
    assert_eq!(round.contributions(), [contribution("a")]);
}

#[test]
fn a_contribution_that_arrives_after_the_deadline_but_before_the_tick_is_late() {
    let mut round = round(&["a", "b", "c"], window(1, None));
    round.apply(contributed("a"), after(99)).unwrap();
    assert_eq!(
        round.apply(contributed("b"), after(100)),
        Ok(vec![
            close(&["a"]),
            Effect::Record(record("b", Outcome::Discarded(ErrorCode::Late))),
        ])
    );
}

#[test]
fn a_contribution_to_a_cancelled_round_is_discarded_because_the_job_ended() {
    let mut round = round(&["a", "b"], window(1, None));
    assert_eq!(
        round.apply(Event::Cancel, after(1)),
        Ok(vec![Effect::Cancel])
    );
    assert_eq!(round.apply(Event::Cancel, after(1)), Ok(vec![]));
    assert_eq!(
        round.apply(contributed("a"), after(2)),
        Ok(vec![Effect::Record(record(
            "a",
            Outcome::Discarded(ErrorCode::JobEnded)
        ))])
    );
    assert_eq!(round.apply(Event::Tick, after(200)), Ok(vec![]));
}

#[test]
fn a_rejected_silo_may_try_again_until_the_window_ends() {
    let mut round = round(&["a", "b"], window(2, None));
    round.apply(contributed("b"), after(1)).unwrap();
    let effects = round.apply(rejected("a"), after(2)).unwrap();
    assert!(
        matches!(&effects[..], [Effect::Record(row)] if row.outcome == Outcome::Rejected(ErrorCode::NotFinite)),
        "{effects:?}"
    );
    assert_eq!(round.awaited().collect::<Vec<_>>(), [&silo("a")]);
    assert_eq!(
        round.apply(contributed("a"), after(3)),
        Ok(vec![accepted("a"), close(&["a", "b"])])
    );
}

#[test]
fn a_rejection_does_not_displace_an_accepted_contribution() {
    let mut round = round(&["a", "b"], window(1, None));
    round.apply(contributed("a"), after(1)).unwrap();
    assert_eq!(round.apply(rejected("a"), after(2)), Ok(vec![]));
    assert_eq!(round.apply(declined("a"), after(2)), Ok(vec![]));
    assert_eq!(round.accepted(), 1);
}

#[test]
fn a_silo_that_declined_may_change_its_mind_while_the_round_is_open() {
    let mut round = round(&["a", "b", "c"], window(1, None));
    round.apply(declined("a"), after(1)).unwrap();
    assert_eq!(
        round.apply(contributed("a"), after(2)),
        Ok(vec![accepted("a")])
    );
}
