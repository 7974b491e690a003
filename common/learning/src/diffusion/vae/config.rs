//! An autoencoder's `config.json`.

use std::path::Path;

use serde::Deserialize;

use super::EPS;
use crate::{
    diffusion::{files, resnet::ResnetSizes},
    error::LearningError,
};

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

    pub(super) fn sizes(&self) -> ResnetSizes {
        ResnetSizes {
            time: None,
            groups: self.groups,
            eps: EPS,
        }
    }
}
