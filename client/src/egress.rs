//! The egress gate: the one way out of a silo.
//!
//! Tensors leave as a [`GlobalUpdate`] only, which nothing but the global adapter can make. The gate checks that it is exactly
//! the job's layout, finite and within bounds, keeps the checked bytes in its outbox (so that a restarted daemon sends the same
//! ones), and before each attempt to send writes a line to the egress log and syncs it. [`Cleared`], [`Departure`],
//! [`ClearedReport`] and [`ClearedDecline`] can be made here only, and the [`crate::coordinator::Coordinator`] takes nothing else.
//! [`Outlet`] stands between the session and the server and logs the rest of what leaves: claims, announcements and repeated attempts.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use concord_common::{
    Clock, ErrorCode, JobId, RoundNumber, SiloId,
    adapter::{AdapterLayout, AdapterVersion},
    chunk::{Cut, DEFAULT_CHUNK_BYTES, PayloadInspector},
    code::Refusal,
    wire::{MAX_METRICS, MetricPoint, MetricReport, is_known_metric},
};
use concord_learning::adapter::GlobalUpdate;

use self::{
    cleared::Attempts,
    log::{EgressLog, Entry, What},
    outbox::Outbox,
};

mod cleared;
mod log;
mod outbox;
mod outlet;
#[cfg(test)]
mod tests;

pub use self::{
    cleared::{Assignment, Cleared, ClearedDecline, ClearedReport, Departure},
    outlet::Outlet,
};

/// Longest sentence of a decline in bytes.
const MAX_SENTENCE_BYTES: usize = 512;

/// Why something may not leave.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EgressError {
    /// It is not what the job asked for, or beyond a bound.
    #[error("the egress gate holds the update back: {0}")]
    Held(Refusal),
    /// The job's byte budget would be exceeded.
    #[error(
        "the egress gate holds {wanted} bytes back: {spent} of the {budget} bytes for job {job} have left; raise egress.max_bytes_per_job to let it go on"
    )]
    Budget {
        /// Job.
        job: JobId,
        /// Bytes that would leave now.
        wanted: u64,
        /// Bytes that have left.
        spent: u64,
        /// Bytes that may leave.
        budget: u64,
    },
    /// A report that holds something else than known names and finite numbers, or too many bytes.
    #[error("the egress gate holds a report back: {0}")]
    Report(String),
    /// The log or the outbox cannot be written, so nothing may leave.
    #[error("{}: {reason}; nothing leaves without its log entry", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Of which kind the operating system's error is.
        kind: io::ErrorKind,
        /// What it said.
        reason: String,
    },
    /// An earlier write has failed and left a torn line that could not be cut off.
    #[error(
        "egress log {}: a line was torn ({reason}) and could not be mended, so nothing leaves; make room on the disk and start the daemon anew", .path.display()
    )]
    Broken {
        /// The file.
        path: PathBuf,
        /// What the operating system said to the torn line.
        reason: String,
    },
    /// The log has a line that the gate did not write.
    #[error("egress log {}: line {line} cannot be read ({reason}); move the file away to start a new one", .path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// The line.
        line: u64,
        /// What is wrong.
        reason: String,
    },
}

impl EgressError {
    fn io(path: &Path, source: &io::Error) -> Self {
        Self::Io {
            path: path.to_path_buf(),
            kind: source.kind(),
            reason: source.to_string(),
        }
    }
}

/// Bounds of this silo, besides the job's own.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GateLimits {
    /// Most bytes that may leave for one job, of payloads and reports.
    pub bytes_per_job: u64,
    /// Largest L2 norm of an update.
    pub max_update_norm: Option<f64>,
}

/// The gate.
#[derive(Debug)]
pub struct EgressGate {
    silo: SiloId,
    server: String,
    limits: GateLimits,
    clock: Arc<dyn Clock>,
    log: Mutex<EgressLog>,
    outbox: Outbox,
}

