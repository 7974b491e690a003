//! A whole model: the folder that `diffusers` saves with `save_pretrained`, loaded as a [`Denoiser`].
//!
//! `model_index.json` names the parts. A folder without `vae` holds a model that works on pixels, or with the key `_concord_patches` on square patches of
//! that many pixels a side, as channels: that is Concord's own extension, for the small embedded model.

mod codec;
mod folder;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use concord_common::{digest::Digest, seed::Seed};
use tch::{Kind, Tensor};

pub use self::codec::{Patches, Pixels};
use super::{
    clip::{ClipConfig, ClipText},
    denoiser::{Condition, Denoiser, LatentCodec, named},
    files::{self, Stored},
    linear::{Linear, Sites},
    params::{Compute, Params},
    prompt::PromptTokenizer,
    schedule::Objective,
    unet::{UNet, UNetConfig},
    vae::{Vae, VaeConfig},
};
use crate::{error::LearningError, named::HostTensor};

/// What a CLIP tokenizer of `transformers` consists of.
const TOKENIZER_FILES: &[&str] = &[
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
];
const SCHEDULER_FILES: &[&str] = &["scheduler_config.json"];
/// Stem of the weights of UNet and autoencoder.
const DIFFUSERS: &str = "diffusion_pytorch_model";
/// Stem of the weights of the text encoder.
const TRANSFORMERS: &str = "model";

/// Tokenizer, text encoder, UNet, codec and objective.
#[derive(Debug)]
pub struct TextToImage {
    folder: PathBuf,
    tokenizer: PromptTokenizer,
    text: ClipText,
    unet: UNet,
    codec: Codec,
    objective: Objective,
    checkpointing: bool,
}

/// What a model works on.
#[derive(Debug)]
pub enum Codec {
    /// What an autoencoder makes of images.
    Latents(Box<Vae>),
    /// Images as they are.
    Pixels(Pixels),
    /// Patches of images.
    Patches(Patches),
}

impl Codec {
    fn as_dyn(&self) -> &dyn LatentCodec {
        match self {
            Self::Latents(vae) => vae.as_ref(),
            Self::Pixels(pixels) => pixels,
            Self::Patches(patches) => patches,
        }
    }
}

/// What `model_index.json` says of the codec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CodecKind {
    Latents,
    Pixels,
    Patches(Patches),
}

impl CodecKind {
    fn build(
        self,
        vae: impl FnOnce() -> Result<Vae, LearningError>,
    ) -> Result<Codec, LearningError> {
        Ok(match self {
            Self::Latents => Codec::Latents(Box::new(vae()?)),
            Self::Pixels => Codec::Pixels(Pixels),
            Self::Patches(patches) => Codec::Patches(patches),
        })
    }
}

impl TextToImage {
    /// Loads a model folder.
    ///
    /// # Errors
    /// [`LearningError::Io`], [`LearningError::Config`], [`LearningError::Weights`], [`LearningError::Tokenizer`]; each names the file.
    pub fn load(folder: &Path, compute: Compute) -> Result<Self, LearningError> {
        let kind = folder::read_index(folder)?;
        let text = ClipText::load(&folder.join("text_encoder"), compute)?;
        let unet = UNet::load(&folder.join("unet"), compute)?;
        let codec = kind.build(|| Vae::load(&folder.join("vae"), compute))?;
        Self::around(folder, text, unet, codec)
    }

    /// How many numbers the weights of a model folder are, as the headers of its files say: what it takes is known before it is loaded.
    ///
    /// # Errors
    /// As [`TextToImage::load`].
    pub fn count(folder: &Path) -> Result<u64, LearningError> {
        let mut parts = vec![("unet", DIFFUSERS), ("text_encoder", TRANSFORMERS)];
        if folder::read_index(folder)? == CodecKind::Latents {
            parts.push(("vae", DIFFUSERS));
        }
        parts.into_iter().try_fold(0, |sum: u64, (part, stem)| {
            let file = files::weights(&folder.join(part), stem)?;
            Ok(sum.saturating_add(files::count(&file)?))
        })
    }

