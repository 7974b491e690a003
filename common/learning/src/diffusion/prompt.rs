//! CLIP's byte-level BPE: prompts to token ids of one length.
//!
//! Reads the folder `tokenizer` of a model: `tokenizer.json` where there is one, otherwise `vocab.json` and `merges.txt`, from which the same
//! pipeline is put together (lower case, single spaces, CLIP's word pattern, byte symbols, `</w>` at a word's end).

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use tch::Tensor;
use tokenizers::{
    AddedToken, Encoding, Tokenizer, TruncationDirection, TruncationParams, TruncationStrategy,
};

use crate::error::LearningError;

/// Larger files than this are not read; the published ones have a megabyte.
const MOST_BYTES: u64 = 64 << 20;

/// The pieces that merges never cross.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// A prompt tokenizer.
#[derive(Debug, Clone)]
pub struct PromptTokenizer {
    file: PathBuf,
    inner: Tokenizer,
    length: usize,
    pad: i64,
}

impl PromptTokenizer {
    /// Loads the folder `tokenizer` for an encoder with that many positions and token ids.
    ///
    /// # Errors
    /// [`LearningError::Io`], [`LearningError::Tokenizer`] if the files are not CLIP's or have more ids than the encoder.
    pub fn load(folder: &Path, positions: i64, vocab: i64) -> Result<Self, LearningError> {
        let whole = folder.join("tokenizer.json");
        let (file, bytes) = if whole.is_file() {
            let bytes = read(&whole)?;
            (whole, bytes)
        } else {
            let file = folder.join("vocab.json");
            let text = assemble(&file, &folder.join("merges.txt"))?;
            (file, text.into_bytes())
        };
        let complain = |reason: String| LearningError::tokenizer(&file, reason);
        let mut inner =
            Tokenizer::from_bytes(bytes).map_err(|error| complain(error.to_string()))?;
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if i64::from(largest) >= vocab {
            return Err(complain(format!(
                "it has ids up to {largest}, but the text encoder has embeddings for {vocab}: the two do not belong together"
            )));
        }
        let id = |inner: &Tokenizer, token: &str| {
            inner
                .token_to_id(token)
                .map(i64::from)
                .ok_or_else(|| complain(format!("it has no token {token}")))
        };
        let (start, end) = (id(&inner, START)?, id(&inner, END)?);
        let pad = match special(folder, "pad_token")? {
            Some(token) => id(&inner, &token)?,
            None => end,
        };
        // transformers takes these out of a prompt before anything else, even the "!" that pads in Stable Diffusion 2.x.
        for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            if let Some(token) = special(folder, name)? {
                id(&inner, &token)?;
                inner
                    .add_special_tokens([AddedToken::from(token, true)])
                    .map_err(|error| complain(error.to_string()))?;
            }
        }
        let length = positions as usize;
        inner.with_padding(None);
        inner
            .with_truncation(Some(TruncationParams {
                direction: TruncationDirection::Right,
                max_length: length,
                strategy: TruncationStrategy::LongestFirst,
                stride: 0,
            }))
            .map_err(|error| complain(error.to_string()))?;
        let loaded = Self {
            file,
            inner,
            length,
            pad,
        };
        let empty = loaded.ids("")?;
        if empty[..2] != [start, end] {
            return Err(LearningError::tokenizer(
                &loaded.file,
                format!("an empty prompt must begin with {START} and {END}"),
            ));
        }
        Ok(loaded)
    }

    /// The ids of one prompt, cut and padded to the encoder's length.
    ///
    /// # Errors
    /// [`LearningError::Tokenizer`] if the prompt cannot be encoded.
    pub fn ids(&self, prompt: &str) -> Result<Vec<i64>, LearningError> {
        let encoding = self.encode(prompt)?;
        let mut ids: Vec<i64> = encoding.get_ids().iter().map(|&id| i64::from(id)).collect();
        ids.resize(self.length, self.pad);
        Ok(ids)
    }

    /// Whether a prompt is longer than the encoder: its end is cut off.
    ///
    /// # Errors
    /// [`LearningError::Tokenizer`] if the prompt cannot be encoded.
    pub fn cuts(&self, prompt: &str) -> Result<bool, LearningError> {
        Ok(!self.encode(prompt)?.get_overflowing().is_empty())
    }

    fn encode(&self, prompt: &str) -> Result<Encoding, LearningError> {
        self.inner
            .encode_fast(prompt, true)
            .map_err(|error| LearningError::tokenizer(&self.file, error.to_string()))
    }

    /// The ids of several prompts, `[n, length]`.
    ///
    /// # Errors
    /// Those of [`PromptTokenizer::ids`], and [`LearningError::Data`] for no prompts.
    pub fn batch(&self, prompts: &[&str]) -> Result<Tensor, LearningError> {
        if prompts.is_empty() {
            return Err(LearningError::Data("there is no prompt".to_owned()));
        }
        let mut all = Vec::with_capacity(prompts.len() * self.length);
        for prompt in prompts {
            all.extend(self.ids(prompt)?);
        }
        Ok(Tensor::f_from_slice(&all)?.f_view([prompts.len() as i64, self.length as i64])?)
    }

    /// How many of a prompt's tokens are its own, before anything is cut.
    ///
    /// # Errors
    /// [`LearningError::Tokenizer`] if the prompt cannot be encoded.
    pub fn count(&self, prompt: &str) -> Result<usize, LearningError> {
        let mut whole = self.inner.clone();
        whole
            .with_truncation(None)
            .map_err(|error| LearningError::tokenizer(&self.file, error.to_string()))?;
        let encoding = whole
            .encode_fast(prompt, false)
            .map_err(|error| LearningError::tokenizer(&self.file, error.to_string()))?;
        Ok(encoding.len())
    }

    /// Tokens in a row, special ones included.
    pub fn length(&self) -> usize {
        self.length
    }
}

