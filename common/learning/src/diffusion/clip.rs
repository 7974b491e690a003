//! CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020), whose last hidden state steers the denoiser.
//!
//! Names are those of `text_encoder/model.safetensors`, with or without `text_model.` in front.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::{
    files,
    layers::LayerNorm,
    linear::{Linear, Shape, sites},
    params::{Compute, Params, Start},
};
use crate::error::LearningError;

#[derive(Debug, Deserialize)]
struct Fields {
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    max_position_embeddings: i64,
    hidden_act: String,
    layer_norm_eps: Option<f64>,
}

/// What stands between the two layers of a feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(1.702 x): CLIP as OpenAI trained it, and Stable Diffusion 1.x.
    QuickGelu,
    /// The exact one: OpenCLIP, and Stable Diffusion 2.x.
    Gelu,
}

/// Sizes of a text encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipConfig {
    /// Token ids are below this.
    pub vocab: i64,
    /// Hidden units.
    pub hidden: i64,
    /// Inner units of a feed-forward network.
    pub inner: i64,
    /// Layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: i64,
    /// The longest text in tokens.
    pub positions: i64,
    /// Of the feed-forward networks.
    pub activation: Activation,
    /// Epsilon of every norm.
    pub eps: f64,
}

impl ClipConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`LearningError::Io`], or [`LearningError::Config`] that says which field asks for what cannot be done.
    pub fn read(file: &Path) -> Result<Self, LearningError> {
        files::read_config(file, Self::parse)
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let fields: Fields = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        for (field, value, most) in [
            ("vocab_size", fields.vocab_size, 1 << 20),
            ("hidden_size", fields.hidden_size, 16_384),
            ("intermediate_size", fields.intermediate_size, 65_536),
            ("num_hidden_layers", fields.num_hidden_layers, 128),
            ("num_attention_heads", fields.num_attention_heads, 1024),
            (
                "max_position_embeddings",
                fields.max_position_embeddings,
                4096,
            ),
        ] {
            files::within(field, value, most)?;
        }
        if fields.hidden_size % fields.num_attention_heads != 0 {
            return Err(format!(
                "num_attention_heads {} does not divide hidden_size {}",
                fields.num_attention_heads, fields.hidden_size
            ));
        }
        if fields.max_position_embeddings < 3 {
            return Err("max_position_embeddings leaves no room for a word".to_owned());
        }
        let activation = match fields.hidden_act.as_str() {
            "quick_gelu" => Activation::QuickGelu,
            "gelu" => Activation::Gelu,
            other => {
                return Err(format!(
                    "hidden_act {other:?} is neither \"quick_gelu\" nor \"gelu\""
                ));
            }
        };
        Ok(Self {
            vocab: fields.vocab_size,
            hidden: fields.hidden_size,
            inner: fields.intermediate_size,
            layers: fields.num_hidden_layers as usize,
            heads: fields.num_attention_heads,
            positions: fields.max_position_embeddings,
            activation,
            eps: files::epsilon("layer_norm_eps", fields.layer_norm_eps.unwrap_or(1e-5))?,
        })
    }
}

#[derive(Debug)]
struct Layer {
    heads: i64,
    activation: Activation,
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    up: Linear,
    down: Linear,
}
sites!(Layer {
    q,
    k,
    v,
    out,
    up,
    down
});

impl Layer {
    fn take(params: &mut Params, index: usize, config: &ClipConfig) -> Result<Self, LearningError> {
        let at = |part: &str| format!("encoder.layers.{index}.{part}");
        let (hidden, inner) = (config.hidden, config.inner);
        let mut linear = |part: &str, size: (i64, i64)| {
            Linear::take(params, &at(part), size, true, Shape::Matrix)
        };
        let q = linear("self_attn.q_proj", (hidden, hidden))?;
        let k = linear("self_attn.k_proj", (hidden, hidden))?;
        let v = linear("self_attn.v_proj", (hidden, hidden))?;
        let out = linear("self_attn.out_proj", (hidden, hidden))?;
        let up = linear("mlp.fc1", (hidden, inner))?;
        let down = linear("mlp.fc2", (inner, hidden))?;
        Ok(Self {
            heads: config.heads,
            activation: config.activation,
            norm1: LayerNorm::take(params, &at("layer_norm1"), hidden, config.eps)?,
            q,
            k,
            v,
            out,
            norm2: LayerNorm::take(params, &at("layer_norm2"), hidden, config.eps)?,
            up,
            down,
        })
    }

    fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        let (n, t, d) = x.size3()?;
        let normed = self.norm1.run(x)?;
        let split = |linear: &Linear| -> Result<Tensor, LearningError> {
            Ok(linear
                .run(&normed)?
                .f_view([n, t, self.heads, d / self.heads])?
                .f_transpose(1, 2)?)
        };
        let mixed = Tensor::f_scaled_dot_product_attention(
            &split(&self.q)?,
            &split(&self.k)?,
            &split(&self.v)?,
            None::<&Tensor>,
            0.0,
            // A word sees those before it: the text encoder is a language model.
            true,
            None,
            false,
        )?;
        let mixed = mixed.f_transpose(1, 2)?.f_reshape([n, t, d])?;
        let x = x.f_add(&self.out.run(&mixed)?)?;
        let inner = self.up.run(&self.norm2.run(&x)?)?;
        let inner = match self.activation {
            Activation::Gelu => inner.f_gelu("none")?,
            Activation::QuickGelu => inner.f_mul(&inner.f_mul_scalar(1.702)?.f_sigmoid()?)?,
        };
        Ok(x.f_add(&self.down.run(&inner)?)?)
    }
}

/// The text encoder.
#[derive(Debug)]
pub struct ClipText {
    config: ClipConfig,
    compute: Compute,
    tensors: BTreeMap<String, Tensor>,
    tokens: Tensor,
    positions: Tensor,
    layers: Vec<Layer>,
    norm: LayerNorm,
}
sites!(ClipText { layers });

/// The layout's name for a stored one. Positions' numbers, which old exports hold, are not weights.
fn rename(stored: &str) -> Option<String> {
    let name = stored.strip_prefix("text_model.").unwrap_or(stored);
    (name != "embeddings.position_ids").then(|| name.to_owned())
}

impl ClipText {
    /// Loads the folder `text_encoder` of a model: `config.json` and `model.safetensors`.
    ///
    /// # Errors
    /// [`LearningError::Io`], [`LearningError::Config`], [`LearningError::Weights`] that names every missing and unexpected tensor.
    pub fn load(folder: &Path, compute: Compute) -> Result<Self, LearningError> {
        let config = ClipConfig::read(&folder.join("config.json"))?;
        let file = files::weights(folder, "model")?;
        Self::build(config, Params::open(&file, rename, compute)?)
    }

    /// Makes one from parameters.
    ///
    /// # Errors
    /// Those of [`Params::finish`].
    pub fn build(config: ClipConfig, mut params: Params) -> Result<Self, LearningError> {
        let p = &mut params;
        let table = Start::Normal(0.02);
        let tokens = p.take(
            "embeddings.token_embedding.weight",
            &[config.vocab, config.hidden],
            table,
        )?;
        let positions = p.take(
            "embeddings.position_embedding.weight",
            &[config.positions, config.hidden],
            table,
        )?;
        let layers = (0..config.layers)
            .map(|index| Layer::take(p, index, &config))
            .collect::<Result<_, _>>()?;
        let norm = LayerNorm::take(p, "final_layer_norm", config.hidden, config.eps)?;
        let compute = params.compute();
        Ok(Self {
            tensors: params.finish()?,
            config,
            compute,
            tokens,
            positions,
            layers,
            norm,
        })
    }

    /// Sizes.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// All weights by name; they share memory with the network's.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// The last hidden state `[n, t, d]` of token ids `[n, t]`, after the last norm.
    ///
    /// # Errors
    /// [`LearningError::Data`] if the texts are too long or an id is outside the vocabulary.
    pub fn run(&self, ids: &Tensor) -> Result<Tensor, LearningError> {
        let (_, t) = ids.size2()?;
        if t < 1 || t > self.config.positions {
            return Err(LearningError::Data(format!(
                "a text has {t} tokens, but the encoder has positions for {}",
                self.config.positions
            )));
        }
        let ids = ids
            .f_to_kind(Kind::Int64)?
            .f_to_device(self.compute.device)?;
        let (least, most) = (
            ids.f_min()?.f_int64_value(&[])?,
            ids.f_max()?.f_int64_value(&[])?,
        );
        if least < 0 || most >= self.config.vocab {
            return Err(LearningError::Data(format!(
                "token ids {least}..={most} are not all in the encoder's vocabulary of {}",
                self.config.vocab
            )));
        }
        let words = Tensor::f_embedding(&self.tokens, &ids, -1, false, false)?;
        let mut x = words.f_add(&self.positions.f_narrow(0, 0, t)?)?;
        for layer in &self.layers {
            x = layer.run(&x)?;
        }
        self.norm.run(&x)
    }
}

#[cfg(test)]
mod tests;
