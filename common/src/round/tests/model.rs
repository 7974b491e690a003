//! The machine against a naive model: the model keeps every event and works each answer out anew from the whole history.

use std::{collections::BTreeMap, time::Duration};

use proptest::{collection::vec, option, prelude::*, sample::select};

use super::{START, silo};
use crate::{
    Digest, ErrorCode, RoundNumber, SiloId, Timestamp,
    adapter::AdapterVersion,
    round::{
        Contribution, Effect, Event, Outcome, ParticipationWindow, Record, Round, RoundPhase,
        RoundSpec,
    },
};

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

#[derive(Clone, Debug)]
struct Case {
    spec: RoundSpec,
    steps: Vec<(Event, Timestamp)>,
}

/// Payload `variant` of a silo: every silo's first has a power of two of its own as its number of examples, so that a loss
/// or a double count shows in the sum.
fn contribution(name: &'static str, variant: u64) -> Contribution {
    let index = NAMES.iter().position(|other| *other == name).unwrap();
    Contribution {
        silo: silo(name),
        digest: Digest::of(format!("{name}{variant}").as_bytes()),
        examples: 1 << (8 * variant.min(2) + index as u64),
    }
}

fn event() -> impl Strategy<Value = Event> {
    let name = || select(&NAMES[..]);
    let code = || {
        let codes = [
            ErrorCode::NotFinite,
            ErrorCode::UnknownTask,
            ErrorCode::Internal,
        ];
        select(codes.to_vec())
    };
    prop_oneof![
        10 => (name(), prop_oneof![8 => Just(0_u64), 1 => Just(1)])
            .prop_map(|(name, variant)| Event::Contributed(contribution(name, variant))),
        3 => (name(), code()).prop_map(|(name, code)| Event::Rejected { silo: silo(name), code }),
        2 => (name(), code()).prop_map(|(name, code)| Event::Declined { silo: silo(name), code }),
        1 => name().prop_map(|name| Event::Lost { silo: silo(name) }),
        3 => Just(Event::Tick),
        2 => (0_u8..2).prop_map(|byte| Event::Aggregated { version: AdapterVersion::of(&[byte]) }),
        1 => Just(Event::AggregationFailed { reason: "overflow".to_owned() }),
        1 => Just(Event::Cancel),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let times = (0_u64..20, 0_u64..40);
    let window = (0_u32..5, option::of(0_u32..3), times).prop_map(|(min, more, (short, long))| {
        ParticipationWindow {
            min_count: min,
            max_count: more.map(|more| min + more),
            min_time: Duration::from_secs(short),
            max_time: Duration::from_secs(short + long),
        }
    });
    let cohort = proptest::sample::subsequence(&NAMES[..5], 0..=5);
    // Mostly forward; now and then the clock is set back.
    let step = (event(), prop_oneof![9 => 0_i64..5_000, 1 => -10_000_i64..0]);
    (window, cohort, vec(step, 0..40)).prop_map(|(window, cohort, steps)| {
        let mut now = START;
        let steps = steps
            .into_iter()
            .map(|(event, millis)| {
                now = Timestamp(now.0 + millis);
                (event, now)
            })
            .collect();
        Case {
            spec: RoundSpec {
                job: "job".parse().unwrap(),
                number: RoundNumber(1),
                cohort: cohort.into_iter().map(silo).collect(),
                window,
                base: AdapterVersion::of(b"base"),
                opened_at: START,
            },
            steps,
        }
    })
}

/// What the rules say, told the long way.
struct Model<'a> {
    spec: &'a RoundSpec,
    phase: RoundPhase,
    /// Everything that was recorded, in the order of its happening; the last row of a silo holds.
    rows: Vec<Record>,
}

