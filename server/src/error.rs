//! What a handler or the driver can fail with, and the one way from there to a gRPC status.

use std::{io, time::Duration};

use concord_common::{ErrorCode, code::Refusal};
use tonic::Status;

use crate::{
    datastore::{DatastoreError, Retryable},
    metrics,
};

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
