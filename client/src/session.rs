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
//! 7. upload until the server has signed, then clear the outbox
//!
//! Stopped before 6, the round is trained again from the saved state and gives the same bytes; after 6 the outbox's bytes go up.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use concord_common::{
    Clock, ErrorCode, JobId, RoundNumber, SiloId,
    code::Refusal,
    job::{JobSpec, TrainingSpec},
    round::{Outcome as ContributionOutcome, job::JobState},
    wire::{MetricPoint, SignedReceipt},
};
use concord_learning::{
    LearningError,
    data::Split,
    metric::Evaluation,
    trainer::{Continue, RoundResult},
};
use tokio_util::sync::CancellationToken;

use crate::{
    bench::{BestModel, TrainerKey, TrainerParts, Workbench},
    coordinator::{CallError, Claim, Coordinator, Notice},
    egress::{Assignment, EgressError, EgressGate},
    patience::{Halt, Pace, patiently, pause},
    profile::Profile,
    status::{StatusBoard, Work},
    transfer::{Delivery, Downloads, TransferError, fetch},
    vault::{Binding, Header, Record, Vault, VaultError},
};

mod finish;
#[cfg(test)]
mod tests;

pub use finish::Finished;

/// Why a silo's work did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The daemon is stopping; nothing is lost.
    #[error("the daemon is stopping")]
    Stopped,
    /// The server refused, or does not keep to the protocol.
    #[error(transparent)]
    Call(CallError),
    /// A transfer failed for another reason than the server's.
    #[error(transparent)]
    Transfer(TransferError),
    /// The vault cannot be used.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The egress gate or its log failed.
    #[error(transparent)]
    Egress(EgressError),
    /// Training or evaluation failed.
    #[error(transparent)]
    Learning(LearningError),
    /// This silo does not take part; the server has been told.
    #[error("declined: {0}")]
    Declined(Refusal),
    /// A worker thread broke off.
    #[error("a worker thread broke off: {0}")]
    Worker(String),
}

impl From<Halt> for SessionError {
    fn from(halt: Halt) -> Self {
        match halt {
            Halt::Stopped => Self::Stopped,
            Halt::Call(error) => Self::Call(error),
        }
    }
}

impl From<TransferError> for SessionError {
    fn from(error: TransferError) -> Self {
        match error {
            TransferError::Halt(halt) => halt.into(),
            TransferError::Egress(error) => Self::Egress(error),
            other => Self::Transfer(other),
        }
    }
}

impl From<LearningError> for SessionError {
    fn from(error: LearningError) -> Self {
        match error {
            LearningError::Cancelled => Self::Stopped,
            other => Self::Learning(other),
        }
    }
}

