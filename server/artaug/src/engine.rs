//! What a job needs of a text-to-image engine, in plain types: the worker's stages are written against this, so that they
//! are tested without one.
//!
//! Whatever an engine gives depends only on its arguments (on a CPU, with a fixed number of threads): a batch has the members that it
//! is given, every prompt is encoded alone, and noise follows from the seeds. That is why a job that was killed ends in the same
//! bytes.

use std::path::Path;

use bytes::Bytes;
use concord_common::seed::Seed;

use crate::{advisor::Region, image::Image, machine::Training};

/// Why an engine cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Model, adapter, prompt or settings cannot be used; the text names which and what to change.
    #[error("{0}")]
    Unusable(String),
    /// [`Watch`] said so.
    #[error("the engine was told to stop")]
    Stopped,
    /// The engine itself failed.
    #[error("the engine failed: {0}")]
    Failed(String),
    /// This machine cannot read or write a file now (a full disk, a file system that is away) or lacks memory, which says nothing about the job. The
    /// text names the file.
    #[error("{0}")]
    Local(String),
}

/// Whether an engine is to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Go {
    /// Go on.
    On,
    /// End with [`EngineError::Stopped`] as soon as nothing is half done.
    Stop,
}

/// An image to be made.
#[derive(Debug, Clone, PartialEq)]
pub struct Order {
    /// The prompt P.
    pub prompt: String,
    /// Seed of the noise.
    pub seed: Seed,
    /// Regions M_i with their prompts P_i, mixed in at every step; none for a plain image.
    pub regions: Vec<Region>,
}

/// The images of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// One for each order.
    pub images: Vec<Image>,
    /// For each order, how many of its texts (the prompt, and each region's) are longer than the model reads of them: their ends have no effect.
    pub cut: Vec<usize>,
    /// Rows that went through the denoiser, over all steps.
    pub forwards: u64,
}

/// An image to learn from.
#[derive(Debug, Clone, PartialEq)]
pub struct Lesson {
    /// Number of its pair.
    pub item: u32,
    /// The prompt P.
    pub prompt: String,
    /// X for [`Training::First`], X' for the others.
    pub image: Image,
}

/// A training.
#[derive(Debug, Clone, Copy)]
pub struct Fit<'a> {
    /// Which.
    pub training: Training,
    /// The images, by item.
    pub lessons: &'a [Lesson],
    /// What [`Training::First`] gave, frozen below [`Training::Second`]; none for the others.
    pub below: Option<&'a [u8]>,
    /// Seed of batches, noise and first weights.
    pub seed: Seed,
    /// A saved state of the same fit to go on from.
    pub from: Option<Kept<'a>>,
    /// Images to be drawn on the way; the training is the same without them, to the bit.
    pub samples: Option<Samples<'a>>,
}

/// Images that are drawn every so many steps of a fit, with the model as opened and what the fit has trained so far; of
/// [`Training::Second`] without what lies below it, as the model will be used.
#[derive(Debug, Clone, Copy)]
pub struct Samples<'a> {
    /// Steps from one time to the next, at least 1.
    pub every: u64,
    /// What is drawn each time, in one batch.
    pub orders: &'a [Order],
}

/// A saved state as it was kept.
#[derive(Debug, Clone, Copy)]
pub struct Kept<'a> {
    /// [`Saved::state`].
    pub state: &'a [u8],
    /// [`Saved::finished`].
    pub finished: &'a [Bytes],
}

/// A state from which a fit goes on to the same bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Saved {
    /// Steps done, over all pairs where each has its own `LoRA`.
    pub step: u64,
    /// Weights, moments, counters and the losses so far; nothing of the finished pairs but what tells whether they are the same.
    pub state: Vec<u8>,
    /// Where each pair has its own `LoRA`: those of the finished pairs, in order. They stay as they are from one state to the next, so each need
    /// be kept once only.
    pub finished: Vec<Bytes>,
    /// Mean loss of the steps since the state before.
    pub loss: f64,
}

impl Saved {
    /// To go on from it.
    pub fn kept(&self) -> Kept<'_> {
        Kept {
            state: &self.state,
            finished: &self.finished,
        }
    }
}

