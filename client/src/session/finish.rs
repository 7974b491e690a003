//! The end of a job in a silo: the last evaluation, the test rows, and the model that is kept.

use super::{
    Arc, BTreeMap, BestModel, CallError, Coordinator, Evaluation, Header, JobSpec, JobState,
    MetricPoint, Notice, Record, RoundNumber, Session, SessionError, Split, TrainingSpec, blocking,
    fetch, numbers,
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
    ///
    /// # Errors
    /// If the vault cannot be read.
    pub fn wants_finish(&self, notice: &Notice) -> Result<bool, SessionError> {
        Ok(notice.state.is_over()
            && self.vault.file(&notice.job, Record::State).exists()
            && self.vault.read(&notice.job, Record::Model)?.is_none())
    }

    /// Ends an ended job: evaluates with the final adapter, tests the best and the last model, reports, and saves the best one
    /// for use. `None` if this silo has trained nothing in it.
    ///
    /// # Errors
    /// [`SessionError`]; the end can be worked on again.
    pub async fn finish(&self, notice: &Notice) -> Result<Option<Finished>, SessionError> {
        let (vault, job) = (self.vault.clone(), notice.job.clone());
        let Some((header, _)) = blocking(move || vault.read(&job, Record::State)).await?? else {
            return Ok(None);
        };
        let JobSpec::FederatedTraining(spec) = JobSpec::parse(&header.spec_toml)
            .map_err(|refusal| SessionError::Call(CallError::protocol(&refusal)))?;
        let last = RoundNumber(header.round.0.max(1));
        self.doing(&notice.job, last, &spec, "testing");
        let outcome = self.test(notice, &header, &spec).await;
        self.board.work(None);
        outcome
    }

    async fn test(
        &self,
        notice: &Notice,
        header: &Header,
        spec: &TrainingSpec,
    ) -> Result<Option<Finished>, SessionError> {
        let job = &notice.job;
        let taken = self.take_up(job, spec, &header.spec_toml).await?;
        let round = notice.round.unwrap_or(header.round);
        let mut last_test = None;
        if notice.state == JobState::Succeeded
            && let Some(version) = notice.base
        {
            let layout = spec
                .adapter_shape()
                .layout()
                .map_err(|refusal| SessionError::Call(CallError::protocol(&refusal)))?;
            let published = fetch(
                self.coordinator.as_ref(),
                &self.downloads,
                job,
                version,
                &layout,
                self.pace,
                &self.stop,
            )
            .await?;
            self.after_aggregation(&taken, round, published.clone(), &self.stop)
                .await?;
            let evaluation = self
                .bench
                .evaluate(&taken.key, published, Split::Test)
                .await?;
            self.report_evaluation(job, round, MetricPoint::LastTest, &evaluation, &self.stop)
                .await?;
            last_test = Some(evaluation);
        }
        let Some(best) = self.bench.best(&taken.key).await? else {
            return Ok(None);
        };
        let mut tested = numbers(&best.test);
        tested.insert("best_round".to_owned(), f64::from(best.round));
        let facts = self.bench.facts(&taken.key).await?;
        if let Some(majority) = facts.majority {
            tested.insert("majority".to_owned(), majority);
        }
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
        let (vault, gate, ended) = (self.vault.clone(), Arc::clone(&self.gate), job.clone());
        blocking(move || -> Result<(), SessionError> {
            gate.done(&ended).map_err(SessionError::Egress)?;
            Ok(vault.remove(&ended, Record::State)?)
        })
        .await??;
        self.bench.close(&taken.key).await?;
        tracing::info!(job.id = %job, best_round = best.round, "the job's model is in the vault");
        Ok(Some(Finished {
            best,
            last_test,
            examples: facts.examples,
            majority: facts.majority,
        }))
    }
}
