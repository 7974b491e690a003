//! What the torch thread keeps: backbones, trainers, the rows and the model in use.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use concord_common::{Digest, SiloId};
use concord_learning::{
    Kind, LearningError,
    backbone::{Backbone, BackboneFiles, Place},
    model::{PersonalModel, Predictor},
    pulse::Pulse,
    task::PreparedTask,
    tokenize::TextTokenizer,
    trainer::LocalTrainer,
};

use super::{TrainerKey, TrainerParts};

#[derive(Default)]
pub(super) struct Store {
    pub(super) backbones: HashMap<PathBuf, Loaded>,
    pub(super) trainers: HashMap<TrainerKey, LocalTrainer>,
    /// The rows last prepared for a silo, and how.
    rows: HashMap<SiloId, (RowsKey, Arc<PreparedTask>)>,
    pub(super) predictor: Option<(Predictor, TextTokenizer)>,
}

/// What prepared rows depend on, besides the silo.
#[derive(Clone, PartialEq)]
struct RowsKey {
    task: String,
    backbone: Digest,
    max_length: u32,
    first: Place,
}

#[derive(Clone)]
pub(super) struct Loaded {
    pub(super) backbone: Arc<Backbone>,
    pub(super) files: BackboneFiles,
}

impl Store {
    /// A backbone; `pulse` beats when its files have been read.
    pub(super) fn backbone(
        &mut self,
        folder: &Path,
        pulse: &Pulse,
    ) -> Result<Loaded, LearningError> {
        if let Some(loaded) = self.backbones.get(folder) {
            return Ok(loaded.clone());
        }
        let loaded = Loaded {
            files: BackboneFiles::find(folder)?,
            backbone: Arc::new(Backbone::load(folder, Kind::Float)?),
        };
        pulse.beat();
        self.backbones.insert(folder.to_path_buf(), loaded.clone());
        Ok(loaded)
    }

    /// The silo's rows, ready for the job's backbone.
    pub(super) fn rows(
        &mut self,
        silo: &SiloId,
        loaded: &Loaded,
        parts: &TrainerParts,
        pulse: &Pulse,
    ) -> Result<Arc<PreparedTask>, LearningError> {
        let key = RowsKey {
            task: parts.spec.task.clone(),
            backbone: *loaded.backbone.digest(),
            max_length: parts.spec.training.max_length,
            first: Place::first(&parts.spec),
        };
        if parts.share
            && let Some((kept, rows)) = self.rows.get(silo)
            && *kept == key
        {
            return Ok(Arc::clone(rows));
        }
        let max_length = key.max_length as usize;
        let tokenizer = TextTokenizer::load(
            &loaded.files.tokenizer,
            loaded.backbone.config(),
            max_length,
        )?;
        pulse.beat();
        let rows = Arc::new(PreparedTask::new(
            &parts.data,
            &loaded.backbone,
            &tokenizer,
            max_length,
            key.first,
            parts.cache.clone(),
            pulse,
        )?);
        if parts.share {
            self.rows.insert(silo.clone(), (key, Arc::clone(&rows)));
        }
        Ok(rows)
    }

    /// The loaded backbone that a model was trained on.
    pub(super) fn backbone_of(
        &self,
        model: &PersonalModel,
    ) -> Result<Arc<Backbone>, LearningError> {
        self.backbones
            .values()
            .find(|loaded| *loaded.backbone.digest() == model.facts.backbone)
            .map(|loaded| Arc::clone(&loaded.backbone))
            .ok_or_else(|| LearningError::State("the model's backbone is not loaded".to_owned()))
    }

    pub(super) fn trainer(&mut self, key: &TrainerKey) -> Result<&mut LocalTrainer, LearningError> {
        self.trainers.get_mut(key).ok_or_else(|| {
            LearningError::State(format!("job {} of silo {} is not open", key.job, key.silo))
        })
    }

    pub(super) fn model(&self) -> Result<&(Predictor, TextTokenizer), LearningError> {
        self.predictor
            .as_ref()
            .ok_or_else(|| LearningError::State("no model is loaded".to_owned()))
    }
}
