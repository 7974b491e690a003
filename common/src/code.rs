//! The reasons Concord gives to a peer: one list, one mapping to gRPC.
//!
//! A [`Refusal`] is what a peer may read: a code for programs and a sentence that says what to change. Internal text is
//! logged where it happens and never put into one.

use std::{fmt, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Domain of every `ErrorInfo` that Concord sends.
pub const ERROR_DOMAIN: &str = "concord.v1";

macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident => ($text:literal, $code:ident),)*) => {
        /// Why something was refused, discarded or declined. The texts are part of the protocol.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum ErrorCode { $($(#[$doc])* $name,)* }

        impl ErrorCode {
            /// Every code, in the order of the protocol page.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The code's text on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The gRPC status code that goes with it.
            pub fn grpc_code(self) -> Code {
                match self { $(Self::$name => Code::$code,)* }
            }
        }
    };
}

error_codes! {
    /// The caller's certificate has the wrong role for this service.
    WrongRole => ("WRONG_ROLE", PermissionDenied),
    /// The caller's certificate belongs to another federation.
    WrongFederation => ("WRONG_FEDERATION", PermissionDenied),
    /// The silo is pending, suspended or revoked.
    NotEnrolled => ("NOT_ENROLLED", PermissionDenied),
    /// A field is missing or malformed.
    InvalidRequest => ("INVALID_REQUEST", InvalidArgument),
    /// A job specification is not acceptable.
    InvalidJobSpec => ("INVALID_JOB_SPEC", InvalidArgument),
    /// A request id was used before with another specification.
    RequestIdReused => ("REQUEST_ID_REUSED", AlreadyExists),
    /// No such job, or not for this silo.
    UnknownJob => ("UNKNOWN_JOB", NotFound),
    /// No such round.
    UnknownRound => ("UNKNOWN_ROUND", NotFound),
    /// No such adapter version in this job.
    UnknownVersion => ("UNKNOWN_VERSION", NotFound),
    /// No such upload, or it has expired.
    UnknownUpload => ("UNKNOWN_UPLOAD", NotFound),
    /// No silo of this name has called.
    UnknownSilo => ("UNKNOWN_SILO", NotFound),
    /// The silo's enrollment cannot change in this way.
    WrongEnrollment => ("WRONG_ENROLLMENT", FailedPrecondition),
    /// The job has already ended.
    JobEnded => ("JOB_ENDED", FailedPrecondition),
    /// The silo is not in the round's cohort.
    NotInCohort => ("NOT_IN_COHORT", FailedPrecondition),
    /// The lease token is wrong or has run out.
    LeaseLost => ("LEASE_LOST", FailedPrecondition),
    /// The round is not the current one.
    WrongRound => ("WRONG_ROUND", FailedPrecondition),
    /// The round was already closed.
    Late => ("LATE", FailedPrecondition),
    /// Another contribution of this silo is already recorded for the round.
    DuplicateContribution => ("DUPLICATE_CONTRIBUTION", AlreadyExists),
    /// The delta starts from another adapter than the round's.
    WrongBaseVersion => ("WRONG_BASE_VERSION", InvalidArgument),
    /// More or fewer tensors than the job's layout.
    TensorCount => ("TENSOR_COUNT", InvalidArgument),
    /// A tensor's name is not the layout's.
    TensorName => ("TENSOR_NAME", InvalidArgument),
    /// The layout's tensors in another order.
    TensorOrder => ("TENSOR_ORDER", InvalidArgument),
    /// A tensor's shape is not the layout's.
    TensorShape => ("TENSOR_SHAPE", InvalidArgument),
    /// A tensor's element type is not the layout's.
    TensorDtype => ("TENSOR_DTYPE", InvalidArgument),
    /// A value is NaN or infinite.
    NotFinite => ("NOT_FINITE", InvalidArgument),
    /// The update's norm is above the job's bound.
    NormTooLarge => ("NORM_TOO_LARGE", InvalidArgument),
    /// The payload has another size than the layout says.
    PayloadSize => ("PAYLOAD_SIZE", InvalidArgument),
    /// The payload's digest is not the announced one.
    DigestMismatch => ("DIGEST_MISMATCH", InvalidArgument),
    /// A chunk is empty, too large or its digest is wrong.
    BadChunk => ("BAD_CHUNK", InvalidArgument),
    /// A chunk leaves a gap or repeats bytes.
    ChunkOffset => ("CHUNK_OFFSET", InvalidArgument),
    /// The stream ended before the payload did.
    Truncated => ("TRUNCATED", InvalidArgument),
    /// The number of examples is 0 or above the job's bound.
    BadWeight => ("BAD_WEIGHT", InvalidArgument),
    /// The silo does not have the job's backbone.
    UnknownBackbone => ("UNKNOWN_BACKBONE", FailedPrecondition),
    /// The silo's backbone has other weights or sizes than the job says.
    BackboneMismatch => ("BACKBONE_MISMATCH", FailedPrecondition),
    /// The silo has no task of the job's name, or of another kind.
    UnknownTask => ("UNKNOWN_TASK", FailedPrecondition),
    /// The silo's data cannot be used.
    BadData => ("BAD_DATA", FailedPrecondition),
    /// The silo's own rules forbid it.
    PolicyRefused => ("POLICY_REFUSED", FailedPrecondition),
    /// The silo tried and could not complete the work.
    SiloFailed => ("SILO_FAILED", Aborted),
    /// The job's kind does not know this call.
    WrongKind => ("WRONG_KIND", FailedPrecondition),
    /// The job has no such object, or no longer.
    UnknownObject => ("UNKNOWN_OBJECT", NotFound),
    /// The journal holds other lines than the worker thinks.
    JournalConflict => ("JOURNAL_CONFLICT", FailedPrecondition),
    /// The job would keep more than its specification allows.
    QuotaExceeded => ("QUOTA_EXCEEDED", FailedPrecondition),
    /// The pairs wait for no word.
    NotWaiting => ("NOT_WAITING", FailedPrecondition),
    /// The job has not ended yet.
    JobNotEnded => ("JOB_NOT_ENDED", FailedPrecondition),
    /// A limit is reached; try again after the given time.
    Busy => ("BUSY", ResourceExhausted),
    /// The server is stopping; try again after the given time.
    ShuttingDown => ("SHUTTING_DOWN", Unavailable),
    /// The caller took too long.
    TooSlow => ("TOO_SLOW", DeadlineExceeded),
    /// A fault of the server; its log has the details.
    Internal => ("INTERNAL", Internal),
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a peer is told: a code, a sentence that says what to change, and perhaps when to try again.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Refusal {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
    /// When a retry may help.
    pub retry_after: Option<Duration>,
}

impl Refusal {
    /// A refusal that a retry does not help.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retry_after: None,
        }
    }

    /// The same, with the advice to try again after `delay`.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// Reads a peer's refusal out of a gRPC status, if Concord wrote it.
    pub fn from_status(status: &Status) -> Option<Self> {
        let details = status.get_error_details();
        let info = details.error_info()?;
        if info.domain != ERROR_DOMAIN {
            return None;
        }
        let code = ErrorCode::ALL
            .iter()
            .copied()
            .find(|code| code.as_str() == info.reason)?;
        Some(Self {
            code,
            message: status.message().to_owned(),
            retry_after: details.retry_info().and_then(|info| info.retry_delay),
        })
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let mut details = ErrorDetails::with_error_info(
            refusal.code.as_str(),
            ERROR_DOMAIN,
            std::collections::HashMap::new(),
        );
        if refusal.retry_after.is_some() {
            details.set_retry_info(refusal.retry_after);
        }
        Self::with_error_details(refusal.code.grpc_code(), refusal.message, details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_survives_the_wire() {
        let refusal = Refusal::new(ErrorCode::Busy, "too many uploads at once; try again")
            .retry_after(Duration::from_secs(2));
        let status = Status::from(refusal.clone());
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(Refusal::from_status(&status), Some(refusal));
    }

    #[test]
    fn every_code_has_a_text_of_its_own() {
        let mut texts: Vec<_> = ErrorCode::ALL.iter().map(|c| c.as_str()).collect();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), ErrorCode::ALL.len());
    }
}
