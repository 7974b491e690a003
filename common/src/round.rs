//! A round as a pure state machine: events in, effects out, and no clock, randomness, I/O or async inside.
//!
//! [`Round::apply`] decides; whoever drives it (the server's round driver, or `concord-client simulate`) carries the
//! effects out. [`Round::restore`] rebuilds a round from what was stored. [`job`] decides what a job does between rounds.
//!
//! The rules:
//! - A silo of the cohort counts at most once. The same payload again is answered as before ([`Effect::Repeat`]); another
//!   payload is refused with `DUPLICATE_CONTRIBUTION`.
//! - A rejected contribution does not end the silo's chances: it may send a better one while the round is open.
//! - The round closes when it has `max_count` contributions, when every silo of the cohort has answered (its contribution
//!   was accepted or lost, or it declined), or after `max_time`. Before `min_time` only the second closes it; until then more than
//!   `max_count` contributions may come in, and they count.
//! - A counted contribution whose bytes were found damaged is lost ([`Event::Lost`]; recorded as rejected with `INTERNAL`). Its
//!   silo has a receipt and will hardly send it again, so the round goes on as if the silo had declined: an open one waits for
//!   the others only, and a closed one is aggregated without it. If it does come again while the round is open, it counts.
//! - With fewer than `min_count` contributions the round fails, as soon as that is certain.
//! - What comes after the end is discarded with `LATE` (`JOB_ENDED` if it was cancelled) and gets a receipt that says so.

use std::{collections::BTreeSet, fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    Digest, ErrorCode, JobId, RoundNumber, SiloId, Timestamp, adapter::AdapterVersion,
    job::RoundsSpec,
};

pub mod job;
mod machine;
#[cfg(test)]
mod tests;

pub use machine::{RestoreError, Round};

/// A text that names no phase or state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {what}")]
pub struct UnknownName {
    what: &'static str,
    text: String,
}

impl UnknownName {
    fn new(what: &'static str, text: &str) -> Self {
        Self {
            what,
            text: text.chars().take(80).collect(),
        }
    }
}

/// Where a round stands. A round never goes back, but for an open one that loses its only contribution.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoundPhase {
    /// Made known to the cohort; no contribution counted yet.
    Announced,
    /// At least one contribution is in.
    Collecting,
    /// Closed; the contributions are being aggregated.
    Aggregating,
    /// The new adapter version is out.
    Published,
    /// Too few contributions, or they could not be aggregated.
    Failed,
    /// The job was cancelled.
    Cancelled,
}

impl RoundPhase {
    /// Every phase.
    pub const ALL: [Self; 6] = [
        Self::Announced,
        Self::Collecting,
        Self::Aggregating,
        Self::Published,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Contributions are counted.
    pub fn is_open(self) -> bool {
        matches!(self, Self::Announced | Self::Collecting)
    }

    /// Nothing but late contributions can happen any more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Published | Self::Failed | Self::Cancelled)
    }

    /// The name in stores and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Announced => "announced",
            Self::Collecting => "collecting",
            Self::Aggregating => "aggregating",
            Self::Published => "published",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for RoundPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for RoundPhase {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        Self::ALL
            .into_iter()
            .find(|phase| phase.as_str() == text)
            .ok_or_else(|| UnknownName::new("round phase", text))
    }
}

/// How many contributions a round wants and how long it waits for them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ParticipationWindow {
    /// The round fails with fewer; 0 is taken as 1.
    pub min_count: u32,
    /// The round closes with this many; the whole cohort if absent.
    pub max_count: Option<u32>,
    /// The round stays open at least this long, unless the whole cohort has answered.
    #[serde(with = "humantime_serde")]
    pub min_time: Duration,
    /// The round closes after this time.
    #[serde(with = "humantime_serde")]
    pub max_time: Duration,
}

impl From<&RoundsSpec> for ParticipationWindow {
    fn from(spec: &RoundsSpec) -> Self {
        Self {
            min_count: spec.min_silos,
            max_count: spec.max_silos,
            min_time: spec.min_time,
            max_time: spec.max_time,
        }
    }
}

