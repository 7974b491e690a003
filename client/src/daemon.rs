//! The daemon's loop: asks for work, does it, and waits for more. It outlives a server that is not up yet, goes away or restarts.

use std::{collections::BTreeSet, time::Duration};

use concord_common::{ErrorCode, JobId, RoundNumber, lifecycle::Heartbeat, round::RoundPhase};
use concord_learning::LearningError;
use futures::StreamExt as _;

use crate::{
    coordinator::{CallError, Coordinator, Notice, Notices},
    egress::EgressError,
    patience::pause,
    receipts::key_id,
    session::{RoundOutcome, Session, SessionError},
};

mod pulse;
#[cfg(test)]
mod tests;

pub use self::pulse::TORCH_SILENCE;

/// One silo's daemon.
#[derive(Debug)]
pub struct Daemon<C> {
    session: Session<C>,
    federation: String,
    poll_interval: Duration,
    connected: bool,
    settled: Settled,
    /// The job whose work went wrong last: others go first.
    failed: Option<JobId>,
    /// The job whose trainer may be in memory.
    open: Option<JobId>,
}

/// What is not worked on again, although the server may still list it.
#[derive(Debug, Default)]
struct Settled {
    jobs: BTreeSet<JobId>,
    /// Rounds that were answered.
    rounds: BTreeSet<(JobId, RoundNumber)>,
    /// Rounds that went on without this silo.
    missed: BTreeSet<(JobId, RoundNumber)>,
    ends: BTreeSet<JobId>,
    /// Jobs that the server did not list and was asked about, in this connection.
    asked: BTreeSet<JobId>,
}

/// The next piece of work.
#[derive(Debug, Clone, PartialEq)]
enum Task {
    End(Notice),
    Receipt(JobId, RoundNumber),
    Round(JobId, RoundNumber),
}

impl Task {
    fn job(&self) -> &JobId {
        match self {
            Self::End(notice) => &notice.job,
            Self::Receipt(job, _) | Self::Round(job, _) => job,
        }
    }

    /// Ends go first, because they are short and free memory.
    fn rank(&self) -> u8 {
        match self {
            Self::End(_) => 0,
            Self::Receipt(..) => 1,
            Self::Round(..) => 2,
        }
    }
}

impl<C: Coordinator> Daemon<C> {
    /// A daemon of a silo of `federation` that asks for work at least every `poll_interval`.
    pub fn new(session: Session<C>, federation: String, poll_interval: Duration) -> Self {
        Self {
            session,
            federation,
            poll_interval,
            connected: false,
            settled: Settled::default(),
            failed: None,
            open: None,
        }
    }

    /// [`Daemon::run`] with a sign of life: `heart` beats while the loop turns or waits, also through a long round as long as its
    /// training goes on. A torch thread that gives no sign for [`TORCH_SILENCE`] stops the beats.
    ///
    /// # Errors
    /// As [`Daemon::run`].
    pub async fn run_with(self, heart: Heartbeat) -> Result<(), SessionError> {
        let torch = self.session.bench.activity();
        tokio::select! {
            ended = self.run() => ended,
            () = pulse::beat(&heart, &torch) => Ok(()),
        }
    }

