//! `config.json`: the family and the sizes.

use std::{fmt, fs, path::Path};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::LearningError;

/// The model families that Concord can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// BERT, also as a sentence-transformers encoder.
    Bert,
    /// RoBERTa: positions counted from the padding id, one token type.
    Roberta,
    /// XLM-R: RoBERTa's network with another vocabulary.
    XlmRoberta,
    /// DistilBERT: no token types.
    #[serde(rename = "distilbert")]
    DistilBert,
}

impl Family {
    /// `model_type` as Hugging Face writes it.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::Roberta => "roberta",
            Self::XlmRoberta => "xlm-roberta",
            Self::DistilBert => "distilbert",
        }
    }

    /// Whether positions are counted from the padding id.
    pub(crate) fn counts_from_padding(self) -> bool {
        matches!(self, Self::Roberta | Self::XlmRoberta)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type())
    }
}

/// The sizes of a backbone.
#[derive(Debug, Clone, PartialEq)]
pub struct BackboneConfig {
    /// Its family.
    pub family: Family,
    /// Hidden units, `d`.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads per layer.
    pub heads: usize,
    /// Inner units of the feed-forward network.
    pub intermediate: usize,
    /// Token ids are below this.
    pub vocab: usize,
    /// The longest row in tokens, special ones included.
    pub max_positions: usize,
    /// Rows of the position table; RoBERTa's has `pad_id + 1` more than `max_positions`.
    pub position_rows: usize,
    /// Token types (segments); 0 where the family has none.
    pub type_vocab: usize,
    /// The id that pads.
    pub pad_id: i64,
    /// Epsilon of every LayerNorm.
    pub layer_norm_eps: f64,
}

#[derive(Deserialize)]
struct Kind {
    model_type: String,
}

/// The fields of BERT's and RoBERTa's `config.json` that matter here.
#[derive(Deserialize)]
struct BertFields {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    hidden_act: String,
    vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "two")]
    type_vocab_size: usize,
    pad_token_id: Option<i64>,
    layer_norm_eps: Option<f64>,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
}

/// The fields of DistilBERT's `config.json` that matter here.
#[derive(Deserialize)]
struct DistilBertFields {
    dim: usize,
    n_layers: usize,
    n_heads: usize,
    hidden_dim: usize,
    activation: String,
    vocab_size: usize,
    max_position_embeddings: usize,
    pad_token_id: Option<i64>,
}

fn two() -> usize {
    2
}

/// BERT's default, and the constant that DistilBERT uses.
const BERT_EPS: f64 = 1e-12;

impl BackboneConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`LearningError::Io`], or [`LearningError::Config`] that says which field asks for what cannot be done.
    pub fn read(file: &Path) -> Result<Self, LearningError> {
        let text = fs::read(file).map_err(|source| LearningError::io(file, source))?;
        Self::parse(&text)
            .map_err(|reason| LearningError::Config(format!("{}: {reason}", file.display())))
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let Kind { model_type } = fields(text)?;
        let config = match model_type.as_str() {
            "bert" => Self::from_bert(Family::Bert, fields(text)?)?,
            "roberta" => Self::from_bert(Family::Roberta, fields(text)?)?,
            "xlm-roberta" => Self::from_bert(Family::XlmRoberta, fields(text)?)?,
            "distilbert" => Self::from_distilbert(&fields(text)?)?,
            other => {
                return Err(format!(
                    "model_type {other:?} is not one of bert, roberta, xlm-roberta, distilbert"
                ));
            }
        };
        config.check()?;
        Ok(config)
    }

    fn from_bert(family: Family, fields: BertFields) -> Result<Self, String> {
        exact_gelu("hidden_act", &fields.hidden_act)?;
        if let Some(other) = fields
            .position_embedding_type
            .filter(|kind| kind != "absolute")
        {
            return Err(format!(
                "position_embedding_type {other:?} is not supported, only \"absolute\""
            ));
        }
        if fields.is_decoder {
            return Err("is_decoder is true; only encoders can be a backbone".to_owned());
        }
        let pad_id = fields
            .pad_token_id
            .unwrap_or(i64::from(family.counts_from_padding()));
        let offset = if family.counts_from_padding() {
            pad_id.max(0) as usize + 1
        } else {
            0
        };
        Ok(Self {
            family,
            hidden: fields.hidden_size,
            layers: fields.num_hidden_layers,
            heads: fields.num_attention_heads,
            intermediate: fields.intermediate_size,
            vocab: fields.vocab_size,
            max_positions: fields.max_position_embeddings.saturating_sub(offset),
            position_rows: fields.max_position_embeddings,
            type_vocab: fields.type_vocab_size,
            pad_id,
            layer_norm_eps: fields.layer_norm_eps.unwrap_or(BERT_EPS),
        })
    }

    fn from_distilbert(fields: &DistilBertFields) -> Result<Self, String> {
        exact_gelu("activation", &fields.activation)?;
        Ok(Self {
            family: Family::DistilBert,
            hidden: fields.dim,
            layers: fields.n_layers,
            heads: fields.n_heads,
            intermediate: fields.hidden_dim,
            vocab: fields.vocab_size,
            max_positions: fields.max_position_embeddings,
            position_rows: fields.max_position_embeddings,
            type_vocab: 0,
            pad_id: fields.pad_token_id.unwrap_or(0),
            layer_norm_eps: BERT_EPS,
        })
    }

    fn check(&self) -> Result<(), String> {
        let sizes = [
            ("hidden size", self.hidden),
            ("number of layers", self.layers),
            ("number of heads", self.heads),
            ("intermediate size", self.intermediate),
            ("vocabulary", self.vocab),
            ("number of usable positions", self.max_positions),
        ];
        if self.pad_id < 0 || self.pad_id as usize >= self.vocab {
            return Err(format!(
                "pad_token_id {} is outside the vocabulary of {}",
                self.pad_id, self.vocab
            ));
        }
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(format!("the {name} is 0"));
        }
        if !self.hidden.is_multiple_of(self.heads) {
            return Err(format!(
                "the hidden size {} is not a multiple of the {} heads",
                self.hidden, self.heads
            ));
        }
        if self.family != Family::DistilBert && self.type_vocab == 0 {
            return Err("type_vocab_size is 0".to_owned());
        }
        if !(self.layer_norm_eps > 0.0 && self.layer_norm_eps < 1.0) {
            return Err(format!(
                "layer_norm_eps {} is out of range",
                self.layer_norm_eps
            ));
        }
        Ok(())
    }
}

fn fields<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    serde_json::from_slice(text).map_err(|error| error.to_string())
}

fn exact_gelu(field: &str, activation: &str) -> Result<(), String> {
    if activation == "gelu" {
        return Ok(());
    }
    Err(format!(
        "{field} {activation:?} is not supported, only \"gelu\""
    ))
}
