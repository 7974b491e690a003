//! AutoencoderKL: images to latents of an eighth of their size (with four levels) and back (Rombach et al. 2021, arXiv 2112.10752).
//!
//! Names are those of `vae/diffusion_pytorch_model.safetensors`; the attention's older spelling (`query`, `key`, `value`, `proj_attn`) is read
//! too.

mod config;

use std::{collections::BTreeMap, path::Path};

use tch::Tensor;

pub use self::config::VaeConfig;
use super::{
    files,
    layers::{Conv, GroupNorm},
    linear::{Linear, Shape},
    params::{Compute, Params},
    resnet::{Downsample, Resnet, Upsample},
};
use crate::error::LearningError;

/// Epsilon of all norms, which is not in `config.json`.
const EPS: f64 = 1e-6;

/// The log of the variance is kept within these.
const LOG_VARIANCE: (f64, f64) = (-30.0, 20.0);

/// Attention of one head over all pixels, added to the map.
#[derive(Debug)]
struct PixelAttention {
    norm: GroupNorm,
    parts: [Linear; 4],
}

impl PixelAttention {
    fn take(
        params: &mut Params,
        name: &str,
        channels: i64,
        groups: i64,
    ) -> Result<Self, LearningError> {
        let norm = GroupNorm::take(params, &format!("{name}.group_norm"), channels, groups, EPS)?;
        let [q, k, v, out] = ["to_q", "to_k", "to_v", "to_out.0"].map(|part| {
            Linear::take(
                params,
                &format!("{name}.{part}"),
                (channels, channels),
                true,
                Shape::Matrix,
            )
        });
        Ok(Self {
            norm,
            parts: [q?, k?, v?, out?],
        })
    }

    fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        let (n, c, h, w) = x.size4()?;
        let pixels = self
            .norm
            .run(&x.f_view([n, c, h * w])?)?
            .f_transpose(1, 2)?;
        let [q, k, v, out] = &self.parts;
        let one_head = |linear: &Linear| -> Result<Tensor, LearningError> {
            Ok(linear.run(&pixels)?.f_unsqueeze(1)?)
        };
        let mixed = Tensor::f_scaled_dot_product_attention(
            &one_head(q)?,
            &one_head(k)?,
            &one_head(v)?,
            None::<&Tensor>,
            0.0,
            false,
            None,
            false,
        )?;
        let joined = out.run(&mixed.f_squeeze_dim(1)?)?;
        Ok(joined
            .f_transpose(1, 2)?
            .f_reshape([n, c, h, w])?
            .f_add(x)?)
    }
}

#[derive(Debug)]
struct Middle {
    first: Resnet,
    attention: PixelAttention,
    second: Resnet,
}

impl Middle {
    fn take(params: &mut Params, part: &str, config: &VaeConfig) -> Result<Self, LearningError> {
        let channels = config.channels[config.channels.len() - 1];
        let width = (channels, channels);
        let at = |name: &str| format!("{part}.mid_block.{name}");
        Ok(Self {
            first: Resnet::take(params, &at("resnets.0"), width, config.sizes())?,
            attention: PixelAttention::take(params, &at("attentions.0"), channels, config.groups)?,
            second: Resnet::take(params, &at("resnets.1"), width, config.sizes())?,
        })
    }

    fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        let x = self.first.run(x, None)?;
        self.second.run(&self.attention.run(&x)?, None)
    }
}

/// Both halves share this: an entry, levels of residual blocks, an exit.
#[derive(Debug)]
struct Ends {
    enter: Conv,
    norm_out: GroupNorm,
    leave: Conv,
}

#[derive(Debug)]
struct Encoder {
    ends: Ends,
    levels: Vec<(Vec<Resnet>, Option<Downsample>)>,
    middle: Middle,
    quant: Option<Conv>,
}

#[derive(Debug)]
struct Decoder {
    ends: Ends,
    levels: Vec<(Vec<Resnet>, Option<Upsample>)>,
    middle: Middle,
    post_quant: Option<Conv>,
}

