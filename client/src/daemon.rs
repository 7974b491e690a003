//! The daemon's loop: asks for work, does it, and waits for more. It outlives a server that is not up yet, goes away or restarts.

use std::{collections::BTreeSet, time::Duration};

use concord_common::{JobId, RoundNumber};
use futures::StreamExt as _;

use crate::{
    coordinator::{CallError, Coordinator, Notice, Notices},
    patience::pause,
    session::{RoundOutcome, Session, SessionError},
};

#[cfg(test)]
mod tests;

/// One silo's daemon.
#[derive(Debug)]
pub struct Daemon<C> {
    session: Session<C>,
    federation: String,
    poll_interval: Duration,
    connected: bool,
    settled: Settled,
}

/// What is not worked on again, although the server may still list it.
#[derive(Debug, Default)]
struct Settled {
    jobs: BTreeSet<JobId>,
    rounds: BTreeSet<(JobId, RoundNumber)>,
    ends: BTreeSet<JobId>,
}

/// The next piece of work.
#[derive(Debug, Clone, PartialEq)]
enum Task {
    Round(JobId, RoundNumber),
    End(Notice),
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
        }
    }

    /// Works until the session's `stop`.
    pub async fn run(mut self) {
        let mut watching = None;
        let mut delays = self.session.pace.delays();
        while !self.session.stop.is_cancelled() {
            let error = match self.attend(&mut watching).await {
                Ok(()) => {
                    delays = self.session.pace.delays();
                    continue;
                }
                Err(SessionError::Stopped) => return,
                Err(error) => error,
            };
            watching = None;
            let call = match &error {
                SessionError::Call(call) => call.clone(),
                other => CallError::Protocol(other.to_string()),
            };
            if call.is_transient() {
                self.connected = false;
                self.session.board.connected(false);
            }
            self.session.board.error(&error.to_string());
            let delay = delays.next(&call);
            tracing::warn!(%error, delay_ms = delay.as_millis() as u64, "will go on after a pause");
            if pause(delay, &self.session.stop).await.is_err() {
                return;
            }
        }
    }

    /// Looks for work once, and does it or waits.
    async fn attend(&mut self, watching: &mut Option<Notices>) -> Result<(), SessionError> {
        if !self.connected {
            self.connect().await?;
        }
        let notices = self.until_stopped(self.session.coordinator.poll()).await?;
        self.session.board.connected(true);
        self.settled.forget_unlisted(&notices);
        match self.choose(&notices)? {
            Some(Task::Round(job, round)) => self.work(job, round).await,
            Some(Task::End(notice)) => self.end(&notice).await,
            None => self.wait(watching).await,
        }
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
        self.session.receipt_key = info.receipt_key;
        self.connected = true;
        self.session.board.connected(true);
        Ok(())
    }

    /// A call that a stop does not wait for.
    async fn until_stopped<T>(
        &self,
        call: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, SessionError> {
        tokio::select! {
            biased;
            () = self.session.stop.cancelled() => Err(SessionError::Stopped),
            answer = call => answer.map_err(SessionError::Call),
        }
    }

    /// Ends go first, because they are short and free memory; then the round that closes first.
    fn choose(&self, notices: &[Notice]) -> Result<Option<Task>, SessionError> {
        for notice in notices {
            if !self.settled.ends.contains(&notice.job) && self.session.wants_finish(notice)? {
                return Ok(Some(Task::End(notice.clone())));
            }
        }
        let next = notices
            .iter()
            .filter(|notice| notice.wants_work())
            .filter_map(|notice| Some((notice.closes_at, notice.job.clone(), notice.round?)))
            .filter(|(_, job, round)| !self.settled.has(job, *round))
            .min();
        Ok(next.map(|(_, job, round)| Task::Round(job, round)))
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
                self.settled.rounds.insert((job, round));
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
            // Trying again would end the same way; the next start of the daemon does.
            Err(
                error @ (SessionError::Learning(_)
                | SessionError::Declined(_)
                | SessionError::Vault(_)),
            ) => {
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
        self.jobs.contains(job) || self.rounds.contains(&(job.clone(), round))
    }

    /// Keeps the sets as small as the server's list.
    fn forget_unlisted(&mut self, notices: &[Notice]) {
        let listed = |job: &JobId| notices.iter().any(|notice| notice.job == *job);
        self.jobs.retain(listed);
        self.ends.retain(listed);
        self.rounds.retain(|(job, _)| listed(job));
    }
}
