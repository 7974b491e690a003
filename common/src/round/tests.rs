use std::{collections::BTreeSet, time::Duration};

use super::{
    Contribution, Effect, Event, Outcome, ParticipationWindow, Record, RestoreError, Round,
    RoundPhase, RoundSpec,
};
use crate::{Digest, ErrorCode, RoundNumber, SiloId, Timestamp, adapter::AdapterVersion};

mod job;
mod model;

const START: Timestamp = Timestamp(1_000_000);

fn silo(name: &str) -> SiloId {
    name.parse().unwrap()
}

fn after(seconds: u64) -> Timestamp {
    START + Duration::from_secs(seconds)
}

fn window(min: u32, max: Option<u32>) -> ParticipationWindow {
    ParticipationWindow {
        min_count: min,
        max_count: max,
        min_time: Duration::ZERO,
        max_time: Duration::from_secs(100),
    }
}

fn round(cohort: &[&str], window: ParticipationWindow) -> Round {
    Round::new(RoundSpec {
        job: "job".parse().unwrap(),
        number: RoundNumber(3),
        cohort: cohort
            .iter()
            .map(|name| silo(name))
            .collect::<BTreeSet<_>>(),
        window,
        base: AdapterVersion::of(b"base"),
        opened_at: START,
    })
}

fn contribution(name: &str) -> Contribution {
    Contribution {
        silo: silo(name),
        digest: Digest::of(name.as_bytes()),
        examples: 10,
    }
}

fn contributed(name: &str) -> Event {
    Event::Contributed(contribution(name))
}

fn declined(name: &str) -> Event {
    Event::Declined {
        silo: silo(name),
        code: ErrorCode::UnknownBackbone,
    }
}

fn rejected(name: &str) -> Event {
    Event::Rejected {
        silo: silo(name),
        code: ErrorCode::NotFinite,
    }
}

fn record(name: &str, outcome: Outcome) -> Record {
    Record {
        silo: silo(name),
        outcome,
        digest: Some(Digest::of(name.as_bytes())),
        examples: 10,
    }
}

fn accepted(name: &str) -> Effect {
    Effect::Record(record(name, Outcome::Accepted))
}

fn close(names: &[&str]) -> Effect {
    Effect::CloseForAggregation {
        contributions: names.iter().map(|name| contribution(name)).collect(),
    }
}

fn failure(effects: &[Effect]) -> &str {
    match effects.last() {
        Some(Effect::Fail { reason }) => reason,
        other => panic!("the round did not fail: {other:?}"),
    }
}

#[test]
fn a_round_goes_from_announcement_to_publication() {
    let mut round = round(&["a", "b"], window(2, None));
    assert_eq!(round.phase(), RoundPhase::Announced);
    assert_eq!(round.next_deadline(), Some(after(100)));
    assert_eq!(
        round.apply(contributed("b"), after(1)),
        Ok(vec![accepted("b")])
    );
    assert_eq!(round.phase(), RoundPhase::Collecting);
    assert_eq!(round.awaited().collect::<Vec<_>>(), [&silo("a")]);
    assert_eq!(
        round.apply(contributed("a"), after(2)),
        Ok(vec![accepted("a"), close(&["a", "b"])]),
        "contributions are handed over in silo-id order"
    );
    assert_eq!(round.phase(), RoundPhase::Aggregating);
    assert_eq!((round.next_deadline(), round.awaited().count()), (None, 0));
    let version = AdapterVersion::of(b"next");
    assert_eq!(
        round.apply(Event::Aggregated { version }, after(3)),
        Ok(vec![Effect::Publish { version }])
    );
    assert_eq!(round.phase(), RoundPhase::Published);
    assert_eq!(
        round.apply(Event::Aggregated { version }, after(4)),
        Ok(vec![])
    );
}

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

#[test]
fn a_silo_that_declined_may_change_its_mind_while_the_round_is_open() {
    let mut round = round(&["a", "b", "c"], window(1, None));
    round.apply(declined("a"), after(1)).unwrap();
    assert_eq!(
        round.apply(contributed("a"), after(2)),
        Ok(vec![accepted("a")])
    );
}

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
