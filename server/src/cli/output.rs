//! What `--json` prints: these types, field by field. Names and meanings stay; fields may be added.
//!
//! Words are lowercase (`succeeded`, `after_training`), digests hexadecimal, times RFC 3339, and what is not there is `null`.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use concord_common::Timestamp;
use concord_proto::v1;
use serde::Serialize;

use crate::ids::hex;

pub(super) mod artaug;

/// One JSON value over several lines.
pub(super) fn pretty<T: Serialize>(out: &mut dyn Write, value: &T) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

/// One JSON value in one line.
pub(super) fn line<T: Serialize>(out: &mut dyn Write, value: &T) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    writeln!(out)?;
    out.flush()
}

/// `JOB_STATE_RUNNING` as `running`.
fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_lowercase()
}

fn time(proto: Option<&prost_types::Timestamp>) -> Option<String> {
    proto.map(|proto| Timestamp::from_proto(proto).to_string())
}

fn digest(bytes: &[u8]) -> Option<String> {
    (!bytes.is_empty()).then(|| hex(bytes))
}

fn text(value: String) -> Option<String> {
    (!value.is_empty()).then_some(value)
}

/// None while it is awaited.
fn outcome(outcome: v1::Outcome) -> Option<String> {
    (outcome != v1::Outcome::Unspecified).then(|| word(outcome.as_str_name(), "OUTCOME_"))
}

/// A job.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(clippy::struct_field_names, reason = "the names of the JSON fields")]
pub(super) struct Job {
    pub(super) job_id: String,
    pub(super) name: String,
    pub(super) kind: String,
    pub(super) algorithm: String,
    pub(super) state: String,
    pub(super) round: u32,
    pub(super) rounds: u32,
    pub(super) reason: Option<String>,
    pub(super) submitted_by: String,
    pub(super) submitted_at: Option<String>,
    pub(super) ended_at: Option<String>,
    pub(super) adapter_version: Option<String>,
    /// True while an operator has paused it.
    pub(super) paused: bool,
    /// True while it waits for an operator's word on pairs.
    pub(super) waits_for_review: bool,
    /// The worker that holds it.
    pub(super) worker: Option<String>,
    /// How far an ArtAug job is; none for other kinds, and before a worker has begun.
    pub(super) artaug: Option<artaug::Progress>,
    /// When an operator had deleted what the server kept for it.
    pub(super) files_deleted_at: Option<String>,
}

impl From<v1::Job> for Job {
    fn from(job: v1::Job) -> Self {
        Self {
            state: word(job.state().as_str_name(), "JOB_STATE_"),
            submitted_at: time(job.submitted_at.as_ref()),
            ended_at: time(job.ended_at.as_ref()),
            files_deleted_at: time(job.files_deleted_at.as_ref()),
            adapter_version: digest(&job.adapter_version),
            job_id: job.job_id,
            name: job.name,
            kind: job.kind,
            algorithm: job.algorithm,
            round: job.round,
            rounds: job.rounds,
            reason: text(job.reason),
            submitted_by: job.submitted_by,
            paused: job.paused,
            waits_for_review: job.waits_for_review,
            worker: text(job.worker),
            artaug: job.artaug.map(artaug::Progress::from),
        }
    }
}

/// The answer to `job submit`.
#[derive(Debug, Serialize)]
pub(super) struct Submitted {
    pub(super) job: Job,
    pub(super) existed: bool,
    /// What keeps the job from being run at the moment.
    pub(super) warning: Option<String>,
}

impl From<v1::SubmitJobResponse> for Submitted {
    fn from(answer: v1::SubmitJobResponse) -> Self {
        Self {
            job: answer.job.unwrap_or_default().into(),
            existed: answer.existed,
            warning: text(answer.warning),
        }
    }
}

/// The answer to `job list`.
#[derive(Debug, Serialize)]
pub(super) struct JobList {
    pub(super) jobs: Vec<Job>,
}

impl From<v1::ListJobsResponse> for JobList {
    fn from(answer: v1::ListJobsResponse) -> Self {
        Self {
            jobs: answer.jobs.into_iter().map(Job::from).collect(),
        }
    }
}

/// The answer to `job pause`, `job resume` and `job cancel`.
#[derive(Debug, Serialize)]
pub(super) struct JobNow {
    pub(super) job: Job,
}

impl From<Option<v1::Job>> for JobNow {
    fn from(job: Option<v1::Job>) -> Self {
        Self {
            job: job.unwrap_or_default().into(),
        }
    }
}

/// A silo's part in a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct SiloProgress {
    pub(super) silo_id: String,
    pub(super) outcome: Option<String>,
    pub(super) reason: Option<String>,
    pub(super) working: bool,
    pub(super) accepted: u32,
    pub(super) bytes_up: u64,
    pub(super) bytes_down: u64,
    /// The sentence with which it declined the job.
    pub(super) message: Option<String>,
}

impl From<v1::SiloProgress> for SiloProgress {
    fn from(silo: v1::SiloProgress) -> Self {
        Self {
            outcome: outcome(silo.outcome()),
            silo_id: silo.silo_id,
            reason: text(silo.reason),
            working: silo.working,
            accepted: silo.accepted,
            bytes_up: silo.bytes_up,
            bytes_down: silo.bytes_down,
            message: text(silo.message),
        }
    }
}

/// Metrics of a silo at a point of a round.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Report {
    pub(super) silo_id: String,
    pub(super) round: u32,
    pub(super) point: String,
    pub(super) metrics: BTreeMap<String, f64>,
}