fn resnets(
    params: &mut Params,
    name: &str,
    count: usize,
    (inputs, outputs): (i64, i64),
    config: &VaeConfig,
) -> Result<Vec<Resnet>, LearningError> {
    (0..count)
        .map(|place| {
            let inputs = if place == 0 { inputs } else { outputs };
            Resnet::take(
                params,
                &format!("{name}.resnets.{place}"),
                (inputs, outputs),
                config.sizes(),
            )
        })
        .collect()
}

impl Encoder {
    fn take(p: &mut Params, config: &VaeConfig) -> Result<Self, LearningError> {
        let channels = &config.channels;
        let last = channels.len() - 1;
        let doubled = 2 * config.latent_channels;
        let levels = (0..=last)
            .map(|level| {
                let name = format!("encoder.down_blocks.{level}");
                let width = (channels[level.saturating_sub(1)], channels[level]);
                let cells = resnets(p, &name, config.resnets, width, config)?;
                let downsample = (level < last)
                    .then(|| Downsample::take(p, &format!("{name}.downsamplers.0"), width.1, true))
                    .transpose()?;
                Ok((cells, downsample))
            })
            .collect::<Result<_, LearningError>>()?;
        Ok(Self {
            levels,
            middle: Middle::take(p, "encoder", config)?,
            ends: Ends {
                enter: Conv::take(p, "encoder.conv_in", (config.in_channels, channels[0]), 3)?,
                norm_out: GroupNorm::take(
                    p,
                    "encoder.conv_norm_out",
                    channels[last],
                    config.groups,
                    EPS,
                )?,
                leave: Conv::take(p, "encoder.conv_out", (channels[last], doubled), 3)?,
            },
            quant: config
                .quant_conv
                .then(|| Conv::take(p, "quant_conv", (doubled, doubled), 1))
                .transpose()?,
        })
    }

    fn run(&self, image: &Tensor) -> Result<Tensor, LearningError> {
        let mut x = self.ends.enter.run(image)?;
        for (cells, downsample) in &self.levels {
            for cell in cells {
                x = cell.run(&x, None)?;
            }
            if let Some(downsample) = downsample {
                x = downsample.run(&x)?;
            }
        }
        let x = self.middle.run(&x)?;
        let x = self
            .ends
            .leave
            .run(&self.ends.norm_out.run(&x)?.f_silu()?)?;
        self.quant
            .as_ref()
            .map_or(Ok(x.shallow_clone()), |conv| conv.run(&x))
    }
}

impl Decoder {
    fn take(p: &mut Params, config: &VaeConfig) -> Result<Self, LearningError> {
        let channels: Vec<i64> = config.channels.iter().rev().copied().collect();
        let last = channels.len() - 1;
        let latent = config.latent_channels;
        let levels = (0..=last)
            .map(|level| {
                let name = format!("decoder.up_blocks.{level}");
                let width = (channels[level.saturating_sub(1)], channels[level]);
                let cells = resnets(p, &name, config.resnets + 1, width, config)?;
                let upsample = (level < last)
                    .then(|| Upsample::take(p, &format!("{name}.upsamplers.0"), width.1))
                    .transpose()?;
                Ok((cells, upsample))
            })
            .collect::<Result<_, LearningError>>()?;
        Ok(Self {
            levels,
            middle: Middle::take(p, "decoder", config)?,
            ends: Ends {
                enter: Conv::take(p, "decoder.conv_in", (latent, channels[0]), 3)?,
                norm_out: GroupNorm::take(
                    p,
                    "decoder.conv_norm_out",
                    channels[last],
                    config.groups,
                    EPS,
                )?,
                leave: Conv::take(
                    p,
                    "decoder.conv_out",
                    (channels[last], config.out_channels),
                    3,
                )?,
            },
            post_quant: config
                .post_quant_conv
                .then(|| Conv::take(p, "post_quant_conv", (latent, latent), 1))
                .transpose()?,
        })
    }

