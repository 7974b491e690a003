//! Reporting numbers.

use std::{collections::BTreeMap, sync::Arc};

use concord_common::{JobId, RoundNumber, wire::MetricPoint};
use concord_learning::metric::Evaluation;
use tokio_util::sync::CancellationToken;

use super::{Session, SessionError, blocking};
use crate::{
    coordinator::{CallError, Coordinator},
    egress::EgressError,
    patience::{Halt, patiently},
};

impl<C: Coordinator> Session<C> {
    pub(super) async fn report_evaluation(
        &self,
        job: &JobId,
        round: RoundNumber,
        point: MetricPoint,
        evaluation: &Evaluation,
        stop: &CancellationToken,
    ) -> Result<(), SessionError> {
        self.report(job, round, point, numbers(evaluation), stop)
            .await
    }

    /// Reports numbers. A server that does not want them does not stop the work.
    pub(super) async fn report(
        &self,
        job: &JobId,
        round: RoundNumber,
        point: MetricPoint,
        numbers: BTreeMap<String, f64>,
        stop: &CancellationToken,
    ) -> Result<(), SessionError> {
        if !self.profile.reports_metrics {
            return Ok(());
        }
        let (gate, of) = (Arc::clone(&self.gate), job.clone());
        let cleared = match blocking(move || gate.report(&of, round, point, numbers)).await? {
            Ok(cleared) => cleared,
            Err(EgressError::Report(reason)) => {
                tracing::warn!(job.id = %job, %round, reason, "a report was held back");
                return Ok(());
            }
            Err(error) => return Err(SessionError::Egress(error)),
        };
        let answer = patiently("report metrics", self.pace, stop, || {
            self.coordinator.report(&cleared)
        })
        .await;
        match answer {
            Err(Halt::Call(error)) if !matches!(error, CallError::Egress(_)) => {
                tracing::warn!(%error, job.id = %job, %round, "a report was refused");
                Ok(())
            }
            answer => Ok(answer?),
        }
    }
}

/// The numbers of an evaluation as they are reported.
pub(super) fn numbers(evaluation: &Evaluation) -> BTreeMap<String, f64> {
    let mut numbers = evaluation.metrics.clone();
    numbers.insert("rows".to_owned(), evaluation.rows as f64);
    numbers
}
