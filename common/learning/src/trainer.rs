//! The local trainer: what a silo does with a job between receiving a global adapter and handing back an update.
//!
//! A round is a function of (specification, silo, round, what the silo kept, the received adapter, the rows): two processes with the same of
//! these and the same number of libtorch threads produce the same bytes. Randomness comes from the job's seed, derived per silo and purpose:
//!
//! | draw | purpose |
//! |---|---|
//! | private adapter | `silo/<silo>` then `private-adapter` |
//! | head | `silo/<silo>` then `head` |
//! | which rows, if `max_examples` is set | `silo/<silo>` then `rows` |
//! | batches | `silo/<silo>` then `round/<round>/epoch/<epoch>` |
//!
//! The order within a round: take the received adapter as w and, frozen, as w^t; run the algorithm's phases (see [`crate::loss`]); export w − w^t;
//! evaluate the personal model on the validation rows. After the server has aggregated, the caller hands in the published adapter with
//! [`LocalTrainer::after_aggregation`], which evaluates the personal model with it on the same rows and keeps it if it is the best so far.
//!
//! | algorithm | what is averaged | what stays | personal model |
//! |---|---|---|---|
//! | `local` | nothing: the update is zero | adapter, head | adapter, head |
//! | `fedavg`, `fedprox`, `moon`, `fedrep` | adapter | head | both |
//! | `ditto` | adapter of the global path | personal adapter, two heads | personal adapter and head |
//! | `fedmcp` | global adapter | private adapter, gate, head | all |
//!
//! A shared head is averaged with the adapter. Batches are the same for every algorithm, so that runs can be compared in pairs.
//!
//! AdamW's moments of what is averaged begin anew in each round, because they belong to another point than the one the round starts from;
//! those of what stays go on over the whole job, and so does every parameter's warm-up.

mod best;
mod personal;
mod plan;
mod round;
mod state;
mod step;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use concord_common::{
    Digest, SiloId,
    job::{Combine, JobSpec, TrainingSpec},
    seed::Seed,
};

use self::{
    personal::{Personal, Sizes},
    plan::{Adapters, HeadUse, Plan},
};
pub use self::{
    round::{Continue, Progress, RoundResult},
    state::SavedState,
};
use crate::{
    adapter::{Adapter, Global, GlobalBase},
    backbone::{Backbone, Place},
    batch::Batching,
    cache::{CacheSettings, CacheStats},
    data::{Problem, Split, TaskData},
    error::LearningError,
    fusion::{FusionRule, Parts},
    head::{Head, Linear},
    metric::{Evaluation, metric_key},
    model::PersonalModel,
    network::Network,
    optimiser::{AdamW, AdamWSettings},
    pulse::Pulse,
    task::PreparedTask,
    tokenize::TextTokenizer,
};

/// What a trainer is made of.
#[derive(Debug)]
pub struct TrainerSetup<'a> {
    /// The job.
    pub spec: &'a TrainingSpec,
    /// The silo.
    pub silo: &'a SiloId,
    /// The frozen model.
    pub backbone: Arc<Backbone>,
    /// Its tokeniser, loaded with the job's `training.max_length`.
    pub tokenizer: &'a TextTokenizer,
    /// The silo's rows.
    pub data: &'a TaskData,
    /// What the prefix cache may hold.
    pub cache: CacheSettings,
}

/// Trains one silo's part of one job. Synchronous; all calls belong on one thread, whose libtorch threads it uses.
#[derive(Debug)]
pub struct LocalTrainer {
    spec: TrainingSpec,
    spec_digest: Digest,
    silo: SiloId,
    seed: Seed,
    plan: Plan,
    rule: FusionRule,
    sizes: Sizes,
    backbone: Arc<Backbone>,
    task: Arc<PreparedTask>,
    /// Training rows in use.
    rows: Vec<usize>,
    /// None before the first global adapter has been seen.
    personal: Option<Personal>,
    optimiser: AdamW,
    best: Option<PersonalModel>,
    last_round: u32,
    batching: Batching,
    pulse: Pulse,
}

/// The averaged part of the model as it stands: just received, or in training.
#[derive(Debug)]
struct Averaged {
    adapter: Adapter<Global>,
    head: Option<Head<Global>>,
}

impl Averaged {
    fn of(base: &GlobalBase, kind: tch::Kind) -> Result<Self, LearningError> {
        Ok(Self {
            adapter: base.adapter(kind)?,
            head: base.head(kind)?,
        })
    }
}

