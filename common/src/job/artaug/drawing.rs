//! The model of a job, what it draws and how.

use serde::{Deserialize, Serialize};

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
    /// 16 bits; refused, because every job trains and small gradients vanish in it.
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
