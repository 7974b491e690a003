//! A round's training: from the adapter that it starts from to the checked update and the saved vault.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use concord_common::{RoundNumber, job::TrainingSpec, wire::MetricPoint};
use concord_learning::trainer::{Continue, RoundResult};
use tokio_util::sync::CancellationToken;

use super::{Session, SessionError, Taken, blocking, lease::Lease};
use crate::{
    bench::TrainerKey,
    coordinator::Coordinator,
    egress::{Assignment, Cleared},
    transfer::fetch,
    vault::{Header, Record},
};

impl<C: Coordinator> Session<C> {
    /// Steps 2 to 6.
    pub(super) async fn train(
        &self,
        taken: &Taken,
        spec: &TrainingSpec,
        assignment: &Assignment,
        lease: &Lease,
    ) -> Result<Cleared, SessionError> {
        let (job, round) = (&assignment.job, assignment.round);
        self.doing(job, round, spec, "downloading");
        let base = fetch(
            self.coordinator.as_ref(),
            &self.downloads,
            job,
            assignment.base,
            &assignment.layout,
            self.pace,
            &lease.end,
        )
        .await?;
        if taken.trained > 0 && taken.trained + 1 == round.0 {
            self.after_aggregation(taken, RoundNumber(taken.trained), base.clone(), &lease.end)
                .await?;
        }
        self.doing(job, round, spec, "training");
        let started = self.clock.now();
        let result = self.train_round(&taken.key, round, base, lease).await?;
        let seconds = self.clock.now().since(started).as_secs_f64();

        let (gate, assigned) = (Arc::clone(&self.gate), assignment.clone());
        let RoundResult {
            update,
            examples,
            training,
            validation,
        } = result;
        let cleared = blocking(move || gate.pass(&assigned, update, examples))
            .await?
            .map_err(SessionError::Egress)?;
        let mut numbers: BTreeMap<String, f64> = training.into_iter().collect();
        numbers.insert("seconds".to_owned(), seconds);
        numbers.insert("examples".to_owned(), examples as f64);
        self.report(job, round, MetricPoint::Training, numbers, &lease.end)
            .await?;
        if let Some(evaluation) = validation {
            self.report_evaluation(
                job,
                round,
                MetricPoint::AfterTraining,
                &evaluation,
                &lease.end,
            )
            .await?;
        }
        self.save_state(taken, round).await?;
        Ok(cleared)
    }

    pub(super) async fn train_round(
        &self,
        key: &TrainerKey,
        round: RoundNumber,
        base: Bytes,
        lease: &Lease,
    ) -> Result<RoundResult, SessionError> {
        let (end, board) = (lease.end.clone(), Arc::clone(&self.board));
        let trained = self.bench.train(key, round.0, base, move |progress| {
            board.step(progress.step, progress.steps);
            if end.is_cancelled() {
                Continue::Stop
            } else {
                Continue::Yes
            }
        });
        Ok(trained.await?)
    }

    /// Evaluates with the adapter that `round` has published, reports, and saves: it may be the best model so far.
    pub(super) async fn after_aggregation(
        &self,
        taken: &Taken,
        round: RoundNumber,
        published: Bytes,
        stop: &CancellationToken,
    ) -> Result<(), SessionError> {
        let evaluation = self
            .bench
            .after_aggregation(&taken.key, round.0, published)
            .await?;
        if let Some(evaluation) = evaluation {
            self.report_evaluation(
                &taken.key.job,
                round,
                MetricPoint::AfterAggregation,
                &evaluation,
                stop,
            )
            .await?;
        }
        self.save_state(taken, round).await
    }

    pub(super) async fn save_state(
        &self,
        taken: &Taken,
        round: RoundNumber,
    ) -> Result<(), SessionError> {
        let body = self.bench.state(&taken.key).await?;
        let header = Header {
            record: Record::State,
            binding: taken.binding.clone(),
            round,
            task: taken.task.clone(),
            metrics: BTreeMap::new(),
            spec_toml: taken.spec_toml.clone(),
        };
        self.save(header, body).await
    }

    pub(super) async fn save(&self, header: Header, body: Vec<u8>) -> Result<(), SessionError> {
        let vault = self.vault.clone();
        blocking(move || vault.save(&header, &body)).await??;
        Ok(())
    }
}