impl LocalTrainer {
    /// Prepares the silo's rows and takes up the job, from the beginning or from a saved state.
    ///
    /// # Errors
    /// Those of [`PreparedTask::new`] and [`LocalTrainer::with_task`].
    pub fn new(setup: TrainerSetup<'_>, saved: Option<SavedState>) -> Result<Self, LearningError> {
        let task = PreparedTask::new(
            setup.data,
            &setup.backbone,
            setup.tokenizer,
            setup.spec.training.max_length as usize,
            Place::first(setup.spec),
            setup.cache,
            &Pulse::default(),
        )?;
        Self::with_task(
            setup.spec,
            setup.silo,
            setup.backbone,
            Arc::new(task),
            saved,
        )
    }

    /// Takes up the job on rows that are prepared already: several jobs (an experiment's arms) can share them and their prefix cache.
    ///
    /// # Errors
    /// [`LearningError::Config`] if backbone or task are not what the job asks for or the algorithm cannot work with the settings,
    /// [`LearningError::Data`] if there are fewer training rows than the algorithm needs, [`LearningError::State`] if the saved state is
    /// another job's, silo's or backbone's, or damaged.
    pub fn with_task(
        spec: &TrainingSpec,
        silo: &SiloId,
        backbone: Arc<Backbone>,
        task: Arc<PreparedTask>,
        saved: Option<SavedState>,
    ) -> Result<Self, LearningError> {
        check_backbone(spec, &backbone)?;
        check_task(spec, &backbone, &task)?;
        let plan = Plan::of(spec)?;
        let shape = spec.adapter_shape();
        let outputs = task.problem().outputs();
        if let Some(classes) = shape.shared_head
            && (classes as usize) < outputs
        {
            return Err(LearningError::Config(format!(
                "the shared head has {classes} outputs, this silo's task needs {outputs}; raise `head.classes`"
            )));
        }
        metric_key(spec.training.metric, task.problem())?;
        let seed = Seed(spec.seed).derive(&format!("silo/{silo}"));
        let rows = used_rows(task.rows(Split::Train), spec.training.max_examples, seed);
        if rows.len() < plan.least_rows() {
            return Err(LearningError::Data(format!(
                "{} with mu above 0 compares batches of at least {} rows, but only {} are in use for training",
                spec.algorithm.name(),
                plan.least_rows(),
                rows.len()
            )));
        }
        let mut trainer = Self {
            spec_digest: Digest::of(spec_text(spec)?.as_bytes()),
            spec: spec.clone(),
            silo: silo.clone(),
            seed,
            plan,
            rule: FusionRule::from(&spec.adapter),
            sizes: Sizes {
                outputs: shape
                    .shared_head
                    .map_or(outputs, |classes| classes as usize),
                kind: backbone.kind(),
                gate: spec.adapter.combine == Combine::Gate,
                global: shape,
            },
            backbone,
            task,
            rows,
            personal: None,
            optimiser: AdamW::new(optimiser_settings(spec)),
            best: None,
            last_round: 0,
            batching: Batching::default(),
            pulse: Pulse::default(),
        };
        if let Some(saved) = saved {
            trainer.restore(saved)?;
        }
        Ok(trainer)
    }

    /// The rows as they are used here.
    pub fn task(&self) -> &Arc<PreparedTask> {
        &self.task
    }

    /// Training rows in use: the weight of this silo's contributions.
    pub fn examples(&self) -> u64 {
        self.rows.len() as u64
    }

    /// Last round that has been trained; 0 before the first.
    pub fn last_round(&self) -> u32 {
        self.last_round
    }

    /// What the prefix cache has done so far.
    pub fn cache_stats(&self) -> CacheStats {
        self.task.cache_stats()
    }

    /// Changes how training rows are put into batches. For benchmarks: it is not part of the saved state.
    pub fn set_batching(&mut self, batching: Batching) {
        self.batching = batching;
    }

    /// Beats once for every batch of the evaluations from now on, those at the end of a round included. It is not part of the saved state.
    pub fn set_pulse(&mut self, pulse: Pulse) {
        self.pulse = pulse;
    }

    /// The personal model with the given global adapter on a split, with the fusion that training uses.
    ///
    /// Before the first round the private part is what training would start from.
    ///
    /// # Errors
    /// [`LearningError::Payload`] if the payload is not of the job's layout, [`LearningError::Data`] that names a label unseen in training.
    pub fn evaluate(
        &mut self,
        global_payload: &[u8],
        split: Split,
    ) -> Result<Evaluation, LearningError> {
        let averaged = self.receive(global_payload)?.1;
        self.evaluate_with(&averaged, split)
    }

