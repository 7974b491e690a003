//! The worker's loop: claim a job, work on it, give it back, ask for the next.

mod command;
mod job;
mod renew;
#[cfg(test)]
mod tests;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use concord_artaug::setup::SetupError;
use concord_common::{Clock, job::artaug::ArtaugSpec};
use concord_proto::v1;

pub use self::command::RunArgs;
use crate::{
    brake::{Brake, Halt, Stop},
    limits::MemoryLimit,
    remote::{CallError, Claim, Pace, Server},
    stages::Parts,
};

/// Longest wait after a job that something outside held up.
const LONGEST_TROUBLE: Duration = Duration::from_mins(5);

/// Why a job cannot be set up on this worker.
#[derive(Debug, thiserror::Error)]
pub enum PartsError {
    /// A part that needs no engine.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The model, or a setting that does not fit it.
    #[error("`{key}`: {what}")]
    Model {
        /// The key of the specification.
        key: &'static str,
        /// Why not, and what to do.
        what: String,
    },
    /// The job wants more than the limits in this worker's settings allow. Another worker may give it.
    #[error("`{key}`: {what}")]
    Limit {
        /// The key of the worker's settings.
        key: &'static str,
        /// How much is wanted, how much there is, and what to do.
        what: String,
    },
    /// Work on the job stops before it has begun here.
    #[error(transparent)]
    Halt(#[from] Halt),
}

/// Makes what a job works with.
pub trait Workshop: Send + Sync {
    /// The engine, advisor and scorers of a specification. Their calls elsewhere go on until the brake drops them. That takes minutes with a
    /// large model, so the brake is also asked on the way.
    ///
    /// # Errors
    /// What this worker lacks, or what the job may not have, with what to do; or that the brake is pulled.
    fn parts(&self, spec: &ArtaugSpec, brake: &Brake) -> Result<Parts, PartsError>;
}

/// How a worker works.
#[derive(Debug, Clone)]
pub struct Habits {
    /// Folder of all jobs' folders.
    pub jobs: PathBuf,
    /// What all jobs' folders together may hold.
    pub disk: u64,
    /// What the process may hold.
    pub memory: MemoryLimit,
    /// Threads beside the engine's.
    pub helpers: usize,
    /// How long a gentle halt waits for what is under way.
    pub stop_within: Duration,
    /// Between two attempts.
    pub pace: Pace,
    /// End when no job has come for so long.
    pub exit_when_idle: Option<Duration>,
}

/// Why a worker has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Told,
    /// No job came for long enough.
    Idle,
    /// The process holds more memory than it may, also without a job: only a new one gets rid of it.
    Heavy,
}

/// A worker.
pub struct Worker {
    /// The server.
    pub server: Arc<dyn Server>,
    /// Makes what jobs work with.
    pub workshop: Box<dyn Workshop>,
    /// How it works.
    pub habits: Habits,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Its stop.
    pub stop: Arc<Stop>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("habits", &self.habits)
            .finish_non_exhaustive()
    }
}

impl Worker {
    /// Works until it is told to stop, no job has come for long enough, or the memory that a job took does not come back. A server that
    /// cannot be reached is no error, and a job that goes wrong ends that job alone.
    pub fn run(&self) -> Ended {
        let pace = self.habits.pace;
        let (mut failures, mut troubles) = (pace.delays(), pace.delays());
        let mut idle_since = Instant::now();
        while !self.stop.is_told() {
            let wait = match self.server.claim() {
                Ok(Claim::Job(lease)) => {
                    failures = pace.delays();
                    let held_up = self.take_up(&lease);
                    idle_since = Instant::now();
                    if !held_up {
                        troubles = pace.delays();
                        continue;
                    }
                    if self.habits.memory.check().is_err() {
                        return Ended::Heavy;
                    }
                    // The same job would be claimed at once, and held up again.
                    let delay = troubles.next().unwrap_or(LONGEST_TROUBLE);
                    self.stop.wait(delay.min(LONGEST_TROUBLE));
                    continue;
                }
                Ok(Claim::Nothing(wait)) => {
                    failures = pace.delays();
                    wait.min(pace.longest)
                }
                Err(error) => {
                    let own = failures.next().unwrap_or(pace.longest);
                    let delay = own.max(wish(&error).min(pace.longest));
                    tracing::warn!(%error, ?delay, "no job can be claimed; trying again");
                    delay
                }
            };
            let is_idle = |idle: Duration| idle_since.elapsed() >= idle;
            if self.habits.exit_when_idle.is_some_and(is_idle) {
                tracing::info!("no job has come for long enough");
                return Ended::Idle;
            }
            self.stop.wait(wait);
        }
        Ended::Told
    }

    /// Works on a claimed job; true if something outside held it up.
    fn take_up(&self, lease: &v1::WorkerLease) -> bool {
        tracing::info!(job.id = %lease.job_id, attempt = lease.attempt, lines = lease.journal_lines, "job claimed");
        job::work(self, lease)
    }
}

fn wish(error: &CallError) -> Duration {
    match error {
        CallError::Unavailable {
            retry_after: Some(wish),
            ..
        } => *wish,
        _ => Duration::ZERO,
    }
}
