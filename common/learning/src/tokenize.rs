//! From text to token ids, and from rows of ids to a padded batch.

use std::path::{Path, PathBuf};

use tch::Tensor;
use tokenizers::{
    EncodeInput, Encoding, PostProcessor, Tokenizer, TruncationDirection, TruncationParams,
    TruncationStrategy,
};

use crate::{
    backbone::{BackboneConfig, Batch},
    error::LearningError,
};

/// The tokens of one example, special ones included, without padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<i64>,
    /// Token types, one per id: 0 for the first text, 1 for the second where the tokenizer tells them apart.
    pub type_ids: Vec<i64>,
}

/// A `tokenizer.json` that cuts to a length of our choosing and never pads.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    file: PathBuf,
    inner: Tokenizer,
}

impl TextTokenizer {
    /// Loads a `tokenizer.json` for a backbone. Its own padding and truncation (many are saved with both fixed at 128) are replaced: nothing
    /// is padded, and rows longer than `max_length` tokens lose the end of their longer text first.
    ///
    /// # Errors
    /// [`LearningError::Tokenizer`] if the file cannot be read or has more ids than the backbone has embeddings,
    /// [`LearningError::Config`] if `max_length` is too short for a pair or too long for the backbone.
    pub fn load(
        file: &Path,
        backbone: &BackboneConfig,
        max_length: usize,
    ) -> Result<Self, LearningError> {
        let bytes = std::fs::read(file).map_err(|source| LearningError::io(file, source))?;
        let mut inner = Tokenizer::from_bytes(bytes)
            .map_err(|error| LearningError::tokenizer(file, error.to_string()))?;

        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if largest as usize >= backbone.vocab {
            return Err(LearningError::tokenizer(
                file,
                format!(
                    "it has ids up to {largest}, but the backbone has embeddings for {}: the two do not belong together",
                    backbone.vocab
                ),
            ));
        }
        if inner.id_to_token(backbone.pad_id as u32).is_none() {
            return Err(LearningError::tokenizer(
                file,
                format!(
                    "it has no token for the backbone's padding id {}: the two do not belong together",
                    backbone.pad_id
                ),
            ));
        }
        let special = inner
            .get_post_processor()
            .map_or(0, |processor| processor.added_tokens(true));
        if max_length < special + 2 {
            return Err(LearningError::Config(format!(
                "max_length {max_length} leaves no room for a pair of texts beside {special} special tokens; raise it to {} or more",
                special + 2
            )));
        }
        if max_length > backbone.max_positions {
            return Err(LearningError::Config(format!(
                "max_length {max_length} is more than the {} positions of the backbone; lower it",
                backbone.max_positions
            )));
        }
        inner.with_padding(None);
        inner
            .with_truncation(Some(TruncationParams {
                direction: TruncationDirection::Right,
                max_length,
                strategy: TruncationStrategy::LongestFirst,
                stride: 0,
            }))
            .map_err(|error| LearningError::tokenizer(file, error.to_string()))?;
        Ok(Self {
            file: file.to_path_buf(),
            inner,
        })
    }

    /// The tokens of one text.
    ///
    /// # Errors
    /// [`LearningError::Tokenizer`] if the tokenizer has no token for some of it, or makes no tokens at all.
    pub fn encode(&self, text: &str) -> Result<Encoded, LearningError> {
        self.plain(self.inner.encode_fast(text, true))
    }

    /// The tokens of two texts in one row.
    ///
    /// # Errors
    /// As [`TextTokenizer::encode`].
    pub fn encode_pair(&self, first: &str, second: &str) -> Result<Encoded, LearningError> {
        self.plain(self.inner.encode_fast((first, second), true))
    }

    /// The tokens of many texts or pairs, in their order, on all cores.
    ///
    /// # Errors
    /// As [`TextTokenizer::encode`].
    pub fn encode_all(
        &self,
        texts: &[(&str, Option<&str>)],
    ) -> Result<Vec<Encoded>, LearningError> {
        let inputs: Vec<EncodeInput<'_>> = texts
            .iter()
            .map(|&(first, second)| match second {
                Some(second) => (first, second).into(),
                None => first.into(),
            })
            .collect();
        self.inner
            .encode_batch_fast(inputs, true)
            .map_err(|error| LearningError::tokenizer(&self.file, error.to_string()))?
            .into_iter()
            .map(|encoding| self.plain(Ok(encoding)))
            .collect()
    }

    fn plain(&self, encoding: tokenizers::Result<Encoding>) -> Result<Encoded, LearningError> {
        let encoding =
            encoding.map_err(|error| LearningError::tokenizer(&self.file, error.to_string()))?;
        if encoding.is_empty() {
            return Err(LearningError::tokenizer(
                &self.file,
                "a text gave no tokens, and the tokenizer adds none of its own",
            ));
        }
        Ok(Encoded {
            ids: widened(encoding.get_ids()),
            type_ids: widened(encoding.get_type_ids()),
        })
    }
}

fn widened(ids: &[u32]) -> Vec<i64> {
    ids.iter().map(|&id| i64::from(id)).collect()
}

/// Stacks rows into one batch, padded at the end to the longest of them.
///
/// # Errors
/// [`LearningError::Data`] for no rows, an empty row, or a row whose types are not as many as its ids.
pub fn pad(rows: &[&Encoded], pad_id: i64) -> Result<Batch, LearningError> {
    let longest = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
    if longest == 0 {
        return Err(LearningError::Data(
            "a batch needs at least one row with tokens".to_owned(),
        ));
    }
    let cells = rows.len() * longest;
    let mut input_ids = Vec::with_capacity(cells);
    let mut token_types = Vec::with_capacity(cells);
    let mut mask = Vec::with_capacity(cells);
    for (place, row) in rows.iter().enumerate() {
        if row.ids.is_empty() || row.ids.len() != row.type_ids.len() {
            return Err(LearningError::Data(format!(
                "row {place} of the batch has {} ids and {} types; both must be as many, and at least one",
                row.ids.len(),
                row.type_ids.len()
            )));
        }
        let end = input_ids.len() + longest;
        mask.resize(input_ids.len() + row.ids.len(), 1);
        mask.resize(end, 0);
        input_ids.extend_from_slice(&row.ids);
        input_ids.resize(end, pad_id);
        token_types.extend_from_slice(&row.type_ids);
        token_types.resize(end, 0);
    }
    let shape = [rows.len() as i64, longest as i64];
    let stacked = |values: &[i64]| Tensor::f_from_slice(values)?.f_view(shape);
    Ok(Batch {
        input_ids: stacked(&input_ids)?,
        token_types: stacked(&token_types)?,
        mask: stacked(&mask)?,
    })
}

#[cfg(test)]
mod tests;