    /// Makes a model from a folder of configurations and a tokenizer, with weights that follow from a seed.
    ///
    /// # Errors
    /// As [`TextToImage::load`].
    pub fn fresh(folder: &Path, seed: Seed, compute: Compute) -> Result<Self, LearningError> {
        let kind = folder::read_index(folder)?;
        let config = |part: &str| folder.join(part).join("config.json");
        let params = |part: &str| Params::fresh(seed.derive(part), compute);
        let text = ClipText::build(
            ClipConfig::read(&config("text_encoder"))?,
            params("text_encoder"),
        )?;
        let unet = UNet::build(UNetConfig::read(&config("unet"))?, params("unet"))?;
        let codec = kind.build(|| Vae::build(VaeConfig::read(&config("vae"))?, params("vae")))?;
        Self::around(folder, text, unet, codec)
    }

    fn around(
        folder: &Path,
        text: ClipText,
        unet: UNet,
        codec: Codec,
    ) -> Result<Self, LearningError> {
        let tokenizer = PromptTokenizer::load(
            &folder.join("tokenizer"),
            text.config().positions,
            text.config().vocab,
        )?;
        let objective = Objective::read(&folder.join("scheduler").join("scheduler_config.json"))?;
        Self::assemble(folder, tokenizer, text, unet, codec, objective)
    }

    /// Puts parts together.
    ///
    /// # Errors
    /// [`LearningError::Config`] if their widths differ.
    pub fn assemble(
        folder: &Path,
        tokenizer: PromptTokenizer,
        text: ClipText,
        unet: UNet,
        codec: Codec,
        objective: Objective,
    ) -> Result<Self, LearningError> {
        let complain = |reason: String| {
            Err(LearningError::Config(format!(
                "{}: {reason}",
                folder.display()
            )))
        };
        let (context, hidden) = (unet.config().context, text.config().hidden);
        if context != hidden {
            return complain(format!(
                "the UNet reads {context} values a token, the text encoder gives {hidden}"
            ));
        }
        let (inner, outer) = (unet.config().in_channels, unet.config().out_channels);
        let channels = codec.as_dyn().channels();
        if inner != channels || outer != channels {
            return complain(format!(
                "the UNet reads {inner} and gives {outer} channels, latents have {channels}"
            ));
        }
        if let Codec::Latents(vae) = &codec
            && (vae.config().in_channels, vae.config().out_channels) != (3, 3)
        {
            return complain("the autoencoder is not one of images with 3 channels".to_owned());
        }
        Ok(Self {
            folder: folder.to_path_buf(),
            tokenizer,
            text,
            unet,
            codec,
            objective,
            checkpointing: false,
        })
    }

    /// The folder that it was loaded from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// All weights of UNet and text encoder as leaves for training from scratch, by name; from now on they collect gradients.
    pub fn leaves(&self) -> BTreeMap<String, Tensor> {
        let tracked = |(name, tensor): (String, Tensor)| (name, tensor.set_requires_grad(true));
        self.weights().into_iter().map(tracked).collect()
    }

    /// The same weights, as they are.
    pub fn weights(&self) -> BTreeMap<String, Tensor> {
        [
            ("unet", self.unet.tensors()),
            ("text_encoder", self.text.tensors()),
        ]
        .into_iter()
        .flat_map(|(part, tensors)| {
            tensors
                .iter()
                .map(move |(name, tensor)| (format!("{part}.{name}"), tensor.shallow_clone()))
        })
        .collect()
    }

    /// How many weights these are.
    pub fn size(&self) -> usize {
        self.weights().values().map(Tensor::numel).sum()
    }

    /// The denoising network.
    pub fn unet(&self) -> &UNet {
        &self.unet
    }