fn read(file: &Path) -> Result<Vec<u8>, LearningError> {
    let found = fs::metadata(file).map_err(|source| LearningError::io(file, source))?;
    // Reading a pipe would wait for someone who writes.
    if !found.is_file() {
        return Err(LearningError::tokenizer(file, "this is no plain file"));
    }
    let length = found.len();
    if length > MOST_BYTES {
        return Err(LearningError::tokenizer(
            file,
            format!("{length} bytes are too many for a tokenizer"),
        ));
    }
    fs::read(file).map_err(|source| LearningError::io(file, source))
}

/// A special token's text from `special_tokens_map.json` or `tokenizer_config.json`.
fn special(folder: &Path, name: &str) -> Result<Option<String>, LearningError> {
    for file in ["special_tokens_map.json", "tokenizer_config.json"] {
        let file = folder.join(file);
        if !file.is_file() {
            continue;
        }
        let fields: Map<String, Value> = serde_json::from_slice(&read(&file)?)
            .map_err(|error| LearningError::tokenizer(&file, error.to_string()))?;
        let token = fields.get(name).and_then(|value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Object(parts) => parts.get("content")?.as_str().map(str::to_owned),
            _ => None,
        });
        if token.is_some() {
            return Ok(token);
        }
    }
    Ok(None)
}

/// A `tokenizer.json` from the two older files.
fn assemble(vocab_file: &Path, merges_file: &Path) -> Result<String, LearningError> {
    let vocab: Map<String, Value> = serde_json::from_slice(&read(vocab_file)?)
        .map_err(|error| LearningError::tokenizer(vocab_file, error.to_string()))?;
    let merges = String::from_utf8(read(merges_file)?)
        .map_err(|error| LearningError::tokenizer(merges_file, error.to_string()))?;
    let pairs = merges
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.is_empty())
        .map(|line| match line.split_once(' ') {
            Some((first, second)) if !second.contains(' ') => Ok(json!([first, second])),
            _ => Err(LearningError::tokenizer(
                merges_file,
                format!("{line:?} is no pair of symbols"),
            )),
        })
        .collect::<Result<Vec<_>, _>>()?;
    // Tables of the published size that end in blanks or leftovers name symbols which the vocabulary lacks: the model says so itself.
    let id = |token: &str| {
        vocab
            .get(token)
            .and_then(Value::as_u64)
            .ok_or_else(|| LearningError::tokenizer(vocab_file, format!("it has no token {token}")))
    };
    let (start, end) = (id(START)?, id(END)?);
    let added = |id: u64, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [added(start, START), added(end, END)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "post_processor": {"type": "RobertaProcessing", "sep": [END, end], "cls": [START, start],
                           "trim_offsets": false, "add_prefix_space": false},
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": END, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": false, "vocab": vocab, "merges": pairs},
    })
    .to_string())
}

#[cfg(test)]
mod tests;
