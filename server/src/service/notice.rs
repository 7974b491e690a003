//! What a silo is told of its rounds.

use concord_common::{RoundNumber, SiloId, round::RoundPhase, wire::outcome_to_proto};
use concord_proto::v1;

use crate::{
    context::Context,
    datastore::{JobRecord, Tx},
    error::Failure,
};

/// Most ended jobs that a silo is told of; the newest count.
const MAX_ENDED: u32 = 50;

/// Everything that waits for a silo now, and the jobs that ended lately.
pub(super) async fn notices(
    context: &Context,
    silo_id: &SiloId,
) -> Result<Vec<v1::RoundNotice>, Failure> {
    let since = context.now() - context.config.jobs.announce_ended;
    context
        .datastore
        .run_read("list_notices", |tx| {
            Box::pin(async move {
                let mut notices = Vec::new();
                for job in &tx.jobs_of_silo(silo_id, since, MAX_ENDED).await? {
                    notices.extend(notice(tx, job, silo_id).await?);
                }
                Ok::<_, Failure>(notices)
            })
        })
        .await
}

/// The notice of one job; none if the silo has no part in its present round.
async fn notice(
    tx: &mut Tx<'_>,
    job: &JobRecord,
    silo_id: &SiloId,
) -> Result<Option<v1::RoundNotice>, Failure> {
    let number = RoundNumber(job.round);
    let Some(round) = tx.round(&job.job_id, number).await? else {
        return Ok(None);
    };
    let silo = tx.round_silo(&job.job_id, number, silo_id).await?;
    if silo.is_none() && !job.has_ended() {
        return Ok(None);
    }
    // Between two rounds and after the last one, the newest adapter is what the silo goes on with.
    let base = match job.adapter_version {
        Some(newest) if round.phase == RoundPhase::Published || job.has_ended() => newest,
        _ => round.base,
    };
    let (outcome, _) = outcome_to_proto(silo.and_then(|silo| silo.outcome));
    Ok(Some(v1::RoundNotice {
        job_id: job.job_id.to_string(),
        job_state: v1::JobState::from(job.state) as i32,
        round: number.0,
        phase: v1::RoundPhase::from(round.phase) as i32,
        base_version: base.0.to_vec(),
        closes_at: Some(round.closes_at.to_proto()),
        outcome: outcome as i32,
    }))
}
