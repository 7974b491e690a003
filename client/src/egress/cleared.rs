//! What may leave, in the forms that only the gate can give it.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use bytes::Bytes;
use concord_common::{
    Digest, ErrorCode, JobId, RoundNumber,
    adapter::{AdapterLayout, AdapterVersion},
    chunk::Cut,
    wire::MetricReport,
};

/// What a round lets out.
#[derive(Clone, PartialEq, Debug)]
pub struct Assignment {
    /// Job.
    pub job: JobId,
    /// Round.
    pub round: RoundNumber,
    /// The tensors that travel.
    pub layout: AdapterLayout,
    /// The adapter that the update must be a delta to.
    pub base: AdapterVersion,
    /// The job's bound on the L2 norm.
    pub max_update_norm: Option<f64>,
    /// The job's bound on the number of examples.
    pub max_examples: u64,
}

/// An update that has passed every check.
#[derive(Clone, PartialEq, Debug)]
pub struct Cleared {
    pub(super) job: JobId,
    pub(super) round: RoundNumber,
    pub(super) layout: AdapterLayout,
    pub(super) base: AdapterVersion,
    pub(super) cut: Cut,
    pub(super) norm: f64,
    pub(super) examples: u64,
}

impl Cleared {
    /// Job.
    pub fn job(&self) -> &JobId {
        &self.job
    }

    /// Round.
    pub fn round(&self) -> RoundNumber {
        self.round
    }

    /// The tensors.
    pub fn layout(&self) -> &AdapterLayout {
        &self.layout
    }

    /// What the payload is a delta to.
    pub fn base(&self) -> AdapterVersion {
        self.base
    }

    /// The bytes.
    pub fn payload(&self) -> &Bytes {
        self.cut.payload()
    }

    /// BLAKE3 of the bytes.
    pub fn digest(&self) -> Digest {
        self.cut.digest()
    }

    /// The bytes and how they are cut into chunks, with the digests of both.
    pub fn cut(&self) -> &Cut {
        &self.cut
    }

    /// L2 norm of the update.
    pub fn norm(&self) -> f64 {
        self.norm
    }

    /// Training examples behind the update.
    pub fn examples(&self) -> u64 {
        self.examples
    }
}

/// One attempt to send a cleared update, already in the log.
#[derive(Debug)]
pub struct Departure {
    pub(super) cleared: Cleared,
    pub(super) offset: u64,
}

impl Departure {
    /// What is sent.
    pub fn cleared(&self) -> &Cleared {
        &self.cleared
    }

    /// From which byte on.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

/// How often something was sent. The first attempt is in the log before there is anything to send.
#[derive(Clone, Debug, Default)]
pub(super) struct Attempts(Arc<AtomicU32>);

impl Attempts {
    /// Counts one more, from 1.
    pub(super) fn next(&self) -> u32 {
        self.0.fetch_add(1, Ordering::Relaxed).saturating_add(1)
    }
}

/// A report of named finite numbers, already in the log.
#[derive(Clone, Debug)]
pub struct ClearedReport {
    pub(super) report: MetricReport,
    pub(super) attempts: Attempts,
}

impl ClearedReport {
    /// The numbers.
    pub fn report(&self) -> &MetricReport {
        &self.report
    }
}

/// A no to a job, already in the log.
#[derive(Clone, Debug)]
pub struct ClearedDecline {
    pub(super) job: JobId,
    pub(super) code: ErrorCode,
    pub(super) sentence: String,
    pub(super) attempts: Attempts,
}

impl ClearedDecline {
    /// The job.
    pub fn job(&self) -> &JobId {
        &self.job
    }

    /// The reason for programs.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// The reason for people, one line without data and paths.
    pub fn sentence(&self) -> &str {
        &self.sentence
    }
}
