//! The server as a worker sees it: jobs to claim, and the journal, objects and results of the job in hand.
//!
//! The server's copy is the authority. Every call on a job carries the lease's token; a worker that has lost its lease is refused,
//! so whatever it still does changes nothing.

pub mod grpc;
mod lease;

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use concord_common::{
    Digest,
    code::{ErrorCode, Refusal},
};
use concord_proto::v1;

pub use self::lease::{FAULTS, Lease, Pace};

/// Why a call brought nothing.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CallError {
    /// The server cannot be reached, or not now.
    #[error("{reason}")]
    Unavailable {
        /// Why.
        reason: String,
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
        /// Whether the server was reached and says that it ran into a fault of its own: trying for ever helps nobody.
        is_fault: bool,
    },
    /// The job is not this worker's any more.
    #[error("{0}")]
    LeaseLost(String),
    /// The server's journal has other lines than this worker believes.
    #[error("{0}")]
    Conflict(String),
    /// The server refused, and will again.
    #[error(transparent)]
    Refused(Refusal),
    /// The server does not keep to the protocol.
    #[error("the server's answer cannot be used: {0}")]
    Protocol(String),
    /// A file of this worker cannot be read for sending.
    #[error("{path}: {what}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        what: String,
    },
}

impl CallError {
    /// What a refusal means for a worker.
    pub fn from_refusal(refusal: Refusal) -> Self {
        match refusal.code {
            ErrorCode::LeaseLost | ErrorCode::UnknownJob | ErrorCode::JobEnded => {
                Self::LeaseLost(refusal.message)
            }
            ErrorCode::JournalConflict => Self::Conflict(refusal.message),
            ErrorCode::Busy
            | ErrorCode::ShuttingDown
            | ErrorCode::TooSlow
            | ErrorCode::Internal
            | ErrorCode::Truncated => Self::Unavailable {
                reason: refusal.to_string(),
                retry_after: refusal.retry_after,
                is_fault: refusal.code == ErrorCode::Internal,
            },
            _ => Self::Refused(refusal),
        }
    }
}

/// What the server says to a worker that asks for a job.
#[derive(Debug, Clone, PartialEq)]
pub enum Claim {
    /// A job.
    Job(v1::WorkerLease),
    /// None; ask again after this time.
    Nothing(Duration),
}

/// What the server says to a sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renewed {
    /// What to do.
    pub command: v1::WorkerCommand,
    /// Number of the newest word on a pair.
    pub reviews: u64,
}

/// Bytes to send: in memory, or a file that may be larger than that.
#[derive(Debug, Clone)]
pub enum Payload {
    /// In memory.
    Bytes(Bytes),
    /// A file of so many bytes.
    File(PathBuf, u64),
}

impl Payload {
    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, bytes) => *bytes,
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The calls of `concord.v1.WorkerService`. They block; from no async task.
///
/// # Errors
/// All of them: [`CallError`].
pub trait Server: Send + Sync {
    /// Asks for a job.
    fn claim(&self) -> Result<Claim, CallError>;
    /// Holds the lease and says how far the job is.
    fn renew(
        &self,
        grip: &v1::JobGrip,
        progress: &v1::ArtaugProgress,
    ) -> Result<Renewed, CallError>;
    /// The journal's lines from `first` on.
    fn read_journal(&self, grip: &v1::JobGrip, first: u64) -> Result<Vec<Vec<u8>>, CallError>;
    /// Adds lines from number `first` on and gives the number of lines after that.
    fn append(&self, grip: &v1::JobGrip, first: u64, lines: &[Vec<u8>]) -> Result<u64, CallError>;
    /// Those of at most 1000 objects that the server does not have.
    fn find_missing(
        &self,
        grip: &v1::JobGrip,
        digests: &[Digest],
    ) -> Result<Vec<Digest>, CallError>;
    /// Sends an object and gives the bytes that the job keeps.
    fn put_object(
        &self,
        grip: &v1::JobGrip,
        digest: Digest,
        payload: &Payload,
    ) -> Result<u64, CallError>;
    /// The bytes of an object, as they came: the caller checks them.
    fn get_object(&self, grip: &v1::JobGrip, digest: Digest) -> Result<Vec<u8>, CallError>;
    /// Removes at most 1000 objects and gives the bytes that the job keeps.
    fn remove_objects(&self, grip: &v1::JobGrip, digests: &[Digest]) -> Result<u64, CallError>;
    /// Words on pairs after number `after`, at most 1000.
    fn reviews(&self, grip: &v1::JobGrip, after: u64) -> Result<Vec<v1::PairReview>, CallError>;
    /// Names an object as a result.
    fn put_artefact(&self, grip: &v1::JobGrip, name: &str, digest: Digest)
    -> Result<(), CallError>;
    /// Gives the job back; its grip is taken from the lease.
    fn release(&self, request: &v1::ReleaseJobRequest) -> Result<(), CallError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_apart_by_what_a_worker_can_do() {
        let of = |code| CallError::from_refusal(Refusal::new(code, "x"));
        assert!(matches!(of(ErrorCode::LeaseLost), CallError::LeaseLost(_)));
        assert!(matches!(of(ErrorCode::JobEnded), CallError::LeaseLost(_)));
        for (code, fault) in [
            (ErrorCode::Busy, false),
            (ErrorCode::ShuttingDown, false),
            (ErrorCode::Internal, true),
        ] {
            assert!(matches!(
                of(code),
                CallError::Unavailable { is_fault, .. } if is_fault == fault
            ));
        }
        assert!(matches!(
            of(ErrorCode::InvalidRequest),
            CallError::Refused(_)
        ));
    }
}
