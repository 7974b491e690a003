//! A whole model: the folder that `diffusers` saves with `save_pretrained`, loaded as a [`Denoiser`].
//!
//! `model_index.json` names the parts. A folder without `vae` holds a model that works on pixels: that is Concord's own extension, for the small
//! embedded model.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use concord_common::{digest::Digest, seed::Seed};
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use super::{
    clip::{ClipConfig, ClipText},
    denoiser::{Condition, Denoiser, LatentCodec, named},
    files,
    linear::{Linear, Sites},
    params::{Compute, Params},
    prompt::PromptTokenizer,
    schedule::Objective,
    unet::{UNet, UNetConfig},
    vae::{Vae, VaeConfig},
};
use crate::{error::LearningError, named::HostTensor};

/// The autoencoder as the denoiser's codec: latents are shifted and scaled.
impl LatentCodec for Vae {
    fn factor(&self) -> i64 {
        self.config().factor()
    }

    fn channels(&self) -> i64 {
        self.config().latent_channels
    }

    fn encode(&self, images: &Tensor) -> Result<Tensor, LearningError> {
        let config = self.config();
        Ok(Vae::encode(self, images)?
            .mean
            .f_sub_scalar(config.shift_factor)?
            .f_mul_scalar(config.scaling_factor)?)
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor, LearningError> {
        let config = self.config();
        let plain = latents
            .f_div_scalar(config.scaling_factor)?
            .f_add_scalar(config.shift_factor)?;
        Vae::decode(self, &plain)
    }
}

/// Pixels are the latents.
#[derive(Debug, Clone, Copy)]
pub struct Pixels;

impl LatentCodec for Pixels {
    fn factor(&self) -> i64 {
        1
    }

    fn channels(&self) -> i64 {
        3
    }

    fn encode(&self, images: &Tensor) -> Result<Tensor, LearningError> {
        Ok(images.shallow_clone())
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor, LearningError> {
        Ok(latents.shallow_clone())
    }
}

/// Tokenizer, text encoder, UNet, codec and objective.
#[derive(Debug)]
pub struct TextToImage {
    folder: PathBuf,
    tokenizer: PromptTokenizer,
    text: ClipText,
    unet: UNet,
    vae: Option<Vae>,
    objective: Objective,
    checkpointing: bool,
}

impl TextToImage {
    /// Loads a model folder.
    ///
    /// # Errors
    /// [`LearningError::Io`], [`LearningError::Config`], [`LearningError::Weights`], [`LearningError::Tokenizer`]; each names the file.
    pub fn load(folder: &Path, compute: Compute) -> Result<Self, LearningError> {
        let has_vae = read_index(folder)?;
        let text = ClipText::load(&folder.join("text_encoder"), compute)?;
        let unet = UNet::load(&folder.join("unet"), compute)?;
        let vae = has_vae
            .then(|| Vae::load(&folder.join("vae"), compute))
            .transpose()?;
        Self::around(folder, text, unet, vae)
    }

    /// Makes a model from a folder of configurations and a tokenizer, with weights that follow from a seed.
    ///
    /// # Errors
    /// As [`TextToImage::load`].
    pub fn fresh(folder: &Path, seed: Seed, compute: Compute) -> Result<Self, LearningError> {
        let has_vae = read_index(folder)?;
        let config = |part: &str| folder.join(part).join("config.json");
        let params = |part: &str| Params::fresh(seed.derive(part), compute);
        let text = ClipText::build(
            ClipConfig::read(&config("text_encoder"))?,
            params("text_encoder"),
        )?;
        let unet = UNet::build(UNetConfig::read(&config("unet"))?, params("unet"))?;
        let vae = has_vae
            .then(|| Vae::build(VaeConfig::read(&config("vae"))?, params("vae")))
            .transpose()?;
        Self::around(folder, text, unet, vae)
    }

    fn around(
        folder: &Path,
        text: ClipText,
        unet: UNet,
        vae: Option<Vae>,
    ) -> Result<Self, LearningError> {
        let tokenizer = PromptTokenizer::load(
            &folder.join("tokenizer"),
            text.config().positions,
            text.config().vocab,
        )?;
        let objective = Objective::read(&folder.join("scheduler").join("scheduler_config.json"))?;
        Self::assemble(folder, tokenizer, text, unet, vae, objective)
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
        vae: Option<Vae>,
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
        let channels = vae
            .as_ref()
            .map_or(Pixels.channels(), LatentCodec::channels);
        if inner != channels || outer != channels {
            return complain(format!(
                "the UNet reads {inner} and gives {outer} channels, latents have {channels}"
            ));
        }
        if let Some(vae) = &vae
            && (vae.config().in_channels, vae.config().out_channels) != (3, 3)
        {
            return complain("the autoencoder is not one of images with 3 channels".to_owned());
        }
        Ok(Self {
            folder: folder.to_path_buf(),
            tokenizer,
            text,
            unet,
            vae,
            objective,
            checkpointing: false,
        })
    }