impl Model<'_> {
    fn row(&self, silo: &SiloId) -> Option<&Record> {
        self.rows.iter().rev().find(|row| row.silo == *silo)
    }

    fn with(&self, which: fn(&Outcome) -> bool) -> Vec<&Record> {
        let mut names: Vec<_> = self.spec.cohort.iter().collect();
        names.sort();
        names
            .into_iter()
            .filter_map(|silo| self.row(silo))
            .filter(|row| which(&row.outcome))
            .collect()
    }

    fn accepted(&self) -> Vec<&Record> {
        self.with(|outcome| matches!(outcome, Outcome::Accepted))
    }

    /// `Some(true)` closes the round, `Some(false)` fails it.
    fn verdict(&self, now: Timestamp) -> Option<bool> {
        let window = &self.spec.window;
        let passed = now.0 - self.spec.opened_at.0;
        let asked = self.spec.cohort.len();
        let accepted = self.accepted().len();
        let declined = self
            .with(|outcome| match outcome {
                Outcome::Declined(_) => true,
                // Its bytes were there and are lost.
                Outcome::Rejected(code) => *code == ErrorCode::Internal,
                Outcome::Accepted | Outcome::Discarded(_) => false,
            })
            .len();
        let least = std::cmp::max(window.min_count, 1) as usize;
        let enough = accepted >= least;
        if asked - declined < least {
            return Some(false);
        }
        if accepted + declined == asked || passed >= window.max_time.as_millis() as i64 {
            return Some(enough);
        }
        let full = window.max_count.is_some_and(|max| accepted >= max as usize);
        let waited = passed.max(0) >= window.min_time.as_millis() as i64;
        (full && enough && waited).then_some(true)
    }

    fn settle(&mut self, now: Timestamp) -> Vec<Effect> {
        if self.phase > RoundPhase::Collecting {
            return vec![];
        }
        match self.verdict(now) {
            None => vec![],
            Some(true) => {
                self.phase = RoundPhase::Aggregating;
                let contributions = self
                    .accepted()
                    .into_iter()
                    .map(|row| Contribution {
                        silo: row.silo.clone(),
                        digest: row.digest.unwrap(),
                        examples: row.examples,
                    })
                    .collect();
                vec![Effect::CloseForAggregation { contributions }]
            }
            Some(false) => {
                self.phase = RoundPhase::Failed;
                // The wording is the machine's own; other tests read it.
                vec![Effect::Fail {
                    reason: String::new(),
                }]
            }
        }
    }

    fn store(&mut self, row: Record) -> Effect {
        self.rows.push(row.clone());
        Effect::Record(row)
    }

    fn handle(&mut self, event: &Event) -> Vec<Effect> {
        match event {
            Event::Contributed(contribution) => {
                if let Some(row) = self.row(&contribution.silo)
                    && row.digest == Some(contribution.digest)
                {
                    return vec![Effect::Repeat(row.clone())];
                }
                let outcome = if self.phase <= RoundPhase::Collecting {
                    self.phase = RoundPhase::Collecting;
                    Outcome::Accepted
                } else if self.phase == RoundPhase::Cancelled {
                    Outcome::Discarded(ErrorCode::JobEnded)
                } else {
                    Outcome::Discarded(ErrorCode::Late)
                };
                vec![self.store(Record {
                    silo: contribution.silo.clone(),
                    outcome,
                    digest: Some(contribution.digest),
                    examples: contribution.examples,
                })]
            }
            Event::Rejected { silo, code } => self.remark(silo, Outcome::Rejected(*code)),
            Event::Declined { silo, code } => self.remark(silo, Outcome::Declined(*code)),
            Event::Lost { silo } => self.lose(silo),
            Event::Aggregated { version } if self.phase == RoundPhase::Aggregating => {
                self.phase = RoundPhase::Published;
                vec![Effect::Publish { version: *version }]
            }
            Event::AggregationFailed { .. } if self.phase == RoundPhase::Aggregating => {
                self.phase = RoundPhase::Failed;
                vec![Effect::Fail {
                    reason: String::new(),
                }]
            }
            Event::Cancel if self.phase <= RoundPhase::Aggregating => {
                self.phase = RoundPhase::Cancelled;
                vec![Effect::Cancel]
            }
            Event::Tick
            | Event::Aggregated { .. }
            | Event::AggregationFailed { .. }
            | Event::Cancel => vec![],
        }
    }

    fn lose(&mut self, silo: &SiloId) -> Vec<Effect> {
        let counts = self.row(silo).map(|row| row.outcome) == Some(Outcome::Accepted);
        if !counts || self.phase > RoundPhase::Aggregating {
            return vec![];
        }
        let mut effects = vec![self.store(Record {
            silo: silo.clone(),
            outcome: Outcome::Rejected(ErrorCode::Internal),
            digest: None,
            examples: 0,
        })];
        let left = self.accepted().len() as u32;
        if self.phase < RoundPhase::Aggregating && left == 0 {
            self.phase = RoundPhase::Announced;
        }
        if self.phase == RoundPhase::Aggregating && left < self.spec.window.min_count.max(1) {
            self.phase = RoundPhase::Failed;
            effects.push(Effect::Fail {
                reason: String::new(),
            });
        }
        effects
    }

    fn remark(&mut self, silo: &SiloId, outcome: Outcome) -> Vec<Effect> {
        match self.row(silo).map(|row| row.outcome) {
            None => {}
            Some(Outcome::Rejected(_)) if self.row(silo).unwrap().outcome != outcome => {}
            Some(_) => return vec![],
        }
        vec![self.store(Record {
            silo: silo.clone(),
            outcome,
            digest: None,
            examples: 0,
        })]
    }

    fn apply(&mut self, event: &Event, now: Timestamp) -> Result<Vec<Effect>, ErrorCode> {
        let silo = match event {
            Event::Contributed(contribution) => Some(&contribution.silo),
            Event::Rejected { silo, .. } | Event::Declined { silo, .. } | Event::Lost { silo } => {
                Some(silo)
            }
            _ => None,
        };
        if silo.is_some_and(|silo| !self.spec.cohort.contains(silo)) {
            return Err(ErrorCode::NotInCohort);
        }
        if let Event::Contributed(contribution) = event
            && let Some(digest) = self.row(&contribution.silo).and_then(|row| row.digest)
            && digest != contribution.digest
        {
            return Err(ErrorCode::DuplicateContribution);
        }
        let of_aggregation = matches!(
            event,
            Event::Aggregated { .. } | Event::AggregationFailed { .. }
        );
        if of_aggregation && self.phase < RoundPhase::Aggregating {
            return Err(ErrorCode::Internal);
        }
        let mut effects = self.settle(now);
        effects.extend(self.handle(event));
        effects.extend(self.settle(now));
        Ok(effects)
    }
}

