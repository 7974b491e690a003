//! The end of a job in a silo: the last evaluation, the test rows, and the model that is kept.

use std::collections::BTreeMap;

use concord_common::{
    JobId, RoundNumber,
    adapter::AdapterVersion,
    job::{JobSpec, TrainingSpec},
    round::job::JobState,
    wire::MetricPoint,
};
use concord_learning::{data::Split, metric::Evaluation};

use super::{Session, SessionError, Taken, blocking, report::numbers};
use crate::{
    bench::BestModel,
    coordinator::{CallError, Coordinator, Notice},
    transfer::fetch,
    vault::{Header, Record},
};

/// What a silo has at the end of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// The best personal model.
    pub best: BestModel,
    /// The model of the last round on the test rows; `None` if the job did not succeed.
    pub last_test: Option<Evaluation>,
    /// Training rows in use.
    pub examples: u64,
    /// Accuracy of the most frequent class on the test rows; `None` for regression.
    pub majority: Option<f64>,
}

impl<C: Coordinator> Session<C> {
    /// Whether the end of this job is still to be worked on here.
    pub fn wants_finish(&self, notice: &Notice) -> bool {
        notice.state.is_over() && self.has_state(&notice.job)
    }

    /// Whether the vault has a state of this job.
    pub(crate) fn has_state(&self, job: &JobId) -> bool {
        self.vault.file(job, Record::State).exists()
    }

    /// Ends an ended job: evaluates with the final adapter, tests the best and the last model, reports, saves the best one for use,
    /// and lets go of the rest. `None` if there is nothing to save: this silo has trained nothing in it, the job ended before a
    /// first model could be evaluated, or an earlier life of the daemon has saved the model.
    ///
    /// # Errors
    /// [`SessionError`]; the end can be worked on again. Nothing of the job stays in memory.
    pub async fn finish(&self, notice: &Notice) -> Result<Option<Finished>, SessionError> {
        let outcome = self.end(notice).await;
        self.board.work(None);
        match outcome {
            Ok(finished) => {
                self.clear(&notice.job).await?;
                Ok(finished)
            }
            Err(error) => {
                self.bench.close(&self.key(&notice.job)).await?;
                Err(error)
            }
        }
    }

    /// Lets go of all of an ended job but its model.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn clear(&self, job: &JobId) -> Result<(), SessionError> {
        self.forget(job).await?;
        let (vault, ended) = (self.vault.clone(), job.clone());
        Ok(blocking(move || vault.remove(&ended, Record::State)).await??)
    }

    async fn end(&self, notice: &Notice) -> Result<Option<Finished>, SessionError> {
        let (vault, job) = (self.vault.clone(), notice.job.clone());
        let saved = blocking(move || vault.read(&job, Record::Model)).await??;
        if saved.is_some() {
            return Ok(None);
        }
        let (vault, job) = (self.vault.clone(), notice.job.clone());
        let Some((header, _)) = blocking(move || vault.read(&job, Record::State)).await?? else {
            return Ok(None);
        };
        let JobSpec::FederatedTraining(spec) = JobSpec::parse(&header.spec_toml)
            .map_err(|refusal| SessionError::Call(CallError::protocol(&refusal)))?;
        let last = RoundNumber(header.round.0.max(1));
        self.doing(&notice.job, last, &spec, "testing");
        self.test(notice, &header, &spec).await
    }

    async fn test(
        &self,
        notice: &Notice,
        header: &Header,
        spec: &TrainingSpec,
    ) -> Result<Option<Finished>, SessionError> {
        let job = &notice.job;
        let taken = self.take_up(job, spec, &header.spec_toml).await?;
        let last_test = match notice.base {
            Some(version) if notice.state == JobState::Succeeded => {
                self.test_last(notice, version, &taken, spec).await?
            }
            _ => None,
        };
        let Some(best) = self.bench.best(&taken.key).await? else {
            tracing::info!(job.id = %job, "the job ended before there was a model to keep");
            return Ok(None);
        };
        let mut tested = numbers(&best.test);
        tested.insert("best_round".to_owned(), f64::from(best.round));
        let facts = self.bench.facts(&taken.key).await?;
        if let Some(majority) = facts.majority {
            tested.insert("majority".to_owned(), majority);
        }
        let round = notice.round.unwrap_or(header.round);
        self.report(job, round, MetricPoint::FinalTest, tested, &self.stop)
            .await?;
        let header = Header {
            record: Record::Model,
            binding: taken.binding.clone(),
            round: RoundNumber(best.round),
            task: taken.task.clone(),
            metrics: BTreeMap::from([
                ("validation".to_owned(), best.validation.metrics.clone()),
                ("test".to_owned(), best.test.metrics.clone()),
            ]),
            spec_toml: taken.spec_toml.clone(),
        };
        self.save(header, best.bytes.clone()).await?;
        tracing::info!(job.id = %job, best_round = best.round, "the job's model is in the vault");
        Ok(Some(Finished {
            best,
            last_test,
            examples: facts.examples,
            majority: facts.majority,
        }))
    }

    /// Evaluates with what the last round has published. `None` if the server does not have it any more.
    async fn test_last(
        &self,
        notice: &Notice,
        version: AdapterVersion,
        taken: &Taken,
        spec: &TrainingSpec,
    ) -> Result<Option<Evaluation>, SessionError> {
        let (job, round) = (
            &notice.job,
            notice.round.unwrap_or(RoundNumber(taken.trained)),
        );
        let layout = spec
            .adapter_shape()
            .layout()
            .map_err(|refusal| SessionError::Call(CallError::protocol(&refusal)))?;
        let fetched = fetch(
            self.coordinator.as_ref(),
            &self.downloads,
            job,
            version,
            &layout,
            self.pace,
            &self.stop,
        )
        .await
        .map_err(SessionError::from);
        let published = match fetched {
            Ok(published) => published,
            Err(SessionError::Call(CallError::Refused(refusal))) => {
                tracing::warn!(%refusal, job.id = %job, "the job's last adapter is not to be had; the model is chosen without it");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        self.after_aggregation(taken, round, published.clone(), &self.stop)
            .await?;
        let evaluation = self
            .bench
            .evaluate(&taken.key, published, Split::Test)
            .await?;
        self.report_evaluation(job, round, MetricPoint::LastTest, &evaluation, &self.stop)
            .await?;
        Ok(Some(evaluation))
    }
}
