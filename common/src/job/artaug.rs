//! The specification of an `artaug` job: a text-to-image model improves itself with an understanding model's advice
//! (arXiv 2412.12888). Declarative like that of a `federated-training` job; it carries no code, no address and no key, and
//! names files only below folders that the worker's own configuration allows.

mod advice;
mod bounds;
mod check;
mod drawing;
mod learning;
mod scorers;
#[cfg(test)]
mod tests;

use std::path::Path;

use serde::{Deserialize, Serialize};

pub use self::{
    advice::{AdvisorSpec, Boxes},
    bounds::{ArtaugLimits, CountsSpec, EvaluationSpec, OutputSpec},
    check::batch_fits,
    drawing::{ModelSpec, Precision, PromptsSpec, SamplerSpec, Solver},
    learning::{LoraMode, LoraSpec, LoraTargets},
    scorers::{EvaluationScorer, FilterScorer, Guard, ScorersSpec},
};
use super::MAX_SPEC_BYTES;
use crate::code::{ErrorCode, Refusal};

/// An `artaug` job.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArtaugSpec {
    /// Name for people; need not be unique.
    pub name: String,
    /// Seed of everything random in the job.
    #[serde(default)]
    pub seed: u64,
    /// Whether the job waits after the filter until an operator has accepted or rejected the kept pairs.
    #[serde(default)]
    pub review: bool,
    /// The text-to-image model.
    pub model: ModelSpec,
    /// What it draws in each iteration.
    pub prompts: PromptsSpec,
    /// What it draws to be judged; none of it may be in `prompts`.
    pub held_out: PromptsSpec,
    /// The understanding model.
    pub advisor: AdvisorSpec,
    /// Who judges.
    pub scorers: ScorersSpec,
    /// How much is made.
    pub counts: CountsSpec,
    /// How images are made.
    #[serde(default)]
    pub sampler: SamplerSpec,
    /// How the differential LoRA is trained.
    #[serde(default)]
    pub lora: LoraSpec,
    /// How an iteration is judged.
    #[serde(default)]
    pub evaluation: EvaluationSpec,
    /// Bounds on the job.
    #[serde(default)]
    pub limits: ArtaugLimits,
    /// What is written at the end.
    #[serde(default)]
    pub output: OutputSpec,
}

/// The `kind` of this job.
pub const KIND: &str = "artaug";

/// The specification with its kind, for writing.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum WithKind<'a> {
    Artaug(&'a ArtaugSpec),
}

impl ArtaugSpec {
    /// Reads and checks a specification with `kind = "artaug"`.
    ///
    /// # Errors
    /// `INVALID_JOB_SPEC` with the key, the reason and what to change.
    pub fn parse(toml_text: &str) -> Result<Self, Refusal> {
        let refuse = |message: String| Refusal::new(ErrorCode::InvalidJobSpec, message);
        if toml_text.len() > MAX_SPEC_BYTES {
            return Err(refuse(format!(
                "a specification has at most {MAX_SPEC_BYTES} bytes, this one {}",
                toml_text.len()
            )));
        }
        // The kind is taken out first: read together with it, a wrong value could not be named by its key.
        let cannot =
            |error: toml::de::Error| refuse(format!("the specification cannot be read: {error}"));
        let mut table: toml::Table = toml_text.parse().map_err(cannot)?;
        match table.remove("kind") {
            Some(toml::Value::String(kind)) if kind == KIND => {}
            Some(other) => return Err(refuse(format!("`kind`: is {other}, must be \"{KIND}\""))),
            None => return Err(refuse(format!("`kind`: is missing, must be \"{KIND}\""))),
        }
        let spec: Self = table.try_into().map_err(cannot)?;
        spec.check()?;
        Ok(spec)
    }

    /// Checks every field; part of [`ArtaugSpec::parse`].
    ///
    /// # Errors
    /// As [`ArtaugSpec::parse`].
    pub fn check(&self) -> Result<(), Refusal> {
        check::check(self)
    }

    /// The specification as TOML with its kind; [`ArtaugSpec::parse`] gives the same specification back.
    ///
    /// # Errors
    /// `INTERNAL` if a value cannot be written as TOML, which a parsed specification cannot contain.
    pub fn to_toml(&self) -> Result<String, Refusal> {
        toml::to_string(&WithKind::Artaug(self))
            .map_err(|error| Refusal::new(ErrorCode::Internal, error.to_string()))
    }
}

/// Whether a path stays below the folder it is joined to: relative, plain names only. The worker checks links on its disk besides.
pub fn stays_below(path: &str) -> bool {
    let plain = |part: &std::path::Component<'_>| matches!(part, std::path::Component::Normal(_));
    let path_has_names =
        !path.is_empty() && !path.contains('\\') && !path.chars().any(char::is_control);
    path_has_names && Path::new(path).components().all(|part| plain(&part))
}
