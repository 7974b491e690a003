//! A coordinator whose calls fail when told to.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use concord_common::{
    ErrorCode, JobId, RoundNumber,
    adapter::AdapterVersion,
    chunk::StreamDigest,
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
    /// The receipt is signed by somebody else, or the server's facts name another key.
    Forged,
    /// The daemon is told to stop, and the call does not happen.
    Stop(CancellationToken),
    /// The server acts on it, and the daemon is told to stop before it hears of that.
    StopAfter(CancellationToken),
    /// The server acts on it and never answers.
    Silence,
    /// Something happens in the silo first; the call itself goes well.
    First(Deed),
    /// A download goes well, and something happens in the silo before it ends.
    Last(Deed),
}

/// What happens in the silo before a call.
#[derive(Clone)]
pub(crate) struct Deed(Arc<dyn Fn() + Send + Sync>);

impl Deed {
    pub(crate) fn new(act: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(act))
    }
}

impl fmt::Debug for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Deed")
    }
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

    async fn around<T>(
        &self,
        call: Call,
        act: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, CallError> {
        Self::carried_out(self.fault(call), act).await
    }

    /// Carries a fault out around an ordinary call.
    async fn carried_out<T>(
        fault: Option<Fault>,
        act: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, CallError> {
        match fault {
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
            Some(Fault::StopAfter(token)) => {
                act.await?;
                token.cancel();
                Err(unreachable())
            }
            Some(Fault::Silence) => {
                act.await?;
                std::future::pending().await
            }
            Some(Fault::First(deed)) => {
                deed.0();
                act.await
            }
            Some(_) => Err(unreachable()),
        }
    }
}

fn other_signer() -> ReceiptSigner {
    ReceiptSigner::from_pkcs8(&ReceiptSigner::generate_pkcs8().unwrap()).unwrap()
}

fn unreachable() -> CallError {
    CallError::Unavailable {
        reason: "planned".to_owned(),
        retry_after: None,
    }
}

impl Coordinator for Faulty {
    async fn info(&self) -> Result<ServerInfo, CallError> {
        let act = self.inner.info();
        match self.fault(Call::Info) {
            Some(Fault::Forged) => Ok(ServerInfo {
                receipt_key: other_signer().public_key().to_vec(),
                ..act.await?
            }),
            fault => Self::carried_out(fault, act).await,
        }
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
        match fault {
            Some(Fault::Unreachable) => return Err(unreachable()),
            Some(Fault::Refused(code)) => {
                return Err(CallError::from_refusal(Refusal::new(code, "planned")));
            }
            _ => {}
        }
        let chunks = self.inner.download(job, version, offset).await?;
        Ok(match fault {
            Some(Fault::Cut(count)) => {
                let broken = futures::stream::once(async { Err(unreachable()) });
                Box::pin(chunks.take(count).chain(broken))
            }
            Some(Fault::OtherBytes) => {
                let mut digest = StreamDigest::new();
                Box::pin(chunks.map(move |sent| {
                    let sent = sent?;
                    let mut data = sent.data.to_vec();
                    data[0] ^= 1;
                    Ok(digest.chunk(sent.offset, Bytes::from(data)))
                }))
            }
            Some(Fault::Last(deed)) => {
                let done = futures::stream::once(async move { deed.0() });
                Box::pin(chunks.chain(done.filter_map(|()| async { None })))
            }
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
        let fault = self.fault(Call::Upload);
        let act = self.inner.upload(departure, upload_id);
        match fault {
            Some(Fault::Cut(count)) => {
                self.inner.send_chunks(departure, upload_id, count)?;
                Err(unreachable())
            }
            Some(Fault::Forged) => Ok(other_signer().sign(act.await?.receipt)),
            fault => Self::carried_out(fault, act).await,
        }
    }

    async fn report(&self, report: &ClearedReport) -> Result<(), CallError> {
        self.around(Call::Report, self.inner.report(report)).await
    }
}