    /// Runs blocks twice in training instead of keeping all activations.
    pub fn set_checkpointing(&mut self, on: bool) {
        self.checkpointing = on;
    }

    /// The folder that it was loaded from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// All weights of UNet and text encoder as leaves for training from scratch, by name; from now on they collect gradients.
    pub fn leaves(&self) -> BTreeMap<String, Tensor> {
        let named = |part: &str, tensors: &BTreeMap<String, Tensor>| -> Vec<(String, Tensor)> {
            tensors
                .iter()
                .map(|(name, tensor)| {
                    let leaf = tensor.set_requires_grad(true);
                    (format!("{part}.{name}"), leaf)
                })
                .collect()
        };
        let mut leaves = named("unet", self.unet.tensors());
        leaves.extend(named("text_encoder", self.text.tensors()));
        leaves.into_iter().collect()
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
        Ok(Condition {
            context: self.text.run(&self.tokenizer.batch(prompts)?)?,
        })
    }

    /// BLAKE3 over names, shapes and f32 values of all weights as they are now: what a stage's results depend on. Attached adapters do not count.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if a weight cannot be copied to the CPU.
    pub fn digest(&self) -> Result<Digest, LearningError> {
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

    /// Folder, file stem and tensors of every part with weights.
    fn parts(&self) -> Vec<(&'static str, &'static str, &BTreeMap<String, Tensor>)> {
        let mut parts = vec![
            ("unet", "diffusion_pytorch_model", self.unet.tensors()),
            ("text_encoder", "model", self.text.tensors()),
        ];
        if let Some(vae) = &self.vae {
            parts.push(("vae", "diffusion_pytorch_model", vae.tensors()));
        }
        parts
    }

    /// Writes the model as a new folder in the same layout: configurations and tokenizer are copied, weights written as they are now, in f32.
    /// Adapters must have been merged.
    ///
    /// # Errors
    /// [`LearningError::Config`] if an adapter is still attached, [`LearningError::Io`] if the folder exists or cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), LearningError> {
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
        copy(
            &self.folder.join("model_index.json"),
            &folder.join("model_index.json"),
        )?;
        for part in ["tokenizer", "scheduler"] {
            copy_folder(&self.folder.join(part), &folder.join(part))?;
        }
        for (part, stem, tensors) in self.parts() {
            let (from, to) = (self.folder.join(part), folder.join(part));
            fs::create_dir(&to).map_err(|source| LearningError::io(&to, source))?;
            copy(&from.join("config.json"), &to.join("config.json"))?;
            files::write_weights(
                &to.join(format!("{stem}.safetensors")),
                tensors,
                &[("format", "pt")],
            )?;
        }
        Ok(())
    }
}

/// Checks the parts that `model_index.json` names; gives whether there is an autoencoder.
fn read_index(folder: &Path) -> Result<bool, LearningError> {
    let index = folder.join("model_index.json");
    let parts: Map<String, Value> = files::read_config(&index, |text| {
        serde_json::from_slice(text).map_err(|error| error.to_string())
    })?;
    for (part, class) in [
        ("unet", "UNet2DConditionModel"),
        ("text_encoder", "CLIPTextModel"),
        ("tokenizer", "CLIPTokenizer"),
    ] {
        let found = parts
            .get(part)
            .and_then(|entry| entry.get(1))
            .and_then(Value::as_str)
            .unwrap_or("nothing");
        if found.trim_end_matches("Fast") != class {
            return Err(LearningError::Config(format!(
                "{}: {part} is {found}, only {class} is supported",
                index.display()
            )));
        }
    }
    Ok(parts.get("vae").is_some_and(|entry| !entry.is_null()))
}

fn copy(from: &Path, to: &Path) -> Result<(), LearningError> {
    fs::copy(from, to)
        .map(drop)
        .map_err(|source| LearningError::io(from, source))
}

/// The plain files of a folder. Neither folders nor links are followed.
fn copy_folder(from: &Path, to: &Path) -> Result<(), LearningError> {
    fs::create_dir(to).map_err(|source| LearningError::io(to, source))?;
    let entries = fs::read_dir(from).map_err(|source| LearningError::io(from, source))?;
    for entry in entries {
        let entry = entry.map_err(|source| LearningError::io(from, source))?;
        let kind = entry
            .file_type()
            .map_err(|source| LearningError::io(entry.path(), source))?;
        if kind.is_file() {
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

impl Denoiser for TextToImage {
    fn compute(&self) -> Compute {
        self.unet.compute()
    }

    fn objective(&self) -> &Objective {
        &self.objective
    }

    fn codec(&self) -> &dyn LatentCodec {
        match &self.vae {
            Some(vae) => vae,
            None => &Pixels,
        }
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
