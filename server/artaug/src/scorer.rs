//! Scorers: one number for an image under its prompt, higher is better.
//!
//! Those that choose the training pairs and those that judge the result are of different types, so that the filter cannot be
//! given a score that the evaluation uses: it would no longer be a judgement.
//!
//! ```
//! use concord_artaug::scorer::{ForFilter, Scorer};
//! fn filter_with(_: &dyn Scorer<Use = ForFilter>) {}
//! fn right(chooser: &dyn Scorer<Use = ForFilter>) {
//!     filter_with(chooser);
//! }
//! ```
//!
//! ```compile_fail
//! use concord_artaug::scorer::{ForEvaluation, ForFilter, Scorer};
//! fn filter_with(_: &dyn Scorer<Use = ForFilter>) {}
//! fn wrong(judge: &dyn Scorer<Use = ForEvaluation>) {
//!     filter_with(judge);
//! }
//! ```

mod external;
mod faults;
mod statistics;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, marker::PhantomData};

use serde::{Deserialize, Serialize};

pub use self::{
    external::{EXTERNAL_VERSION, ExternalScorer},
    faults::FaultScorer,
    statistics::{Discriminant, InvalidDiscriminant, StatisticsScorer},
};
use crate::{
    advisor::{AdvisorError, Usage},
    image::Image,
};

/// What a scorer may be used for: [`ForFilter`] or [`ForEvaluation`].
pub trait Use: sealed::Sealed + Send + Sync + 'static {
    /// Its name in settings and tables.
    const NAME: &'static str;
}

/// Chooses training pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForFilter {}

/// Judges models; unseen by the filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForEvaluation {}

impl Use for ForFilter {
    const NAME: &'static str = "filter";
}

impl Use for ForEvaluation {
    const NAME: &'static str = "evaluation";
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::ForFilter {}
    impl Sealed for super::ForEvaluation {}
}

/// Gives an image a number. Calls may block; never from an async task.
pub trait Scorer: Send + Sync {
    /// What it may be used for.
    type Use: Use;

    /// Its name in manifests; unique within a job.
    fn name(&self) -> &str;

    /// Version of the words with which it asks a model elsewhere; none if it asks nobody.
    fn version(&self) -> Option<&'static str> {
        None
    }

    /// The score of an image that was made from `prompt`.
    ///
    /// # Errors
    /// If there is no score of this image, or the scorer cannot be asked at all.
    fn score(&self, image: &Image, prompt: &str) -> Result<f64, ScoreError>;

    /// The same with what it cost; scorers that ask a model elsewhere count.
    fn score_counted(&self, image: &Image, prompt: &str) -> (Result<f64, ScoreError>, Usage) {
        (self.score(image, prompt), Usage::default())
    }
}

/// Why there is no score.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    /// This image has none; others may.
    #[error("{scorer} gave no score: {what}")]
    NoScore {
        /// Which scorer.
        scorer: String,
        /// What happened.
        what: String,
    },
    /// The scorer cannot be asked now.
    #[error("{scorer} cannot be asked: {source}")]
    Unavailable {
        /// Which scorer.
        scorer: String,
        /// What happened.
        #[source]
        source: AdvisorError,
    },
}

/// The scores of one image by the scorer's name. Those of the filter and of the evaluation are different types.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Scores<U> {
    values: BTreeMap<String, f64>,
    #[serde(skip)]
    purpose: PhantomData<fn() -> U>,
}

impl<U> Default for Scores<U> {
    fn default() -> Self {
        Self {
            values: BTreeMap::new(),
            purpose: PhantomData,
        }
    }
}

impl<U> Scores<U> {
    /// The score under a name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.values.get(name).copied()
    }

    /// Adds or replaces a score.
    pub fn insert(&mut self, name: impl Into<String>, value: f64) {
        self.values.insert(name.into(), value);
    }

    /// Names and scores in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.values
            .iter()
            .map(|(name, value)| (name.as_str(), *value))
    }
}

impl<U> FromIterator<(String, f64)> for Scores<U> {
    fn from_iter<T: IntoIterator<Item = (String, f64)>>(pairs: T) -> Self {
        Self {
            values: pairs.into_iter().collect(),
            purpose: PhantomData,
        }
    }
}

/// The scorers of one use.
pub type Panel<U> = Vec<Box<dyn Scorer<Use = U>>>;

/// A score that is missing, and why.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// Which scorer.
    pub scorer: String,
    /// What happened.
    pub what: String,
}

/// What scorers say of one image.
#[derive(Clone, PartialEq, Debug)]
pub struct Opinion<U> {
    /// The scores that there are.
    pub scores: Scores<U>,
    /// Those that are missing.
    pub failures: Vec<Failure>,
}

/// Longest reason of a failure that is kept, in bytes.
const MAX_REASON: usize = 300;

impl<U> Default for Opinion<U> {
    fn default() -> Self {
        Self {
            scores: Scores::default(),
            failures: Vec::new(),
        }
    }
}

impl<U: Use> Opinion<U> {
    /// Asks one more scorer. One without a score of this image takes nothing from the others. What it costs is added to `usage`, whatever comes of
    /// it.
    ///
    /// # Errors
    /// [`ScoreError::Unavailable`] if the scorer cannot be asked at all now; what others said stays.
    pub fn ask(
        &mut self,
        scorer: &dyn Scorer<Use = U>,
        image: &Image,
        prompt: &str,
        usage: &mut Usage,
    ) -> Result<(), ScoreError> {
        let (score, cost) = scorer.score_counted(image, prompt);
        *usage += cost;
        let what = match score {
            Ok(value) if value.is_finite() => {
                self.scores.insert(scorer.name(), value);
                return Ok(());
            }
            Ok(value) => format!("{value} is no score"),
            Err(ScoreError::NoScore { what, .. }) => what,
            Err(error @ ScoreError::Unavailable { .. }) => return Err(error),
        };
        self.failures.push(Failure {
            scorer: scorer.name().to_owned(),
            what: what[..what.floor_char_boundary(MAX_REASON)].to_owned(),
        });
        Ok(())
    }
}