    fn run(&self, latent: &Tensor) -> Result<Tensor, LearningError> {
        let latent = self
            .post_quant
            .as_ref()
            .map_or(Ok(latent.shallow_clone()), |conv| conv.run(latent))?;
        let mut x = self.middle.run(&self.ends.enter.run(&latent)?)?;
        for (cells, upsample) in &self.levels {
            for cell in cells {
                x = cell.run(&x, None)?;
            }
            if let Some(upsample) = upsample {
                x = upsample.run(&x, None)?;
            }
        }
        self.ends.leave.run(&self.ends.norm_out.run(&x)?.f_silu()?)
    }
}

/// What the encoder says of an image: a normal distribution for every number of the latent.
#[derive(Debug)]
pub struct Moments {
    /// Means, `[n, latent, h, w]`.
    pub mean: Tensor,
    /// Logs of the variances, of the same shape.
    pub log_variance: Tensor,
}

/// The autoencoder.
#[derive(Debug)]
pub struct Vae {
    config: VaeConfig,
    compute: Compute,
    tensors: BTreeMap<String, Tensor>,
    encoder: Encoder,
    decoder: Decoder,
}

/// The layout's name for a stored one.
fn rename(stored: &str) -> String {
    if !stored.contains(".attentions.") {
        return stored.to_owned();
    }
    let mut name = stored.to_owned();
    for (old, new) in [
        (".query.", ".to_q."),
        (".key.", ".to_k."),
        (".value.", ".to_v."),
        (".proj_attn.", ".to_out.0."),
    ] {
        name = name.replace(old, new);
    }
    name
}

impl Vae {
    /// Loads the folder `vae` of a model: `config.json` and `diffusion_pytorch_model.safetensors`.
    ///
    /// # Errors
    /// [`LearningError::Io`], [`LearningError::Config`], [`LearningError::Weights`] that names every missing and unexpected tensor.
    pub fn load(folder: &Path, compute: Compute) -> Result<Self, LearningError> {
        let config = VaeConfig::read(&folder.join("config.json"))?;
        let file = files::weights(folder, "diffusion_pytorch_model")?;
        Self::build(
            config,
            Params::open(&file, |stored| Some(rename(stored)), compute)?,
        )
    }

    /// Makes one from parameters.
    ///
    /// # Errors
    /// [`LearningError::Config`] if the configuration's numbers do not go together, and those of [`Params::finish`].
    pub fn build(config: VaeConfig, mut params: Params) -> Result<Self, LearningError> {
        let encoder = Encoder::take(&mut params, &config)?;
        let decoder = Decoder::take(&mut params, &config)?;
        let compute = params.compute();
        Ok(Self {
            tensors: params.finish()?,
            config,
            compute,
            encoder,
            decoder,
        })
    }

    /// Sizes.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Where and in what it computes.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// All weights by name; they share memory with the network's.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// Images `[n, in, h, w]` in -1..=1 to the distribution of their latents, unscaled.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn encode(&self, images: &Tensor) -> Result<Moments, LearningError> {
        let both = self.encode_raw(images)?.f_chunk(2, 1)?;
        let [mean, log_variance] = <[Tensor; 2]>::try_from(both)
            .map_err(|_| LearningError::Data("the encoder gave no two halves".to_owned()))?;
        Ok(Moments {
            mean,
            log_variance: log_variance.f_clamp(LOG_VARIANCE.0, LOG_VARIANCE.1)?,
        })
    }

    fn encode_raw(&self, images: &Tensor) -> Result<Tensor, LearningError> {
        self.encoder.run(images)
    }

    /// Unscaled latents `[n, latent, h, w]` to images `[n, out, h', w']`, about -1..=1.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor, LearningError> {
        self.decoder.run(latents)
    }
}

#[cfg(test)]
mod tests;
