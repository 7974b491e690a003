//! The same for ArtAug jobs.

use std::{collections::BTreeSet, time::Duration};

use concord_proto::v1;
use serde::Serialize;

use super::{Job, digest, text};
use crate::cli::pairs::Decided;

/// How far an ArtAug job is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(in crate::cli) struct Progress {
    /// The iteration under way, from 1.
    pub(in crate::cli) iteration: u32,
    /// Most iterations.
    pub(in crate::cli) iterations: u32,
    pub(in crate::cli) stage: String,
    /// Done of the stage.
    pub(in crate::cli) done: u64,
    /// What there is to do in the stage; none while it is not known.
    pub(in crate::cli) total: Option<u64>,
    pub(in crate::cli) per_second: Option<f64>,
    /// Time left of the stage.
    pub(in crate::cli) remaining_seconds: Option<f64>,
    /// Digests of the last images made, the newest first.
    pub(in crate::cli) last_images: Vec<String>,
    /// Bytes that the server keeps for the job.
    pub(in crate::cli) bytes_kept: u64,
    /// Of the worker, in bytes.
    pub(in crate::cli) peak_memory: Option<u64>,
}

impl From<v1::ArtaugProgress> for Progress {
    fn from(progress: v1::ArtaugProgress) -> Self {
        let rate = progress.per_second;
        Self {
            iteration: progress.iteration,
            iterations: progress.iterations,
            done: progress.done,
            total: (progress.total > 0).then_some(progress.total),
            per_second: (rate.is_finite() && rate > 0.0).then_some(rate),
            // A time below zero is none.
            remaining_seconds: progress
                .remaining
                .and_then(|time| Duration::try_from(time).ok())
                .map(|time| time.as_secs_f64()),
            last_images: progress
                .last_images
                .iter()
                .filter_map(|bytes| digest(bytes))
                .collect(),
            bytes_kept: progress.bytes_kept,
            peak_memory: (progress.peak_memory > 0).then_some(progress.peak_memory),
            stage: progress.stage,
        }
    }
}

/// The answer to `artaug review` without words.
#[derive(Debug, Clone, Serialize)]
#[expect(clippy::struct_field_names, reason = "the names of the JSON fields")]
pub(in crate::cli) struct Waiting {
    pub(in crate::cli) job_id: String,
    /// None if no pair waits.
    pub(in crate::cli) iteration: Option<u32>,
    pub(in crate::cli) waiting: BTreeSet<u32>,
    /// Name of the artefact that shows the pairs.
    pub(in crate::cli) gallery: Option<String>,
    /// Where it was written to.
    pub(in crate::cli) page: Option<String>,
}

impl Waiting {
    /// What waits of a job.
    pub(in crate::cli) fn new(job_id: String, answer: v1::ListReviewResponse) -> Self {
        Self {
            job_id,
            iteration: (answer.iteration > 0).then_some(answer.iteration),
            waiting: answer.waiting.into_iter().collect(),
            gallery: text(answer.gallery),
            page: None,
        }
    }
}

/// The answer to `artaug review` with words.
#[derive(Debug, Clone, Serialize)]
pub(in crate::cli) struct Reviewed {
    pub(in crate::cli) job_id: String,
    /// None if no pair waited.
    pub(in crate::cli) iteration: Option<u32>,
    pub(in crate::cli) accepted: BTreeSet<u32>,
    pub(in crate::cli) rejected: BTreeSet<u32>,
    /// How many pairs still wait.
    pub(in crate::cli) waiting: u32,
    /// Where the page that shows the pairs was written to.
    pub(in crate::cli) page: Option<String>,
}

impl Reviewed {
    /// The words that were recorded.
    pub(in crate::cli) fn new(before: Waiting, decided: Decided, waiting: u32) -> Self {
        Self {
            job_id: before.job_id,
            iteration: before.iteration,
            accepted: decided.accepted,
            rejected: decided.rejected,
            waiting,
            page: before.page,
        }
    }
}

/// A result of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(in crate::cli) struct Artefact {
    pub(in crate::cli) name: String,
    pub(in crate::cli) digest: Option<String>,
    pub(in crate::cli) bytes: u64,
}

/// The answer to `artaug artefacts`.
#[derive(Debug, Clone, Serialize)]
pub(in crate::cli) struct ArtefactList {
    pub(in crate::cli) artefacts: Vec<Artefact>,
}

impl From<v1::ListArtefactsResponse> for ArtefactList {
    fn from(answer: v1::ListArtefactsResponse) -> Self {
        let artefact = |artefact: v1::Artefact| Artefact {
            digest: digest(&artefact.digest),
            name: artefact.name,
            bytes: artefact.bytes,
        };
        Self {
            artefacts: answer.artefacts.into_iter().map(artefact).collect(),
        }
    }
}

/// A file of a job's results.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(in crate::cli) struct FetchedFile {
    pub(in crate::cli) name: String,
    pub(in crate::cli) digest: String,
    pub(in crate::cli) bytes: u64,
    /// False if it was there already, with the same content.
    pub(in crate::cli) written: bool,
}

/// The answer to `artaug fetch`.
#[derive(Debug, Clone, Serialize)]
pub(in crate::cli) struct Fetched {
    pub(in crate::cli) folder: String,
    pub(in crate::cli) files: Vec<FetchedFile>,
}

/// The answer to `artaug delete`.
#[derive(Debug, Clone, Serialize)]
pub(in crate::cli) struct Deleted {
    pub(in crate::cli) job: Job,
    /// Bytes that were kept for the job before.
    pub(in crate::cli) bytes_freed: u64,
}

impl From<v1::DeleteJobFilesResponse> for Deleted {
    fn from(answer: v1::DeleteJobFilesResponse) -> Self {
        Self {
            job: answer.job.unwrap_or_default().into(),
            bytes_freed: answer.bytes_freed,
        }
    }
}