impl From<v1::MetricReport> for Report {
    fn from(report: v1::MetricReport) -> Self {
        Self {
            point: word(report.point().as_str_name(), "METRIC_POINT_"),
            silo_id: report.silo_id,
            round: report.round,
            metrics: report
                .metrics
                .into_iter()
                .map(|metric| (metric.name, metric.value))
                .collect(),
        }
    }
}

/// The answer to `job show`, and one line of `job watch` (there `spec_toml` is `null` and `metrics` holds what is new).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct JobState {
    pub(super) job: Job,
    pub(super) spec_toml: Option<String>,
    pub(super) silos: Vec<SiloProgress>,
    pub(super) metrics: Vec<Report>,
}

impl From<v1::GetJobResponse> for JobState {
    fn from(answer: v1::GetJobResponse) -> Self {
        Self {
            job: answer.job.unwrap_or_default().into(),
            spec_toml: Some(answer.spec_toml),
            silos: answer.silos.into_iter().map(SiloProgress::from).collect(),
            metrics: answer.metrics.into_iter().map(Report::from).collect(),
        }
    }
}

impl From<v1::WatchJobResponse> for JobState {
    fn from(answer: v1::WatchJobResponse) -> Self {
        Self {
            job: answer.job.unwrap_or_default().into(),
            spec_toml: None,
            silos: answer.silos.into_iter().map(SiloProgress::from).collect(),
            metrics: answer.metrics.into_iter().map(Report::from).collect(),
        }
    }
}

/// A round.
#[derive(Debug, Clone, Serialize)]
#[expect(clippy::struct_field_names, reason = "the names of the JSON fields")]
pub(super) struct Round {
    pub(super) job_id: String,
    pub(super) round: u32,
    pub(super) phase: String,
    pub(super) cohort: u32,
    pub(super) accepted: u32,
    pub(super) announced_at: Option<String>,
    pub(super) ended_at: Option<String>,
    pub(super) base_version: Option<String>,
    pub(super) published_version: Option<String>,
}

impl From<v1::Round> for Round {
    fn from(round: v1::Round) -> Self {
        Self {
            phase: word(round.phase().as_str_name(), "ROUND_PHASE_"),
            announced_at: time(round.announced_at.as_ref()),
            ended_at: time(round.ended_at.as_ref()),
            base_version: digest(&round.base_version),
            published_version: digest(&round.published_version),
            job_id: round.job_id,
            round: round.round,
            cohort: round.cohort,
            accepted: round.accepted,
        }
    }
}

/// The answer to `round list`.
#[derive(Debug, Serialize)]
pub(super) struct RoundList {
    pub(super) rounds: Vec<Round>,
}

impl From<v1::ListRoundsResponse> for RoundList {
    fn from(answer: v1::ListRoundsResponse) -> Self {
        Self {
            rounds: answer.rounds.into_iter().map(Round::from).collect(),
        }
    }
}

/// A silo's part in a round.
#[derive(Debug, Clone, Serialize)]
pub(super) struct RoundSilo {
    pub(super) silo_id: String,
    pub(super) outcome: Option<String>,
    pub(super) reason: Option<String>,
    pub(super) examples: u64,
    pub(super) payload_digest: Option<String>,
    pub(super) recorded_at: Option<String>,
}

/// The answer to `round show`.
#[derive(Debug, Serialize)]
pub(super) struct RoundState {
    pub(super) round: Round,
    pub(super) silos: Vec<RoundSilo>,
}

impl From<v1::GetRoundResponse> for RoundState {
    fn from(answer: v1::GetRoundResponse) -> Self {
        let silo = |silo: v1::RoundSilo| RoundSilo {
            outcome: outcome(silo.outcome()),
            payload_digest: digest(&silo.payload_digest),
            recorded_at: time(silo.recorded_at.as_ref()),
            silo_id: silo.silo_id,
            reason: text(silo.reason),
            examples: silo.examples,
        };
        Self {
            round: answer.round.unwrap_or_default().into(),
            silos: answer.silos.into_iter().map(silo).collect(),
        }
    }
}

/// A silo.
#[derive(Debug, Clone, Serialize)]
#[expect(clippy::struct_field_names, reason = "the names of the JSON fields")]
pub(super) struct Silo {
    pub(super) silo_id: String,
    pub(super) enrollment: String,
    pub(super) connected: bool,
    pub(super) first_seen: Option<String>,
    pub(super) last_seen: Option<String>,
}

impl From<v1::Silo> for Silo {
    fn from(silo: v1::Silo) -> Self {
        Self {
            enrollment: enrollment(silo.enrollment()),
            first_seen: time(silo.first_seen.as_ref()),
            last_seen: time(silo.last_seen.as_ref()),
            silo_id: silo.silo_id,
            connected: silo.connected,
        }
    }
}

fn enrollment(enrollment: v1::Enrollment) -> String {
    word(enrollment.as_str_name(), "ENROLLMENT_")
}

/// The answer to `silo list`.
#[derive(Debug, Serialize)]
pub(super) struct SiloList {
    pub(super) silos: Vec<Silo>,
}

impl From<v1::ListSilosResponse> for SiloList {
    fn from(answer: v1::ListSilosResponse) -> Self {
        Self {
            silos: answer.silos.into_iter().map(Silo::from).collect(),
        }
    }
}

/// The answer to `silo approve`, `silo suspend` and `silo revoke`.
#[derive(Debug, Serialize)]
pub(super) struct Enrolled {
    pub(super) silo: Silo,
    /// What it was before; the same if nothing changed.
    pub(super) before: String,
}

impl From<v1::SetEnrollmentResponse> for Enrolled {
    fn from(answer: v1::SetEnrollmentResponse) -> Self {
        Self {
            before: enrollment(answer.before()),
            silo: answer.silo.unwrap_or_default().into(),
        }
    }
}
