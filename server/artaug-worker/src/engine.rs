//! [`Engine`] on libtorch: a Stable Diffusion model, or a small one of the same family, from its folder.
//!
//! Every model of a job comes about in one way: the base is loaded from its folder and the joined `LoRA`, read from its bytes, is merged into it once
//! ([`lora::current`]). A training attaches its adapters to that and takes them off again; nothing else changes a weight. So a model's bits tell the
//! files that it was made of and nothing about interruptions.

mod adapters;
mod container;
mod fit;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use concord_artaug::{
    advisor::Region as Advised,
    engine::{Drawn, Engine, EngineError, Fit, Fitted, Go, Joined, Order, Watch},
    image::Image,
};
use concord_common::{
    Digest,
    job::artaug::{LoraSpec, Precision, SamplerSpec, Solver},
};
use concord_learning::{
    diffusion::{
        denoiser::Denoiser,
        draw::{Easel, Picture, Sampling, Wish},
        lora,
        params::Compute,
        pipeline::TextToImage,
        region::Region,
        schedule::Sampler,
    },
    error::LearningError,
    torch::use_threads,
};

/// What a job's specification and the worker's settings fix for the engine.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The base model's folder in the diffusers layout; the worker has checked that it is an allowed one.
    pub folder: PathBuf,
    /// Arithmetic.
    pub precision: Precision,
    /// How images are made.
    pub sampler: SamplerSpec,
    /// How adapters are trained.
    pub lora: LoraSpec,
    /// Threads of an operation, at least 1. Results are the same to the bit for the same number only.
    pub threads: usize,
    /// Number of the GPU to work on; the CPU if absent.
    pub gpu: Option<usize>,
}

/// The engine.
#[derive(Debug)]
pub struct TorchEngine {
    settings: Settings,
    compute: Compute,
    opened: Option<Opened>,
}

/// A model as opened, and its sampler.
#[derive(Debug)]
struct Opened {
    model: TextToImage,
    easel: Easel,
}

impl TorchEngine {
    /// An engine that has opened nothing yet.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] for f16, in which gradients vanish, and for a GPU that is not there.
    pub fn new(settings: Settings) -> Result<Self, EngineError> {
        let bf16 = match settings.precision {
            Precision::F32 => false,
            Precision::Bf16 => true,
            Precision::F16 => {
                return Err(EngineError::Unusable(
                    "`model.precision`: an ArtAug job trains, and gradients vanish in f16; use \"bf16\" or \"f32\""
                        .to_owned(),
                ));
            }
        };
        let compute = Compute::on(settings.gpu, bf16).map_err(unusable)?;
        Ok(Self {
            settings,
            compute,
            opened: None,
        })
    }

    /// BLAKE3 over the weights of the opened model; of the base if no adapter was merged.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] if nothing is open.
    pub fn digest(&self) -> Result<Digest, EngineError> {
        let opened = self.opened.as_ref().ok_or_else(nothing_open)?;
        opened.model.digest().map_err(failed)
    }

    /// Width and height in pixels of the images that the opened model draws.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] if nothing is open.
    pub fn size(&self) -> Result<[u32; 2], EngineError> {
        Ok(self.opened.as_ref().ok_or_else(nothing_open)?.easel.size())
    }

    /// Whether a prompt is longer than what the opened model reads of it.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] if nothing is open or the prompt cannot be encoded.
    pub fn cuts(&self, prompt: &str) -> Result<bool, EngineError> {
        let opened = self.opened.as_ref().ok_or_else(nothing_open)?;
        opened.model.cuts(prompt).map_err(unusable)
    }

    /// Makes the model anew.
    fn load(&self, joined: Option<&[u8]>) -> Result<TextToImage, EngineError> {
        let joined = joined.map(adapters::read_joined).transpose()?;
        lora::current(&self.settings.folder, joined.as_ref(), self.compute).map_err(unusable)
    }

    /// The opened model, with this thread set up.
    fn at_work(&mut self) -> Result<&mut Opened, EngineError> {
        use_threads(self.settings.threads);
        self.opened.as_mut().ok_or_else(nothing_open)
    }
}

impl Engine for TorchEngine {
    fn open(&mut self, joined: Option<&[u8]>) -> Result<(), EngineError> {
        use_threads(self.settings.threads);
        // First, so that two models need not fit into memory.
        self.opened = None;
        let model = self.load(joined)?;
        let easel = sampling(&self.settings.sampler)
            .ready(&model)
            .map_err(unusable)?;
        self.opened = Some(Opened { model, easel });
        Ok(())
    }

    fn draw(&mut self, orders: &[Order], go: &mut dyn FnMut() -> Go) -> Result<Drawn, EngineError> {
        let strength = self.settings.sampler.region_strength;
        let opened = self.at_work()?;
        drawn(&opened.easel, &opened.model, strength, orders, go)
    }

