//! AutoencoderKL: images to latents of an eighth of their size (with four levels) and back (Rombach et al. 2021, arXiv 2112.10752).
//!
//! Names are those of `vae/diffusion_pytorch_model.safetensors`; the attention's older spelling (`query`, `key`, `value`, `proj_attn`) is read
//! too.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;
use tch::Tensor;

use super::{
    files,
    layers::{Conv, GroupNorm},
    linear::{Linear, Shape},
    params::{Compute, Params},
    resnet::{Downsample, Resnet, ResnetSizes, Upsample},
};
use crate::error::LearningError;

/// Epsilon of all norms, which is not in `config.json`.
const EPS: f64 = 1e-6;

/// The log of the variance is kept within these.
const LOG_VARIANCE: (f64, f64) = (-30.0, 20.0);

#[derive(Debug, Deserialize)]
struct Fields {
    #[serde(default = "three")]
    in_channels: i64,
    #[serde(default = "three")]
    out_channels: i64,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    block_out_channels: Vec<i64>,
    #[serde(default = "one")]
    layers_per_block: i64,
    #[serde(default = "four")]
    latent_channels: i64,
    #[serde(default = "thirty_two")]
    norm_num_groups: i64,
    #[serde(default = "stable_diffusions")]
    scaling_factor: f64,
    shift_factor: Option<f64>,
    latents_mean: Option<Vec<f64>>,
    latents_std: Option<Vec<f64>>,
    act_fn: Option<String>,
    #[serde(default = "yes")]
    use_quant_conv: bool,
    #[serde(default = "yes")]
    use_post_quant_conv: bool,
    #[serde(default = "yes")]
    mid_block_add_attention: bool,
}

fn one() -> i64 {
    1
}
fn three() -> i64 {
    3
}
fn four() -> i64 {
    4
}
fn thirty_two() -> i64 {
    32
}
fn stable_diffusions() -> f64 {
    0.18215
}
fn yes() -> bool {
    true
}

/// Sizes of an autoencoder.
#[derive(Debug, Clone, PartialEq)]
pub struct VaeConfig {
    /// Channels of the images that enter.
    pub in_channels: i64,
    /// Channels of the images that leave.
    pub out_channels: i64,
    /// Channels from full resolution downwards.
    pub channels: Vec<i64>,
    /// Residual blocks of a level of the encoder; the decoder's have one more.
    pub resnets: usize,
    /// Channels of a latent.
    pub latent_channels: i64,
    /// Groups of every norm.
    pub groups: i64,
    /// Latents times this are what the denoiser sees.
    pub scaling_factor: f64,
    /// Subtracted from latents before that.
    pub shift_factor: f64,
    /// Whether the encoder's output goes through one more layer.
    pub quant_conv: bool,
    /// Whether the decoder's input does.
    pub post_quant_conv: bool,
}

impl VaeConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`LearningError::Io`], or [`LearningError::Config`] that says which field asks for what cannot be done.
    pub fn read(file: &Path) -> Result<Self, LearningError> {
        files::read_config(file, Self::parse)
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let fields: Fields = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let levels = fields.block_out_channels.len();
        files::within("levels in block_out_channels", levels as i64, 8)?;
        for (field, found, only) in [
            (
                "down_block_types",
                &fields.down_block_types,
                "DownEncoderBlock2D",
            ),
            ("up_block_types", &fields.up_block_types, "UpDecoderBlock2D"),
        ] {
            if found.len() != levels || found.iter().any(|name| name != only) {
                return Err(format!(
                    "{field} {found:?} is not {levels} times {only}, which is all that is supported"
                ));
            }
        }
        for channels in &fields.block_out_channels {
            files::within("block_out_channels", *channels, 16_384)?;
        }
        for (field, value, most) in [
            ("in_channels", fields.in_channels, 64),
            ("out_channels", fields.out_channels, 64),
            ("layers_per_block", fields.layers_per_block, 16),
            ("latent_channels", fields.latent_channels, 64),
            ("norm_num_groups", fields.norm_num_groups, 1024),
        ] {
            files::within(field, value, most)?;
        }
        if !(fields.scaling_factor > 1e-6 && fields.scaling_factor < 1e6) {
            return Err(format!(
                "scaling_factor {} is out of range",
                fields.scaling_factor
            ));
        }
        let shift_factor = fields.shift_factor.unwrap_or(0.0);
        if !shift_factor.is_finite() {
            return Err(format!("shift_factor {shift_factor} is out of range"));
        }
        if fields.act_fn.as_deref().unwrap_or("silu") != "silu" {
            return Err("act_fn is not supported, only \"silu\"".to_owned());
        }
        if fields.latents_mean.is_some() || fields.latents_std.is_some() {
            return Err("latents_mean and latents_std are not supported, only null".to_owned());
        }
        if !fields.mid_block_add_attention {
            return Err("mid_block_add_attention false is not supported".to_owned());
        }
        Ok(Self {
            in_channels: fields.in_channels,
            out_channels: fields.out_channels,
            channels: fields.block_out_channels,
            resnets: fields.layers_per_block as usize,
            latent_channels: fields.latent_channels,
            groups: fields.norm_num_groups,
            scaling_factor: fields.scaling_factor,
            shift_factor,
            quant_conv: fields.use_quant_conv,
            post_quant_conv: fields.use_post_quant_conv,
        })
    }

    /// How many pixels a side of a latent's pixel covers.
    pub fn factor(&self) -> i64 {
        1 << (self.channels.len() - 1)
    }

    fn sizes(&self) -> ResnetSizes {
        ResnetSizes {
            time: None,
            groups: self.groups,
            eps: EPS,
        }
    }
}

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
        Ok(joined.f_transpose(1, 2)?.f_reshape([n, c, h, w])?.f_add(x)?)
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
            attention: PixelAttention::take(
                params,
                &at("attentions.0"),
                channels,
                config.groups,
            )?,
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
                    .then(|| {
                        Downsample::take(p, &format!("{name}.downsamplers.0"), width.1, true)
                    })
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
        self.quant.as_ref().map_or(Ok(x.shallow_clone()), |conv| conv.run(&x))
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
        self.ends
            .leave
            .run(&self.ends.norm_out.run(&x)?.f_silu()?)
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
fn rename(stored: &str) -> Option<String> {
    if !stored.contains(".attentions.") {
        return Some(stored.to_owned());
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
    Some(name)
}

impl Vae {
    /// Loads the folder `vae` of a model: `config.json` and `diffusion_pytorch_model.safetensors`.
    ///
    /// # Errors
    /// [`LearningError::Io`], [`LearningError::Config`], [`LearningError::Weights`] that names every missing and unexpected tensor.
    pub fn load(folder: &Path, compute: Compute) -> Result<Self, LearningError> {
        let config = VaeConfig::read(&folder.join("config.json"))?;
        let file = files::weights(folder, "diffusion_pytorch_model")?;
        Self::build(config, Params::open(&file, rename, compute)?)
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
