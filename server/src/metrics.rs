//! The server's metrics, each moved in one place; their names stand in [`concord_common::telemetry::names`].

use std::time::Duration;

use concord_common::{
    ErrorCode,
    round::{RoundPhase, job::JobState},
    telemetry::names,
};
use metrics::{counter, gauge, histogram};

/// A transaction ended: `committed`, `retried` or `failed`.
pub(crate) fn transaction(name: &'static str, outcome: &'static str) {
    counter!(names::DATASTORE_TRANSACTIONS, "name" => name, "outcome" => outcome).increment(1);
}

/// A caller was refused.
pub(crate) fn refusal(code: ErrorCode) {
    counter!(names::REFUSALS, "code" => code.as_str()).increment(1);
}

/// A contribution or a silo's answer was recorded, or repeated.
pub(crate) fn contribution(outcome: &'static str) {
    counter!(names::CONTRIBUTIONS, "outcome" => outcome).increment(1);
}

/// A round came into a phase.
pub(crate) fn round(phase: RoundPhase) {
    counter!(names::ROUNDS, "phase" => phase.as_str()).increment(1);
}

/// A round ended so long after it was announced.
pub(crate) fn round_seconds(time: Duration) {
    histogram!(names::ROUND_SECONDS).record(time.as_secs_f64());
}

/// An aggregation took so long.
pub(crate) fn aggregation_seconds(time: Duration) {
    histogram!(names::AGGREGATION_SECONDS).record(time.as_secs_f64());
}

/// A job came into a state.
pub(crate) fn job(state: JobState) {
    counter!(names::JOBS, "state" => state.as_str()).increment(1);
}

/// A job that workers run came into a state.
pub(crate) fn worker_job(state: JobState) {
    counter!(names::WORKER_JOBS, "state" => state.as_str()).increment(1);
}

/// A worker's lease began or ended.
pub(crate) fn worker_lease(outcome: &'static str) {
    counter!(names::WORKER_LEASES, "outcome" => outcome).increment(1);
}

/// Lines came into journals.
pub(crate) fn worker_journal_lines(lines: u64) {
    counter!(names::WORKER_JOURNAL_LINES).increment(lines);
}

/// Bytes of workers' objects came in (`up`) or went out (`down`).
pub(crate) fn worker_object_bytes(direction: &'static str, bytes: u64) {
    counter!(names::WORKER_OBJECT_BYTES, "direction" => direction).increment(bytes);
}

/// The server started a worker.
pub(crate) fn worker_start() {
    counter!(names::WORKER_STARTS).increment(1);
}

/// Payload bytes came in (`up`) or went out (`down`).
pub(crate) fn transfer_bytes(direction: &'static str, bytes: u64) {
    counter!(names::TRANSFER_BYTES, "direction" => direction).increment(bytes);
}

/// One step of a gauge as long as the value lives.
#[derive(Debug)]
pub(crate) struct Level(&'static str);

impl Level {
    fn rise(name: &'static str) -> Self {
        gauge!(name).increment(1.0);
        Self(name)
    }

    /// A transfer that has its turn.
    pub(crate) fn transfer() -> Self {
        Self::rise(names::TRANSFERS_ACTIVE)
    }

    /// A transfer that waits for its turn.
    pub(crate) fn waiting_transfer() -> Self {
        Self::rise(names::TRANSFERS_WAITING)
    }

    /// A silo that watches for rounds.
    pub(crate) fn watching_silo() -> Self {
        Self::rise(names::SILOS_WATCHING)
    }

    /// A job that is being run.
    pub(crate) fn running_job() -> Self {
        Self::rise(names::JOBS_RUNNING)
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        gauge!(self.0).decrement(1.0);
    }
}

/// One group of files was synced to the disk.
pub(crate) fn spool_sync(files: usize) {
    counter!(names::SPOOL_SYNCS).increment(1);
    counter!(names::SPOOL_SYNCED_FILES).increment(files as u64);
}
