//! The specification of an `artaug` job: a text-to-image model improves itself with an understanding model's advice
//! (arXiv 2412.12888). Declarative like that of a `federated-training` job; it carries no code, no address and no key, and
//! names files only below folders that the worker's own configuration allows.

mod check;
#[cfg(test)]
mod tests;

use std::{path::Path, time::Duration};

use serde::{Deserialize, Serialize};

use super::MAX_SPEC_BYTES;
use crate::{
    code::{ErrorCode, Refusal},
    config::ByteSize,
};

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

/// The text-to-image model.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Its folder in the diffusers layout, below one of the worker's model folders.
    pub folder: String,
    /// Arithmetic of the engine.
    #[serde(default)]
    pub precision: Precision,
}

/// Arithmetic of the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32 bits; on a CPU.
    #[default]
    F32,
    /// 16 bits with the range of 32.
    Bf16,
    /// 16 bits; for generation on older GPUs.
    F16,
}

/// A list of prompts: in the specification, or in a file of the worker.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptsSpec {
    /// The prompts themselves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub texts: Vec<String>,
    /// A text file with a prompt on each line, below one of the worker's prompt folders.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

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

/// How much is made.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CountsSpec {
    /// Most iterations.
    pub iterations: u32,
    /// Pairs made in each.
    pub pairs: u32,
    /// Most pairs trained on.
    pub kept: u32,
    /// Fewer pairs are not trained on: the job stops.
    #[serde(default = "default_least_kept")]
    pub least_kept: u32,
    /// Held-out images of each arm; the prompts are gone through in order, again and again with other seeds.
    pub held_out: u32,
}

/// How images are made.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerSpec {
    /// The solver.
    pub kind: Solver,
    /// Steps.
    pub steps: u32,
    /// Strength of classifier-free guidance; 1 switches it off.
    pub guidance: f64,
    /// What images should not be like.
    pub negative_prompt: String,
    /// Width and height in pixels; the model's own if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<[u32; 2]>,
    /// Images in a batch.
    pub batch: u32,
    /// s_i: how strongly a region's prompt counts beside the base prompt.
    pub region_strength: f64,
}

/// The solver of the sampling equation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Solver {
    /// arXiv 2010.02502.
    #[default]
    Ddim,
    /// DPM-Solver++ (2M), arXiv 2211.01095.
    DpmSolver,
    /// Euler; for models of flow matching too.
    Euler,
}

/// How the differential LoRA is trained.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSpec {
    /// Rank; alpha equals it.
    pub rank: u32,
    /// Which linear layers carry one.
    pub targets: LoraTargets,
    /// One pair of LoRAs over all pairs of images, or one for each with averaging.
    pub mode: LoraMode,
    /// Steps of `LoRA_1`. It must fit the base images closely for the difference to be clean.
    pub first_steps: u32,
    /// Steps of `LoRA_2`, and of the control.
    pub second_steps: u32,
    /// Learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm; 0 switches it off.
    pub clip_norm: f64,
    /// Images in a batch.
    pub batch: u32,
    /// Batches whose gradients are added before a step.
    pub accumulation: u32,
    /// Whether blocks are computed again on the way back, to save memory.
    pub recompute: bool,
    /// Steps between checkpoints: a crash costs at most these.
    pub checkpoint_every: u32,
    /// Rank of the reduced merged LoRA; it is not written if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduced_rank: Option<u32>,
}

/// Which linear layers carry a LoRA.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoraTargets {
    /// Queries, keys, values and outputs of attention.
    #[default]
    Attention,
    /// All of them.
    AllLinear,
}

/// How many LoRAs are trained.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoraMode {
    /// One `LoRA_1` and one `LoRA_2` over all pairs.
    #[default]
    Joint,
    /// One each for every pair; the `LoRA_2` are averaged.
    PerPair,
}

/// How an iteration is judged.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationSpec {
    /// Whether the control arms run: plain LoRA on the enhanced images, and prompt rewriting alone.
    pub control: bool,
    /// Confidence of the intervals.
    pub confidence: f64,
    /// Samples of the bootstrap.
    pub resamples: u32,
    /// Differences of the judging score up to this are ties.
    pub tie: f64,
}

/// Bounds on the job.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ArtaugLimits {
    /// How far the mean alignment may fall below the base's before the iteration is rolled back.
    pub alignment_loss: f64,
    /// Least diversity, as a part of the base's.
    pub least_diversity: f64,
    /// Longest time of the whole job.
    #[serde(with = "humantime_serde")]
    pub time: Duration,
    /// Bytes that the job may keep on the worker's disk.
    pub disk: ByteSize,
    /// Threads of the engine; the worker's own limit if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
}

/// What is written at the end, beside LoRA files, metrics, gallery and model card.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutputSpec {
    /// The fused checkpoint in the diffusers layout.
    pub fused: bool,
}

impl Default for SamplerSpec {
    fn default() -> Self {
        Self {
            kind: Solver::default(),
            steps: 20,
            guidance: 7.5,
            negative_prompt: String::new(),
            size: None,
            batch: 8,
            region_strength: 1.0,
        }
    }
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self {
            rank: 8,
            targets: LoraTargets::default(),
            mode: LoraMode::default(),
            first_steps: 120,
            second_steps: 120,
            learning_rate: 1e-3,
            weight_decay: 0.0,
            clip_norm: 1.0,
            batch: 8,
            accumulation: 1,
            recompute: false,
            checkpoint_every: 20,
            reduced_rank: None,
        }
    }
}

impl Default for EvaluationSpec {
    fn default() -> Self {
        Self {
            control: true,
            confidence: 0.95,
            resamples: 2000,
            tie: 0.0,
        }
    }
}

impl Default for ArtaugLimits {
    fn default() -> Self {
        Self {
            alignment_loss: 0.02,
            least_diversity: 0.8,
            time: Duration::from_hours(24),
            disk: ByteSize(10 << 30),
            threads: None,
        }
    }
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
fn default_alignment_gain() -> f64 {
    -0.02
}
fn default_least_kept() -> u32 {
    8
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
