//! The machine itself; its rules stand in the parent module.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Contribution, Effect, Event, Outcome, Record, RoundPhase, RoundSpec};
use crate::{ErrorCode, RoundNumber, SiloId, Timestamp, code::Refusal};

/// Stored rows that no round can have left behind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// A row of a silo that was never asked.
    #[error("{round} has a record of silo `{silo}`, which is not in its cohort")]
    NotInCohort {
        /// Round.
        round: RoundNumber,
        /// Silo.
        silo: SiloId,
    },
    /// Two rows of one silo.
    #[error("{round} has two records of silo `{silo}`")]
    Twice {
        /// Round.
        round: RoundNumber,
        /// Silo.
        silo: SiloId,
    },
    /// A counted or discarded contribution without its digest, or a digest without a contribution.
    #[error("{round}: the record of silo `{silo}` is {outcome}, which {rule} a payload digest")]
    Digest {
        /// Round.
        round: RoundNumber,
        /// Silo.
        silo: SiloId,
        /// Name of the outcome.
        outcome: &'static str,
        /// `needs` or `cannot have`.
        rule: &'static str,
    },
    /// Phase and rows do not go together.
    #[error(
        "{round} is stored as {phase} with {accepted} accepted contributions of at least {needed}"
    )]
    Phase {
        /// Round.
        round: RoundNumber,
        /// Stored phase.
        phase: RoundPhase,
        /// Accepted rows.
        accepted: u32,
        /// Accepted rows that the phase needs.
        needed: u32,
    },
}

/// One round of a job.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Round {
    spec: RoundSpec,
    phase: RoundPhase,
    records: BTreeMap<SiloId, Record>,
}

impl Round {
    /// A round that was just announced.
    pub fn new(spec: RoundSpec) -> Self {
        Self {
            spec,
            phase: RoundPhase::Announced,
            records: BTreeMap::new(),
        }
    }

    /// A round as it was when `phase` and `records` were stored. The difference between announced and collecting is taken
    /// from the records.
    ///
    /// # Errors
    /// If no round can have left these rows behind.
    pub fn restore(
        spec: RoundSpec,
        phase: RoundPhase,
        records: impl IntoIterator<Item = Record>,
    ) -> Result<Self, RestoreError> {
        let mut round = Self::new(spec);
        for record in records {
            round.check_restored(&record)?;
            round.records.insert(record.silo.clone(), record);
        }
        let accepted = round.accepted();
        let needed = match phase {
            RoundPhase::Aggregating | RoundPhase::Published => round.min_count(),
            _ => 0,
        };
        if accepted < needed {
            return Err(RestoreError::Phase {
                round: round.spec.number,
                phase,
                accepted,
                needed,
            });
        }
        round.phase = match phase {
            RoundPhase::Announced | RoundPhase::Collecting if accepted == 0 => {
                RoundPhase::Announced
            }
            RoundPhase::Announced => RoundPhase::Collecting,
            other => other,
        };
        Ok(round)
    }

    fn check_restored(&self, record: &Record) -> Result<(), RestoreError> {
        let round = self.spec.number;
        let silo = record.silo.clone();
        if !self.spec.cohort.contains(&silo) {
            return Err(RestoreError::NotInCohort { round, silo });
        }
        if self.records.contains_key(&silo) {
            return Err(RestoreError::Twice { round, silo });
        }
        let sent = matches!(record.outcome, Outcome::Accepted | Outcome::Discarded(_));
        if sent != record.digest.is_some() {
            return Err(RestoreError::Digest {
                round,
                silo,
                outcome: record.outcome.as_str(),
                rule: if sent { "needs" } else { "cannot have" },
            });
        }
        Ok(())
    }

    /// What the round is fixed to.
    pub fn spec(&self) -> &RoundSpec {
        &self.spec
    }

    /// Where the round stands.
    pub fn phase(&self) -> RoundPhase {
        self.phase
    }

    /// What is recorded, in silo-id order; silos without an answer are missing.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// What is recorded for a silo.
    pub fn record(&self, silo: &SiloId) -> Option<&Record> {
        self.records.get(silo)
    }

    /// Number of accepted contributions.
    pub fn accepted(&self) -> u32 {
        self.count(|outcome| outcome == Outcome::Accepted)
    }

    /// The accepted contributions in silo-id order: what is to be aggregated, also after a restart in that phase.
    pub fn contributions(&self) -> Vec<Contribution> {
        self.records
            .values()
            .filter(|record| record.outcome == Outcome::Accepted)
            .filter_map(|record| {
                Some(Contribution {
                    silo: record.silo.clone(),
                    digest: record.digest?,
                    examples: record.examples,
                })
            })
            .collect()
    }

    /// Silos that are waited for: those of an open round that were neither accepted nor have declined, and whose contribution
    /// was not lost.
    pub fn awaited(&self) -> impl Iterator<Item = &SiloId> {
        let open = self.phase.is_open();
        self.spec
            .cohort
            .iter()
            .filter(move |silo| open && !self.has_answered(silo))
    }

