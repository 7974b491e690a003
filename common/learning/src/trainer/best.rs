//! The personal model as a thing of its own, and the best of them.

use super::{Averaged, LocalTrainer};
use crate::{
    data::Split,
    error::LearningError,
    metric::{Evaluation, metric_key},
    model::{ModelFacts, PersonalModel},
    named::{HostTensor, NamedTensors},
};

impl LocalTrainer {
    /// Evaluates the personal model with the adapter that `round` has published on the validation rows, and keeps it if it is the best so far.
    /// `None` if there are no validation rows.
    ///
    /// # Errors
    /// As [`LocalTrainer::evaluate`].
    pub fn after_aggregation(
        &mut self,
        round: u32,
        published_payload: &[u8],
    ) -> Result<Option<Evaluation>, LearningError> {
        let averaged = self.receive(published_payload)?.1;
        self.consider(&averaged, round)
    }

    /// The personal model with the given global adapter: what `predict` and `export` use.
    ///
    /// # Errors
    /// [`LearningError::Payload`] if the payload is not of the job's layout.
    pub fn personal_model(
        &mut self,
        global_payload: &[u8],
    ) -> Result<PersonalModel, LearningError> {
        let averaged = self.receive(global_payload)?.1;
        self.snapshot(&averaged, self.last_round, None)
    }

    /// The best personal model so far, among those that [`LocalTrainer::after_aggregation`] has seen, by the job's metric on the validation rows
    /// (the first of several); the newest one if there are no such rows. `None` before the first.
    pub fn best(&self) -> Option<&PersonalModel> {
        self.best.as_ref()
    }

    /// `None` without validation rows.
    pub(super) fn validate(
        &self,
        averaged: &Averaged,
    ) -> Result<Option<Evaluation>, LearningError> {
        let any = self.task.rows(Split::Validation) > 0;
        any.then(|| self.evaluate_with(averaged, Split::Validation))
            .transpose()
    }

    /// Evaluates on the validation rows and keeps the model if it is better than the best so far.
    fn consider(
        &mut self,
        averaged: &Averaged,
        round: u32,
    ) -> Result<Option<Evaluation>, LearningError> {
        let Some(evaluation) = self.validate(averaged)? else {
            self.best = Some(self.snapshot(averaged, round, None)?);
            return Ok(None);
        };
        let (metric, problem) = (self.spec.training.metric, self.task.problem());
        let value = evaluation.chosen(metric, problem)?;
        let best = self
            .best
            .as_ref()
            .and_then(|model| model.facts.validation.as_ref())
            .map_or(f64::NEG_INFINITY, |(_, best)| *best);
        if value > best {
            let name = metric_key(metric, problem)?.to_owned();
            self.best = Some(self.snapshot(averaged, round, Some((name, value)))?);
        }
        Ok(Some(evaluation))
    }

    fn snapshot(
        &self,
        averaged: &Averaged,
        round: u32,
        validation: Option<(String, f64)>,
    ) -> Result<PersonalModel, LearningError> {
        let (adapters, head) = self.plan.personal;
        let outputs = self.task.problem().outputs() as i64;
        let head = self.head(averaged, head)?;
        let mut tensors = NamedTensors::from([
            (
                "head.weight".to_owned(),
                HostTensor::from_tensor(&head.weight.f_narrow(0, 0, outputs)?)?,
            ),
            (
                "head.bias".to_owned(),
                HostTensor::from_tensor(&head.bias.f_narrow(0, 0, outputs)?)?,
            ),
        ]);
        if adapters.global() {
            tensors.extend(averaged.adapter.to_host("global.")?);
        }
        let personal = self.personal();
        if adapters.private()
            && let Some(private) = &personal.private
        {
            tensors.extend(private.to_host("private.")?);
        }
        if let Some(gate) = &personal.gate {
            tensors.insert("gate".to_owned(), HostTensor::from_tensor(gate)?);
        }
        let scale = self.task.scale();
        Ok(PersonalModel {
            facts: ModelFacts {
                format: ModelFacts::FORMAT,
                job: self.spec.name.clone(),
                task: self.spec.task.clone(),
                silo: self.silo.to_string(),
                algorithm: self.spec.algorithm.name().to_owned(),
                round,
                backbone_name: self.spec.backbone.name.clone(),
                backbone: *self.backbone.digest(),
                hidden: self.spec.backbone.hidden,
                adapter_layers: self.spec.adapter_layers(),
                adapter_position: self.spec.adapter.position,
                global_bottleneck: adapters.global().then_some(self.spec.adapter.bottleneck),
                private_bottleneck: self
                    .plan
                    .private
                    .filter(|_| adapters.private())
                    .map(|(bottleneck, _)| bottleneck),
                combine: self.spec.adapter.combine,
                scale_global: self.spec.adapter.scale_global,
                scale_private: self.spec.adapter.scale_private,
                pool: self.spec.head.pool,
                input: self.task.kind(),
                problem: self.task.problem().clone(),
                max_length: self.task.max_length(),
                target_mean: scale.mean,
                target_std: scale.std,
                validation,
            },
            tensors,
        })
    }
}
