//! Between the messages of `concord.v1` and the vocabulary: every field that comes from a peer is checked here.
//!
//! A refusal names the field. Enumerations that a message leaves out are refused where one is needed.

use std::time::Duration;

use concord_proto::v1;

use crate::{
    Digest, ErrorCode, JobId, RoundNumber, SiloId,
    adapter::AdapterVersion,
    code::Refusal,
    round::{Outcome, ParticipationWindow, RoundPhase, job::JobState},
};

mod metric;
mod reason;
mod receipt;
#[cfg(test)]
mod tests;

pub use metric::{
    MAX_METRIC_NAME_BYTES, MAX_METRICS, METRIC_NAMES, MetricPoint, MetricReport, is_known_metric,
    is_metric_name,
};
pub use reason::UnknownCode;
pub use receipt::{
    PUBLIC_KEY_BYTES, Receipt, ReceiptError, ReceiptSigner, SIGNATURE_BYTES, SignedReceipt,
};

/// `INVALID_REQUEST` for a field, with what is wrong about it.
pub fn invalid_field(field: &str, problem: impl std::fmt::Display) -> Refusal {
    Refusal::new(ErrorCode::InvalidRequest, format!("`{field}`: {problem}"))
}

/// A message field that must be there.
///
/// # Errors
/// `INVALID_REQUEST` if it is not.
pub fn required<T>(field: &str, value: Option<T>) -> Result<T, Refusal> {
    value.ok_or_else(|| invalid_field(field, "is missing"))
}

/// A job id from a message's `job_id`.
///
/// # Errors
/// `INVALID_REQUEST` if it is malformed.
pub fn job_id(text: &str) -> Result<JobId, Refusal> {
    text.parse().map_err(|error| invalid_field("job_id", error))
}

/// A silo id from a message's `silo_id`.
///
/// # Errors
/// `INVALID_REQUEST` if it is malformed.
pub fn silo_id(text: &str) -> Result<SiloId, Refusal> {
    text.parse()
        .map_err(|error| invalid_field("silo_id", error))
}

/// A round number from a message's `round`.
///
/// # Errors
/// `INVALID_REQUEST` if it is 0.
pub fn round_number(number: u32) -> Result<RoundNumber, Refusal> {
    if number == 0 {
        return Err(invalid_field("round", "rounds are counted from 1"));
    }
    Ok(RoundNumber(number))
}

/// A digest from a field of a message.
///
/// # Errors
/// `INVALID_REQUEST` if it has not 32 bytes.
pub fn digest(field: &str, bytes: &[u8]) -> Result<Digest, Refusal> {
    Digest::try_from(bytes).map_err(|error| invalid_field(field, error))
}

/// An adapter version from a field of a message.
///
/// # Errors
/// `INVALID_REQUEST` if it has not 32 bytes.
pub fn adapter_version(field: &str, bytes: &[u8]) -> Result<AdapterVersion, Refusal> {
    digest(field, bytes).map(AdapterVersion)
}

/// The wire form of a duration; more than the form can hold becomes the most it can.
pub fn duration_to_proto(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos() as i32,
    }
}

