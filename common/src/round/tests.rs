use std::{collections::BTreeSet, time::Duration};

use super::{
    Contribution, Effect, Event, Outcome, ParticipationWindow, Record, Round, RoundPhase, RoundSpec,
};
use crate::{Digest, ErrorCode, RoundNumber, SiloId, Timestamp, adapter::AdapterVersion};

mod answers;
mod end;
mod job;
mod lost;
mod model;
mod stored;

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
