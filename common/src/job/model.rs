//! What is trained: the frozen model, the adapters in it and the head on top.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use crate::Digest;

/// Which frozen model a job uses. Each silo maps the name to a folder of its own.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneSpec {
    /// Name in the silos' configuration.
    pub name: String,
    /// Width d.
    pub hidden: u64,
    /// Number of transformer layers.
    pub layers: u32,
    /// BLAKE3 of the weights file; if given, silos with other weights decline.
    #[serde(default)]
    pub digest: Option<Digest>,
}

/// Bottleneck adapters A(h) = W_up GELU(W_down h + b_d) + b_u in the chosen layers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterSpec {
    /// Bottleneck r of the global adapter.
    pub bottleneck: u64,
    /// Bottleneck of the private adapter; the global one's if absent.
    #[serde(default)]
    pub private_bottleneck: Option<u64>,
    /// Layers that carry adapters, counted from 0; all if empty.
    #[serde(default)]
    pub layers: BTreeSet<u32>,
    /// Where in these layers they stand. The layout does not depend on it.
    #[serde(default, skip_serializing_if = "AdapterPosition::is_default")]
    pub position: AdapterPosition,
    /// How the two adapters' outputs are joined.
    #[serde(default)]
    pub combine: Combine,
    /// s_g: scale of the global adapter's output.
    #[serde(default = "default_scale")]
    pub scale_global: f64,
    /// s_p: scale of the private adapter's output.
    #[serde(default = "default_scale")]
    pub scale_private: f64,
    /// Standard deviation of W_up at the start; not 0, because zero outputs make CKA 0/0.
    #[serde(default = "default_init_up")]
    pub init_up: f64,
    /// Where the private adapter starts.
    #[serde(default)]
    pub private_start: PrivateStart,
    /// Standard deviation of the noise on a private adapter that starts near the global one, relative to each tensor's own.
    #[serde(default = "default_private_noise")]
    pub private_noise: f64,
}

/// The part of a layer that adapters follow: they read its output, before its residual and LayerNorm.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdapterPosition {
    /// The feed-forward network, its second dense layer.
    #[default]
    Ffn,
    /// The attention, its output projection.
    Attention,
}

impl AdapterPosition {
    /// It is left out where it is written: what was before there was a choice has the same bytes still, and with them the same digest.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for AdapterPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ffn => "ffn",
            Self::Attention => "attention",
        })
    }
}

/// How the outputs of the two adapters are joined: h' = h + ...
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Combine {
    /// s_g A_g(h) + s_p A_p(h)
    #[default]
    Sum,
    /// (s_g A_g(h) + s_p A_p(h)) / 2
    Mean,
    /// g s_g A_g(h) + (1 - g) s_p A_p(h), g = sigmoid of one learned number a layer, kept private
    Gate,
}

/// Where a private adapter starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrivateStart {
    /// Own random weights, unlike the global adapter's.
    #[default]
    Independent,
    /// The first global adapter plus noise. Needs equal bottlenecks.
    NearGlobal,
}

/// The head on top of the pooled last hidden state.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadSpec {
    /// Private (label sets may differ) or shared (it travels with the adapter).
    #[serde(default)]
    pub sharing: HeadSharing,
    /// Outputs of a shared head; silos use the first as many as they have classes.
    #[serde(default)]
    pub classes: Option<u64>,
    /// How the last hidden states become one vector.
    #[serde(default)]
    pub pool: Pool,
}

/// Whether the head travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadSharing {
    /// Stays in the vault.
    #[default]
    Private,
    /// Part of the layout.
    Shared,
}

/// Pooling of the last hidden states.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pool {
    /// Mean over the tokens that are not padding.
    #[default]
    Mean,
    /// The first token.
    Cls,
}

fn default_scale() -> f64 {
    1.0
}
fn default_init_up() -> f64 {
    1e-3
}
fn default_private_noise() -> f64 {
    0.1
}
