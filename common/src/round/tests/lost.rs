//! Contributions that were counted and whose bytes were found damaged.

use super::{
    accepted, after, close, contributed, contribution, failure, record, round, silo, window,
};
use crate::{
    ErrorCode,
    adapter::AdapterVersion,
    round::{Effect, Event, Outcome, Record, RoundPhase},
};

fn lost(name: &str) -> Event {
    Event::Lost { silo: silo(name) }
}

/// What is recorded of a silo whose contribution was lost.
fn damaged(name: &str) -> Effect {
    Effect::Record(Record {
        digest: None,
        examples: 0,
        ..record(name, Outcome::Rejected(ErrorCode::Internal))
    })
}

#[test]
fn a_silo_whose_contribution_was_lost_is_not_waited_for_and_may_send_it_again() {
    let mut round = round(&["a", "b"], window(1, None));
    round.apply(contributed("a"), after(1)).unwrap();
    assert_eq!(round.apply(lost("a"), after(2)), Ok(vec![damaged("a")]));
    assert_eq!(round.phase(), RoundPhase::Announced);
    assert!(round.awaited().eq([&silo("b")]));
    // A loss is no judgement of the bytes: the same ones count.
    assert_eq!(
        round.apply(contributed("a"), after(3)),
        Ok(vec![accepted("a")])
    );
    assert_eq!(round.apply(lost("b"), after(3)), Ok(vec![]));
}

#[test]
fn an_open_round_that_lost_a_contribution_closes_with_the_others() {
    let mut round = round(&["a", "b", "c"], window(1, None));
    round.apply(contributed("a"), after(1)).unwrap();
    round.apply(contributed("b"), after(1)).unwrap();
    assert_eq!(round.apply(lost("a"), after(2)), Ok(vec![damaged("a")]));
    assert_eq!(round.phase(), RoundPhase::Collecting);
    assert_eq!(
        round.apply(contributed("c"), after(3)),
        Ok(vec![accepted("c"), close(&["b", "c"])])
    );
}

#[test]
fn an_open_round_that_the_others_cannot_fill_after_a_loss_fails_at_once() {
    let mut round = round(&["a", "b"], window(2, None));
    round.apply(contributed("a"), after(1)).unwrap();
    let effects = round.apply(lost("a"), after(2)).unwrap();
    assert_eq!(effects[0], damaged("a"));
    assert!(
        failure(&effects).contains(
            "0 sent only rejected contributions and 1 did not answer; 1 contributions were damaged"
        ),
        "{effects:?}"
    );
    assert_eq!(round.phase(), RoundPhase::Failed);
}

#[test]
fn a_closed_round_is_aggregated_without_a_lost_contribution() {
    let mut round = round(&["a", "b"], window(1, None));
    round.apply(contributed("a"), after(1)).unwrap();
    round.apply(contributed("b"), after(1)).unwrap();
    assert_eq!(round.apply(lost("a"), after(2)), Ok(vec![damaged("a")]));
    assert_eq!(round.phase(), RoundPhase::Aggregating);
    assert_eq!(round.contributions(), [contribution("b")]);
    let version = AdapterVersion::of(b"new");
    round
        .apply(Event::Aggregated { version }, after(3))
        .unwrap();
    assert_eq!(round.apply(lost("b"), after(4)), Ok(vec![]));
}

#[test]
fn a_closed_round_that_lost_too_many_contributions_fails() {
    let mut round = round(&["a", "b"], window(2, None));
    round.apply(contributed("a"), after(1)).unwrap();
    round.apply(contributed("b"), after(1)).unwrap();
    let effects = round.apply(lost("a"), after(2)).unwrap();
    assert_eq!(effects[0], damaged("a"));
    assert!(failure(&effects).contains("damaged"), "{effects:?}");
    assert_eq!(round.phase(), RoundPhase::Failed);
}
