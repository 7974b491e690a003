//! A UNet's `config.json`: what is read of it, and what it must not ask for.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{diffusion::files, error::LearningError};

/// Fields that change the network in ways that Stable Diffusion 1.x and 2.x do not use, and the value that leaves it alone.
///
/// `upcast_attention`, which 2.1 has, is read past: it keeps f16 from running out of range in attention, and a job computes in f32 or bf16, which has
/// the range of f32.
const NEUTRAL: [(&str, &str); 26] = [
    ("act_fn", "\"silu\""),
    ("addition_embed_type", "null"),
    ("addition_time_embed_dim", "null"),
    ("attention_type", "\"default\""),
    ("center_input_sample", "false"),
    ("class_embed_type", "null"),
    ("class_embeddings_concat", "false"),
    ("conv_in_kernel", "3"),
    ("conv_out_kernel", "3"),
    ("cross_attention_norm", "null"),
    ("downsample_padding", "1"),
    ("dual_cross_attention", "false"),
    ("encoder_hid_dim", "null"),
    ("encoder_hid_dim_type", "null"),
    ("mid_block_only_cross_attention", "null"),
    ("mid_block_type", "\"UNetMidBlock2DCrossAttn\""),
    ("num_attention_heads", "null"),
    ("num_class_embeds", "null"),
    ("only_cross_attention", "false"),
    ("resnet_skip_time_act", "false"),
    ("resnet_time_scale_shift", "\"default\""),
    ("reverse_transformer_layers_per_block", "null"),
    ("time_cond_proj_dim", "null"),
    ("time_embedding_act_fn", "null"),
    ("time_embedding_type", "\"positional\""),
    ("timestep_post_act", "null"),
];

/// The same for numbers that may be written as 1 or 1.0.
const ONES: [&str; 2] = ["mid_block_scale_factor", "resnet_out_scale_factor"];

/// A number for all levels, or one for each.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum PerLevel {
    All(i64),
    Each(Vec<i64>),
}

impl PerLevel {
    fn spread(&self, levels: usize, field: &str, most: i64) -> Result<Vec<i64>, String> {
        let values = match self {
            Self::All(value) => vec![*value; levels],
            Self::Each(values) if values.len() == levels => values.clone(),
            Self::Each(values) => {
                return Err(format!(
                    "{field} has {} numbers for {levels} levels",
                    values.len()
                ));
            }
        };
        match values.iter().find(|&&value| value < 1 || value > most) {
            Some(value) => Err(format!("{field} {value} is not in 1..={most}")),
            None => Ok(values),
        }
    }
}

#[derive(Debug, Deserialize)]
struct Fields {
    #[serde(default = "four")]
    in_channels: i64,
    #[serde(default = "four")]
    out_channels: i64,
    sample_size: Option<Size>,
    #[serde(default = "yes")]
    flip_sin_to_cos: bool,
    #[serde(default)]
    freq_shift: i64,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    block_out_channels: Vec<i64>,
    #[serde(default = "two_layers")]
    layers_per_block: PerLevel,
    norm_num_groups: Option<i64>,
    norm_eps: Option<f64>,
    cross_attention_dim: i64,
    #[serde(default = "eight_heads")]
    attention_head_dim: PerLevel,
    #[serde(default = "one_block")]
    transformer_layers_per_block: PerLevel,
    #[serde(default)]
    use_linear_projection: bool,
    time_embedding_dim: Option<i64>,
}

/// One number for height and width, or both.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Size {
    Square(i64),
    Sides([i64; 2]),
}

fn four() -> i64 {
    4
}
fn yes() -> bool {
    true
}
fn two_layers() -> PerLevel {
    PerLevel::All(2)
}
fn eight_heads() -> PerLevel {
    PerLevel::All(8)
}
fn one_block() -> PerLevel {
    PerLevel::All(1)
}

/// One level of the UNet, seen from above: its way down and its way up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Level {
    /// Channels.
    pub channels: i64,
    /// Residual blocks on the way down; the way up has one more.
    pub resnets: usize,
    /// Attention heads (the field `attention_head_dim` counts heads, whatever its name says).
    pub heads: i64,
    /// Transformer blocks behind every residual block.
    pub depth: usize,
    /// Whether the way down has transformers.
    pub attends_down: bool,
    /// Whether the way up has transformers.
    pub attends_up: bool,
}

