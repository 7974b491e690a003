//! A coordinator whose calls fail when told to.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use concord_common::{
    ErrorCode, JobId, RoundNumber,
    adapter::AdapterVersion,
    chunk::chunk,
    code::Refusal,
    wire::{ReceiptSigner, SignedReceipt},
};
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use crate::{
    coordinator::{
        Begun, CallError, Chunks, Claim, Coordinator, Notice, Notices, ServerInfo,
        memory::MemoryCoordinator,
    },
    egress::{Cleared, ClearedDecline, ClearedReport, Departure},
};

/// A kind of call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Call {
    Info,
    Watch,
    Poll,
    Claim,
    Decline,
    Download,
    Begin,
    Upload,
    Report,
}

/// What goes wrong with one call.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// It does not reach the server.
    Unreachable,
    /// The server acts on it and the answer is lost.
    LostAnswer,
    /// A transfer breaks off after this many chunks.
    Cut(usize),
    /// The server refuses.
    Refused(ErrorCode),
    /// The download carries other bytes, well wrapped.
    OtherBytes,
    /// The receipt is signed by somebody else.
    Forged,
    /// The daemon is told to stop, and the call does not happen.
    Stop(CancellationToken),
}

/// Passes calls on, except for the planned faults, which each hit one call.
#[derive(Clone, Debug)]
pub(crate) struct Faulty {
    inner: MemoryCoordinator,
    plan: Arc<Mutex<VecDeque<(Call, Fault)>>>,
    down: Arc<AtomicBool>,
    calls: Arc<AtomicU64>,
}

impl Faulty {
    pub(crate) fn new(inner: MemoryCoordinator) -> Self {
        Self {
            inner,
            plan: Arc::default(),
            down: Arc::default(),
            calls: Arc::default(),
        }
    }

    /// The next call of this kind meets this fault.
    pub(crate) fn plan(&self, call: Call, fault: Fault) {
        self.plan.lock().unwrap().push_back((call, fault));
    }

    /// Planned faults that have not happened yet.
    pub(crate) fn left(&self) -> usize {
        self.plan.lock().unwrap().len()
    }

    /// Takes the server away, or brings it back.
    pub(crate) fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    /// Calls so far.
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    fn fault(&self, call: Call) -> Option<Fault> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if self.down.load(Ordering::SeqCst) {
            return Some(Fault::Unreachable);
        }
        let mut plan = self.plan.lock().unwrap();
        let place = plan.iter().position(|(planned, _)| *planned == call)?;
        plan.remove(place).map(|(_, fault)| fault)
    }

    /// Carries a fault out around an ordinary call.
    async fn around<T>(
        &self,
        call: Call,
        act: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, CallError> {
        match self.fault(call) {
            None => act.await,
            Some(Fault::LostAnswer) => {
                act.await?;
                Err(unreachable())
            }
            Some(Fault::Refused(code)) => {
                Err(CallError::from_refusal(Refusal::new(code, "planned")))
            }
            Some(Fault::Stop(token)) => {
                token.cancel();
                Err(unreachable())
            }
            Some(_) => Err(unreachable()),
        }
    }
}

fn unreachable() -> CallError {
    CallError::Unavailable {
        reason: "planned".to_owned(),
        retry_after: None,
    }
}

impl Coordinator for Faulty {
    async fn info(&self) -> Result<ServerInfo, CallError> {
        self.around(Call::Info, self.inner.info()).await
    }

    async fn watch(&self) -> Result<Notices, CallError> {
        match self.fault(Call::Watch) {
            None => self.inner.watch().await,
            Some(Fault::Cut(messages)) => {
                let stream = self.inner.watch().await?;
                let broken = futures::stream::once(async { Err(unreachable()) });
                Ok(Box::pin(stream.take(messages).chain(broken)))
            }
            Some(_) => Err(unreachable()),
        }
    }

    async fn poll(&self) -> Result<Vec<Notice>, CallError> {
        self.around(Call::Poll, self.inner.poll()).await
    }

    async fn claim(&self, job: &JobId, round: RoundNumber) -> Result<Claim, CallError> {
        self.around(Call::Claim, self.inner.claim(job, round)).await
    }

    async fn decline(&self, decline: &ClearedDecline) -> Result<(), CallError> {
        self.around(Call::Decline, self.inner.decline(decline))
            .await
    }

    async fn download(
        &self,
        job: &JobId,
        version: AdapterVersion,
        offset: u64,
    ) -> Result<Chunks, CallError> {
        let fault = self.fault(Call::Download);
        if matches!(fault, Some(Fault::Unreachable)) {
            return Err(unreachable());
        }
        let chunks = self.inner.download(job, version, offset).await?;
        Ok(match fault {
            Some(Fault::Cut(count)) => {
                let broken = futures::stream::once(async { Err(unreachable()) });
                Box::pin(chunks.take(count).chain(broken))
            }
            Some(Fault::OtherBytes) => Box::pin(chunks.map(|sent| {
                let sent = sent?;
                let mut data = sent.data.to_vec();
                data[0] ^= 1;
                Ok(chunk(sent.offset, Bytes::from(data)))
            })),
            _ => chunks,
        })
    }

    async fn begin(&self, cleared: &Cleared, token: &[u8]) -> Result<Begun, CallError> {
        self.around(Call::Begin, self.inner.begin(cleared, token))
            .await
    }

    async fn upload(
        &self,
        departure: &Departure,
        upload_id: &[u8],
    ) -> Result<SignedReceipt, CallError> {
        match self.fault(Call::Upload) {
            None => self.inner.upload(departure, upload_id).await,
            Some(Fault::Cut(count)) => {
                self.inner.send_chunks(departure, upload_id, count)?;
                Err(unreachable())
            }
            Some(Fault::LostAnswer) => {
                self.inner.upload(departure, upload_id).await?;
                Err(unreachable())
            }
            Some(Fault::Refused(code)) => {
                Err(CallError::from_refusal(Refusal::new(code, "planned")))
            }
            Some(Fault::Forged) => {
                let receipt = self.inner.upload(departure, upload_id).await?.receipt;
                let key = ReceiptSigner::generate_pkcs8().unwrap();
                Ok(ReceiptSigner::from_pkcs8(&key).unwrap().sign(receipt))
            }
            Some(Fault::Stop(token)) => {
                token.cancel();
                Err(unreachable())
            }
            Some(_) => Err(unreachable()),
        }
    }

    async fn report(&self, report: &ClearedReport) -> Result<(), CallError> {
        self.around(Call::Report, self.inner.report(report)).await
    }
}
