//! Texts as one vector each: a sentence encoder, averaged over the tokens.

use std::path::Path;

use concord_common::Digest;
use tch::{Kind, Tensor};

use super::Rows;
use crate::{
    backbone::{Backbone, BackboneFiles, NoHook},
    error::LearningError,
    reference::mean_pool,
    tokenize::{Encoded, TextTokenizer, pad},
};

/// Longest text in tokens; what is beyond does not count.
const MAX_TOKENS: usize = 64;
/// Texts in one forward pass.
const BATCH: usize = 64;

/// The encoder with its tokenizer.
#[derive(Debug)]
pub struct TextTower {
    backbone: Backbone,
    tokenizer: TextTokenizer,
}

impl TextTower {
    /// Loads a backbone's folder.
    ///
    /// # Errors
    /// As [`Backbone::load`] and [`TextTokenizer::load`].
    pub fn load(folder: &Path) -> Result<Self, LearningError> {
        let backbone = Backbone::load(folder, Kind::Float)?;
        let files = BackboneFiles::find(folder)?;
        let length = MAX_TOKENS.min(backbone.config().max_positions);
        let tokenizer = TextTokenizer::load(&files.tokenizer, backbone.config(), length)?;
        Ok(Self {
            backbone,
            tokenizer,
        })
    }

    /// BLAKE3 of the encoder's weights file.
    pub fn digest(&self) -> &Digest {
        self.backbone.digest()
    }

    /// Values of a text's vector.
    pub fn width(&self) -> usize {
        self.backbone.config().hidden
    }

    /// One vector of length 1 a text, in their order. A text's vector does not depend on the others but for the last bits.
    ///
    /// # Errors
    /// [`LearningError::Tokenizer`] if a text cannot be encoded.
    pub fn read(&self, texts: &[&str]) -> Result<Rows, LearningError> {
        let _frozen = tch::no_grad_guard();
        let inputs: Vec<(&str, Option<&str>)> = texts.iter().map(|text| (*text, None)).collect();
        let encoded = self.tokenizer.encode_all(&inputs)?;
        // Texts of like length share a batch, so that little of it is padding.
        let mut order: Vec<usize> = (0..encoded.len()).collect();
        order.sort_by_key(|place| encoded[*place].ids.len());
        let mut values = vec![0.0; texts.len() * self.width()];
        for places in order.chunks(BATCH) {
            let rows: Vec<&Encoded> = places.iter().map(|place| &encoded[*place]).collect();
            let batch = pad(&rows, self.backbone.config().pad_id)?;
            let hidden = self.backbone.forward(&batch, &mut NoHook::default())?;
            let read = Rows::from_tensor(&unit(&mean_pool(&hidden, &batch.mask)?)?)?;
            for (index, place) in places.iter().enumerate() {
                let start = place * self.width();
                values[start..start + self.width()].copy_from_slice(read.row(index));
            }
        }
        Rows::new(self.width(), values)
    }
}

/// Rows of length 1.
pub(super) fn unit(rows: &Tensor) -> Result<Tensor, LearningError> {
    let length = rows
        .f_norm_scalaropt_dim(2.0, [-1_i64], true)?
        .f_clamp_min(1e-8)?;
    Ok(rows.f_div(&length)?)
}
