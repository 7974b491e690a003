//! What a silo is told of its rounds.

use concord_common::{SiloId, round::RoundPhase, wire::outcome_to_proto};
use concord_proto::v1;

use crate::{context::Context, datastore::NoticeRecord, error::Failure};

/// Most ended jobs that a silo is told of; the newest count.
const MAX_ENDED: u32 = 50;

/// Everything that waits for a silo now, and the jobs that ended lately.
pub(super) async fn notices(
    context: &Context,
    silo_id: &SiloId,
) -> Result<Vec<v1::RoundNotice>, Failure> {
    let since = context.now() - context.config.jobs.announce_ended;
    let records = context
        .datastore
        .read_statement("list_notices", |tx| {
            Box::pin(async move {
                Ok::<_, Failure>(tx.notices_of_silo(silo_id, since, MAX_ENDED).await?)
            })
        })
        .await?;
    Ok(records.iter().filter_map(notice).collect())
}

/// The notice of one job; none if the silo has no part in its present round.
fn notice(record: &NoticeRecord) -> Option<v1::RoundNotice> {
    let ended = record.state.is_over();
    if !record.asked && !ended {
        return None;
    }
    // Between two rounds and after the last one, the newest adapter is what the silo goes on with.
    let base = match record.newest {
        Some(newest) if record.phase == RoundPhase::Published || ended => newest,
        _ => record.base,
    };
    let (outcome, _) = outcome_to_proto(record.outcome);
    Some(v1::RoundNotice {
        job_id: record.job_id.to_string(),
        job_state: v1::JobState::from(record.state) as i32,
        round: record.round.0,
        phase: v1::RoundPhase::from(record.phase) as i32,
        base_version: base.0.to_vec(),
        closes_at: Some(record.closes_at.to_proto()),
        outcome: outcome as i32,
    })
}