/// How a round ended for this silo.
#[derive(Debug, Clone, PartialEq)]
pub enum RoundOutcome {
    /// The server has signed for the contribution, whatever it made of it.
    Answered(Box<SignedReceipt>),
    /// The round or the job ended without this silo.
    Missed(Refusal),
}

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
        let assignment = Assignment {
            job: job.clone(),
            round,
            layout: claim.layout.clone(),
            base: claim.base,
            max_update_norm: claim.spec.limits.max_update_norm,
            max_examples: claim.spec.limits.max_examples,
        };
        let pending = if taken.trained == round.0 {
            self.gate
                .pending(&assignment)
                .map_err(SessionError::Egress)?
        } else {
            None
        };
        let cleared = match pending {
            Some(cleared) => cleared,
            None => match self.train(&taken, &claim.spec, &assignment, lease).await {
                Ok(cleared) => cleared,
                Err(error) => return Err(self.decline_for(job, error).await),
            },
        };
        self.doing(job, round, &claim.spec, "uploading");
        let delivery = Delivery {
            coordinator: self.coordinator.as_ref(),
            gate: &self.gate,
            silo: &self.silo,
            receipt_key: &self.receipt_key,
            pace: self.pace,
            stop: &lease.end,
        };
        let receipt = match delivery.deliver(&cleared, lease.token()).await {
            Ok(receipt) => receipt,
            Err(error) => return Err(self.decline_for(job, error.into()).await),
        };
        self.gate.done(job).map_err(SessionError::Egress)?;
        self.board.receipt(&receipt);
        match receipt.receipt.outcome {
            ContributionOutcome::Accepted => {
                tracing::info!(job.id = %job, %round, "contribution accepted");
            }
            other => {
                let reason = other.reason().map(ErrorCode::as_str);
                tracing::warn!(job.id = %job, %round, outcome = other.as_str(), reason, "contribution does not count");
            }
        }
        Ok(RoundOutcome::Answered(Box::new(receipt)))
    }

    /// Steps 2 to 6.
    async fn train(
        &self,
        taken: &Taken,
        spec: &TrainingSpec,
        assignment: &Assignment,
        lease: &Lease,
    ) -> Result<crate::egress::Cleared, SessionError> {
        let (job, round) = (&assignment.job, assignment.round);
        self.doing(job, round, spec, "downloading");
        let base = fetch(
            self.coordinator.as_ref(),
            &self.downloads,
            job,
            assignment.base,
            &assignment.layout,
            self.pace,
            &lease.end,
        )
        .await?;
        if taken.trained > 0 && taken.trained + 1 == round.0 {
            self.after_aggregation(taken, RoundNumber(taken.trained), base.clone(), &lease.end)
                .await?;
        }
        self.doing(job, round, spec, "training");
        let started = self.clock.now();
        let result = self.train_round(&taken.key, round, base, lease).await?;
        let seconds = self.clock.now().since(started).as_secs_f64();

        let (gate, assigned) = (Arc::clone(&self.gate), assignment.clone());
        let RoundResult {
            update,
            examples,
            training,
            validation,
        } = result;
        let cleared = blocking(move || gate.pass(&assigned, update, examples))
            .await?
            .map_err(SessionError::Egress)?;
        let mut numbers: BTreeMap<String, f64> = training.into_iter().collect();
        numbers.insert("seconds".to_owned(), seconds);
        numbers.insert("examples".to_owned(), examples as f64);
        self.report(job, round, MetricPoint::Training, numbers, &lease.end)
            .await?;
        if let Some(evaluation) = validation {
            self.report_evaluation(
                job,
                round,
                MetricPoint::AfterTraining,
                &evaluation,
                &lease.end,
            )
            .await?;
        }
        self.save_state(taken, round).await?;
        Ok(cleared)
    }

    async fn train_round(
        &self,
        key: &TrainerKey,
        round: RoundNumber,
        base: Bytes,
        lease: &Lease,
    ) -> Result<RoundResult, SessionError> {
        let (end, board) = (lease.end.clone(), Arc::clone(&self.board));
        let trained = self.bench.train(key, round.0, base, move |progress| {
            board.step(progress.step, progress.steps);
            if end.is_cancelled() {
                Continue::Stop
            } else {
                Continue::Yes
            }
        });
        Ok(trained.await?)
    }

    /// Evaluates with the adapter that `round` has published, reports, and saves: it may be the best model so far.
    async fn after_aggregation(
        &self,
        taken: &Taken,
        round: RoundNumber,
        published: Bytes,
        stop: &CancellationToken,
    ) -> Result<(), SessionError> {
        let evaluation = self
            .bench
            .after_aggregation(&taken.key, round.0, published)
            .await?;
        if let Some(evaluation) = evaluation {
            self.report_evaluation(
                &taken.key.job,
                round,
                MetricPoint::AfterAggregation,
                &evaluation,
                stop,
            )
            .await?;
        }
        self.save_state(taken, round).await
    }

    async fn save_state(&self, taken: &Taken, round: RoundNumber) -> Result<(), SessionError> {
        let body = self.bench.state(&taken.key).await?;
        let header = Header {
            record: Record::State,
            binding: taken.binding.clone(),
            round,
            task: taken.task.clone(),
            metrics: BTreeMap::new(),
            spec_toml: taken.spec_toml.clone(),
        };
        self.save(header, body).await
    }

    async fn save(&self, header: Header, body: Vec<u8>) -> Result<(), SessionError> {
        let vault = self.vault.clone();
        blocking(move || vault.save(&header, &body)).await??;
        Ok(())
    }

    /// Checks that this silo can and will do the job, and has its trainer at hand, from the vault if there is a state.
    async fn take_up(
        &self,
        job: &JobId,
        spec: &TrainingSpec,
        spec_toml: &str,
    ) -> Result<Taken, SessionError> {
        let declined = SessionError::Declined;
        self.profile.check(spec).map_err(declined)?;
        let task = self.profile.task(&spec.task).map_err(declined)?.clone();
        let folder = self
            .profile
            .backbone(&spec.backbone.name)
            .map_err(declined)?;
        let backbone = self.bench.backbone(&folder).await.map_err(|error| {
            tracing::error!(%error, "the backbone cannot be loaded");
            SessionError::Declined(Refusal::new(
                ErrorCode::BackboneMismatch,
                "this silo's backbone cannot be loaded; its log has the reason",
            ))
        })?;
        Profile::check_backbone(spec, &backbone).map_err(declined)?;
        let binding = Binding {
            job: job.clone(),
            silo: self.silo.clone(),
            backbone: backbone.digest,
            spec: concord_common::Digest::of(spec_toml.as_bytes()),
        };
        let key = TrainerKey {
            job: job.clone(),
            silo: self.silo.clone(),
        };
        let (vault, bound) = (self.vault.clone(), binding.clone());
        let saved = blocking(move || vault.load(&bound, Record::State)).await??;
        let trained = saved.as_ref().map_or(0, |(header, _)| header.round.0);
        if !self.bench.has(&key).await? {
            let loaded = blocking({
                let task = task.clone();
                move || crate::data::load_splits(&task)
            })
            .await?;
            let loaded = loaded.map_err(|error| {
                tracing::error!(%error, task = %task.name, "the task's data cannot be used");
                SessionError::Declined(Refusal::new(
                    ErrorCode::BadData,
                    format!(
                        "this silo's data for task `{}` cannot be used; its log has the reason",
                        spec.task
                    ),
                ))
            })?;
            for place in &loaded.first_skipped {
                tracing::warn!(task = %task.name, row = %place, skipped = loaded.skipped, "bad row skipped");
            }
            let parts = TrainerParts {
                spec: spec.clone(),
                backbone: folder,
                data: loaded.data,
                cache: self.profile.cache.clone(),
                share: self.profile.shares_rows,
                saved: saved.map(|(_, body)| body),
            };
            self.bench.open(&key, parts).await?;
        }
        Ok(Taken {
            key,
            binding,
            task: task.name,
            spec_toml: spec_toml.to_owned(),
            trained,
        })
    }

    /// Tells the server when this silo cannot go on with a job, and gives back what the caller is to know.
    async fn decline_for(&self, job: &JobId, error: SessionError) -> SessionError {
        let failed = |sentence: &str| Refusal::new(ErrorCode::SiloFailed, sentence);
        let refusal = match &error {
            SessionError::Declined(refusal) => refusal.clone(),
            SessionError::Egress(EgressError::Held(refusal)) => failed(&format!(
                "this silo's egress gate held the update back ({})",
                refusal.code
            )),
            SessionError::Egress(EgressError::Budget { .. }) => Refusal::new(
                ErrorCode::PolicyRefused,
                "this silo's byte budget for the job is used up",
            ),
            SessionError::Vault(_) => {
                failed("this silo's vault for the job cannot be used; its log has the reason")
            }
            SessionError::Learning(LearningError::Config(_) | LearningError::Payload(_)) => {
                failed("this silo cannot train with the job's settings; its log has the reason")
            }
            SessionError::Learning(LearningError::Data(_) | LearningError::Tokenizer { .. }) => {
                Refusal::new(
                    ErrorCode::BadData,
                    "this silo's data cannot be used for the job; its log has the reason",
                )
            }
            SessionError::Learning(LearningError::Stopped(_)) => return error,
            SessionError::Learning(_) => {
                failed("training failed in this silo; its log has the reason")
            }
            _ => return error,
        };
        tracing::error!(%error, job.id = %job, code = %refusal.code, "declining the job");
        match self.decline(job, &refusal).await {
            Ok(()) => SessionError::Declined(refusal),
            Err(other) => other,
        }
    }

    async fn decline(&self, job: &JobId, refusal: &Refusal) -> Result<(), SessionError> {
        let (gate, of, why) = (Arc::clone(&self.gate), job.clone(), refusal.clone());
        let cleared = blocking(move || gate.decline(&of, &why))
            .await?
            .map_err(SessionError::Egress)?;
        let answer = patiently("decline job", self.pace, &self.stop, || {
            self.coordinator.decline(&cleared)
        })
        .await;
        match answer {
            Err(Halt::Call(CallError::Refused(refusal))) if is_over(refusal.code) => Ok(()),
            answer => Ok(answer?),
        }
    }

    async fn report_evaluation(
        &self,
        job: &JobId,
        round: RoundNumber,
        point: MetricPoint,
        evaluation: &Evaluation,
        stop: &CancellationToken,
    ) -> Result<(), SessionError> {
        self.report(job, round, point, numbers(evaluation), stop)
            .await
    }

    /// Reports numbers. A server that does not want them does not stop the work.
    async fn report(
        &self,
        job: &JobId,
        round: RoundNumber,
        point: MetricPoint,
        numbers: BTreeMap<String, f64>,
        stop: &CancellationToken,
    ) -> Result<(), SessionError> {
        if !self.profile.reports_metrics {
            return Ok(());
        }
        let (gate, of) = (Arc::clone(&self.gate), job.clone());
        let cleared = match blocking(move || gate.report(&of, round, point, numbers)).await? {
            Ok(cleared) => cleared,
            Err(EgressError::Report(reason)) => {
                tracing::warn!(job.id = %job, %round, reason, "a report was held back");
                return Ok(());
            }
            Err(error) => return Err(SessionError::Egress(error)),
        };
        let answer = patiently("report metrics", self.pace, stop, || {
            self.coordinator.report(&cleared)
        })
        .await;
        match answer {
            Err(Halt::Call(error)) => {
                tracing::warn!(%error, job.id = %job, %round, "a report was refused");
                Ok(())
            }
            answer => Ok(answer?),
        }
    }

    /// Keeps the lease until the work is done or the server says that the round goes on without this silo.
    async fn renew(&self, job: &JobId, round: RoundNumber, lease: &Lease) {
        loop {
            if pause(lease.duration / 2, &lease.done).await.is_err() {
                return;
            }
            let renewed = tokio::select! {
                () = lease.done.cancelled() => return,
                renewed = patiently("renew lease", self.pace, &lease.end, || self.coordinator.claim(job, round)) => renewed,
            };
            match renewed {
                Ok(claim) => lease.renewed(claim.token),
                Err(Halt::Call(CallError::Refused(refusal))) if is_over(refusal.code) => {
                    tracing::warn!(%refusal, job.id = %job, %round, "the round goes on without this silo");
                    lease.lost(refusal);
                    return;
                }
                Err(Halt::Call(error)) => {
                    tracing::warn!(%error, job.id = %job, "the lease could not be renewed");
                }
                Err(Halt::Stopped) => return,
            }
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

/// The numbers of an evaluation as they are reported.
fn numbers(evaluation: &Evaluation) -> BTreeMap<String, f64> {
    let mut numbers = evaluation.metrics.clone();
    numbers.insert("rows".to_owned(), evaluation.rows as f64);
    numbers
}

/// A lease while it is worked on.
#[derive(Debug)]
struct Lease {
    duration: Duration,
    token: Mutex<Vec<u8>>,
    refusal: Mutex<Option<Refusal>>,
    /// Ends the work: the daemon stops, or the lease is lost.
    end: CancellationToken,
    /// Ends the renewing.
    done: CancellationToken,
}

impl Lease {
    fn new(claim: &Claim, end: CancellationToken) -> Self {
        Self {
            duration: claim.duration,
            token: Mutex::new(claim.token.clone()),
            refusal: Mutex::new(None),
            done: end.child_token(),
            end,
        }
    }

    fn token(&self) -> Vec<u8> {
        self.token
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn renewed(&self, token: Vec<u8>) {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }

    fn lost(&self, refusal: Refusal) {
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(refusal);
        self.end.cancel();
    }

    fn refusal(&self) -> Option<Refusal> {
        self.refusal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
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
