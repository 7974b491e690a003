//! The understanding model of a job.

use serde::{Deserialize, Serialize};

/// The understanding model.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum AdvisorSpec {
    /// Measured photometry and composition against clean images; needs nothing.
    Rules {
        /// Most regions of an image.
        #[serde(default = "four_regions")]
        max_regions: u32,
        /// Quantile of the clean images beyond which a measure is a fault.
        #[serde(default = "default_tail")]
        tail: f64,
        /// A fault counts from this excess on, in visible steps.
        #[serde(default = "default_excess")]
        least_excess: f64,
        /// Alignment with its prompt, -1 to 1, below which an image's middle is asked for the subject; at -1 never. Without it, and
        /// where the worker has an image-text model, what 19 in 20 clean drawings reach.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        subject_below: Option<f64>,
    },
    /// A model with image input behind an OpenAI-compatible chat endpoint.
    Chat {
        /// Name of the endpoint in the worker's configuration.
        endpoint: String,
        /// Name of the model there.
        model: String,
        /// How the model writes boxes.
        boxes: Boxes,
        /// Most regions of an image.
        #[serde(default = "four_regions")]
        max_regions: u32,
        /// Tries to get a usable answer on one image.
        #[serde(default = "three_tries")]
        tries: u32,
        /// Sampling temperature of the answers.
        #[serde(default = "default_temperature")]
        temperature: f64,
        /// Most tokens of an answer.
        #[serde(default = "default_max_tokens")]
        max_tokens: u32,
        /// Whether to send a JSON schema along.
        #[serde(default = "yes")]
        schema: bool,
        /// Images are enlarged until their shorter side has this many pixels.
        #[serde(default = "default_least_side")]
        least_side: u32,
    },
}

/// How an understanding model writes boxes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Boxes {
    /// Fractions of the sides, 0 to 1.
    Fraction,
    /// Pixels of the image as sent.
    Pixel,
    /// Thousandths of the sides, 0 to 1000.
    Thousand,
}

fn four_regions() -> u32 {
    4
}

fn default_tail() -> f64 {
    0.02
}

fn default_excess() -> f64 {
    0.5
}

fn three_tries() -> u32 {
    3
}

fn default_temperature() -> f64 {
    0.2
}

fn default_max_tokens() -> u32 {
    800
}

fn yes() -> bool {
    true
}

fn default_least_side() -> u32 {
    448
}
