//! A job's specification: declarative TOML, the same type at the operator, the server and the silo.
//!
//! Every field is checked before a job is queued ([`JobSpec::parse`]); unknown keys are errors that name the key. The
//! samples under `deploy/config/` show every setting with a comment.

use std::{collections::BTreeSet, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    Digest, SiloId,
    adapter::{AdapterShape, InitialScale},
    code::{ErrorCode, Refusal},
    seed::Seed,
};

pub mod artaug;
mod check;
#[cfg(test)]
mod tests;

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

/// Which frozen model a job uses. Each silo maps the name to a folder of its own.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneSpec {
    /// Name in the silos' configuration.
    pub name: String,
    /// Width d.
    pub hidden: u64,
    /// Number of transformer layers.
    pub layers: u32,
    /// BLAKE3 of the weights file; if given, silos with other weights decline.
    #[serde(default)]
    pub digest: Option<Digest>,
}

/// Bottleneck adapters A(h) = W_up GELU(W_down h + b_d) + b_u after the FFN of the chosen layers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterSpec {
    /// Bottleneck r of the global adapter.
    pub bottleneck: u64,
    /// Bottleneck of the private adapter; the global one's if absent.
    #[serde(default)]
    pub private_bottleneck: Option<u64>,
    /// Layers that carry adapters, counted from 0; all if empty.
    #[serde(default)]
    pub layers: BTreeSet<u32>,
    /// How the two adapters' outputs are joined.
    #[serde(default)]
    pub combine: Combine,
    /// s_g: scale of the global adapter's output.
    #[serde(default = "one")]
    pub scale_global: f64,
    /// s_p: scale of the private adapter's output.
    #[serde(default = "one")]
    pub scale_private: f64,
    /// Standard deviation of W_up at the start; not 0, because zero outputs make CKA 0/0.
    #[serde(default = "default_init_up")]
    pub init_up: f64,
    /// Where the private adapter starts.
    #[serde(default)]
    pub private_start: PrivateStart,
    /// Standard deviation of the noise on a private adapter that starts near the global one, relative to each tensor's own.
    #[serde(default = "default_private_noise")]
    pub private_noise: f64,
}

/// How the outputs of the two adapters are joined: h' = h + ...
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Combine {
    /// s_g A_g(h) + s_p A_p(h)
    #[default]
    Sum,
    /// (s_g A_g(h) + s_p A_p(h)) / 2
    Mean,
    /// g s_g A_g(h) + (1 - g) s_p A_p(h), g = sigmoid of one learned number a layer, kept private
    Gate,
}

/// Where a private adapter starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrivateStart {
    /// Own random weights, unlike the global adapter's.
    #[default]
    Independent,
    /// The first global adapter plus noise. Needs equal bottlenecks.
    NearGlobal,
}

/// The head on top of the pooled last hidden state.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadSpec {
    /// Private (label sets may differ) or shared (it travels with the adapter).
    #[serde(default)]
    pub sharing: HeadSharing,
    /// Outputs of a shared head; silos use the first as many as they have classes.
    #[serde(default)]
    pub classes: Option<u64>,
    /// How the last hidden states become one vector.
    #[serde(default)]
    pub pool: Pool,
}

/// Whether the head travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadSharing {
    /// Stays in the vault.
    #[default]
    Private,
    /// Part of the layout.
    Shared,
}

/// Pooling of the last hidden states.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pool {
    /// Mean over the tokens that are not padding.
    #[default]
    Mean,
    /// The first token.
    Cls,
}

/// How a silo trains, with the settings of that way.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase", deny_unknown_fields)]
pub enum AlgorithmSpec {
    /// No exchange: one private adapter; for `simulate` only.
    Local {},
    /// x <- sum p_k w_k (arXiv 1602.05629); with a private head this is FedPer (1912.00818).
    Fedavg {},
    /// FedAvg with (mu/2)||w - x||^2 in the local loss (1812.06127).
    Fedprox {
        /// Strength of the proximal term.
        #[serde(default = "default_prox_mu")]
        mu: f64,
    },
    /// Model-contrastive learning on representations (2103.16257).
    Moon {
        /// Strength of the contrastive term.
        #[serde(default = "one")]
        mu: f64,
        /// Temperature.
        #[serde(default = "half")]
        tau: f64,
    },
    /// A personal model pulled towards the global one (2012.04221).
    Ditto {
        /// Strength of the pull.
        #[serde(default = "default_ditto_lambda")]
        lambda: f64,
    },
    /// The head first with the rest frozen, then the rest with the head frozen (2102.07078).
    Fedrep {
        /// Epochs for the head in each round.
        #[serde(default = "one_epoch")]
        head_epochs: u32,
    },
    /// Two adapters under a contrastive loss (2409.00116): L = CE + alpha R_g + mu L_con; mu = 0 is the ablation.
    Fedmcp {
        /// Strength of the contrastive term.
        #[serde(default = "one")]
        mu: f64,
        /// Temperature of the contrastive term.
        #[serde(default = "half")]
        tau: f64,
        /// Strength of the global adapter's regularisation.
        #[serde(default = "default_alpha")]
        alpha: f64,
        /// What R_g is.
        #[serde(default)]
        regulariser: Regulariser,
        /// Which estimator of HSIC the CKA uses.
        #[serde(default)]
        cka: CkaEstimator,
    },
}