    /// When the next [`Event::Tick`] will move an open round, if no other event comes before.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        if !self.phase.is_open() {
            return None;
        }
        if self.is_decided() {
            return Some(self.spec.opened_at);
        }
        let window = &self.spec.window;
        if self.has_max_count() {
            return Some(self.spec.opened_at + window.min_time.min(window.max_time));
        }
        Some(self.spec.closes_at())
    }

    /// Takes one event at the moment `now`. A deadline that has passed takes effect first.
    ///
    /// # Errors
    /// The state is then as it was: `NOT_IN_COHORT` for a silo that was not asked, `DUPLICATE_CONTRIBUTION` for a second
    /// payload of a silo, `BAD_WEIGHT` for a contribution without examples, and `INTERNAL` for an aggregate of a round
    /// that is still open.
    pub fn apply(&mut self, event: Event, now: Timestamp) -> Result<Vec<Effect>, Refusal> {
        self.check(&event)?;
        let mut effects = Vec::new();
        self.settle(now, &mut effects);
        match event {
            Event::Contributed(contribution) => self.contribute(contribution, &mut effects),
            Event::Rejected { silo, code } => {
                self.note(silo, Outcome::Rejected(code), &mut effects);
            }
            Event::Declined { silo, code } => {
                self.note(silo, Outcome::Declined(code), &mut effects);
            }
            Event::Lost { silo } => self.lose(silo, &mut effects),
            Event::Tick => {}
            Event::Aggregated { version } => {
                if self.phase == RoundPhase::Aggregating {
                    self.phase = RoundPhase::Published;
                    effects.push(Effect::Publish { version });
                }
            }
            Event::AggregationFailed { reason } => {
                if self.phase == RoundPhase::Aggregating {
                    self.phase = RoundPhase::Failed;
                    effects.push(Effect::Fail { reason });
                }
            }
            Event::Cancel => {
                if !self.phase.is_over() {
                    self.phase = RoundPhase::Cancelled;
                    effects.push(Effect::Cancel);
                }
            }
        }
        self.settle(now, &mut effects);
        Ok(effects)
    }

    fn check(&self, event: &Event) -> Result<(), Refusal> {
        match event {
            Event::Contributed(contribution) => self.check_contribution(contribution),
            Event::Rejected { silo, .. } | Event::Declined { silo, .. } | Event::Lost { silo } => {
                self.check_member(silo)
            }
            Event::Aggregated { .. } | Event::AggregationFailed { .. } if self.phase.is_open() => {
                Err(Refusal::new(
                    ErrorCode::Internal,
                    format!("round {} is still open", self.spec.number),
                ))
            }
            _ => Ok(()),
        }
    }

    fn check_member(&self, silo: &SiloId) -> Result<(), Refusal> {
        if self.spec.cohort.contains(silo) {
            return Ok(());
        }
        Err(Refusal::new(
            ErrorCode::NotInCohort,
            format!(
                "silo `{silo}` is not in the cohort of round {}; work only on rounds that were announced to it",
                self.spec.number
            ),
        ))
    }

    fn check_contribution(&self, contribution: &Contribution) -> Result<(), Refusal> {
        self.check_member(&contribution.silo)?;
        if contribution.examples == 0 {
            return Err(Refusal::new(
                ErrorCode::BadWeight,
                "a contribution must have at least 1 training example",
            ));
        }
        match self.records.get(&contribution.silo) {
            Some(Record {
                outcome,
                digest: Some(digest),
                ..
            }) if *digest != contribution.digest => Err(Refusal::new(
                ErrorCode::DuplicateContribution,
                format!(
                    "another contribution of silo `{}` to round {} is already {} (payload {}); send the same one or none",
                    contribution.silo,
                    self.spec.number,
                    outcome.as_str(),
                    digest.short()
                ),
            )),
            _ => Ok(()),
        }
    }

    fn contribute(&mut self, contribution: Contribution, effects: &mut Vec<Effect>) {
        if let Some(record) = self.records.get(&contribution.silo)
            && record.digest.is_some()
        {
            effects.push(Effect::Repeat(record.clone()));
            return;
        }
        let outcome = match self.phase {
            RoundPhase::Announced | RoundPhase::Collecting => {
                self.phase = RoundPhase::Collecting;
                Outcome::Accepted
            }
            RoundPhase::Cancelled => Outcome::Discarded(ErrorCode::JobEnded),
            RoundPhase::Aggregating | RoundPhase::Published | RoundPhase::Failed => {
                Outcome::Discarded(ErrorCode::Late)
            }
        };
        self.write(
            Record {
                silo: contribution.silo,
                outcome,
                digest: Some(contribution.digest),
                examples: contribution.examples,
            },
            effects,
        );
    }

    /// A rejection or a no never displaces a contribution, and a rejection never displaces a no.
    fn note(&mut self, silo: SiloId, outcome: Outcome, effects: &mut Vec<Effect>) {
        let keep = self.records.get(&silo).is_some_and(|record| {
            !matches!(record.outcome, Outcome::Rejected(_)) || record.outcome == outcome
        });
        if !keep {
            self.write(
                Record {
                    silo,
                    outcome,
                    digest: None,
                    examples: 0,
                },
                effects,
            );
        }
    }

    /// Takes a counted contribution out of a round that still needs its bytes. Its silo is not waited for: it has its receipt and
    /// has settled the round.
    fn lose(&mut self, silo: SiloId, effects: &mut Vec<Effect>) {
        let counts = self
            .records
            .get(&silo)
            .is_some_and(|record| record.outcome == Outcome::Accepted);
        if !counts || self.phase.is_over() {
            return;
        }
        self.write(
            Record {
                silo,
                outcome: LOST,
                digest: None,
                examples: 0,
            },
            effects,
        );
        let (accepted, min) = (self.accepted(), self.min_count());
        match self.phase {
            RoundPhase::Aggregating if accepted < min => {
                self.phase = RoundPhase::Failed;
                effects.push(Effect::Fail {
                    reason: format!(
                        "round {} has {accepted} accepted contributions of at least {min} left: the bytes of the others were \
                         damaged on the server's disk",
                        self.spec.number
                    ),
                });
            }
            RoundPhase::Collecting if accepted == 0 => self.phase = RoundPhase::Announced,
            _ => {}
        }
    }

    fn write(&mut self, record: Record, effects: &mut Vec<Effect>) {
        self.records.insert(record.silo.clone(), record.clone());
        effects.push(Effect::Record(record));
    }

    /// Ends the collection if it is time.
    fn settle(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        if !self.is_due(now) {
            return;
        }
        let (accepted, min) = (self.accepted(), self.min_count());
        if accepted >= min {
            self.phase = RoundPhase::Aggregating;
            effects.push(Effect::CloseForAggregation {
                contributions: self.contributions(),
            });
            return;
        }
        self.phase = RoundPhase::Failed;
        effects.push(Effect::Fail {
            reason: self.failure(accepted, min, now),
        });
    }

    fn is_due(&self, now: Timestamp) -> bool {
        let window = &self.spec.window;
        self.phase.is_open()
            && (self.is_decided()
                || (self.has_max_count() && now.since(self.spec.opened_at) >= window.min_time)
                || now >= self.spec.closes_at())
    }

    /// Waiting cannot change anything: all have answered, or too many are out.
    fn is_decided(&self) -> bool {
        self.all_answered() || self.reachable() < self.min_count()
    }

    fn failure(&self, accepted: u32, min: u32, now: Timestamp) -> String {
        let cohort = self.spec.cohort.len();
        let lost = self.count(|outcome| outcome == LOST);
        let rejected = self.count(|outcome| matches!(outcome, Outcome::Rejected(_))) - lost;
        let declined = self.count(|outcome| matches!(outcome, Outcome::Declined(_)));
        let damaged = match lost {
            0 => String::new(),
            _ => format!("; {lost} contributions were damaged on the server's disk"),
        };
        let silent = cohort - self.records.len();
        let ended = if now >= self.spec.closes_at() {
            format!(
                "after {}",
                humantime::format_duration(self.spec.window.max_time)
            )
        } else {
            "before its time was up".to_owned()
        };
        format!(
            "round {} ended {ended} with {accepted} accepted contributions of at least {min}: of {cohort} silos \
             {declined} declined, {rejected} sent only rejected contributions and {silent} did not answer{damaged}",
            self.spec.number
        )
    }

    fn count(&self, which: impl Fn(Outcome) -> bool) -> u32 {
        self.records
            .values()
            .filter(|record| which(record.outcome))
            .count() as u32
    }

    fn min_count(&self) -> u32 {
        self.spec.window.min_count.max(1)
    }

    fn has_max_count(&self) -> bool {
        self.spec
            .window
            .max_count
            .is_some_and(|max| self.accepted() >= max.max(self.min_count()))
    }

    fn has_answered(&self, silo: &SiloId) -> bool {
        self.records
            .get(silo)
            .is_some_and(|record| record.outcome == Outcome::Accepted || is_out(record.outcome))
    }

    fn all_answered(&self) -> bool {
        self.spec.cohort.iter().all(|silo| self.has_answered(silo))
    }

    /// Contributions that the round can still get, those it has included.
    fn reachable(&self) -> u32 {
        self.spec.cohort.len() as u32 - self.count(is_out)
    }
}

/// What is recorded of a silo whose contribution was lost; no check of a contribution ends with it.
const LOST: Outcome = Outcome::Rejected(ErrorCode::Internal);

/// True if nothing more is expected of the silo in this round.
fn is_out(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Declined(_)) || outcome == LOST
}