/// Sizes of a UNet.
#[derive(Debug, Clone, PartialEq)]
pub struct UNetConfig {
    /// Channels that enter.
    pub in_channels: i64,
    /// Channels that leave.
    pub out_channels: i64,
    /// Height and width that it was trained at.
    pub sample_size: Option<(i64, i64)>,
    /// Whether the time's cosines come before its sines.
    pub cosine_first: bool,
    /// Subtracted from the number of frequencies.
    pub freq_shift: i64,
    /// From full resolution downwards.
    pub levels: Vec<Level>,
    /// Groups of every GroupNorm.
    pub groups: i64,
    /// Epsilon of the residual blocks' norms.
    pub eps: f64,
    /// Values per token of the text.
    pub context: i64,
    /// Whether projections are matrices (2.x) or convolutions (1.x).
    pub linear_projections: bool,
    /// Values of the time's embedding.
    pub time: i64,
}

impl UNetConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`LearningError::Io`], or [`LearningError::Config`] that says which field asks for what cannot be done.
    pub fn read(file: &Path) -> Result<Self, LearningError> {
        files::read_config(file, Self::parse)
    }

    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let all: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| error.to_string())?;
        files::neutral(&all, &NEUTRAL)?;
        for field in ONES {
            if let Some(value) = all.get(field)
                && value
                    .as_f64()
                    .is_none_or(|factor| (factor - 1.0).abs() > 0.0)
            {
                return Err(format!("{field} {value} is not supported, only 1"));
            }
        }
        let fields: Fields = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        Self::checked(&fields)
    }

    fn checked(fields: &Fields) -> Result<Self, String> {
        let channels = &fields.block_out_channels;
        let count = channels.len();
        files::within("levels in block_out_channels", count as i64, 8)?;
        if fields.down_block_types.len() != count || fields.up_block_types.len() != count {
            return Err(format!(
                "block_out_channels has {count} levels, down_block_types {}, up_block_types {}",
                fields.down_block_types.len(),
                fields.up_block_types.len()
            ));
        }
        let layers = fields
            .layers_per_block
            .spread(count, "layers_per_block", 16)?;
        let heads = fields
            .attention_head_dim
            .spread(count, "attention_head_dim", 1024)?;
        let depths = fields.transformer_layers_per_block.spread(
            count,
            "transformer_layers_per_block",
            32,
        )?;
        let levels = (0..count)
            .map(|level| {
                files::within("block_out_channels", channels[level], 16_384)?;
                Ok(Level {
                    channels: channels[level],
                    resnets: layers[level] as usize,
                    heads: heads[level],
                    depth: depths[level] as usize,
                    attends_down: attends(
                        &fields.down_block_types[level],
                        "CrossAttnDownBlock2D",
                        "DownBlock2D",
                    )?,
                    attends_up: attends(
                        &fields.up_block_types[count - 1 - level],
                        "CrossAttnUpBlock2D",
                        "UpBlock2D",
                    )?,
                })
            })
            .collect::<Result<Vec<_>, String>>()?;
        let time = fields.time_embedding_dim.unwrap_or(4 * channels[0]);
        for (field, value, most) in [
            ("in_channels", fields.in_channels, 64),
            ("out_channels", fields.out_channels, 64),
            ("cross_attention_dim", fields.cross_attention_dim, 16_384),
            ("time_embedding_dim", time, 65_536),
        ] {
            files::within(field, value, most)?;
        }
        if channels[0] % 2 != 0 {
            return Err(format!(
                "the first of block_out_channels, {}, is odd: the time's sines and cosines need an even number",
                channels[0]
            ));
        }
        if !(0..=1).contains(&fields.freq_shift) {
            return Err(format!(
                "freq_shift {} is neither 0 nor 1",
                fields.freq_shift
            ));
        }
        if channels[0] / 2 <= fields.freq_shift {
            return Err(format!(
                "the first of block_out_channels, {}, is too small",
                channels[0]
            ));
        }
        let sample_size = fields.sample_size.map(|size| match size {
            Size::Square(side) => (side, side),
            Size::Sides([height, width]) => (height, width),
        });
        if let Some((height, width)) = sample_size {
            files::within("sample_size", height, 4096)?;
            files::within("sample_size", width, 4096)?;
        }
        Ok(Self {
            in_channels: fields.in_channels,
            out_channels: fields.out_channels,
            sample_size,
            cosine_first: fields.flip_sin_to_cos,
            freq_shift: fields.freq_shift,
            levels,
            groups: fields.norm_num_groups.unwrap_or(32),
            eps: files::epsilon("norm_eps", fields.norm_eps.unwrap_or(1e-5))?,
            context: fields.cross_attention_dim,
            linear_projections: fields.use_linear_projection,
            time,
        })
    }
}

fn attends(found: &str, with: &str, without: &str) -> Result<bool, String> {
    if found == with {
        Ok(true)
    } else if found == without {
        Ok(false)
    } else {
        Err(format!(
            "block type {found:?} is neither {with} nor {without}"
        ))
    }
}