    /// Works until the session's `stop`.
    ///
    /// # Errors
    /// Only what a new process alone can mend: the torch thread has ended, or the egress log takes nothing more.
    pub async fn run(mut self) -> Result<(), SessionError> {
        let mut watching = None;
        let mut delays = self.session.pace.delays();
        while !self.session.stop.is_cancelled() {
            let error = match self.attend(&mut watching).await {
                Ok(()) => {
                    delays = self.session.pace.delays();
                    continue;
                }
                Err(SessionError::Stopped) if self.session.stop.is_cancelled() => return Ok(()),
                Err(
                    error @ (SessionError::Learning(LearningError::Stopped(_))
                    | SessionError::Egress(
                        EgressError::Broken { .. } | EgressError::Log { .. },
                    )),
                ) => return Err(error),
                Err(error) => error,
            };
            watching = None;
            let call = match &error {
                SessionError::Call(call) => call.clone(),
                other => CallError::Protocol(other.to_string()),
            };
            // The next attempt begins with the server's facts: another receipt key, or another server, may be behind the error.
            self.connected = false;
            if call.is_transient() {
                self.session.board.connected(false);
            }
            self.session.board.error(&error.to_string());
            let delay = delays.next(&call);
            tracing::warn!(%error, delay_ms = delay.as_millis() as u64, "will go on after a pause");
            if pause(delay, &self.session.stop).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Looks for work once, and does it or waits.
    async fn attend(&mut self, watching: &mut Option<Notices>) -> Result<(), SessionError> {
        if !self.connected {
            self.connect().await?;
        }
        let notices = self.until_stopped(self.session.coordinator.poll()).await?;
        self.session.board.connected(true);
        self.settled.forget_unlisted(&notices);
        self.settled.reopen(&notices);
        self.tidy(&notices).await;
        let Some(task) = self.choose(&notices) else {
            if self.ask_unlisted(&notices).await? {
                return Ok(());
            }
            return self.wait(watching).await;
        };
        let job = task.job().clone();
        self.open = Some(job.clone());
        let outcome = match task {
            Task::End(notice) => self.end(&notice).await,
            Task::Receipt(job, round) => self.receipt(job, round).await,
            Task::Round(job, round) => self.work(job, round).await,
        };
        self.failed = outcome.is_err().then_some(job);
        outcome
    }

    async fn connect(&mut self) -> Result<(), SessionError> {
        let info = self.until_stopped(self.session.coordinator.info()).await?;
        if info.federation != self.federation {
            return Err(SessionError::Call(CallError::Protocol(format!(
                "it is of federation `{}`, this silo of `{}`",
                info.federation, self.federation
            ))));
        }
        tracing::info!(server.version = %info.version, "connected");
        self.note_key(&info.receipt_key);
        self.session.receipt_key = info.receipt_key;
        self.settled.asked.clear();
        self.connected = true;
        self.session.board.connected(true);
        Ok(())
    }

    /// Says when the server signs with another key than before, also before this daemon's start.
    fn note_key(&self, key: &[u8]) {
        let before = match self.session.receipt_key.as_slice() {
            [] => self.session.receipts.last().map(|kept| kept.key_id),
            known => Some(key_id(known)),
        };
        let now = key_id(key);
        if let Some(before) = before.filter(|before| *before != now) {
            tracing::warn!(%before, %now, "the server signs receipts with another key now; it should be known why");
        }
    }

    /// A call that a stop does not wait for.
    async fn until_stopped<T>(
        &self,
        call: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, SessionError> {
        tokio::select! {
            biased;
            () = self.session.stop.cancelled() => Err(SessionError::Stopped),
            answer = call => Ok(answer?),
        }
    }

    /// Lets go of jobs that have ended without anything to finish, and of the trainer of one that the server does not know any
    /// more. A fault of one does not stop the others; it is tried again with the next look.
    async fn tidy(&mut self, notices: &[Notice]) {
        for notice in notices {
            let job = &notice.job;
            if !notice.state.is_over()
                || self.settled.ends.contains(job)
                || self.session.wants_finish(notice)
            {
                continue;
            }
            match self.session.clear(job).await {
                Ok(()) => {
                    self.settled.ends.insert(job.clone());
                }
                Err(error) => {
                    tracing::error!(%error, job.id = %job, "an ended job cannot be cleared away");
                }
            }
        }
        let gone = |job: &mut JobId| notices.iter().all(|notice| notice.job != *job);
        if let Some(job) = self.open.take_if(gone)
            && let Err(error) = self.session.forget(&job).await
        {
            tracing::error!(%error, job.id = %job, "a job that the server does not list cannot be let go");
        }
    }

    /// The next piece of work: of the job that went wrong last only if there is no other, by kind, and then what closes first.
    fn choose(&self, notices: &[Notice]) -> Option<Task> {
        let tasks = notices
            .iter()
            .filter_map(|notice| Some((self.task(notice)?, notice)));
        let next = tasks.min_by_key(|(task, notice)| {
            let failed = self.failed.as_ref() == Some(task.job());
            (failed, task.rank(), notice.closes_at, task.job().clone())
        });
        next.map(|(task, _)| task)
    }

    /// What is to be done for a job.
    fn task(&self, notice: &Notice) -> Option<Task> {
        let job = &notice.job;
        if notice.state.is_over() {
            let wanted = !self.settled.ends.contains(job) && self.session.wants_finish(notice);
            return wanted.then(|| Task::End(notice.clone()));
        }
        let round = notice.round?;
        if self.settled.has(job, round) {
            return None;
        }
        let kept = self.session.receipts.has(job, round);
        if notice.wants_work() {
            // What was accepted and is rejected now the server has lost since, and it waits for nobody.
            let lost = notice.rejected && kept;
            return (!lost).then(|| Task::Round(job.clone(), round));
        }
        let fetchable = notice.answered && notice.phase.is_some_and(RoundPhase::is_open);
        (fetchable && !kept).then(|| Task::Receipt(job.clone(), round))
    }

    /// Asks about a job that the vault has a state of and the server does not list: this daemon may have been away for longer than
    /// ends are told. Its best model so far is saved if the server says that the job has ended, and only then: a silo is not told
    /// of every round of a job that runs. `false` if there is none to ask about.
    async fn ask_unlisted(&mut self, notices: &[Notice]) -> Result<bool, SessionError> {
        let unlisted = self.session.vault.jobs()?.into_iter().find(|job| {
            !self.settled.asked.contains(job)
                && notices.iter().all(|notice| notice.job != *job)
                && self.session.has_state(job)
        });
        let Some(job) = unlisted else {
            return Ok(false);
        };
        // Whether the job runs at all is looked at before the round.
        let claim = self.session.coordinator.claim(&job, RoundNumber(1));
        match self.until_stopped(claim).await {
            Err(SessionError::Call(CallError::Refused(refusal)))
                if refusal.code == ErrorCode::JobEnded =>
            {
                tracing::info!(job.id = %job, "a job has ended while this daemon was away");
                self.end(&Notice::of_ended(job.clone())).await?;
            }
            Err(SessionError::Call(CallError::Refused(refusal))) => {
                tracing::info!(%refusal, job.id = %job, "the vault has a state of a job that the server does not list; it stays");
            }
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        self.settled.asked.insert(job);
        Ok(true)
    }

    /// Fetches the receipt of a round that an earlier life of this daemon has contributed to.
    async fn receipt(&mut self, job: JobId, round: RoundNumber) -> Result<(), SessionError> {
        self.session.receipt(&job, round).await?;
        self.settled.rounds.insert((job, round));
        Ok(())
    }

    async fn work(&mut self, job: JobId, round: RoundNumber) -> Result<(), SessionError> {
        match self.session.round(&job, round).await {
            Ok(RoundOutcome::Answered(_)) => {
                self.settled.rounds.insert((job, round));
                Ok(())
            }
            Ok(RoundOutcome::Missed(refusal)) => {
                tracing::warn!(%refusal, job.id = %job, %round, "the round went on without this silo");
                self.session.board.error(&refusal.to_string());
                self.settled.missed.insert((job, round));
                Ok(())
            }
            Err(SessionError::Declined(refusal)) => {
                self.session
                    .board
                    .error(&format!("declined job {job}: {refusal}"));
                self.settled.jobs.insert(job);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn end(&mut self, notice: &Notice) -> Result<(), SessionError> {
        match self.session.finish(notice).await {
            Ok(_) => {
                self.settled.ends.insert(notice.job.clone());
                Ok(())
            }
            // Trying again would end the same way; somebody has to mend it, and the next start of the daemon tries again.
            Err(error) if error.is_lasting() => {
                tracing::error!(%error, job.id = %notice.job, "the job's end cannot be worked on");
                self.session.board.error(&error.to_string());
                self.settled.ends.insert(notice.job.clone());
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Waits for a change that the server tells, or for the time to ask again. A stream that cannot be had is no fault: some
    /// proxies cut them, and asking now and then does as well.
    async fn wait(&self, watching: &mut Option<Notices>) -> Result<(), SessionError> {
        let fresh = watching.is_none();
        if fresh {
            match self.until_stopped(self.session.coordinator.watch()).await {
                Ok(stream) => *watching = Some(stream),
                Err(SessionError::Call(error)) => {
                    tracing::debug!(%error, "cannot watch for rounds");
                    return Ok(pause(self.poll_interval, &self.session.stop).await?);
                }
                Err(error) => return Err(error),
            }
        }
        let Some(stream) = watching.as_mut() else {
            return Ok(());
        };
        let message = tokio::select! {
            biased;
            () = self.session.stop.cancelled() => return Err(SessionError::Stopped),
            message = stream.next() => message,
            () = tokio::time::sleep(self.poll_interval) => return Ok(()),
        };
        match message {
            Some(Ok(_)) => Ok(()),
            Some(Err(error)) => {
                tracing::debug!(%error, "the watch broke off");
                self.unwatch(watching, fresh).await
            }
            None => self.unwatch(watching, fresh).await,
        }
    }

    /// After a watch that held for a while the server is asked at once; one that breaks off right away is not begun anew in a
    /// hurry.
    async fn unwatch(
        &self,
        watching: &mut Option<Notices>,
        fresh: bool,
    ) -> Result<(), SessionError> {
        *watching = None;
        if fresh {
            pause(self.poll_interval, &self.session.stop).await?;
        }
        Ok(())
    }
}

impl Settled {
    fn has(&self, job: &JobId, round: RoundNumber) -> bool {
        let round = (job.clone(), round);
        self.jobs.contains(job) || self.rounds.contains(&round) || self.missed.contains(&round)
    }

    /// Takes answered rounds up again that the server waits for all the same: the record of what it has signed for went with its
    /// machine's power (`durability = "process"`).
    fn reopen(&mut self, notices: &[Notice]) {
        for notice in notices {
            let waits = notice.wants_work() && !notice.rejected;
            if let Some(round) = notice.round.filter(|_| waits)
                && self.rounds.remove(&(notice.job.clone(), round))
            {
                tracing::warn!(job.id = %notice.job, %round, "the server has lost a contribution that it had signed for; it is sent again");
            }
        }
    }

    /// Keeps the sets as small as the server's list.
    fn forget_unlisted(&mut self, notices: &[Notice]) {
        let listed = |job: &JobId| notices.iter().any(|notice| notice.job == *job);
        self.jobs.retain(listed);
        self.ends.retain(listed);
        self.rounds.retain(|(job, _)| listed(job));
        self.missed.retain(|(job, _)| listed(job));
    }
}
