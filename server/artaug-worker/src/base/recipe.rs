//! What the embedded base model is, and how it is trained: numbers, and the configuration files that follow from them.

use std::{collections::BTreeMap, fs, path::Path};

use concord_artaug::data::DATA_VERSION;
use concord_common::digest::Digest;
use concord_learning::{diffusion::pretrain::Course, optimiser::AdamWSettings};
use serde::Serialize;
use serde_json::{Value, json};

use super::{BaseError, vocabulary::Vocabulary};

/// Sizes and course of a base model. Whatever changes here makes another run: it is part of the fingerprint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    /// Pixels of an image's side.
    pub side: u32,
    /// Pixels of a patch's side, which are the channels of one latent pixel.
    pub patch: i64,
    /// Channels of the UNet's levels. All but the first have transformers.
    pub widths: Vec<i64>,
    /// Residual blocks of a level on the way down.
    pub blocks: i64,
    /// Groups of the norms.
    pub groups: i64,
    /// Attention heads, in UNet and text encoder.
    pub heads: i64,
    /// Hidden units of the text encoder.
    pub text_width: i64,
    /// Its layers.
    pub text_layers: i64,
    /// The longest caption in tokens, with its two ends.
    pub tokens: i64,
    /// Images of a step.
    pub batch: usize,
    /// Part of the captions that are empty.
    pub empty: f64,
    /// Learning rate after warm-up.
    pub learning_rate: f64,
    /// The step from which the rate falls with the square root of the step.
    pub decay_from: u64,
    /// Steps of warm-up.
    pub warmup: u32,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Norm to which gradients are clipped.
    pub clip_norm: f64,
    /// Memory of the averaged weights.
    pub average: f64,
}

impl Recipe {
    /// The one whose result is in the repository.
    pub fn icons() -> Self {
        Self {
            side: 32,
            patch: 2,
            widths: vec![64, 128],
            blocks: 1,
            groups: 16,
            heads: 4,
            text_width: 96,
            text_layers: 2,
            tokens: 40,
            batch: 32,
            empty: 0.1,
            learning_rate: 6e-4,
            decay_from: 6000,
            warmup: 500,
            weight_decay: 0.01,
            clip_norm: 1.0,
            average: 0.9995,
        }
    }

    /// How the steps go.
    pub fn course(&self) -> Course {
        Course {
            learning_rate: self.learning_rate,
            decay_from: self.decay_from,
            adamw: AdamWSettings {
                weight_decay: self.weight_decay,
                warmup_steps: self.warmup,
                clip_norm: self.clip_norm,
            },
            average: self.average,
        }
    }

    /// All that a run's bytes depend on, by name.
    pub fn fingerprint(
        &self,
        seed: u64,
        threads: usize,
        icons: &BTreeMap<String, Digest>,
    ) -> BTreeMap<String, String> {
        let mut entries = BTreeMap::from([
            ("recipe".to_owned(), json!(self).to_string()),
            ("seed".to_owned(), seed.to_string()),
            ("threads".to_owned(), threads.to_string()),
            ("data version".to_owned(), DATA_VERSION.to_string()),
        ]);
        for (set, digest) in icons {
            entries.insert(format!("icons {set}"), digest.to_string());
        }
        entries
    }

    /// Writes everything of a model folder but the weights.
    ///
    /// # Errors
    /// If the folder exists or a file cannot be written.
    pub fn write_folder(&self, folder: &Path, words: &Vocabulary) -> Result<(), BaseError> {
        let make = |path: &Path| fs::create_dir(path).map_err(|error| BaseError::io(path, error));
        make(folder)?;
        let put = |part: &str, name: &str, text: String| {
            let path = folder.join(part);
            if !path.is_dir() {
                make(&path)?;
            }
            let file = path.join(name);
            fs::write(&file, text).map_err(|error| BaseError::io(&file, error))
        };
        put("", "model_index.json", pretty(&self.index()))?;
        put("unet", "config.json", pretty(&self.unet()))?;
        put("text_encoder", "config.json", pretty(&self.text(words)))?;
        put("scheduler", "scheduler_config.json", pretty(&scheduler()))?;
        put("tokenizer", "vocab.json", words.vocab_json())?;
        put("tokenizer", "merges.txt", words.merges_text())?;
        put(
            "tokenizer",
            "tokenizer_config.json",
            pretty(&json!({
                "bos_token": Vocabulary::START,
                "eos_token": Vocabulary::END,
                "unk_token": Vocabulary::END,
                "pad_token": Vocabulary::END,
                "model_max_length": self.tokens,
                "tokenizer_class": "CLIPTokenizer",
            })),
        )
    }

    fn index(&self) -> Value {
        json!({
            "_class_name": "StableDiffusionPipeline",
            "_concord_patches": self.patch,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
        })
    }

    fn unet(&self) -> Value {
        let channels = 3 * self.patch * self.patch;
        let level = |place: usize, way: &str| {
            let kind = if place == 0 { "" } else { "CrossAttn" };
            format!("{kind}{way}Block2D")
        };
        let down: Vec<String> = (0..self.widths.len())
            .map(|place| level(place, "Down"))
            .collect();
        let up: Vec<String> = (0..self.widths.len())
            .rev()
            .map(|place| level(place, "Up"))
            .collect();
        json!({
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "attention_head_dim": self.heads,
            "block_out_channels": self.widths,
            "cross_attention_dim": self.text_width,
            "down_block_types": down,
            "flip_sin_to_cos": true,
            "freq_shift": 0,
            "in_channels": channels,
            "layers_per_block": self.blocks,
            "norm_eps": 1e-5,
            "norm_num_groups": self.groups,
            "out_channels": channels,
            "sample_size": i64::from(self.side) / self.patch,
            "up_block_types": up,
            "use_linear_projection": true,
        })
    }

    fn text(&self, words: &Vocabulary) -> Value {
        json!({
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "bos_token_id": words.start(),
            "eos_token_id": words.end(),
            "pad_token_id": words.end(),
            "hidden_act": "quick_gelu",
            "hidden_size": self.text_width,
            "intermediate_size": 4 * self.text_width,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": self.tokens,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.text_layers,
            "vocab_size": words.len(),
        })
    }
}

/// A straight flow. Images this small are still recognisable at times at which large ones are noise, so times are not shifted.
fn scheduler() -> Value {
    json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 1.0,
    })
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