    /// The text encoder.
    pub fn text(&self) -> &ClipText {
        &self.text
    }

    /// The linear layers of UNet and text encoder: what a LoRA file of others may speak of.
    pub fn all_sites(&mut self) -> Vec<(String, &mut Linear)> {
        let mut sites = named("unet", &mut self.unet);
        sites.extend(named("text_encoder", &mut self.text));
        sites
    }

    /// The prompt tokenizer.
    pub fn tokenizer(&self) -> &PromptTokenizer {
        &self.tokenizer
    }

    /// The text encoder's output for prompts, with gradients where its weights have some.
    ///
    /// # Errors
    /// [`LearningError::Tokenizer`], [`LearningError::Data`].
    pub fn encode_text(&self, prompts: &[&str]) -> Result<Condition, LearningError> {
        Ok(Condition::of(
            self.text.run(&self.tokenizer.batch(prompts)?)?,
        ))
    }

    /// Folder, file stem and tensors of every part with weights.
    fn parts(&self) -> Vec<(&'static str, &'static str, &BTreeMap<String, Tensor>)> {
        let mut parts = vec![
            ("unet", DIFFUSERS, self.unet.tensors()),
            ("text_encoder", TRANSFORMERS, self.text.tensors()),
        ];
        if let Codec::Latents(vae) = &self.codec {
            parts.push(("vae", DIFFUSERS, vae.tensors()));
        }
        parts
    }

    /// Writes the model as a new folder in the same layout: configurations and tokenizer are copied, weights written as they are now, in f32.
    /// `model_index.json` says of parts that Concord does not use (a safety checker) that there are none. Adapters must have been merged.
    ///
    /// # Errors
    /// [`LearningError::Config`] if an adapter is still attached, [`LearningError::Io`] if the folder exists or cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), LearningError> {
        self.save_as(folder, Stored::Single)
    }

    /// [`TextToImage::save`] in f16: half the size, for a model that is kept beside code.
    ///
    /// # Errors
    /// As [`TextToImage::save`], and [`LearningError::Weights`] if a weight is too large for f16.
    pub fn save_half(&self, folder: &Path) -> Result<(), LearningError> {
        self.save_as(folder, Stored::Half)
    }

    fn save_as(&self, folder: &Path, stored: Stored) -> Result<(), LearningError> {
        let mut linears = Vec::new();
        self.unet.linears(&mut linears);
        self.text.linears(&mut linears);
        if let Some(linear) = linears.iter().find(|linear| !linear.pairs().is_empty()) {
            return Err(LearningError::Config(format!(
                "{} still has an adapter; merge or detach it before the model is saved",
                linear.name()
            )));
        }
        fs::create_dir(folder).map_err(|source| LearningError::io(folder, source))?;
        let mut written = Vec::new();
        for (part, names) in [
            ("tokenizer", TOKENIZER_FILES),
            ("scheduler", SCHEDULER_FILES),
        ] {
            folder::copy_named(&self.folder.join(part), &folder.join(part), names)?;
            written.push(part);
        }
        for (part, stem, tensors) in self.parts() {
            let (from, to) = (self.folder.join(part), folder.join(part));
            fs::create_dir(&to).map_err(|source| LearningError::io(&to, source))?;
            folder::copy(&from.join("config.json"), &to.join("config.json"))?;
            written.push(part);
            files::write_weights_as(
                &to.join(format!("{stem}.safetensors")),
                tensors,
                &[("format", "pt")],
                stored,
            )?;
        }
        folder::write_index(&self.folder, folder, &written)
    }
}

impl Denoiser for TextToImage {
    fn compute(&self) -> Compute {
        self.unet.compute()
    }

    fn objective(&self) -> &Objective {
        &self.objective
    }

    fn codec(&self) -> &dyn LatentCodec {
        self.codec.as_dyn()
    }

