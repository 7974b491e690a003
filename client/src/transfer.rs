//! Adapters and updates over a connection that may break: both directions go on where they stopped.
//!
//! A download is kept in a file of the state folder as it arrives, so that it survives the daemon too. An upload asks the server
//! how far it is and sends the rest.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use concord_common::{
    Digest, ErrorCode, JobId, SiloId,
    adapter::{AdapterLayout, AdapterVersion},
    chunk::{ChunkAssembler, Expected, ResumeError},
    code::Refusal,
    wire::SignedReceipt,
};
use futures::StreamExt as _;
use tokio::io::AsyncWriteExt as _;
use tokio_util::sync::CancellationToken;

use crate::{
    coordinator::{Begun, CallError, Coordinator},
    egress::{Cleared, EgressError, EgressGate},
    patience::{Halt, Pace, patiently, pause},
};

#[cfg(test)]
mod tests;

/// A peer that contradicts itself this often in one transfer is given up.
const MAX_FAULTS: u32 = 5;

/// A transfer that did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The daemon is stopping, or the server refused.
    #[error(transparent)]
    Halt(#[from] Halt),
    /// The gate let nothing out.
    #[error(transparent)]
    Egress(#[from] EgressError),
    /// The download's file could not be written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The receipt is not for what was sent, or nobody signed it.
    #[error("the receipt is not to be believed: {0}")]
    Receipt(String),
}

impl From<CallError> for TransferError {
    fn from(error: CallError) -> Self {
        Self::Halt(error.into())
    }
}

/// Where unfinished downloads are kept: one file an adapter, named by its version.
#[derive(Debug, Clone)]
pub struct Downloads {
    folder: PathBuf,
}

impl Downloads {
    /// Opens `<state folder>/downloads`.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(state_folder: &Path) -> io::Result<Self> {
        let folder = state_folder.join("downloads");
        crate::vault::private_folder(&folder)
            .map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Self { folder })
    }

    fn file(&self, version: AdapterVersion) -> PathBuf {
        self.folder.join(format!("{version}.adapter"))
    }

    /// Removes all files but that of `version`: a silo needs one adapter at a time.
    fn keep_only(&self, version: AdapterVersion) -> io::Result<()> {
        let kept = self.file(version);
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if path != kept {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Takes up what is there; begins anew if it cannot be used.
    fn resume(&self, expected: &Expected, version: AdapterVersion) -> io::Result<ChunkAssembler> {
        self.keep_only(version)?;
        let path = self.file(version);
        match fs::File::open(&path) {
            Ok(mut file) => match ChunkAssembler::resume(expected.clone(), &mut file) {
                Ok(assembler) => return Ok(assembler),
                Err(ResumeError::Read(error)) => return Err(error),
                Err(ResumeError::Content(refusal)) => {
                    tracing::warn!(%refusal, "a half download is thrown away");
                    fs::remove_file(&path)?;
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(ChunkAssembler::new(expected.clone()))
    }
}

/// Fetches an adapter; every byte has been checked against the layout and the version.
///
/// # Errors
/// [`TransferError`]; what has arrived is kept for the next attempt.
pub async fn fetch<C: Coordinator>(
    coordinator: &C,
    downloads: &Downloads,
    job: &JobId,
    version: AdapterVersion,
    layout: &AdapterLayout,
    pace: Pace,
    stop: &CancellationToken,
) -> Result<Bytes, TransferError> {
    let expected = Expected {
        layout: layout.clone(),
        digest: version.0,
        max_norm: None,
    };
    let path = downloads.file(version);
    let io = |source| TransferError::Io {
        path: path.clone(),
        source,
    };
    let mut delays = pace.delays();
    let mut faults = 0;
    loop {
        let (store, wanted) = (downloads.clone(), expected.clone());
        let mut assembler = blocking(move || store.resume(&wanted, version))
            .await
            .map_err(io)?;
        let outcome = if assembler.is_complete() {
            Ok(())
        } else {
            let receiving = receive(coordinator, job, version, &mut assembler, &path);
            tokio::select! {
                biased;
                () = stop.cancelled() => return Err(Halt::Stopped.into()),
                outcome = receiving => outcome,
            }
        };
        let error = match outcome {
            Ok(()) => match assembler.finish() {
                // What is handed on is what is checked, whatever the disk did in between.
                Ok(_) => {
                    let (file, whole) = (path.clone(), version.0);
                    let read = blocking(move || {
                        let bytes = fs::read(&file)?;
                        let found = Digest::of(&bytes);
                        if found != whole {
                            fs::remove_file(&file)?;
                        }
                        Ok((Bytes::from(bytes), found))
                    });
                    match read.await.map_err(io)? {
                        (bytes, found) if found == version.0 => return Ok(bytes),
                        (_, found) => Fault::Content(Refusal::new(
                            ErrorCode::DigestMismatch,
                            format!(
                                "the adapter's file has other bytes than arrived (digest {})",
                                found.short()
                            ),
                        )),
                    }
                }
                // Every chunk was as announced and the whole is not: nothing of it can be used.
                Err(refusal) if refusal.code == ErrorCode::DigestMismatch => {
                    tokio::fs::remove_file(&path).await.map_err(io)?;
                    Fault::Content(refusal)
                }
                Err(refusal) => Fault::Content(refusal),
            },
            Err(fault) => fault,
        };
        match error {
            Fault::Io(source) => return Err(io(source)),
            Fault::Call(error) if error.is_transient() => {
                tracing::warn!(%error, "a download broke off; it goes on where it stopped");
                pause(delays.next(&error), stop).await?;
            }
            Fault::Call(error) => return Err(error.into()),
            Fault::Content(refusal) => {
                faults += 1;
                tracing::warn!(%refusal, faults, "a download was not what it should be");
                if faults == MAX_FAULTS {
                    return Err(CallError::protocol(&refusal).into());
                }
            }
        }
    }
}

enum Fault {
    Call(CallError),
    /// The bytes are not what they should be, or stop too early.
    Content(Refusal),
    Io(io::Error),
}

async fn receive<C: Coordinator>(
    coordinator: &C,
    job: &JobId,
    version: AdapterVersion,
    assembler: &mut ChunkAssembler,
    path: &Path,
) -> Result<(), Fault> {
    let mut file = tokio::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .await
        .map_err(Fault::Io)?;
    let received = async {
        let mut chunks = coordinator
            .download(job, version, assembler.offset())
            .await
            .map_err(Fault::Call)?;
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(Fault::Call)?;
            assembler.accept(&chunk).map_err(Fault::Content)?;
            file.write_all(&chunk.data).await.map_err(Fault::Io)?;
        }
        Ok(())
    }
    .await;
    // Also after a failure, so that the next attempt finds all that has arrived.
    file.flush().await.map_err(Fault::Io)?;
    received
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

/// What a delivery needs to know.
#[derive(Debug)]
pub struct Delivery<'a, C> {
    /// The server.
    pub coordinator: &'a C,
    /// The gate that logs each attempt.
    pub gate: &'a Arc<EgressGate>,
    /// This silo, as receipts must name it.
    pub silo: &'a SiloId,
    /// What receipts are verified with.
    pub receipt_key: &'a [u8],
    /// Waits between attempts.
    pub pace: Pace,
    /// Ends the waiting.
    pub stop: &'a CancellationToken,
}

impl<C: Coordinator> Delivery<'_, C> {
    /// Sends a cleared update until the server has signed for it. A receipt may also say that it was rejected or discarded.
    ///
    /// # Errors
    /// [`TransferError`].
    pub async fn deliver(
        &self,
        cleared: &Cleared,
        mut token: Vec<u8>,
    ) -> Result<SignedReceipt, TransferError> {
        let mut delays = self.pace.delays();
        let mut faults = 0;
        loop {
            let shown = &token;
            let begun = patiently("begin contribution", self.pace, self.stop, || {
                self.coordinator.begin(cleared, shown)
            })
            .await;
            let outcome = match begun {
                Ok(Begun::Recorded(receipt)) => Ok(receipt),
                Ok(Begun::Upload { id, offset }) => self.upload(cleared, &id, offset).await?,
                Err(Halt::Stopped) => return Err(Halt::Stopped.into()),
                Err(Halt::Call(error)) => Err(error),
            };
            let error = match outcome {
                Ok(receipt) => {
                    self.check(cleared, &receipt)?;
                    return Ok(receipt);
                }
                Err(error) => error,
            };
            match error.code() {
                None if error.is_transient() => {
                    tracing::warn!(%error, "an upload broke off; it goes on where the server wants");
                    pause(delays.next(&error), self.stop).await?;
                    continue;
                }
                // The lease ran out while the server was away: a new one serves the same update.
                Some(ErrorCode::LeaseLost) if faults < MAX_FAULTS => {
                    let claim = patiently("claim lease", self.pace, self.stop, || {
                        self.coordinator.claim(cleared.job(), cleared.round())
                    })
                    .await?;
                    token = claim.token;
                }
                Some(
                    ErrorCode::UnknownUpload
                    | ErrorCode::ChunkOffset
                    | ErrorCode::BadChunk
                    | ErrorCode::Truncated
                    | ErrorCode::DigestMismatch,
                ) if faults < MAX_FAULTS => {
                    tracing::warn!(%error, "an upload did not arrive whole; it begins anew");
                }
                _ => return Err(error.into()),
            }
            faults += 1;
        }
    }

    /// The receipt of an update that the server has recorded; `None` if it has not, or does not say.
    ///
    /// # Errors
    /// [`TransferError`].
    pub async fn recorded(
        &self,
        cleared: &Cleared,
        token: &[u8],
    ) -> Result<Option<SignedReceipt>, TransferError> {
        let begun = patiently("fetch receipt", self.pace, self.stop, || {
            self.coordinator.begin(cleared, token)
        })
        .await;
        match begun {
            Ok(Begun::Recorded(receipt)) => {
                self.check(cleared, &receipt)?;
                Ok(Some(receipt))
            }
            Ok(Begun::Upload { .. }) | Err(Halt::Call(CallError::Refused(_))) => Ok(None),
            Err(halt) => Err(halt.into()),
        }
    }

    async fn upload(
        &self,
        cleared: &Cleared,
        id: &[u8],
        offset: u64,
    ) -> Result<Result<SignedReceipt, CallError>, TransferError> {
        if offset > cleared.payload().len() as u64 {
            return Ok(Err(CallError::Protocol(format!(
                "the server wants byte {offset} of an update of {} bytes",
                cleared.payload().len()
            ))));
        }
        let (gate, leaving) = (Arc::clone(self.gate), cleared.clone());
        let departure = tokio::task::spawn_blocking(move || gate.depart(&leaving, offset))
            .await
            .map_err(|error| CallError::Protocol(error.to_string()))??;
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(Halt::Stopped.into()),
            outcome = self.coordinator.upload(&departure, id) => Ok(outcome),
        }
    }

    fn check(&self, cleared: &Cleared, signed: &SignedReceipt) -> Result<(), TransferError> {
        signed
            .verify(self.receipt_key)
            .map_err(|error| TransferError::Receipt(error.to_string()))?;
        let receipt = &signed.receipt;
        let wrong = if receipt.job != *cleared.job() {
            "job"
        } else if receipt.round != cleared.round() {
            "round"
        } else if receipt.silo != *self.silo {
            "silo"
        } else if receipt.payload_digest != cleared.digest() {
            "payload"
        } else {
            return Ok(());
        };
        Err(TransferError::Receipt(format!("it is for another {wrong}")))
    }
}