/// What a round is fixed to from its start on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RoundSpec {
    /// Job.
    pub job: JobId,
    /// Number in the job.
    pub number: RoundNumber,
    /// The silos that are asked.
    pub cohort: BTreeSet<SiloId>,
    /// Counts and times.
    pub window: ParticipationWindow,
    /// Adapter that contributions are deltas to.
    pub base: AdapterVersion,
    /// When the round was announced; the window's times count from here.
    pub opened_at: Timestamp,
}

impl RoundSpec {
    /// When the round closes at the latest.
    pub fn closes_at(&self) -> Timestamp {
        self.opened_at + self.window.max_time
    }
}

/// A silo's update for a round, checked and spooled.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Contribution {
    /// Who sent it.
    pub silo: SiloId,
    /// BLAKE3 of the payload.
    pub digest: Digest,
    /// Training examples behind it.
    pub examples: u64,
}

/// What became of a silo's part in a round.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(tag = "outcome", content = "reason", rename_all = "snake_case")]
pub enum Outcome {
    /// Counted in the aggregate.
    Accepted,
    /// Refused; the silo may send a better one.
    Rejected(ErrorCode),
    /// Well-formed but not counted.
    Discarded(ErrorCode),
    /// The silo said that it will not take part.
    Declined(ErrorCode),
}

impl Outcome {
    /// The outcome's name in stores and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Rejected(_) => "rejected",
            Self::Discarded(_) => "discarded",
            Self::Declined(_) => "declined",
        }
    }

    /// Why, for every outcome but accepted.
    pub fn reason(self) -> Option<ErrorCode> {
        match self {
            Self::Accepted => None,
            Self::Rejected(code) | Self::Discarded(code) | Self::Declined(code) => Some(code),
        }
    }

    /// From the name and the reason's text (empty when accepted), as stores keep them.
    ///
    /// # Errors
    /// If there is no such outcome or reason, or the reason is missing or superfluous.
    pub fn from_parts(name: &str, reason: &str) -> Result<Self, UnknownName> {
        if name == "accepted" && reason.is_empty() {
            return Ok(Self::Accepted);
        }
        let code = reason
            .parse()
            .map_err(|_| UnknownName::new("reason for an outcome", reason))?;
        match name {
            "rejected" => Ok(Self::Rejected(code)),
            "discarded" => Ok(Self::Discarded(code)),
            "declined" => Ok(Self::Declined(code)),
            _ => Err(UnknownName::new("outcome", name)),
        }
    }
}

/// The row a round keeps for a silo; a later one replaces it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Who.
    pub silo: SiloId,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// BLAKE3 of the payload; always there for accepted and discarded contributions, never for others.
    pub digest: Option<Digest>,
    /// Training examples behind the update; 0 without a digest.
    pub examples: u64,
}

/// What can happen to a round.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A contribution arrived whole, passed every check and is spooled.
    Contributed(Contribution),
    /// A contribution did not pass a check.
    Rejected {
        /// Who sent it.
        silo: SiloId,
        /// Why; never `INTERNAL`, which stands for a lost contribution.
        code: ErrorCode,
    },
    /// The bytes of an accepted contribution were damaged on the way from its receipt to the aggregation.
    Lost {
        /// Whose they are.
        silo: SiloId,
    },
    /// A silo will not take part.
    Declined {
        /// Who.
        silo: SiloId,
        /// Why.
        code: ErrorCode,
    },
    /// Time has passed.
    Tick,
    /// The aggregate is computed and stored.
    Aggregated {
        /// Its version.
        version: AdapterVersion,
    },
    /// The contributions cannot be aggregated.
    AggregationFailed {
        /// One sentence for the operator.
        reason: String,
    },
    /// An operator cancelled the job.
    Cancel,
}

/// What the driver has to do, in this order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Store this row for its silo, in place of an earlier one; send a receipt if it has a digest.
    Record(Record),
    /// This very contribution is recorded already: answer with the receipt of then.
    Repeat(Record),
    /// Aggregate exactly these, in silo-id order, and come back with [`Event::Aggregated`].
    CloseForAggregation {
        /// The accepted contributions in silo-id order.
        contributions: Vec<Contribution>,
    },
    /// Make the version the job's newest.
    Publish {
        /// The new adapter.
        version: AdapterVersion,
    },
    /// The round has failed.
    Fail {
        /// One sentence with the numbers, for the operator.
        reason: String,
    },
    /// The round is cancelled.
    Cancel,
}
