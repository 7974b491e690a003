//! When a round closes, and when it fails.

use std::time::Duration;

use super::{
    START, accepted, after, close, contributed, declined, failure, rejected, round, window,
};
use crate::{
    ErrorCode,
    adapter::AdapterVersion,
    round::{Effect, Event, ParticipationWindow, RoundPhase},
};

#[test]
fn the_round_closes_when_the_whole_cohort_has_answered_even_before_the_minimum_time() {
    let mut round = round(
        &["a", "b"],
        ParticipationWindow {
            min_time: Duration::from_secs(50),
            ..window(1, None)
        },
    );
    round.apply(declined("b"), after(1)).unwrap();
    assert_eq!(
        round.apply(contributed("a"), after(2)),
        Ok(vec![accepted("a"), close(&["a"])])
    );
}

#[test]
fn enough_contributions_do_not_close_the_round_before_the_minimum_time() {
    let mut round = round(
        &["a", "b", "c"],
        ParticipationWindow {
            min_time: Duration::from_secs(50),
            ..window(1, Some(1))
        },
    );
    round.apply(contributed("b"), after(1)).unwrap();
    assert_eq!(round.next_deadline(), Some(after(50)));
    assert_eq!(
        round.apply(contributed("a"), after(49)),
        Ok(vec![accepted("a")]),
        "what arrives while the round is open counts"
    );
    assert_eq!(
        round.apply(Event::Tick, after(50)),
        Ok(vec![close(&["a", "b"])])
    );
}

#[test]
fn a_clock_that_was_set_back_does_not_reopen_or_hold_up_a_round() {
    let mut round = round(&["a", "b"], window(1, Some(1)));
    assert_eq!(
        round.apply(contributed("a"), START - Duration::from_secs(9)),
        Ok(vec![accepted("a"), close(&["a"])])
    );
    assert_eq!(round.apply(Event::Tick, START), Ok(vec![]));
    assert_eq!(round.phase(), RoundPhase::Aggregating);
}

#[test]
fn too_few_contributions_fail_with_the_numbers() {
    let mut round = round(&["a", "b", "c", "d"], window(3, None));
    round.apply(contributed("a"), after(1)).unwrap();
    round.apply(rejected("b"), after(1)).unwrap();
    round.apply(declined("c"), after(1)).unwrap();
    let effects = round.apply(Event::Tick, after(100)).unwrap();
    assert_eq!(
        failure(&effects),
        "round 3 ended after 1m 40s with 1 accepted contributions of at least 3: of 4 silos 1 declined, 1 sent only \
         rejected contributions and 1 did not answer"
    );
    assert_eq!(round.phase(), RoundPhase::Failed);
}

#[test]
fn a_round_fails_as_soon_as_too_many_silos_have_declined() {
    let mut round = round(&["a", "b", "c"], window(2, None));
    assert_eq!(round.apply(declined("a"), after(1)).unwrap().len(), 1);
    let effects = round.apply(declined("b"), after(2)).unwrap();
    assert!(failure(&effects).contains("2 declined"), "{effects:?}");
    assert_eq!(round.phase(), RoundPhase::Failed);
}

#[test]
fn a_round_with_a_cohort_that_is_too_small_fails_at_the_first_tick() {
    let mut round = round(&["a"], window(2, None));
    assert_eq!(round.next_deadline(), Some(START));
    let effects = round.apply(Event::Tick, START).unwrap();
    assert!(failure(&effects).contains("at least 2"), "{effects:?}");
}

#[test]
fn a_round_whose_contributions_cannot_be_aggregated_fails() {
    let mut round = round(&["a"], window(1, None));
    round.apply(contributed("a"), after(1)).unwrap();
    let reason = "tensor `w` overflows f32".to_owned();
    assert_eq!(
        round.apply(
            Event::AggregationFailed {
                reason: reason.clone()
            },
            after(2)
        ),
        Ok(vec![Effect::Fail { reason }])
    );
    assert_eq!(round.phase(), RoundPhase::Failed);
}

#[test]
fn an_aggregate_of_an_open_round_is_refused() {
    let mut round = round(&["a"], window(1, None));
    let version = AdapterVersion::of(b"next");
    let refusal = round
        .apply(Event::Aggregated { version }, after(1))
        .unwrap_err();
    assert_eq!(refusal.code, ErrorCode::Internal);
    assert_eq!(round.phase(), RoundPhase::Announced);
}

#[test]
fn an_aggregate_that_comes_after_the_cancellation_is_dropped() {
    let mut round = round(&["a"], window(1, None));
    round.apply(contributed("a"), after(1)).unwrap();
    round.apply(Event::Cancel, after(2)).unwrap();
    let version = AdapterVersion::of(b"next");
    assert_eq!(
        round.apply(Event::Aggregated { version }, after(3)),
        Ok(vec![])
    );
    assert_eq!(round.phase(), RoundPhase::Cancelled);
}
