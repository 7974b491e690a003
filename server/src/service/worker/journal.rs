//! The journal of a job in a worker's hands.

use std::sync::Arc;

use concord_common::{ErrorCode, code::Refusal, wire};
use concord_proto::v1;
use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::{Grip, check::MAX_LINE_BYTES, within_bounds};
use crate::{
    context::Context,
    datastore::WorkerJobRecord,
    decide::workers,
    error::{Failure, refuse},
    metrics,
    service::BoxStream,
};

/// Most bytes of a job's journal, which is in the database: as many as a worker reads (`concord-artaug`'s `MAX_JOURNAL`), enough for
/// tens of thousands of pairs with all that an advisor said.
const MAX_JOURNAL: u64 = 512 << 20;
/// Most lines in one message.
const PAGE_LINES: u32 = 1000;

/// The lines from `first` on, as far as they go; the lease is looked at again with every message.
pub(super) async fn read(
    context: Arc<Context>,
    grip: Grip,
    first: u64,
) -> Result<BoxStream<v1::ReadJournalResponse>, Failure> {
    // A worker without the job is refused before the stream begins.
    let page = page(&context, &grip, first).await?;
    let pages = stream::try_unfold(Some(page), move |page| {
        let (context, grip) = (Arc::clone(&context), grip.clone());
        async move {
            let Some(page) = page else {
                return Ok::<_, Failure>(None);
            };
            if page.lines.is_empty() {
                return Ok(None);
            }
            let next = page.first + page.lines.len() as u64;
            let following = self::page(&context, &grip, next).await?;
            Ok(Some((page, Some(following))))
        }
    });
    Ok(pages.map_err(Into::into).boxed())
}

async fn page(
    context: &Context,
    grip: &Grip,
    first: u64,
) -> Result<v1::ReadJournalResponse, Failure> {
    let now = context.now();
    let lines = context
        .datastore
        .run_read("read_journal", |tx| {
            Box::pin(async move {
                let record = workers::gripped(tx, grip, now).await?;
                if first > record.lines {
                    let problem = format!("the journal has {} lines", record.lines);
                    return Err(wire::invalid_field("first", problem).into());
                }
                let bytes = MAX_LINE_BYTES as u64;
                Ok::<_, Failure>(
                    tx.journal_lines(&grip.job_id, first, PAGE_LINES, bytes)
                        .await?,
                )
            })
        })
        .await?;
    Ok(v1::ReadJournalResponse { first, lines })
}

/// Adds lines; those that are there already must be the same. Gives the number of lines, all of them durable.
pub(super) async fn append(
    context: &Arc<Context>,
    grip: &Grip,
    first: u64,
    lines: &[Vec<u8>],
) -> Result<u64, Failure> {
    let (now, most) = (context.now(), context.config.workers.max_total_disk);
    let (added, next) = context
        .datastore
        .run_tx("append_journal", |tx| {
            Box::pin(async move {
                let job_id = &grip.job_id;
                let record = workers::gripped(tx, grip, now).await?;
                if first > record.lines {
                    return conflict(format!(
                        "the journal of job `{job_id}` has {} lines, so that line {first} would leave a gap",
                        record.lines
                    ));
                }
                let there = (record.lines - first).min(lines.len() as u64) as usize;
                let (known, new) = lines.split_at(there);
                for (n, line) in (first..).zip(known) {
                    if !tx.is_journal_line(job_id, n, line).await? {
                        return conflict(format!(
                            "line {n} of the journal of job `{job_id}` is another one; read it and go on from there"
                        ));
                    }
                }
                if new.is_empty() {
                    return Ok((0, record.lines));
                }
                let bytes = new.iter().map(|line| line.len() as u64).sum();
                within_journal(&record, bytes)?;
                within_bounds(tx, &record, bytes, most).await?;
                tx.append_journal(job_id, record.lines, new, now).await?;
                let added = new.len() as u64;
                Ok::<_, Failure>((added, record.lines + added))
            })
        })
        .await?;
    metrics::worker_journal_lines(added);
    Ok(next)
}

/// `QUOTA_EXCEEDED` if a journal would become longer than workers read.
fn within_journal(record: &WorkerJobRecord, more: u64) -> Result<(), Refusal> {
    if record.journal_bytes.saturating_add(more) <= MAX_JOURNAL {
        return Ok(());
    }
    Err(Refusal::new(
        ErrorCode::QuotaExceeded,
        format!(
            "the journal of job `{}` has {} bytes; it may have {MAX_JOURNAL}, and {more} more do not fit",
            record.job_id, record.journal_bytes
        ),
    ))
}

fn conflict<T>(message: String) -> Result<T, Failure> {
    refuse(ErrorCode::JournalConflict, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_grows_no_longer_than_workers_read() {
        let record = |journal_bytes| WorkerJobRecord {
            job_id: "a".parse().unwrap(),
            has_ended: false,
            paused: false,
            lease: None,
            attempts: 1,
            idle_attempts: 0,
            lines_at_claim: 0,
            lines: 1,
            journal_bytes,
            object_bytes: 0,
            quota: u64::MAX,
            progress: None,
            waits: false,
            reviews_done: 0,
            reviews: 0,
            waiting_iteration: None,
            trouble: None,
            files_deleted_at: None,
        };
        within_journal(&record(MAX_JOURNAL - 7), 7).unwrap();
        for (there, more) in [(MAX_JOURNAL - 7, 8), (MAX_JOURNAL, 1), (1, u64::MAX)] {
            let refused = within_journal(&record(there), more).unwrap_err();
            assert_eq!(refused.code, ErrorCode::QuotaExceeded);
        }
    }
}
