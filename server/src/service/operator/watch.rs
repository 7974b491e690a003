//! A job's state now and after every change.

use std::time::Duration;

use concord_common::JobId;
use concord_proto::v1;
use futures::stream;
use tokio::time::Instant;

use super::Operator;
use crate::{
    error::Failure,
    service::{BoxStream, federation::shutting_down},
};

/// Changes of a job within this time become one message.
const WATCH_PAUSE: Duration = Duration::from_millis(50);
/// The same for the progress of a job that a worker runs.
const WATCH_PAUSE_WORKER: Duration = Duration::from_millis(500);

/// The states of a job from now on, until it has ended or the operator is to watch anew.
pub(super) fn watch(service: Operator, job_id: JobId) -> BoxStream<v1::WatchJobResponse> {
    let watch = Watch {
        changes: service.context.hub.watch_job(&job_id),
        ends: Instant::now() + service.context.config.limits.max_connection_age,
        service,
        job_id,
        last: None,
    };
    Box::pin(stream::unfold(Some(watch), |watch| async move {
        let mut watch = watch?;
        match watch.next().await {
            Ok(None) => None,
            Ok(Some(state)) => Some((Ok(state), Some(watch))),
            Err(failure) => Some((Err(failure.into()), None)),
        }
    }))
}

/// One operator's view of a job.
struct Watch {
    service: Operator,
    job_id: JobId,
    changes: tokio::sync::watch::Receiver<()>,
    last: Option<(v1::WatchJobResponse, i64)>,
    /// When the operator is to watch anew, so that its connection can come to an end.
    ends: Instant,
}

impl Watch {
    /// The present state at first, later the next one that differs; none once the job has ended, or when the operator is to
    /// watch anew.
    async fn next(&mut self) -> Result<Option<v1::WatchJobResponse>, Failure> {
        loop {
            if let Some((last, _)) = &self.last {
                if last.job.as_ref().is_some_and(|job| job.ended_at.is_some()) {
                    return Ok(None);
                }
                let by_worker = last.job.as_ref().is_some_and(|job| job.artaug.is_some());
                let pause = if by_worker {
                    WATCH_PAUSE_WORKER
                } else {
                    WATCH_PAUSE
                };
                tokio::select! {
                    // The hub lives in the context, so that the sender cannot be gone.
                    _ = self.changes.changed() => tokio::time::sleep(pause).await,
                    () = self.service.shutdown.token().cancelled_owned() => {
                        return Err(shutting_down().into());
                    }
                    () = tokio::time::sleep_until(self.ends) => return Ok(None),
                }
            }
            self.changes.mark_unchanged();
            let after = self.last.as_ref().map_or(0, |(_, after)| *after);
            let state = self.service.job_state(&self.job_id, after).await?;
            let response = v1::WatchJobResponse {
                job: Some(state.view),
                silos: state.silos,
                metrics: state.metrics,
            };
            let is_news = !response.metrics.is_empty()
                || self.last.as_ref().is_none_or(|(last, _)| {
                    last.job != response.job || last.silos != response.silos
                });
            if is_news {
                self.last = Some((response.clone(), state.last_report));
                return Ok(Some(response));
            }
        }
    }
}
