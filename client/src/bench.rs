//! The workbench: backbones and trainers, all on the one torch thread.
//!
//! Tensors cannot be shared between threads, so everything made of them lives in a store that belongs to the torch thread. What
//! comes and goes are texts, bytes and numbers.

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use concord_common::{Digest, JobId, SiloId, job::TrainingSpec};
use concord_learning::{
    LearningError,
    backbone::BackboneConfig,
    cache::{CacheSettings, CacheStats},
    data::{Row, Split, TaskData},
    metric::Evaluation,
    model::{PersonalModel, Prediction, Predictor},
    pulse::Pulse,
    tokenize::TextTokenizer,
    torch::{TorchSettings, TorchThread},
    trainer::{Continue, LocalTrainer, Progress, RoundResult, SavedState},
};

pub use self::activity::Activity;
use self::store::Store;

mod activity;
mod store;
#[cfg(test)]
mod tests;

/// Which trainer: one for each silo's part in a job.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TrainerKey {
    /// Job.
    pub job: JobId,
    /// Silo.
    pub silo: SiloId,
}

/// A backbone's facts.
#[derive(Clone, PartialEq, Debug)]
pub struct BackboneInfo {
    /// BLAKE3 of the weights.
    pub digest: Digest,
    /// Family and sizes.
    pub config: BackboneConfig,
}

/// What a trainer is made of.
#[derive(Debug)]
pub struct TrainerParts {
    /// The job.
    pub spec: TrainingSpec,
    /// Folder of the backbone.
    pub backbone: PathBuf,
    /// The silo's rows.
    pub data: TaskData,
    /// What the prefix cache may hold.
    pub cache: CacheSettings,
    /// Whether another job of the same silo may share the prepared rows and their cache.
    pub share: bool,
    /// The trainer's state from the vault.
    pub saved: Option<Vec<u8>>,
}

/// A text or a pair of texts to predict for.
pub type Input = (String, Option<String>);

thread_local! {
    /// Filled on the torch thread only.
    static STORE: RefCell<Store> = RefCell::default();
}

/// A handle on the torch thread and what is kept there.
#[derive(Debug, Clone)]
pub struct Workbench {
    torch: Arc<TorchThread>,
    activity: Arc<Activity>,
}

impl Workbench {
    /// Starts the torch thread.
    ///
    /// # Errors
    /// If there are to be no threads, or the system gives none.
    pub fn start(threads: usize) -> Result<Self, LearningError> {
        let settings = TorchSettings {
            intra_op_threads: threads,
        };
        Ok(Self {
            torch: Arc::new(TorchThread::start(settings)?),
            activity: Arc::default(),
        })
    }

    /// What tells whether the torch thread gets on with its work.
    pub fn activity(&self) -> Arc<Activity> {
        Arc::clone(&self.activity)
    }

    /// A sign of life for work that is done in one go.
    fn pulse(&self) -> Pulse {
        let activity = Arc::clone(&self.activity);
        Pulse::new(move || activity.turn())
    }

