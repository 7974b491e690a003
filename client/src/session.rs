//! One silo's work, the same for the daemon and for a simulation: a round from claim to receipt, and the end of a job.
//!
//! The order of a round is chosen so that a stop at any point loses nothing and sends nothing twice:
//!
//! 1. claim the lease; decline the job if this silo cannot or will not do it
//! 2. download the round's adapter; it is what the round before has published, so evaluate the personal model with it
//! 3. train; the lease is renewed meanwhile
//! 4. through the egress gate, which keeps the checked update in its outbox
//! 5. report metrics (a second report of the same point replaces the first)
//! 6. save the vault: from here on the round counts as trained
//! 7. upload until the server has signed
//! 8. keep the receipt; the outbox keeps an accepted update until the next one takes its place or the job ends
//!
//! Stopped before 6, the round is trained again from the saved state and gives the same bytes; after 6 the outbox's bytes go up;
//! after 7 the server gives the same receipt again. A server whose machine lost power may have forgotten what it has signed for
//! (`durability = "process"`): then the outbox's bytes go up once more. No round is trained on top of its own result.
//!
//! A fault that would come again (a torn vault, data that cannot be used, an update that the server refuses) declines the job. What
//! may pass (a full disk, a server that is away) is given back as an error, and the caller tries again.

use std::sync::Arc;

use concord_common::{
    Clock, ErrorCode, JobId, RoundNumber, SiloId, code::Refusal, job::TrainingSpec,
};
use tokio_util::sync::CancellationToken;

use crate::{
    bench::{TrainerKey, Workbench},
    coordinator::{CallError, Claim, Coordinator},
    egress::EgressGate,
    patience::{Halt, Pace, patiently},
    profile::Profile,
    receipts::Receipts,
    status::{StatusBoard, Work},
    transfer::Downloads,
    vault::{Binding, Vault},
};

mod deliver;
mod error;
mod finish;
mod lease;
mod prepare;
mod refuse;
mod report;
#[cfg(test)]
mod tests;
mod train;

use self::{deliver::assignment, lease::Lease};
pub use self::{
    error::{RoundOutcome, SessionError},
    finish::Finished,
};

/// What a silo works with.
#[derive(Debug)]
pub struct Session<C> {
    /// The server.
    pub coordinator: Arc<C>,
    /// What receipts are verified with.
    pub receipt_key: Vec<u8>,
    /// This silo.
    pub silo: SiloId,
    /// Its backbones, tasks and rules.
    pub profile: Arc<Profile>,
    /// Its torch thread.
    pub bench: Workbench,
    /// Its vault.
    pub vault: Vault,
    /// Its gate.
    pub gate: Arc<EgressGate>,
    /// Its unfinished downloads.
    pub downloads: Downloads,
    /// What the server has signed.
    pub receipts: Arc<Receipts>,
    /// Where people look.
    pub board: Arc<StatusBoard>,
    /// Waits between attempts.
    pub pace: Pace,
    /// For durations in reports.
    pub clock: Arc<dyn Clock>,
    /// Stops the work between two training steps.
    pub stop: CancellationToken,
}

/// A job that this silo has taken up.
#[derive(Debug, Clone)]
struct Taken {
    key: TrainerKey,
    binding: Binding,
    task: String,
    spec_toml: String,
    /// Last round in the vault; 0 for none.
    trained: u32,
}

/// Codes that say: the round goes on, or ended, without this silo.
fn is_over(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::JobEnded
            | ErrorCode::WrongRound
            | ErrorCode::UnknownRound
            | ErrorCode::UnknownJob
            | ErrorCode::NotInCohort
            | ErrorCode::Late
            | ErrorCode::LeaseLost
            | ErrorCode::DuplicateContribution
    )
}

impl<C: Coordinator> Session<C> {
    /// Does this silo's part of a round.
    ///
    /// # Errors
    /// [`SessionError`]. After `Declined` the server will not ask again; after any other the same round can be tried again.
    pub async fn round(
        &self,
        job: &JobId,
        round: RoundNumber,
    ) -> Result<RoundOutcome, SessionError> {
        let claimed = patiently("claim lease", self.pace, &self.stop, || {
            self.coordinator.claim(job, round)
        })
        .await;
        let claim = match claimed {
            Ok(claim) => claim,
            Err(Halt::Call(CallError::Refused(refusal))) if is_over(refusal.code) => {
                return Ok(RoundOutcome::Missed(refusal));
            }
            Err(halt) => return Err(halt.into()),
        };
        let lease = Lease::new(&claim, self.stop.child_token());
        let work = async {
            let outcome = self.work(job, round, &claim, &lease).await;
            lease.done.cancel();
            outcome
        };
        let (outcome, ()) = tokio::join!(work, self.renew(job, round, &lease));
        self.board.work(None);
        match (outcome, lease.refusal()) {
            (Err(SessionError::Stopped), Some(refusal)) => Ok(RoundOutcome::Missed(refusal)),
            (Err(SessionError::Call(CallError::Refused(refusal))), _) if is_over(refusal.code) => {
                Ok(RoundOutcome::Missed(refusal))
            }
            (outcome, _) => outcome,
        }
    }

    async fn work(
        &self,
        job: &JobId,
        round: RoundNumber,
        claim: &Claim,
        lease: &Lease,
    ) -> Result<RoundOutcome, SessionError> {
        self.doing(job, round, &claim.spec, "preparing");
        let taken = match self.take_up(job, &claim.spec, &claim.spec_toml).await {
            Ok(taken) => taken,
            Err(error) => return Err(self.decline_for(job, error).await),
        };
        let assignment = assignment(job, round, claim);
        let pending = if taken.trained == round.0 {
            self.gate
                .pending(&assignment)
                .map_err(SessionError::Egress)?
        } else {
            None
        };
        let cleared = match pending {
            Some(cleared) => cleared,
            None if taken.trained == round.0 => {
                return Ok(RoundOutcome::Missed(Refusal::new(
                    ErrorCode::SiloFailed,
                    "this silo has trained the round already and its update is not there any more; it goes on with the next round",
                )));
            }
            None => match self.train(&taken, &claim.spec, &assignment, lease).await {
                Ok(cleared) => cleared,
                Err(error) => return Err(self.decline_for(job, error).await),
            },
        };
        self.doing(job, round, &claim.spec, "uploading");
        match self.deliver(&cleared, lease).await {
            Ok(receipt) => Ok(RoundOutcome::Answered(Box::new(receipt))),
            Err(error) => Err(self.decline_for(job, error).await),
        }
    }

    /// Lets go of a job: its trainer and what was in the outbox. Its vault stays as it is.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn forget(&self, job: &JobId) -> Result<(), SessionError> {
        self.bench.close(&self.key(job)).await?;
        let (gate, of) = (Arc::clone(&self.gate), job.clone());
        blocking(move || gate.done(&of))
            .await?
            .map_err(SessionError::Egress)
    }

    fn key(&self, job: &JobId) -> TrainerKey {
        TrainerKey {
            job: job.clone(),
            silo: self.silo.clone(),
        }
    }

    fn doing(&self, job: &JobId, round: RoundNumber, spec: &TrainingSpec, what: &str) {
        tracing::info!(job.id = %job, %round, what, "working");
        self.board.work(Some(Work {
            job: job.clone(),
            round,
            rounds: spec.rounds.count,
            doing: what.to_owned(),
            step: 0,
            steps: 0,
        }));
    }
}

/// Runs disk work off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, SessionError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| SessionError::Worker(error.to_string()))
}