/// R_g, the regularisation of the global adapter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Regulariser {
    /// Cross-entropy of the global-only path.
    GlobalLoss,
    /// (1/2)||w_g - w_g^t||^2
    #[default]
    Distance,
}

/// Estimator of HSIC inside CKA.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CkaEstimator {
    /// Song et al. 2012; usable at batch size; needs 4 rows.
    #[default]
    Unbiased,
    /// Kornblith et al. 2019; near 1 for any two random adapters at batch size.
    Biased,
}

/// Local optimisation: AdamW with linear warm-up and clipping by the global norm.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LocalTrainingSpec {
    /// Passes over the training split in each round.
    pub epochs: u32,
    /// Rows in a batch.
    pub batch_size: u32,
    /// Learning rate of adapters.
    pub learning_rate: f64,
    /// Learning rate of the head.
    pub head_learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Steps over which the learning rate rises from 0, counted over the whole job.
    pub warmup_steps: u32,
    /// Gradients are scaled down to this norm; 0 switches it off.
    pub clip_norm: f64,
    /// Longest input in tokens; longer ones are cut.
    pub max_length: u32,
    /// Evaluate the personal model before and after aggregation on the validation split.
    pub metric: MetricName,
    /// Most training rows that are used, the first ones of a seeded shuffle; all if absent.
    pub max_examples: Option<u64>,
}

impl Default for LocalTrainingSpec {
    fn default() -> Self {
        Self {
            epochs: 1,
            batch_size: 32,
            learning_rate: 1e-3,
            head_learning_rate: 1e-3,
            weight_decay: 0.01,
            warmup_steps: 0,
            clip_norm: 1.0,
            max_length: 128,
            metric: MetricName::Auto,
            max_examples: None,
        }
    }
}

/// The number by which the best personal model is chosen, on the validation split.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MetricName {
    /// Accuracy for classification, Spearman for regression.
    #[default]
    Auto,
    /// Share of right answers.
    Accuracy,
    /// Unweighted mean of the classes' F1.
    MacroF1,
    /// Matthews correlation coefficient.
    Mcc,
    /// Spearman's rank correlation.
    Spearman,
}

/// How rounds run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoundsSpec {
    /// Rounds to run.
    pub count: u32,
    /// A round with fewer accepted contributions fails.
    #[serde(default = "two")]
    pub min_silos: u32,
    /// A round closes as soon as it has this many; the whole cohort if absent.
    #[serde(default)]
    pub max_silos: Option<u32>,
    /// A round stays open at least this long, unless the whole cohort has answered.
    #[serde(default, with = "humantime_serde")]
    pub min_time: Duration,
    /// A round closes after this time.
    #[serde(default = "default_max_time", with = "humantime_serde")]
    pub max_time: Duration,
    /// p_k of the weighted mean.
    #[serde(default)]
    pub weighting: Weighting,
}

/// p_k, the weight of silo k.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weighting {
    /// n_k / n: the largest task owns the global adapter.
    #[default]
    Examples,
    /// 1 / K.
    Uniform,
}

/// Bounds on contributions.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSpec {
    /// Largest L2 norm of an update; absent means no bound beyond finite numbers.
    pub max_update_norm: Option<f64>,
    /// Most examples that a silo may claim for one round.
    pub max_examples: u64,
}

impl Default for LimitsSpec {
    fn default() -> Self {
        Self {
            max_update_norm: None,
            max_examples: 100_000_000,
        }
    }
}

fn one() -> f64 {
    1.0
}
fn half() -> f64 {
    0.5
}
fn default_init_up() -> f64 {
    1e-3
}
fn default_private_noise() -> f64 {
    0.1
}
fn default_prox_mu() -> f64 {
    0.01
}
fn default_ditto_lambda() -> f64 {
    0.1
}
fn default_alpha() -> f64 {
    0.01
}
fn one_epoch() -> u32 {
    1
}
fn two() -> u32 {
    2
}
fn default_max_time() -> Duration {
    Duration::from_hours(1)
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
        let spec: Self = toml::from_str(toml_text)
            .map_err(|error| refuse(format!("the specification cannot be read: {error}")))?;
        let Self::FederatedTraining(training) = &spec;
        check::check(training)?;
        Ok(spec)
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

impl AlgorithmSpec {
    /// The name as in the specification.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Local {} => "local",
            Self::Fedavg {} => "fedavg",
            Self::Fedprox { .. } => "fedprox",
            Self::Moon { .. } => "moon",
            Self::Ditto { .. } => "ditto",
            Self::Fedrep { .. } => "fedrep",
            Self::Fedmcp { .. } => "fedmcp",
        }
    }
}
