//! Why a silo's work did not come to its end, and how it did.

use std::{io, path::PathBuf};

use concord_common::{code::Refusal, wire::SignedReceipt};
use concord_learning::LearningError;

use crate::{
    coordinator::CallError, data::DataError, egress::EgressError, patience::Halt,
    transfer::TransferError, vault::VaultError,
};

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
    /// A receipt cannot be kept.
    #[error("{}: {source}; the round does not count as answered without its receipt", .path.display())]
    Receipts {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The silo's files cannot be read just now.
    #[error(transparent)]
    Data(DataError),
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

impl From<CallError> for SessionError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Egress(error) => Self::Egress(error),
            other => Self::Call(other),
        }
    }
}

impl From<Halt> for SessionError {
    fn from(halt: Halt) -> Self {
        match halt {
            Halt::Stopped => Self::Stopped,
            Halt::Call(error) => error.into(),
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

/// Whether reading an input may go well later, without anybody mending the input or its place.
pub(super) fn may_pass(error: &io::Error) -> bool {
    !matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::IsADirectory
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::InvalidData
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::UnexpectedEof
    )
}