    async fn run<R: Send + 'static>(
        &self,
        name: &'static str,
        work: impl FnOnce(&mut Store) -> Result<R, LearningError> + Send + 'static,
    ) -> Result<R, LearningError> {
        let activity = Arc::clone(&self.activity);
        self.torch
            .run(name, move || {
                let _running = activity.begin();
                STORE.with_borrow_mut(work)
            })
            .await
    }

    async fn with_trainer<R: Send + 'static>(
        &self,
        name: &'static str,
        key: &TrainerKey,
        work: impl FnOnce(&mut LocalTrainer) -> Result<R, LearningError> + Send + 'static,
    ) -> Result<R, LearningError> {
        let key = key.clone();
        self.run(name, move |store| work(store.trainer(&key)?))
            .await
    }

    /// Loads a backbone, once.
    ///
    /// # Errors
    /// Those of [`concord_learning::backbone::Backbone::load`].
    pub async fn backbone(&self, folder: &Path) -> Result<BackboneInfo, LearningError> {
        let (folder, pulse) = (folder.to_path_buf(), self.pulse());
        self.run("load backbone", move |store| {
            let loaded = store.backbone(&folder, &pulse)?;
            Ok(BackboneInfo {
                digest: *loaded.backbone.digest(),
                config: loaded.backbone.config().clone(),
            })
        })
        .await
    }

    /// The last round of a trainer that is at hand, 0 before the first; `None` without a trainer.
    ///
    /// # Errors
    /// If the torch thread has stopped.
    pub async fn last_round(&self, key: &TrainerKey) -> Result<Option<u32>, LearningError> {
        let key = key.clone();
        self.run("look for a trainer", move |store| {
            Ok(store.trainers.get(&key).map(LocalTrainer::last_round))
        })
        .await
    }

    /// Makes a trainer, in place of an older one of the same key.
    ///
    /// # Errors
    /// Those of [`LocalTrainer::new`], of the tokenizer and of [`SavedState::from_bytes`].
    pub async fn open(&self, key: &TrainerKey, parts: TrainerParts) -> Result<(), LearningError> {
        let (key, pulse) = (key.clone(), self.pulse());
        self.run("open trainer", move |store| {
            let saved = parts
                .saved
                .as_deref()
                .map(SavedState::from_bytes)
                .transpose()?;
            let loaded = store.backbone(&parts.backbone, &pulse)?;
            let rows = store.rows(&key.silo, &loaded, &parts, &pulse)?;
            let mut trainer =
                LocalTrainer::with_task(&parts.spec, &key.silo, loaded.backbone, rows, saved)?;
            trainer.set_pulse(pulse);
            store.trainers.insert(key, trainer);
            Ok(())
        })
        .await
    }

    /// Forgets a trainer.
    ///
    /// # Errors
    /// If the torch thread has stopped.
    pub async fn close(&self, key: &TrainerKey) -> Result<(), LearningError> {
        let key = key.clone();
        self.run("close trainer", move |store| {
            store.trainers.remove(&key);
            Ok(())
        })
        .await
    }

    /// Forgets all trainers of the silo but this one: each may hold a prefix cache of its own, and its state is in the vault.
    ///
    /// # Errors
    /// If the torch thread has stopped.
    pub async fn keep_only(&self, key: &TrainerKey) -> Result<(), LearningError> {
        let key = key.clone();
        self.run("close other trainers", move |store| {
            store
                .trainers
                .retain(|other, _| other.silo != key.silo || *other == key);
            Ok(())
        })
        .await
    }

    /// Trains a round, calling `progress` after every step, and logs where the prefixes of its rows came from.
    ///
    /// # Errors
    /// Those of [`LocalTrainer::train_round`].
    pub async fn train(
        &self,
        key: &TrainerKey,
        round: u32,
        payload: Bytes,
        mut progress: impl FnMut(Progress) -> Continue + Send + 'static,
    ) -> Result<RoundResult, LearningError> {
        let activity = Arc::clone(&self.activity);
        let mut step = move |now| {
            activity.turn();
            progress(now)
        };
        let (job, silo) = (key.job.clone(), key.silo.clone());
        self.with_trainer("train a round", key, move |trainer| {
            let before = trainer.cache_stats();
            let result = trainer.train_round(round, &payload, &mut step)?;
            let cache = trainer.cache_stats().since(&before);
            tracing::info!(
                job.id = %job,
                silo.id = %silo,
                round,
                from_memory = cache.memory_hits(),
                from_disk = cache.disk_hits,
                computed = cache.misses,
                "rows through the prefix cache"
            );
            Ok(result)
        })
        .await
    }

    /// Evaluates with the adapter that a round has published.
    ///
    /// # Errors
    /// Those of [`LocalTrainer::after_aggregation`].
    pub async fn after_aggregation(
        &self,
        key: &TrainerKey,
        round: u32,
        payload: Bytes,
    ) -> Result<Option<Evaluation>, LearningError> {
        self.with_trainer("evaluate after aggregation", key, move |trainer| {
            trainer.after_aggregation(round, &payload)
        })
        .await
    }

    /// Evaluates the personal model with a global adapter on a split.
    ///
    /// # Errors
    /// Those of [`LocalTrainer::evaluate`].
    pub async fn evaluate(
        &self,
        key: &TrainerKey,
        payload: Bytes,
        split: Split,
    ) -> Result<Evaluation, LearningError> {
        self.with_trainer("evaluate", key, move |trainer| {
            trainer.evaluate(&payload, split)
        })
        .await
    }

    /// The best personal model so far, as bytes for the vault, and its evaluations on the validation and the test rows.
    ///
    /// # Errors
    /// Those of [`Predictor::evaluate`].
    pub async fn best(&self, key: &TrainerKey) -> Result<Option<BestModel>, LearningError> {
        let (key, pulse) = (key.clone(), self.pulse());
        self.run("evaluate the best model", move |store| {
            let trainer = store.trainer(&key)?;
            let Some(model) = trainer.best().cloned() else {
                return Ok(None);
            };
            let bytes = model.to_bytes()?;
            let task = Arc::clone(trainer.task());
            let backbone = store.backbone_of(&model)?;
            let mut predictor = Predictor::new(model, backbone)?;
            predictor.set_pulse(pulse);
            Ok(Some(BestModel {
                validation: predictor.evaluate(&task, Split::Validation)?,
                test: predictor.evaluate(&task, Split::Test)?,
                round: predictor.model().facts.round,
                bytes,
            }))
        })
        .await
    }

    /// The trainer's state, as bytes for the vault.
    ///
    /// # Errors
    /// Those of [`LocalTrainer::save_state`].
    pub async fn state(&self, key: &TrainerKey) -> Result<Vec<u8>, LearningError> {
        self.with_trainer("save state", key, |trainer| {
            trainer.save_state()?.to_bytes()
        })
        .await
    }

    /// Majority class accuracy on the test rows and what the prefix cache has done, for reports.
    ///
    /// # Errors
    /// If the test rows have a label that is unseen in training.
    pub async fn facts(&self, key: &TrainerKey) -> Result<TrainerFacts, LearningError> {
        self.with_trainer("trainer facts", key, |trainer| {
            Ok(TrainerFacts {
                examples: trainer.examples(),
                last_round: trainer.last_round(),
                majority: trainer.task().majority_accuracy(Split::Test)?,
                cache: trainer.cache_stats(),
            })
        })
        .await
    }

    /// Takes a personal model up for [`Workbench::predict`].
    ///
    /// # Errors
    /// If the model is not of this backbone, or the tokenizer cannot be loaded.
    pub async fn use_model(
        &self,
        folder: &Path,
        model: PersonalModel,
    ) -> Result<(), LearningError> {
        let (folder, pulse) = (folder.to_path_buf(), self.pulse());
        self.run("load model", move |store| {
            let loaded = store.backbone(&folder, &pulse)?;
            let tokenizer = TextTokenizer::load(
                &loaded.files.tokenizer,
                loaded.backbone.config(),
                model.facts.max_length,
            )?;
            let mut predictor = Predictor::new(model, loaded.backbone)?;
            predictor.set_pulse(pulse);
            store.predictor = Some((predictor, tokenizer));
            Ok(())
        })
        .await
    }

    /// Predictions for some texts, in their order, by the model last taken up.
    ///
    /// # Errors
    /// Those of [`Predictor::predict`].
    pub async fn predict(&self, inputs: Vec<Input>) -> Result<Vec<Prediction>, LearningError> {
        self.run("predict", move |store| {
            let (predictor, tokenizer) = store.model()?;
            let texts: Vec<(&str, Option<&str>)> = inputs
                .iter()
                .map(|(text, second)| (text.as_str(), second.as_deref()))
                .collect();
            predictor.predict(tokenizer, &texts)
        })
        .await
    }

    /// The outputs of the model last taken up before softmax or scaling, row after row.
    ///
    /// # Errors
    /// Those of [`Predictor::outputs`].
    pub async fn outputs(&self, inputs: Vec<Input>) -> Result<Vec<f64>, LearningError> {
        self.run("outputs", move |store| {
            let (predictor, tokenizer) = store.model()?;
            let texts: Vec<(&str, Option<&str>)> = inputs
                .iter()
                .map(|(text, second)| (text.as_str(), second.as_deref()))
                .collect();
            predictor.outputs(tokenizer, &texts)
        })
        .await
    }

    /// Loss and metrics of the model last taken up on labelled rows.
    ///
    /// # Errors
    /// Those of [`Predictor::evaluate_rows`].
    pub async fn evaluate_rows(&self, rows: Vec<Row>) -> Result<Evaluation, LearningError> {
        self.run("evaluate rows", move |store| {
            let (predictor, tokenizer) = store.model()?;
            predictor.evaluate_rows(tokenizer, &rows)
        })
        .await
    }
}

/// A finished personal model.
#[derive(Clone, PartialEq, Debug)]
pub struct BestModel {
    /// [`PersonalModel::to_bytes`].
    pub bytes: Vec<u8>,
    /// Round that it is of.
    pub round: u32,
    /// On the validation rows.
    pub validation: Evaluation,
    /// On the test rows.
    pub test: Evaluation,
}

/// Numbers about a trainer.
#[derive(Clone, PartialEq, Debug)]
pub struct TrainerFacts {
    /// Training rows in use.
    pub examples: u64,
    /// Last round that was trained.
    pub last_round: u32,
    /// Accuracy of the most frequent class on the test rows; `None` for regression.
    pub majority: Option<f64>,
    /// The prefix cache.
    pub cache: CacheStats,
}