    fn native_size(&self) -> [i64; 3] {
        let config = self.unet.config();
        // Every Stable Diffusion says its size; the first one's stands in where a file does not.
        let (height, width) = config.sample_size.unwrap_or((64, 64));
        [config.in_channels, height, width]
    }

    fn condition(&self, prompts: &[&str]) -> Result<Condition, LearningError> {
        let _frozen = tch::no_grad_guard();
        self.encode_text(prompts)
    }

    fn cuts(&self, prompt: &str) -> Result<bool, LearningError> {
        self.tokenizer.cuts(prompt)
    }

    fn predict(
        &self,
        samples: &Tensor,
        times: &Tensor,
        condition: &Condition,
    ) -> Result<Tensor, LearningError> {
        self.unet.run(samples, times, &condition.context)
    }

    fn predict_and_pull(
        &self,
        samples: &Tensor,
        times: &Tensor,
        condition: &Condition,
        leaves: &[&Tensor],
        output_gradient: &mut dyn FnMut(&Tensor) -> Result<Tensor, LearningError>,
    ) -> Result<Vec<Tensor>, LearningError> {
        if self.checkpointing {
            return self
                .unet
                .pull(samples, times, &condition.context, leaves, output_gradient);
        }
        let output = self.predict(samples, times, condition)?;
        super::unet::pull_through(&[&output], &[&output_gradient(&output.detach())?], leaves)
    }

    fn digest(&self) -> Result<Digest, LearningError> {
        let mut hasher = blake3::Hasher::new_derive_key("concord.v1 diffusion weights");
        for (part, _, tensors) in self.parts() {
            for (name, tensor) in tensors {
                let host = HostTensor::from_tensor(tensor)?;
                hasher.update(format!("{part}.{name} {:?}\n", host.shape).as_bytes());
                hasher.update(&concord_common::adapter::encode_f32(&host.values));
            }
        }
        Ok(hasher.finalize().into())
    }

    fn set_checkpointing(&mut self, on: bool) {
        self.checkpointing = on;
    }

    fn sites(&mut self) -> Vec<(String, &mut Linear)> {
        named("unet", &mut self.unet)
    }
}

/// Images in -1..=1, `[n, 3, h, w]`, to 8 bits a channel, `[n, h, w, 3]`.
///
/// # Errors
/// [`LearningError::Torch`] if the shape is another.
pub fn to_bytes(images: &Tensor) -> Result<Vec<u8>, LearningError> {
    let scaled = images
        .f_detach()?
        .f_to_kind(Kind::Float)?
        .f_div_scalar(2.0)?
        .f_add_scalar(0.5)?
        .f_clamp(0.0, 1.0)?
        .f_mul_scalar(255.0)?
        .f_round()?
        .f_permute([0, 2, 3, 1])?
        .f_contiguous()?
        .f_to_kind(Kind::Uint8)?;
    let flat = scaled.f_view([-1])?;
    let mut bytes = vec![0; flat.numel()];
    let count = bytes.len();
    flat.f_copy_data(&mut bytes, count)?;
    Ok(bytes)
}

/// 8 bits a channel, `[n, h, w, 3]`, to images in -1..=1, `[n, 3, h, w]`.
///
/// # Errors
/// [`LearningError::Data`] if there are not as many bytes.
pub fn from_bytes(
    bytes: &[u8],
    (n, height, width): (i64, i64, i64),
    compute: Compute,
) -> Result<Tensor, LearningError> {
    if bytes.len() as i64 != n * height * width * 3 {
        return Err(LearningError::Data(format!(
            "{} bytes are not {n} images of {height} by {width} pixels",
            bytes.len()
        )));
    }
    Ok(Tensor::f_from_slice(bytes)?
        .f_view([n, height, width, 3])?
        .f_permute([0, 3, 1, 2])?
        .f_to_kind(compute.kind)?
        .f_to_device(compute.device)?
        .f_div_scalar(127.5)?
        .f_sub_scalar(1.0)?
        .f_contiguous()?)
}

#[cfg(test)]
mod tests;
