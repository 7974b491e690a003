//! Stored rows as operators see them.

use std::collections::BTreeSet;

use concord_common::{
    JobId, RoundNumber, SiloId, Timestamp, job::Submission, round::Outcome, wire::outcome_to_proto,
};
use concord_proto::v1;

use crate::{
    datastore::{JobRecord, RoundRecord, RoundSiloRecord, SiloRecord, Tx, WorkerJobRecord},
    error::Failure,
};

/// A job; with the workers' part if it is one of theirs.
pub(super) fn job(record: &JobRecord, worker: Option<&WorkerJobRecord>, now: Timestamp) -> v1::Job {
    // A specification that a newer version no longer reads leaves these fields empty.
    let spec = Submission::parse(&record.spec_toml).ok();
    let training = match &spec {
        Some(Submission::Federated(training)) => Some(training),
        Some(Submission::Artaug(_)) | None => None,
    };
    v1::Job {
        job_id: record.job_id.to_string(),
        name: spec
            .as_ref()
            .map_or_else(String::new, |spec| spec.name().to_owned()),
        kind: record.kind.clone(),
        state: v1::JobState::from(record.state) as i32,
        round: record.round,
        rounds: training.map_or(0, |spec| spec.rounds.count),
        reason: if record.has_ended() {
            record.reason.clone()
        } else {
            worker
                .and_then(|worker| worker.trouble.clone())
                .unwrap_or_default()
        },
        submitted_at: Some(record.submitted_at.to_proto()),
        ended_at: record.ended_at.map(Timestamp::to_proto),
        adapter_version: record
            .adapter_version
            .map_or_else(Vec::new, |version| version.0.to_vec()),
        submitted_by: record.submitted_by.clone(),
        algorithm: training.map_or_else(String::new, |spec| spec.algorithm.name().to_owned()),
        paused: worker.is_some_and(|worker| worker.paused && !worker.has_ended),
        waits_for_review: worker.is_some_and(WorkerJobRecord::waits_for_review),
        artaug: worker.and_then(progress_of),
        worker: worker
            .and_then(|worker| worker.holder(now))
            .map_or_else(String::new, |lease| lease.worker.clone()),
        files_deleted_at: worker
            .and_then(|worker| worker.files_deleted_at)
            .map(Timestamp::to_proto),
    }
}

/// How far a job is, without what was deleted since.
fn progress_of(worker: &WorkerJobRecord) -> Option<v1::ArtaugProgress> {
    let mut progress = worker.progress.clone()?;
    if worker.files_deleted_at.is_some() {
        progress.last_images.clear();
        progress.bytes_kept = 0;
    }
    Some(progress)
}

pub(super) fn round(job_id: &JobId, record: &RoundRecord) -> v1::Round {
    v1::Round {
        job_id: job_id.to_string(),
        round: record.number.0,
        phase: v1::RoundPhase::from(record.phase) as i32,
        cohort: record.cohort,
        accepted: record.accepted,
        announced_at: Some(record.announced_at.to_proto()),
        ended_at: record.ended_at.map(Timestamp::to_proto),
        base_version: record.base.0.to_vec(),
        published_version: record
            .published
            .map_or_else(Vec::new, |version| version.0.to_vec()),
    }
}

pub(super) fn round_silo(record: &RoundSiloRecord) -> v1::RoundSilo {
    let (outcome, reason) = outcome_to_proto(record.outcome);
    v1::RoundSilo {
        silo_id: record.silo_id.to_string(),
        outcome: outcome as i32,
        reason,
        examples: record.examples,
        payload_digest: record
            .digest
            .map_or_else(Vec::new, concord_common::Digest::to_vec),
        recorded_at: record.recorded_at.map(Timestamp::to_proto),
    }
}

pub(super) fn silo(record: &SiloRecord, connected: bool) -> v1::Silo {
    v1::Silo {
        silo_id: record.silo_id.to_string(),
        enrollment: record.enrollment as i32,
        first_seen: Some(record.first_seen.to_proto()),
        last_seen: Some(record.last_seen.to_proto()),
        connected,
    }
}

/// Every silo's part in a job.
pub(super) async fn progress(
    tx: &mut Tx<'_>,
    job: &JobRecord,
    now: Timestamp,
) -> Result<Vec<v1::SiloProgress>, Failure> {
    let number = RoundNumber(job.round);
    let round = tx.round_silos(&job.job_id, number).await?;
    let holders: BTreeSet<SiloId> = tx.lease_holders(&job.job_id, number, now).await?;
    let silos = tx.job_silos(&job.job_id).await?;
    Ok(silos
        .into_iter()
        .map(|silo| {
            let part = round.iter().find(|part| part.silo_id == silo.silo_id);
            let declined = silo
                .declined
                .as_ref()
                .map(|(code, _)| Outcome::Declined(*code));
            let outcome = part.and_then(|part| part.outcome).or(declined);
            let answered = matches!(outcome, Some(Outcome::Accepted | Outcome::Declined(_)));
            let working = !job.has_ended() && !answered && holders.contains(&silo.silo_id);
            let (number, reason) = outcome_to_proto(outcome);
            v1::SiloProgress {
                silo_id: silo.silo_id.to_string(),
                outcome: number as i32,
                reason,
                working,
                bytes_up: silo.bytes_up,
                bytes_down: silo.bytes_down,
                accepted: silo.accepted,
                message: silo
                    .declined
                    .map_or_else(String::new, |(_, message)| message),
            }
        })
        .collect())
}
