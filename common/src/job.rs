//! A job's specification: declarative TOML, the same type at the operator, the server and the silo.
//!
//! Every field is checked before a job is queued ([`JobSpec::parse`]); unknown keys are errors that name the key. The
//! samples under `deploy/config/` show every setting with a comment.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    SiloId,
    adapter::{AdapterShape, InitialScale},
    code::{ErrorCode, Refusal},
    seed::Seed,
};

mod algorithm;
pub mod artaug;
mod check;
mod model;
mod rounds;
#[cfg(test)]
mod tests;
mod training;

pub use algorithm::{AlgorithmSpec, CkaEstimator, Regulariser};
pub use model::{
    AdapterPosition, AdapterSpec, BackboneSpec, Combine, HeadSharing, HeadSpec, Pool, PrivateStart,
};
pub use rounds::{LimitsSpec, RoundsSpec, Weighting};
pub use training::{LocalTrainingSpec, MetricName};

/// The `kind` of a job that silos run.
pub const FEDERATED: &str = "federated-training";

/// Largest specification in bytes.
pub const MAX_SPEC_BYTES: usize = 64 * 1024;

/// What the server is asked to do.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum JobSpec {
    /// Silos fine-tune adapters together.
    FederatedTraining(Box<TrainingSpec>),
}

/// A `federated-training` job.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingSpec {
    /// Name for people; need not be unique.
    pub name: String,
    /// Name of the task that each silo maps to its own data.
    pub task: String,
    /// Silos to ask; empty means all active ones.
    #[serde(default)]
    pub silos: BTreeSet<SiloId>,
    /// Seed of everything random in the job.
    #[serde(default)]
    pub seed: u64,
    /// The frozen model.
    pub backbone: BackboneSpec,
    /// Shape and place of the adapters.
    pub adapter: AdapterSpec,
    /// The classification or regression head.
    #[serde(default)]
    pub head: HeadSpec,
    /// How a silo trains.
    pub algorithm: AlgorithmSpec,
    /// Local optimisation.
    #[serde(default)]
    pub training: LocalTrainingSpec,
    /// How rounds run.
    pub rounds: RoundsSpec,
    /// Bounds on contributions.
    #[serde(default)]
    pub limits: LimitsSpec,
}

/// What an operator may submit. Silos are only ever given a [`JobSpec`]; an ArtAug job goes to a worker.
#[derive(Clone, PartialEq, Debug)]
pub enum Submission {
    /// Silos fine-tune adapters together.
    Federated(Box<TrainingSpec>),
    /// A text-to-image model improves itself.
    Artaug(Box<artaug::ArtaugSpec>),
}

impl Submission {
    /// Reads and checks a specification of any kind.
    ///
    /// # Errors
    /// `INVALID_JOB_SPEC` with the key, the reason and what to change.
    pub fn parse(toml_text: &str) -> Result<Self, Refusal> {
        let is_artaug = toml_text.len() <= MAX_SPEC_BYTES
            && toml_text.parse::<toml::Table>().is_ok_and(|table| {
                table.get("kind").and_then(toml::Value::as_str) == Some(artaug::KIND)
            });
        if is_artaug {
            return Ok(Self::Artaug(Box::new(artaug::ArtaugSpec::parse(
                toml_text,
            )?)));
        }
        let JobSpec::FederatedTraining(spec) = JobSpec::parse(toml_text)?;
        Ok(Self::Federated(spec))
    }

    /// Its kind, as in the specification.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Federated(_) => FEDERATED,
            Self::Artaug(_) => artaug::KIND,
        }
    }

    /// Its name for people.
    pub fn name(&self) -> &str {
        match self {
            Self::Federated(spec) => &spec.name,
            Self::Artaug(spec) => &spec.name,
        }
    }
}

impl JobSpec {
    /// Reads and checks a specification.
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
        let cannot =
            |error: toml::de::Error| refuse(format!("the specification cannot be read: {error}"));
        let mut table: toml::Table = toml_text.parse().map_err(cannot)?;
        // The kind is taken out first: read together with it, a wrong value could not be named by its key.
        match table.remove("kind") {
            Some(toml::Value::String(kind)) if kind == FEDERATED => {}
            Some(other) => {
                return Err(refuse(format!(
                    "`kind`: is {other}, must be \"{FEDERATED}\""
                )));
            }
            None => {
                return Err(refuse(format!(
                    "`kind`: is missing, must be \"{FEDERATED}\""
                )));
            }
        }
        let training: TrainingSpec = table.try_into().map_err(cannot)?;
        check::check(&training)?;
        Ok(Self::FederatedTraining(Box::new(training)))
    }

    /// The specification as TOML; [`JobSpec::parse`] gives the same specification back.
    ///
    /// # Errors
    /// `INTERNAL` if a value cannot be written as TOML, which a parsed specification cannot contain.
    pub fn to_toml(&self) -> Result<String, Refusal> {
        toml::to_string(self).map_err(|error| Refusal::new(ErrorCode::Internal, error.to_string()))
    }

    /// The part of a `federated-training` job.
    pub fn training(&self) -> &TrainingSpec {
        let Self::FederatedTraining(training) = self;
        training
    }
}

impl TrainingSpec {
    /// Layers that carry adapters, ascending.
    pub fn adapter_layers(&self) -> Vec<u32> {
        if self.adapter.layers.is_empty() {
            (0..self.backbone.layers).collect()
        } else {
            self.adapter.layers.iter().copied().collect()
        }
    }

    /// Sizes of the global adapter.
    pub fn adapter_shape(&self) -> AdapterShape {
        AdapterShape {
            hidden: self.backbone.hidden,
            bottleneck: self.adapter.bottleneck,
            layers: self.adapter_layers(),
            shared_head: match self.head.sharing {
                HeadSharing::Private => None,
                HeadSharing::Shared => self.head.classes,
            },
        }
    }

    /// The payload that round 1 starts from; the same bytes on the server and in a simulation.
    ///
    /// # Errors
    /// As [`AdapterShape::layout`].
    pub fn initial_adapter(&self) -> Result<Vec<u8>, Refusal> {
        self.adapter_shape()
            .initial_payload(self.initial_scale(), self.initial_seed())
    }

    /// The elements of [`Self::initial_adapter`] one tensor after the other, each drawn when it is asked for.
    ///
    /// # Errors
    /// As [`AdapterShape::layout`].
    pub fn initial_tensors(&self) -> Result<impl Iterator<Item = Vec<f32>> + use<>, Refusal> {
        self.adapter_shape()
            .initial_tensors(self.initial_scale(), self.initial_seed())
    }

    fn initial_seed(&self) -> Seed {
        Seed(self.seed).derive("global-adapter")
    }

    /// Scales of the first weights.
    pub fn initial_scale(&self) -> InitialScale {
        InitialScale {
            up: self.adapter.init_up as f32,
            ..InitialScale::default()
        }
    }
}