    /// Reads a payload and makes the silo's own part if there is none yet.
    fn receive(&mut self, payload: &[u8]) -> Result<(GlobalBase, Averaged), LearningError> {
        let base = GlobalBase::receive(&self.sizes.global, payload)?;
        let averaged = Averaged::of(&base, self.sizes.kind)?;
        if self.personal.is_none() {
            self.personal = Some(Personal::begin(
                &self.plan,
                &self.sizes,
                self.spec.initial_scale(),
                self.seed,
                &averaged.adapter,
                averaged.head.as_ref(),
            )?);
        }
        Ok((base, averaged))
    }

    fn personal(&self) -> &Personal {
        self.personal
            .as_ref()
            .expect("`receive` comes first in every public method and makes it")
    }

    /// The adapters of a forward pass.
    fn parts<'a>(&'a self, averaged: &'a Averaged, adapters: Adapters) -> Parts<'a> {
        let personal = self.personal();
        Parts {
            global: adapters.global().then(|| averaged.adapter.layers()),
            private: personal
                .private
                .as_ref()
                .filter(|_| adapters.private())
                .map(Adapter::layers),
            gate: personal.gate.as_ref(),
        }
    }

    fn head<'a>(
        &'a self,
        averaged: &'a Averaged,
        which: HeadUse,
    ) -> Result<&'a Linear, LearningError> {
        let personal = self.personal();
        let (own, path) = (&personal.head, &personal.path_head);
        match which {
            HeadUse::Own => own.as_ref().map(|head| &head.linear),
            HeadUse::Path => path.as_ref().map(|head| &head.linear),
            HeadUse::Shared => averaged.head.as_ref().map(|head| &head.linear),
        }
        .ok_or_else(|| LearningError::Config("this job's layout has no shared head".to_owned()))
    }

    fn evaluate_with(
        &self,
        averaged: &Averaged,
        split: Split,
    ) -> Result<Evaluation, LearningError> {
        let (adapters, head) = self.plan.personal;
        let _frozen = tch::no_grad_guard();
        let stacks = self.parts(averaged, adapters).stack(self.rule)?;
        Network {
            stacks: &stacks,
            head: self.head(averaged, head)?,
            pool: self.spec.head.pool,
            outputs: self.task.problem().outputs(),
            pulse: &self.pulse,
        }
        .evaluate(&self.backbone, &self.task, split)
    }
}

/// The training rows in use, ascending.
fn used_rows(rows: usize, max_examples: Option<u64>, seed: Seed) -> Vec<usize> {
    let mut used: Vec<usize> = (0..rows).collect();
    if let Some(most) = max_examples
        && most < rows as u64
    {
        seed.derive("rows").rng().shuffle(&mut used);
        used.truncate(most as usize);
        used.sort_unstable();
    }
    used
}

fn optimiser_settings(spec: &TrainingSpec) -> AdamWSettings {
    AdamWSettings {
        weight_decay: spec.training.weight_decay,
        warmup_steps: spec.training.warmup_steps,
        clip_norm: spec.training.clip_norm,
    }
}

fn spec_text(spec: &TrainingSpec) -> Result<String, LearningError> {
    Ok(JobSpec::FederatedTraining(Box::new(spec.clone())).to_toml()?)
}

fn check_backbone(spec: &TrainingSpec, backbone: &Backbone) -> Result<(), LearningError> {
    let (want, have) = (&spec.backbone, backbone.config());
    if want.hidden != have.hidden as u64 || want.layers as usize != have.layers {
        return Err(LearningError::Config(format!(
            "the job's backbone `{}` has width {} and {} layers, this silo's has {} and {}",
            want.name, want.hidden, want.layers, have.hidden, have.layers
        )));
    }
    if let Some(digest) = &want.digest
        && digest != backbone.digest()
    {
        return Err(LearningError::Config(format!(
            "the job's backbone `{}` has digest {digest}, this silo's has {}",
            want.name,
            backbone.digest()
        )));
    }
    Ok(())
}

fn check_task(
    spec: &TrainingSpec,
    backbone: &Backbone,
    task: &PreparedTask,
) -> Result<(), LearningError> {
    let fits = task.backbone() == backbone.digest()
        && task.first() == Place::first(spec)
        && task.max_length() == spec.training.max_length as usize;
    if !fits {
        return Err(LearningError::Config(
            "the rows were prepared for another backbone, place of the first adapter or `training.max_length` than the job's".to_owned(),
        ));
    }
    if *task.problem() == Problem::Regression
        && spec.head.classes.is_some_and(|classes| classes < 1)
    {
        return Err(LearningError::Config(
            "a shared head needs an output".to_owned(),
        ));
    }
    Ok(())
}
