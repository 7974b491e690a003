//! What a job does between rounds, decided without I/O: whom to ask next, whether to wait, and how it ends.

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::UnknownName;
use crate::{RoundNumber, SiloId, Timestamp, job::TrainingSpec};

/// What became of a job. A job never goes back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Accepted; waiting for its turn.
    Queued,
    /// Rounds are being run.
    Running,
    /// All rounds are published.
    Succeeded,
    /// A round could not be completed.
    Failed,
    /// An operator cancelled it.
    Cancelled,
}

impl JobState {
    /// Every state.
    pub const ALL: [Self; 5] = [
        Self::Queued,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Nothing can happen any more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The name in stores and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for JobState {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        Self::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| UnknownName::new("job state", text))
    }
}

/// Silos as the federation knows them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Roster {
    /// Enrolled and active: asked by jobs that name no silos.
    pub active: BTreeSet<SiloId>,
    /// Not to be asked, also when a job names them: pending, suspended or revoked.
    pub barred: BTreeSet<SiloId>,
}

/// How far a job is, between two rounds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Rounds published so far.
    pub published: u32,
    /// Silos that declined the job in any round; they are not asked again.
    pub declined: BTreeSet<SiloId>,
    /// Since when no round is open: the job's start, or the end of its last round.
    pub idle_since: Timestamp,
}

/// What to do now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Open this round with this cohort.
    Open {
        /// Its number.
        number: RoundNumber,
        /// Whom to ask.
        cohort: BTreeSet<SiloId>,
    },
    /// Too few silos for now; look again when a silo joins or at this moment.
    Wait {
        /// When waiting ends.
        until: Timestamp,
    },
    /// The last round is published.
    Succeed,
    /// The job cannot go on.
    Fail {
        /// One sentence with the numbers, for the operator.
        reason: String,
    },
}

/// The next step of a running job without an open round. A silo that the job names is asked although it was never seen:
/// it may come later. With too few silos the job waits for up to `rounds.max_time`, unless more cannot help.
pub fn next_step(
    spec: &TrainingSpec,
    progress: &Progress,
    roster: &Roster,
    now: Timestamp,
) -> Step {
    if progress.published >= spec.rounds.count {
        return Step::Succeed;
    }
    let number = RoundNumber(progress.published + 1);
    let named = !spec.silos.is_empty();
    let pool = if named { &spec.silos } else { &roster.active };
    let willing = pool - &progress.declined;
    let cohort = &willing - &roster.barred;
    let min = spec.rounds.min_silos.max(1) as usize;
    if cohort.len() >= min {
        return Step::Open { number, cohort };
    }
    let until = progress.idle_since + spec.rounds.max_time;
    let hopeless = named && willing.len() < min;
    if now < until && !hopeless {
        return Step::Wait { until };
    }
    Step::Fail {
        reason: format!(
            "round {number} needs at least {min} silos and {} can be asked: {} declined the job, {} are not active",
            cohort.len(),
            progress.declined.len(),
            willing.len() - cohort.len(),
        ),
    }
}
