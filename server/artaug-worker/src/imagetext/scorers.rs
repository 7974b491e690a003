//! The scorers that need a trained model, as a job asks for them.

use std::{
    marker::PhantomData,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use concord_artaug::{
    image::Image,
    scorer::{ForEvaluation, ForFilter, ScoreError, Scorer, Use},
    setup::{GUARD, SetupError, TrainedScorers},
};
use concord_learning::brisque::Brisque;

use super::{ImageText, ImageTextFiles, features::picture};

/// The trained models that a worker has, loaded when a job first asks for them and kept.
#[derive(Debug)]
pub struct TrainedModels {
    image_text: Option<ImageTextFiles>,
    brisque: Option<PathBuf>,
    threads: usize,
    loaded: Mutex<Option<Arc<ImageText>>>,
}

impl TrainedModels {
    /// Models from files; `brisque` is the table that `deploy/artaug/fetch.py` makes. Nothing is read yet.
    pub fn new(
        image_text: Option<ImageTextFiles>,
        brisque: Option<PathBuf>,
        threads: usize,
    ) -> Self {
        Self {
            image_text,
            brisque,
            threads,
            loaded: Mutex::default(),
        }
    }

    /// The image-text model, if the worker has it; loaded at the first call.
    ///
    /// # Errors
    /// If it cannot be loaded.
    pub fn image_text(&self) -> Result<Option<Arc<ImageText>>, SetupError> {
        let Some(files) = &self.image_text else {
            return Ok(None);
        };
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = &*loaded {
            return Ok(Some(Arc::clone(model)));
        }
        let model = ImageText::load(files, self.threads).map_err(|error| SetupError::Scorer {
            scorer: "alignment",
            what: error.to_string(),
        })?;
        Ok(Some(Arc::clone(loaded.insert(Arc::new(model)))))
    }

    /// The table of `brisque`, if the worker has it.
    pub fn brisque(&self) -> Option<&Path> {
        self.brisque.as_deref()
    }

    fn aligned<U: Use>(&self) -> Result<Box<dyn Scorer<Use = U>>, SetupError> {
        let model = self.image_text()?.ok_or_else(|| SetupError::Scorer {
            scorer: "alignment",
            what: "this worker has no image-text model; set `data.image_text` in its settings, or say `guard = \"none\"` and take `alignment` out of \
                   the filter"
                .to_owned(),
        })?;
        Ok(Box::new(AlignmentScorer {
            model,
            purpose: PhantomData,
        }))
    }

    fn distorted<U: Use>(&self) -> Result<Box<dyn Scorer<Use = U>>, SetupError> {
        let refuse = |what: String| SetupError::Scorer {
            scorer: "brisque",
            what,
        };
        let table = self.brisque.as_ref().ok_or_else(|| {
            refuse("this worker has no table for it; set `data.brisque` in its settings".to_owned())
        })?;
        let table = Brisque::load(table).map_err(|error| refuse(error.to_string()))?;
        Ok(Box::new(BrisqueScorer {
            table,
            purpose: PhantomData,
        }))
    }
}

impl TrainedScorers for TrainedModels {
    fn alignment_filter(&self) -> Result<Box<dyn Scorer<Use = ForFilter>>, SetupError> {
        self.aligned()
    }

    fn alignment_guard(&self) -> Result<Box<dyn Scorer<Use = ForEvaluation>>, SetupError> {
        self.aligned()
    }

    fn brisque_filter(&self) -> Result<Box<dyn Scorer<Use = ForFilter>>, SetupError> {
        self.distorted()
    }

    fn brisque_evaluation(&self) -> Result<Box<dyn Scorer<Use = ForEvaluation>>, SetupError> {
        self.distorted()
    }
}

/// The cosine of image and prompt.
struct AlignmentScorer<U> {
    model: Arc<ImageText>,
    purpose: PhantomData<fn() -> U>,
}

impl<U: Use> Scorer for AlignmentScorer<U> {
    type Use = U;

    fn name(&self) -> &str {
        GUARD
    }

    fn score(&self, image: &Image, prompt: &str) -> Result<f64, ScoreError> {
        self.model
            .alignment(image, prompt)
            .map_err(|error| ScoreError::NoScore {
                scorer: GUARD.to_owned(),
                what: error.to_string(),
            })
    }
}

/// BRISQUE with its sign turned, because a higher score is better here.
struct BrisqueScorer<U> {
    table: Brisque,
    purpose: PhantomData<fn() -> U>,
}

impl<U: Use> Scorer for BrisqueScorer<U> {
    type Use = U;

    fn name(&self) -> &'static str {
        "brisque"
    }

    fn score(&self, image: &Image, _prompt: &str) -> Result<f64, ScoreError> {
        let refuse = |what: String| ScoreError::NoScore {
            scorer: "brisque".to_owned(),
            what,
        };
        let score = self
            .table
            .score(picture(image))
            .map_err(|error| refuse(error.to_string()))?;
        Ok(-score)
    }
}