/// A finished fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Fitted {
    /// The `LoRA` in Concord's own container, for [`Engine::join`] and [`Fit::below`]; one for every pair in that mode.
    pub lora: Vec<u8>,
    /// The loss of every step, also of those before an interruption.
    pub losses: Vec<f64>,
}

/// Who looks at a fit.
pub trait Watch {
    /// A step is done.
    fn stepped(&mut self, step: u64, loss: f64) -> Go;

    /// Whether to go on, asked where a step is long: between its passes, and while images are made ready. Nothing is recorded there.
    fn within_step(&mut self) -> Go {
        Go::On
    }

    /// Whether the samples of this step are wanted: nobody draws those that are recorded already.
    fn wants_samples(&mut self, _step: u64) -> bool {
        false
    }

    /// The samples of a step, before the state of that step. Where a fit was stopped between the two, the one that goes on from the state draws
    /// them first.
    ///
    /// # Errors
    /// Ends the fit with that error.
    fn sampled(&mut self, _step: u64, _drawn: Drawn) -> Result<Go, EngineError> {
        Ok(Go::On)
    }

    /// Whether a fit that was told to stop is to give the state after its last whole step before it ends.
    fn wants_state(&mut self, _step: u64) -> bool {
        false
    }

    /// A state to keep; called every `lora.checkpoint_every` steps, and when [`Watch::wants_state`] says so.
    ///
    /// # Errors
    /// Ends the fit with that error.
    fn save(&mut self, saved: Saved) -> Result<Go, EngineError>;
}

/// Adapters after an iteration.
#[derive(Debug, Clone, PartialEq)]
pub struct Joined {
    /// Everything learned so far, joined by rank.
    pub merged: Vec<u8>,
    /// The same, reduced by SVD to `lora.reduced_rank`, if that is set.
    pub reduced: Option<Vec<u8>>,
}

/// A text-to-image model with its sampler and `LoRA` settings, which the job's specification fixes.
pub trait Engine: Send {
    /// Makes the model anew from the base and the joined `LoRA` of earlier iterations (none in the first). This is the
    /// only way in which a learned adapter gets into the model.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] if the adapter does not fit the model; [`EngineError::Local`] if the base cannot be read now.
    fn open(&mut self, joined: Option<&[u8]>) -> Result<(), EngineError>;

    /// Draws a batch: exactly these members in one go.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] for a prompt that cannot be encoded; [`EngineError::Stopped`] if `go` says so between steps.
    fn draw(&mut self, orders: &[Order], go: &mut dyn FnMut() -> Go) -> Result<Drawn, EngineError>;

    /// Trains an adapter on the model as opened. The model is as before when it returns, also with an error.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] if the state is of another fit; [`EngineError::Stopped`] after a [`Go::Stop`].
    fn fit(&mut self, fit: &Fit<'_>, watch: &mut dyn Watch) -> Result<Fitted, EngineError>;

    /// Joins what was learned before (none in the first iteration) and a finished fit: rank concatenation, lossless; in the mode of
    /// one `LoRA` for each pair, their mean.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] if they are not of the same layers.
    fn join(&mut self, before: Option<&[u8]>, fitted: &[u8]) -> Result<Joined, EngineError>;

    /// The joined adapter in the layouts of other tools, as file names and bytes. `facts` become the files' metadata. What is under way
    /// stands in `folder`, which must not exist and is gone at the end; an error may leave it behind.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] if the adapter cannot be read; [`EngineError::Local`] if the folder cannot be written.
    fn export(
        &mut self,
        joined: &[u8],
        facts: &[(String, String)],
        folder: &Path,
    ) -> Result<Vec<(String, Vec<u8>)>, EngineError>;

    /// The whole model with a joined adapter merged into its weights, as a folder in the diffusers layout. The folder must not exist.
    /// What was open is closed: two models need not fit into memory.
    ///
    /// # Errors
    /// [`EngineError::Local`] if the base cannot be read now or the folder cannot be written; what is there of it stays.
    fn export_fused(&mut self, joined: &[u8], folder: &Path) -> Result<(), EngineError>;
}
