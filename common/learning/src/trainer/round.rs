//! One round.

use std::collections::BTreeMap;

use super::{Averaged, LocalTrainer, plan::Phase, step::StepReport};
use crate::{
    adapter::{Adapter, GlobalBase, GlobalUpdate},
    batch::{Batching, training_batches},
    data::Split,
    error::LearningError,
    loss::MIN_ROWS,
    metric::Evaluation,
};

/// Where a round is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Progress {
    /// The round.
    pub round: u32,
    /// What is being trained: `train`, `head`, `representation`, `global` or `personal`.
    pub phase: &'static str,
    /// Steps done in this round.
    pub step: u64,
    /// Steps of the whole round.
    pub steps: u64,
    /// Loss of the last step, all terms together.
    pub loss: f64,
}

/// What the caller wants after a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Continue {
    /// The next step.
    Yes,
    /// An end: the round fails with [`LearningError::Cancelled`].
    Stop,
}

/// What a round has given.
#[derive(Clone, PartialEq, Debug)]
pub struct RoundResult {
    /// What may leave the silo.
    pub update: GlobalUpdate,
    /// Training rows in use.
    pub examples: u64,
    /// Means over the steps of the last phase: `loss` (all terms), `task_loss`, and where there are such terms `contrastive`, `cka_pull` (s+),
    /// `cka_push` (s−), `regulariser`, `global_loss`; and `gradient_norm`, `steps`, `update_norm`.
    pub training: Vec<(String, f64)>,
    /// The personal model on the validation rows after training and before aggregation; `None` without validation rows.
    pub validation: Option<Evaluation>,
}

impl LocalTrainer {
    /// Trains one round from a global adapter. `progress` is called after every step and can end the round.
    ///
    /// # Errors
    /// [`LearningError::Cancelled`] if `progress` says so, [`LearningError::Payload`] if the payload is not of the job's layout,
    /// [`LearningError::Training`] if the numbers stop being finite. After any error the trainer is as it was before the call, and the round can
    /// be trained again with the same result.
    pub fn train_round(
        &mut self,
        round: u32,
        global_payload: &[u8],
        progress: &mut dyn FnMut(Progress) -> Continue,
    ) -> Result<RoundResult, LearningError> {
        let before = self.save_state()?;
        let outcome = self.run_round(round, global_payload, progress);
        if outcome.is_err() {
            self.restore(before)?;
        }
        outcome
    }

    fn run_round(
        &mut self,
        round: u32,
        global_payload: &[u8],
        progress: &mut dyn FnMut(Progress) -> Continue,
    ) -> Result<RoundResult, LearningError> {
        let (base, averaged) = self.receive(global_payload)?;
        let received = Averaged::of(&base, self.sizes.kind)?;
        let phases = self.plan.phases.clone();
        let batch_size = self.spec.training.batch_size as usize;
        let per_epoch = self.batches(round, 0, batch_size).len() as u64;
        let steps = per_epoch
            * phases
                .iter()
                .map(|phase| u64::from(phase.epochs))
                .sum::<u64>();
        let mut done = 0;
        let mut means = Means::default();
        for phase in &phases {
            means = Means::default();
            self.set_trained(phase, &averaged)?;
            for epoch in 0..phase.epochs {
                for rows in self.batches(round, epoch, batch_size) {
                    let report = self
                        .step(phase, &averaged, &received, &rows)
                        .map_err(|error| located(error, round, phase, done))?;
                    done += 1;
                    let now = Progress {
                        round,
                        phase: phase.name,
                        step: done,
                        steps,
                        loss: report.loss,
                    };
                    means.add(&report);
                    if progress(now) == Continue::Stop {
                        return Err(LearningError::Cancelled);
                    }
                }
            }
        }
        self.finish_round(round, &base, &averaged, means)
    }

    fn finish_round(
        &mut self,
        round: u32,
        base: &GlobalBase,
        averaged: &Averaged,
        means: Means,
    ) -> Result<RoundResult, LearningError> {
        if self.plan.keeps_previous
            && let Some(personal) = &mut self.personal
        {
            personal.previous = Some(Adapter::copy_of(&averaged.adapter)?);
        }
        self.optimiser.forget_moments("global.");
        let update = averaged.adapter.export(averaged.head.as_ref(), base)?;
        let mut training = means.finish();
        training.push(("update_norm".to_owned(), norm(update.payload())));
        self.last_round = round;
        let validation = self.validate(averaged)?;
        Ok(RoundResult {
            update,
            examples: self.examples(),
            training,
            validation,
        })
    }

    fn batches(&self, round: u32, epoch: u32, batch_size: usize) -> Vec<Vec<usize>> {
        if self.batching == Batching::InOrder {
            return self
                .rows
                .chunks(batch_size)
                .map(<[usize]>::to_vec)
                .collect();
        }
        training_batches(
            &self.rows,
            self.task.lengths(Split::Train),
            batch_size,
            MIN_ROWS,
            self.seed.derive(&format!("round/{round}/epoch/{epoch}")),
        )
    }
}

fn located(error: LearningError, round: u32, phase: &Phase, step: u64) -> LearningError {
    match error {
        LearningError::Training(reason) => LearningError::Training(format!(
            "round {round}, phase {}, step {}: {reason}",
            phase.name,
            step + 1
        )),
        other => other,
    }
}

/// Euclidean norm of a payload.
fn norm(payload: &[u8]) -> f64 {
    let (elements, _) = payload.as_chunks::<4>();
    elements
        .iter()
        .map(|bytes| f64::from(f32::from_le_bytes(*bytes)).powi(2))
        .sum::<f64>()
        .sqrt()
}

/// Sums over steps, by name.
#[derive(Default)]
struct Means {
    steps: u64,
    /// Sum, and steps that had such a number: a term may be left out of a step.
    sums: BTreeMap<&'static str, (f64, u64)>,
}

impl Means {
    fn add(&mut self, report: &StepReport) {
        self.steps += 1;
        for (name, value) in report.numbers() {
            let (sum, steps) = self.sums.entry(name).or_default();
            *sum += value;
            *steps += 1;
        }
    }

    fn finish(self) -> Vec<(String, f64)> {
        let mut means: Vec<(String, f64)> = self
            .sums
            .into_iter()
            .map(|(name, (sum, steps))| (name.to_owned(), sum / steps as f64))
            .collect();
        means.push(("steps".to_owned(), self.steps as f64));
        means
    }
}
