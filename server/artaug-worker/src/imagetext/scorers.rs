//! The scorers that need a trained model, as a job asks for them.

use std::{
    marker::PhantomData,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use concord_artaug::{
    image::Image,
    scorer::{ForEvaluation, ForFilter, ScoreError, Scorer, Use},
    setup::{GUARD, SetupError, TrainedScorers},
};
use concord_learning::brisque::Brisque;

use super::{ImageText, ImageTextFiles, features::picture};

/// Loads models when a job first asks for them and keeps them.
#[derive(Debug)]
pub struct ImageTextScorers {
    files: ImageTextFiles,
    brisque: PathBuf,
    threads: usize,
    loaded: Mutex<Option<Arc<ImageText>>>,
}

impl ImageTextScorers {
    /// Scorers from files; `brisque` is the table that `deploy/artaug/fetch.py` makes. Nothing is read yet.
    pub fn new(files: ImageTextFiles, brisque: PathBuf, threads: usize) -> Self {
        Self {
            files,
            brisque,
            threads,
            loaded: Mutex::default(),
        }
    }

    /// The image-text model, loaded at the first call.
    ///
    /// # Errors
    /// If it cannot be loaded.
    pub fn model(&self) -> Result<Arc<ImageText>, SetupError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = &*loaded {
            return Ok(Arc::clone(model));
        }
        let model =
            ImageText::load(&self.files, self.threads).map_err(|error| SetupError::Scorer {
                scorer: "alignment",
                what: error.to_string(),
            })?;
        Ok(Arc::clone(loaded.insert(Arc::new(model))))
    }

    fn aligned<U: Use>(&self) -> Result<Box<dyn Scorer<Use = U>>, SetupError> {
        Ok(Box::new(AlignmentScorer {
            model: self.model()?,
            purpose: PhantomData,
        }))
    }

    fn distorted<U: Use>(&self) -> Result<Box<dyn Scorer<Use = U>>, SetupError> {
        let table = Brisque::load(&self.brisque).map_err(|error| SetupError::Scorer {
            scorer: "brisque",
            what: error.to_string(),
        })?;
        Ok(Box::new(BrisqueScorer {
            table,
            purpose: PhantomData,
        }))
    }
}

impl TrainedScorers for ImageTextScorers {
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