fn without_wording(effects: Vec<Effect>) -> Vec<Effect> {
    effects
        .into_iter()
        .map(|effect| match effect {
            Effect::Fail { .. } => Effect::Fail {
                reason: String::new(),
            },
            other => other,
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn the_machine_does_what_the_naive_model_does(case in case()) {
        let mut round = Round::new(case.spec.clone());
        let mut model = Model { spec: &case.spec, phase: RoundPhase::Announced, rows: vec![] };
        for (event, now) in case.steps {
            let before = round.clone();
            let expected = model.apply(&event, now);
            let got = round.apply(event.clone(), now);
            if got.is_err() {
                prop_assert_eq!(&round, &before, "a refusal changed the state");
            }
            let got = got.map(without_wording).map_err(|refusal| refusal.code);
            prop_assert_eq!(got, expected, "{:?} at {:?}", event, now);
            prop_assert_eq!(round.phase(), model.phase);
            for silo in &case.spec.cohort {
                prop_assert_eq!(round.record(silo), model.row(silo));
            }
        }
    }

    #[test]
    fn what_the_effects_stored_restores_the_round_after_any_event(case in case()) {
        let mut round = Round::new(case.spec.clone());
        let mut restarted = Round::new(case.spec.clone());
        let mut rows = BTreeMap::new();
        for (event, now) in case.steps {
            let effects = round.apply(event.clone(), now);
            prop_assert_eq!(&restarted.apply(event, now), &effects);
            for effect in effects.into_iter().flatten() {
                if let Effect::Record(row) = effect {
                    rows.insert(row.silo.clone(), row);
                }
            }
            restarted = Round::restore(case.spec.clone(), round.phase(), rows.values().cloned())
                .map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!(&restarted, &round);
        }
    }

    #[test]
    fn every_silo_counts_at_most_once_and_the_round_ends_at_most_once(case in case()) {
        let mut round = Round::new(case.spec.clone());
        let mut phase = round.phase();
        let (mut counted, mut closed, mut ends) = (BTreeMap::new(), None, 0);
        for (event, now) in case.steps {
            for effect in round.apply(event, now).into_iter().flatten() {
                match effect {
                    Effect::Record(Record { silo, outcome: Outcome::Accepted, examples, .. }) => {
                        prop_assert!(closed.is_none(), "accepted after closing");
                        prop_assert!(counted.insert(silo, examples).is_none(), "accepted twice");
                    }
                    Effect::CloseForAggregation { contributions } => {
                        prop_assert!(closed.is_none(), "closed twice");
                        let sum: u64 = contributions.iter().map(|c| c.examples).sum();
                        prop_assert_eq!(sum, counted.values().sum::<u64>());
                        prop_assert!(contributions.iter().map(|c| &c.silo).eq(counted.keys()));
                        prop_assert!(contributions.len() >= case.spec.window.min_count.max(1) as usize);
                        closed = Some(contributions);
                    }
                    Effect::Publish { .. } => {
                        prop_assert!(closed.is_some(), "published without closing");
                        ends += 1;
                    }
                    Effect::Fail { .. } | Effect::Cancel => ends += 1,
                    Effect::Record(Record { silo, .. }) => {
                        // Only a loss displaces a counted contribution.
                        counted.remove(&silo);
                    }
                    Effect::Repeat(_) => {}
                }
            }
            let has_lost_all = (phase, round.phase()) == (RoundPhase::Collecting, RoundPhase::Announced);
            prop_assert!(round.phase() >= phase || has_lost_all, "{:?} after {:?}", round.phase(), phase);
            phase = round.phase();
            prop_assert_eq!(ends, u32::from(phase.is_over()));
            prop_assert_eq!(u64::from(round.accepted()), counted.len() as u64);
        }
    }

    #[test]
    fn nothing_happens_before_the_next_deadline_and_something_does_at_it(case in case()) {
        let mut round = Round::new(case.spec.clone());
        for (event, now) in case.steps {
            let _ = round.apply(event, now);
            let Some(deadline) = round.next_deadline() else {
                continue;
            };
            if deadline > case.spec.opened_at {
                let early = Timestamp(deadline.0 - 1);
                prop_assert_eq!(round.clone().apply(Event::Tick, early), Ok(vec![]));
            }
            prop_assert_eq!(round.clone().apply(Event::Tick, deadline).map(|e| e.len()), Ok(1));
        }
    }
}
