//! The last thing before the wire: a [`Coordinator`] that writes the egress log's line for each call that carries something.

use std::sync::Arc;

use concord_common::{
    ErrorCode, JobId, RoundNumber, adapter::AdapterVersion, code::Refusal, wire::SignedReceipt,
};

use super::{Cleared, ClearedDecline, ClearedReport, Departure, EgressError, EgressGate};
use crate::coordinator::{
    Begun, CallError, Chunks, Claim, Coordinator, Notice, Notices, ServerInfo,
};

/// Passes calls on to `inner`, each after its line in the gate's log is on the disk.
///
/// Claims, announcements of updates, and every attempt after the first to send a report or a no are logged here; first attempts were
/// logged when the gate cleared them, and bytes of an update when it made the [`Departure`]. What asks the server and tells it nothing that
/// it has not said itself ([`Coordinator::info`], `watch`, `poll`, `download`) is not logged.
#[derive(Debug)]
pub struct Outlet<C> {
    inner: C,
    gate: Arc<EgressGate>,
}

impl<C> Outlet<C> {
    /// Stands before `inner`.
    pub fn new(inner: C, gate: Arc<EgressGate>) -> Self {
        Self { inner, gate }
    }

    /// Has the gate write a line, off the async threads.
    async fn log(
        &self,
        write: impl FnOnce(&EgressGate) -> Result<(), EgressError> + Send + 'static,
    ) -> Result<(), CallError> {
        let gate = Arc::clone(&self.gate);
        tokio::task::spawn_blocking(move || write(&gate))
            .await
            .map_err(|error| CallError::Protocol(error.to_string()))?
            .map_err(|error| match error {
                EgressError::Report(reason) => {
                    CallError::Refused(Refusal::new(ErrorCode::PolicyRefused, reason))
                }
                // A disk that is full now may have room later.
                error @ EgressError::Io { .. } => CallError::Unavailable {
                    reason: error.to_string(),
                    retry_after: None,
                },
                error => CallError::Egress(error),
            })
    }
}

impl<C: Coordinator> Coordinator for Outlet<C> {
    async fn info(&self) -> Result<ServerInfo, CallError> {
        self.inner.info().await
    }

    async fn watch(&self) -> Result<Notices, CallError> {
        self.inner.watch().await
    }

    async fn poll(&self) -> Result<Vec<Notice>, CallError> {
        self.inner.poll().await
    }

    async fn claim(&self, job: &JobId, round: RoundNumber) -> Result<Claim, CallError> {
        let of = job.clone();
        self.log(move |gate| gate.send_claim(&of, round)).await?;
        self.inner.claim(job, round).await
    }

    async fn decline(&self, decline: &ClearedDecline) -> Result<(), CallError> {
        let leaving = decline.clone();
        self.log(move |gate| gate.send_decline(&leaving)).await?;
        self.inner.decline(decline).await
    }

    async fn download(
        &self,
        job: &JobId,
        version: AdapterVersion,
        offset: u64,
    ) -> Result<Chunks, CallError> {
        self.inner.download(job, version, offset).await
    }

    async fn begin(&self, cleared: &Cleared, token: &[u8]) -> Result<Begun, CallError> {
        let leaving = cleared.clone();
        self.log(move |gate| gate.send_announcement(&leaving))
            .await?;
        self.inner.begin(cleared, token).await
    }

    async fn upload(
        &self,
        departure: &Departure,
        upload_id: &[u8],
    ) -> Result<SignedReceipt, CallError> {
        self.inner.upload(departure, upload_id).await
    }

    async fn report(&self, report: &ClearedReport) -> Result<(), CallError> {
        let leaving = report.clone();
        self.log(move |gate| gate.send_report(&leaving)).await?;
        self.inner.report(report).await
    }
}