    fn fit(&mut self, fit: &Fit<'_>, watch: &mut dyn Watch) -> Result<Fitted, EngineError> {
        let spec = self.settings.lora.clone();
        let strength = self.settings.sampler.region_strength;
        let Opened { model, easel } = self.at_work()?;
        let mut draw = |model: &dyn Denoiser, orders: &[Order], go: &mut dyn FnMut() -> Go| {
            drawn(easel, model, strength, orders, go)
        };
        fit::run(model, &spec, fit, watch, &mut draw)
    }

    fn join(&mut self, before: Option<&[u8]>, fitted: &[u8]) -> Result<Joined, EngineError> {
        use_threads(self.settings.threads);
        adapters::join(before, fitted, self.settings.lora.reduced_rank)
    }

    fn export(
        &mut self,
        joined: &[u8],
        facts: &[(String, String)],
        folder: &Path,
    ) -> Result<Vec<(String, Vec<u8>)>, EngineError> {
        if self.opened.is_none() {
            self.open(None)?;
        }
        let layers = lora::layers(self.at_work()?.model.sites());
        adapters::export(joined, &layers, facts, folder)
    }

    fn export_fused(&mut self, joined: &[u8], folder: &Path) -> Result<(), EngineError> {
        use_threads(self.settings.threads);
        self.opened = None;
        let joined = adapters::read_joined(joined)?;
        // In f32 whatever the job computes in: that is what the file holds.
        lora::current(&self.settings.folder, Some(&joined), Compute::CPU)
            .map_err(unusable)?
            .save(folder)
            .map_err(failed)
    }
}

fn sampling(spec: &SamplerSpec) -> Sampling {
    Sampling {
        sampler: match spec.kind {
            Solver::Ddim => Sampler::Ddim,
            Solver::DpmSolver => Sampler::Dpm,
            Solver::Euler => Sampler::Euler,
        },
        steps: spec.steps as usize,
        guidance: spec.guidance,
        negative: spec.negative_prompt.clone(),
        size: spec.size,
    }
}

/// Draws on a model that the easel was made ready for.
fn drawn(
    easel: &Easel,
    model: &dyn Denoiser,
    strength: f64,
    orders: &[Order],
    go: &mut dyn FnMut() -> Go,
) -> Result<Drawn, EngineError> {
    let wishes: Vec<Wish> = orders
        .iter()
        .map(|order| Wish {
            prompt: order.prompt.clone(),
            seed: order.seed,
            regions: order
                .regions
                .iter()
                .map(|advised| region(advised, strength))
                .collect(),
        })
        .collect();
    let cut = orders
        .iter()
        .map(|order| cut_texts(model, order).map_err(unusable))
        .collect::<Result<_, _>>()?;
    let drawn = easel
        .draw(model, &wishes, &mut |_| match go() {
            Go::On => Ok(()),
            Go::Stop => Err(LearningError::Cancelled),
        })
        .map_err(unusable)?;
    Ok(Drawn {
        images: drawn
            .pictures
            .into_iter()
            .map(image)
            .collect::<Result<_, _>>()?,
        cut,
        forwards: drawn.rows,
    })
}

/// How many texts of an order are longer than the model reads of them.
fn cut_texts(model: &dyn Denoiser, order: &Order) -> Result<usize, LearningError> {
    let regions = order.regions.iter().map(|region| region.prompt.as_str());
    let mut cut = 0;
    for text in regions.chain([order.prompt.as_str()]) {
        cut += usize::from(model.cuts(text)?);
    }
    Ok(cut)
}

fn region(advised: &Advised, strength: f64) -> Region {
    let [left, top, right, bottom] = advised.area.edges();
    Region {
        left,
        top,
        right,
        bottom,
        prompt: advised.prompt.as_str().to_owned(),
        strength,
    }
}

fn image(picture: Picture) -> Result<Image, EngineError> {
    Image::new(picture.width, picture.height, picture.pixels)
        .map_err(|error| EngineError::Failed(error.to_string()))
}

fn nothing_open() -> EngineError {
    EngineError::Unusable("no model is open".to_owned())
}

/// An error of the library where its arguments can be at fault.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the shape that `map_err` wants"
)]
fn unusable(error: LearningError) -> EngineError {
    match error {
        LearningError::Cancelled => EngineError::Stopped,
        ref lacking if is_local(lacking) => EngineError::Local(error.to_string()),
        LearningError::Torch(_) | LearningError::Panicked { .. } | LearningError::Stopped(_) => {
            EngineError::Failed(error.to_string())
        }
        _ => EngineError::Unusable(error.to_string()),
    }
}

/// Whether it is this machine that lacks something: a file that cannot be read or written, or memory.
fn is_local(error: &LearningError) -> bool {
    match error {
        LearningError::Io { .. } => true,
        // libtorch says so in words alone.
        LearningError::Torch(_) => {
            let text = error.to_string();
            ["can't allocate memory", "out of memory"]
                .iter()
                .any(|words| text.contains(words))
        }
        _ => false,
    }
}

/// An error of the library where they cannot.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the shape that `map_err` wants"
)]
fn failed(error: LearningError) -> EngineError {
    match error {
        ref lacking if is_local(lacking) => EngineError::Local(error.to_string()),
        _ => EngineError::Failed(error.to_string()),
    }
}