/// A duration from a field of a message.
///
/// # Errors
/// `INVALID_REQUEST` if it is negative or malformed.
pub fn duration_from_proto(
    field: &str,
    proto: &prost_types::Duration,
) -> Result<Duration, Refusal> {
    match (u64::try_from(proto.seconds), u32::try_from(proto.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Ok(Duration::new(seconds, nanos)),
        _ => Err(invalid_field(field, "is no length of time")),
    }
}

impl From<RoundPhase> for v1::RoundPhase {
    fn from(phase: RoundPhase) -> Self {
        match phase {
            RoundPhase::Announced => Self::Announced,
            RoundPhase::Collecting => Self::Collecting,
            RoundPhase::Aggregating => Self::Aggregating,
            RoundPhase::Published => Self::Published,
            RoundPhase::Failed => Self::Failed,
            RoundPhase::Cancelled => Self::Cancelled,
        }
    }
}

/// A phase from a message.
///
/// # Errors
/// `INVALID_REQUEST` if it is missing or unknown.
pub fn phase_from_proto(number: i32) -> Result<RoundPhase, Refusal> {
    RoundPhase::ALL
        .into_iter()
        .find(|phase| v1::RoundPhase::from(*phase) as i32 == number)
        .ok_or_else(|| invalid_field("phase", format!("{number} is no phase of a round")))
}

impl From<JobState> for v1::JobState {
    fn from(state: JobState) -> Self {
        match state {
            JobState::Queued => Self::Queued,
            JobState::Running => Self::Running,
            JobState::Succeeded => Self::Succeeded,
            JobState::Failed => Self::Failed,
            JobState::Cancelled => Self::Cancelled,
        }
    }
}

/// A job's state from a message.
///
/// # Errors
/// `INVALID_REQUEST` if it is missing or unknown.
pub fn job_state_from_proto(number: i32) -> Result<JobState, Refusal> {
    JobState::ALL
        .into_iter()
        .find(|state| v1::JobState::from(*state) as i32 == number)
        .ok_or_else(|| invalid_field("state", format!("{number} is no state of a job")))
}

/// The two fields that an outcome takes in a message; unspecified and empty while it is awaited.
pub fn outcome_to_proto(outcome: Option<Outcome>) -> (v1::Outcome, String) {
    let number = match outcome {
        None => v1::Outcome::Unspecified,
        Some(Outcome::Accepted) => v1::Outcome::Accepted,
        Some(Outcome::Rejected(_)) => v1::Outcome::Rejected,
        Some(Outcome::Discarded(_)) => v1::Outcome::Discarded,
        Some(Outcome::Declined(_)) => v1::Outcome::Declined,
    };
    let reason = outcome
        .and_then(Outcome::reason)
        .map_or("", ErrorCode::as_str);
    (number, reason.to_owned())
}

/// An outcome from the two fields of a message; `None` while it is awaited.
///
/// # Errors
/// `INVALID_REQUEST` if the outcome is unknown, or its reason is unknown, missing or superfluous.
pub fn outcome_from_proto(number: i32, reason: &str) -> Result<Option<Outcome>, Refusal> {
    let name = match v1::Outcome::try_from(number) {
        Ok(v1::Outcome::Unspecified) if reason.is_empty() => return Ok(None),
        Ok(v1::Outcome::Accepted) => "accepted",
        Ok(v1::Outcome::Rejected) => "rejected",
        Ok(v1::Outcome::Discarded) => "discarded",
        Ok(v1::Outcome::Declined) => "declined",
        Ok(v1::Outcome::Unspecified) | Err(_) => {
            return Err(invalid_field("outcome", format!("{number} is no outcome")));
        }
    };
    Outcome::from_parts(name, reason)
        .map(Some)
        .map_err(|error| invalid_field("reason", error))
}

/// The wire form of a window; no `max_count` is 0.
pub fn window_to_proto(window: &ParticipationWindow) -> v1::ParticipationWindow {
    v1::ParticipationWindow {
        min_count: window.min_count,
        max_count: window.max_count.unwrap_or(0),
        min_time: Some(duration_to_proto(window.min_time)),
        max_time: Some(duration_to_proto(window.max_time)),
    }
}

/// A window from a message.
///
/// # Errors
/// `INVALID_REQUEST` if a time is missing or malformed, or a minimum is above its maximum.
pub fn window_from_proto(proto: &v1::ParticipationWindow) -> Result<ParticipationWindow, Refusal> {
    let time = |field: &str, value: &Option<prost_types::Duration>| {
        duration_from_proto(field, required(field, value.as_ref())?)
    };
    let window = ParticipationWindow {
        min_count: proto.min_count,
        max_count: (proto.max_count > 0).then_some(proto.max_count),
        min_time: time("min_time", &proto.min_time)?,
        max_time: time("max_time", &proto.max_time)?,
    };
    if window.max_count.is_some_and(|max| max < window.min_count) {
        return Err(invalid_field("max_count", "must not be below `min_count`"));
    }
    if window.max_time < window.min_time {
        return Err(invalid_field("max_time", "must not be below `min_time`"));
    }
    Ok(window)
}