impl EgressGate {
    /// Opens the log `egress.jsonl` and the outbox in the state folder. `server` stands in the log.
    ///
    /// # Errors
    /// If the log cannot be opened or read, or the outbox cannot be made.
    pub fn open(
        state_folder: &Path,
        silo: SiloId,
        server: String,
        limits: GateLimits,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, EgressError> {
        Ok(Self {
            silo,
            server,
            limits,
            clock,
            log: Mutex::new(EgressLog::open(&state_folder.join("egress.jsonl"))?),
            outbox: Outbox::open(&state_folder.join("outbox"))?,
        })
    }

    /// Checks an update and keeps it in the outbox until [`EgressGate::done`].
    ///
    /// # Errors
    /// [`EgressError::Held`] with the layout's, `NOT_FINITE`, `NORM_TOO_LARGE`, `WRONG_BASE_VERSION` or `BAD_WEIGHT`.
    pub fn pass(
        &self,
        assignment: &Assignment,
        update: GlobalUpdate,
        examples: u64,
    ) -> Result<Cleared, EgressError> {
        assignment
            .layout
            .check_same(&update.layout().to_proto())
            .map_err(EgressError::Held)?;
        let base = update.base();
        let cleared = self.check(assignment, base, update.into_payload().into(), examples)?;
        self.outbox.keep(&cleared)?;
        Ok(cleared)
    }

    /// The update that this daemon, perhaps in an earlier life, has passed for the same round.
    ///
    /// # Errors
    /// If the outbox cannot be read. What no longer passes the checks is not given out but removed.
    pub fn pending(&self, assignment: &Assignment) -> Result<Option<Cleared>, EgressError> {
        let Some((payload, examples)) = self.outbox.find(assignment)? else {
            return Ok(None);
        };
        match self.check(assignment, assignment.base, payload, examples) {
            Ok(cleared) => Ok(Some(cleared)),
            Err(error) => {
                tracing::warn!(%error, job.id = %assignment.job, "what was left in the outbox is thrown away");
                self.outbox.remove(&assignment.job)?;
                Ok(None)
            }
        }
    }

    /// Writes and syncs the log entry for sending `cleared` from byte `offset` on, where the server wants it to go on. Of an earlier attempt
    /// only what is before `offset` goes on to count towards the budget.
    ///
    /// # Errors
    /// [`EgressError::Budget`], or [`EgressError::Io`]: then nothing may be sent.
    pub fn depart(&self, cleared: &Cleared, offset: u64) -> Result<Departure, EgressError> {
        let bytes = (cleared.payload().len() as u64).saturating_sub(offset);
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let spent = log.spent_before(&cleared.job, cleared.round, cleared.digest(), offset);
        if spent.saturating_add(bytes) > self.limits.bytes_per_job {
            return Err(EgressError::Budget {
                job: cleared.job.clone(),
                wanted: bytes,
                spent,
                budget: self.limits.bytes_per_job,
            });
        }
        log.write(&self.entry(
            &cleared.job,
            What::Contribution {
                round: cleared.round,
                tensors: cleared.layout.tensors().len() as u64,
                offset,
                bytes,
                digest: cleared.digest(),
                norm: cleared.norm,
                examples: cleared.examples,
            },
        ))?;
        Ok(Departure {
            cleared: cleared.clone(),
            offset,
        })
    }

    /// Forgets the update of a job: the server has answered for its round.
    ///
    /// # Errors
    /// If the file cannot be removed.
    pub fn done(&self, job: &JobId) -> Result<(), EgressError> {
        self.outbox.remove(job)
    }

    /// Checks and logs a report.
    ///
    /// # Errors
    /// [`EgressError::Report`] for anything but 1 to [`MAX_METRICS`] finite numbers with names that are known
    /// ([`concord_common::wire::METRIC_NAMES`]), or beyond the job's byte budget.
    pub fn report(
        &self,
        job: &JobId,
        round: RoundNumber,
        point: MetricPoint,
        metrics: BTreeMap<String, f64>,
    ) -> Result<ClearedReport, EgressError> {
        let hold = |reason: String| Err(EgressError::Report(reason));
        if metrics.is_empty() || metrics.len() > MAX_METRICS {
            return hold(format!(
                "it has {} numbers, 1 to {MAX_METRICS} may leave",
                metrics.len()
            ));
        }
        if !metrics.keys().all(|name| is_known_metric(name)) {
            return hold("it has a number with a name that is not one of the known metrics".into());
        }
        if let Some((name, value)) = metrics.iter().find(|(_, value)| !value.is_finite()) {
            return hold(format!("`{name}` is {value}"));
        }
        let report = MetricReport {
            silo: self.silo.clone(),
            job: job.clone(),
            round,
            point,
            metrics,
        };
        self.log_report(&report, 1)?;
        Ok(ClearedReport {
            report,
            attempts: Attempts::default(),
        })
    }

    /// Logs an attempt to send a report, unless it is the first, which is in the log already.
    fn send_report(&self, cleared: &ClearedReport) -> Result<(), EgressError> {
        match cleared.attempts.next() {
            1 => Ok(()),
            attempt => self.log_report(&cleared.report, attempt),
        }
    }

    fn log_report(&self, report: &MetricReport, attempt: u32) -> Result<(), EgressError> {
        let sizes = report
            .metrics
            .keys()
            .map(|name| name.len() + size_of::<f64>());
        let bytes = sizes.sum::<usize>() as u64;
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let spent = log.spent(&report.job);
        if spent.saturating_add(bytes) > self.limits.bytes_per_job {
            return Err(EgressError::Report(format!(
                "with its {bytes} bytes more than egress.max_bytes_per_job would leave for job {}",
                report.job
            )));
        }
        log.write(&self.entry(
            &report.job,
            What::Metrics {
                round: report.round,
                point: report.point.as_str().to_owned(),
                metrics: report.metrics.clone(),
                bytes,
                attempt,
            },
        ))
    }

    /// Logs a no. The sentence must hold no data and no paths; it becomes one line of the length that the protocol takes.
    ///
    /// # Errors
    /// [`EgressError::Io`] or [`EgressError::Broken`].
    pub fn decline(&self, job: &JobId, refusal: &Refusal) -> Result<ClearedDecline, EgressError> {
        let cleared = ClearedDecline {
            job: job.clone(),
            code: refusal.code,
            sentence: one_line(&refusal.message),
            attempts: Attempts::default(),
        };
        self.log_decline(&cleared, 1)?;
        Ok(cleared)
    }

    /// Logs an attempt to send a no, unless it is the first, which is in the log already.
    fn send_decline(&self, cleared: &ClearedDecline) -> Result<(), EgressError> {
        match cleared.attempts.next() {
            1 => Ok(()),
            attempt => self.log_decline(cleared, attempt),
        }
    }

    fn log_decline(&self, cleared: &ClearedDecline, attempt: u32) -> Result<(), EgressError> {
        self.log(
            &cleared.job,
            What::Decline {
                code: cleared.code,
                sentence: cleared.sentence.clone(),
                attempt,
            },
        )
    }

    /// Logs the wish to take part in a round.
    fn send_claim(&self, job: &JobId, round: RoundNumber) -> Result<(), EgressError> {
        self.log(job, What::Claim { round })
    }

    /// Logs the announcement of an update.
    fn send_announcement(&self, cleared: &Cleared) -> Result<(), EgressError> {
        self.log(
            &cleared.job,
            What::Announcement {
                round: cleared.round,
                digest: cleared.digest(),
                size: cleared.payload().len() as u64,
                examples: cleared.examples,
            },
        )
    }

    fn log(&self, job: &JobId, what: What) -> Result<(), EgressError> {
        let entry = self.entry(job, what);
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(&entry)
    }

    /// Bytes that have left for a job, of payloads and reports.
    pub fn spent(&self, job: &JobId) -> u64 {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .spent(job)
    }

    fn entry(&self, job: &JobId, what: What) -> Entry {
        Entry {
            time: self.clock.now().to_string(),
            server: self.server.clone(),
            job: job.clone(),
            what,
        }
    }

    fn check(
        &self,
        assignment: &Assignment,
        base: AdapterVersion,
        payload: Bytes,
        examples: u64,
    ) -> Result<Cleared, EgressError> {
        let hold = |code, message| Err(EgressError::Held(Refusal::new(code, message)));
        if base != assignment.base {
            return hold(
                ErrorCode::WrongBaseVersion,
                format!(
                    "it is a delta to {base}, the round starts from {}",
                    assignment.base
                ),
            );
        }
        if examples == 0 || examples > assignment.max_examples {
            return hold(
                ErrorCode::BadWeight,
                format!(
                    "it stands for {examples} examples, the job takes 1 to {}",
                    assignment.max_examples
                ),
            );
        }
        let bounds = [assignment.max_update_norm, self.limits.max_update_norm];
        let bound = bounds.into_iter().flatten().reduce(f64::min);
        let norm = check_payload(&assignment.layout, &payload, bound).map_err(EgressError::Held)?;
        Ok(Cleared {
            job: assignment.job.clone(),
            round: assignment.round,
            layout: assignment.layout.clone(),
            base,
            cut: Cut::new(payload, DEFAULT_CHUNK_BYTES),
            norm,
            examples,
        })
    }
}

/// A sentence without control characters and line breaks, of at most [`MAX_SENTENCE_BYTES`].
fn one_line(sentence: &str) -> String {
    let mut line: String = sentence
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    line.truncate(line.floor_char_boundary(MAX_SENTENCE_BYTES));
    line
}

/// The L2 norm of a payload that has the layout's size, finite values and at most the bound.
fn check_payload(
    layout: &AdapterLayout,
    payload: &[u8],
    bound: Option<f64>,
) -> Result<f64, Refusal> {
    if payload.len() as u64 != layout.payload_bytes() {
        return Err(Refusal::new(
            ErrorCode::PayloadSize,
            format!(
                "the layout has {} bytes, the update {}",
                layout.payload_bytes(),
                payload.len()
            ),
        ));
    }
    let norm = PayloadInspector::new().then(payload, layout)?.norm();
    match bound {
        Some(bound) if norm > bound => Err(Refusal::new(
            ErrorCode::NormTooLarge,
            format!("the update's L2 norm is {norm:.3}, above the bound of {bound}"),
        )),
        _ => Ok(norm),
    }
}
