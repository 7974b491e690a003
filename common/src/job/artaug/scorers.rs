//! Who chooses the pairs of a job, and who judges its result.

use serde::{Deserialize, Serialize};

/// Who judges.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScorersSpec {
    /// Choose the training pairs.
    pub filter: Vec<FilterScorer>,
    /// Judge the result; the filter may use none of them.
    pub evaluation: Vec<EvaluationScorer>,
    /// Name of the evaluation scorer that decides; the first if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<String>,
    /// What guards that images still fit their prompts. It can stop the job, never praise a model.
    #[serde(default)]
    pub guard: Guard,
}

/// A scorer of the filter. A pair must gain `least_gain` in it; below 0 allows a loss.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum FilterScorer {
    /// Exposure, contrast, sharpness and placement against clean images.
    Photometry {
        /// Least gain.
        #[serde(default)]
        least_gain: f64,
    },
    /// Colourfulness against clean images.
    Colour {
        /// Least gain.
        #[serde(default)]
        least_gain: f64,
    },
    /// How well image and prompt fit, by the small trained image-text model.
    Alignment {
        /// Least gain.
        #[serde(default = "default_alignment_gain")]
        least_gain: f64,
    },
    /// Distortion of photos; means little on drawings.
    Brisque {
        /// Least gain.
        #[serde(default)]
        least_gain: f64,
    },
    /// A model behind a chat endpoint.
    Chat {
        /// Its name in manifests.
        name: String,
        /// Name of the endpoint in the worker's configuration.
        endpoint: String,
        /// Name of the model there.
        model: String,
        /// What it judges, in words.
        criterion: String,
        /// Tries to get a score of one image. This and the three below are an advisor's defaults if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tries: Option<u32>,
        /// Most tokens of an answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_tokens: Option<u32>,
        /// Whether to send a JSON schema along.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        schema: Option<bool>,
        /// Images are enlarged until their shorter side has this many pixels.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        least_side: Option<u32>,
        /// Least gain, of 1.
        #[serde(default)]
        least_gain: f64,
    },
}

/// A scorer of the evaluation.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum EvaluationScorer {
    /// A linear discriminant of image statistics, trained on good and badly rendered images.
    Statistics {},
    /// Distortion of photos; means little on drawings.
    Brisque {},
    /// A model behind a chat endpoint.
    Chat {
        /// Its name in manifests.
        name: String,
        /// Name of the endpoint in the worker's configuration.
        endpoint: String,
        /// Name of the model there.
        model: String,
        /// What it judges, in words.
        criterion: String,
        /// Tries to get a score of one image. This and the three below are an advisor's defaults if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tries: Option<u32>,
        /// Most tokens of an answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_tokens: Option<u32>,
        /// Whether to send a JSON schema along.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        schema: Option<bool>,
        /// Images are enlarged until their shorter side has this many pixels.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        least_side: Option<u32>,
    },
}

/// What guards that images still fit their prompts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guard {
    /// The small trained image-text model.
    #[default]
    Alignment,
    /// Nothing; the job's report says so.
    None,
}

fn default_alignment_gain() -> f64 {
    -0.02
}

impl FilterScorer {
    /// Its name in manifests.
    pub fn name(&self) -> &str {
        match self {
            Self::Photometry { .. } => "photometry",
            Self::Colour { .. } => "colour",
            Self::Alignment { .. } => "alignment",
            Self::Brisque { .. } => "brisque",
            Self::Chat { name, .. } => name,
        }
    }

    /// What a pair must gain in it.
    pub fn least_gain(&self) -> f64 {
        match self {
            Self::Photometry { least_gain }
            | Self::Colour { least_gain }
            | Self::Alignment { least_gain }
            | Self::Brisque { least_gain }
            | Self::Chat { least_gain, .. } => *least_gain,
        }
    }
}

impl EvaluationScorer {
    /// Its name in manifests.
    pub fn name(&self) -> &str {
        match self {
            Self::Statistics {} => "statistics",
            Self::Brisque {} => "brisque",
            Self::Chat { name, .. } => name,
        }
    }
}

impl ScorersSpec {
    /// Name of the evaluation scorer that decides.
    pub fn judge(&self) -> &str {
        let first = || self.evaluation.first().map_or("", EvaluationScorer::name);
        self.judge.as_deref().unwrap_or_else(first)
    }
}
