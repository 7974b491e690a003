//! What a handler or the driver can fail with, and the one way from there to a gRPC status.

use std::{io, time::Duration};

use concord_common::{ErrorCode, code::Refusal};
use tonic::Status;

use crate::{
    datastore::{DatastoreError, Retryable},
    metrics,
};

/// The machine has too many files open; the same number on every Unix.
const ENFILE: i32 = 23;
/// This process has.
const EMFILE: i32 = 24;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The caller must change something or try again later; the text is for it to read.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The database failed.
    #[error(transparent)]
    Datastore(#[from] DatastoreError),
    /// A file could not be read or written.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the file.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A thread that did the work broke off.
    #[error("a worker thread broke off: {0}")]
    Worker(#[from] tokio::task::JoinError),
}

impl Failure {
    /// An I/O failure of `what`; for `map_err`.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        |source| Self::Io { what, source }
    }

    /// Whether it is a file's, and nothing is wrong with that file: the disk is full, or the process has too many files open. Somebody
    /// makes room, and it passes.
    pub fn wants_room(&self) -> bool {
        matches!(self, Self::Io { source, .. } if wants_room(source))
    }

    /// What the caller is told. Internal text is logged here and goes no further.
    pub fn into_refusal(self) -> Refusal {
        let busy = matches!(&self, Self::Datastore(error) if error.is_busy());
        match self {
            Self::Refused(refusal) => refusal,
            _ if busy => {
                tracing::warn!(error = %self, "the database stayed busy");
                Refusal::new(ErrorCode::Busy, "the server's database is busy; try again")
                    .retry_after(Duration::from_secs(1))
            }
            other => {
                tracing::error!(error = %other, "a request failed");
                Refusal::new(
                    ErrorCode::Internal,
                    "the server could not do this; its log has the details",
                )
                .retry_after(Duration::from_secs(5))
            }
        }
    }
}

fn wants_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::OutOfMemory
    ) || matches!(error.raw_os_error(), Some(ENFILE | EMFILE))
}

impl Retryable for Failure {
    fn is_busy(&self) -> bool {
        matches!(self, Self::Datastore(error) if error.is_busy())
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let refusal = failure.into_refusal();
        metrics::refusal(refusal.code);
        refusal.into()
    }
}

/// A refusal as a failure.
pub(crate) fn refuse<T>(code: ErrorCode, message: impl Into<String>) -> Result<T, Failure> {
    Err(Refusal::new(code, message).into())
}
