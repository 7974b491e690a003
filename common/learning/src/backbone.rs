//! The frozen language model: an encoder of the BERT line, run layer by layer so that adapters can be hooked in.
//!
//! Weights carry no gradient and dropout is off, so every value below the first adapter depends on the tokens alone. That part
//! ([`Backbone::run_prefix`]) can be computed once per example and kept.
//!
//! Shapes in this module: `n` rows in a batch, `t` tokens in its longest row, `d` hidden units.

mod config;
mod family;
mod files;
mod layer;

use std::{ops::Range, path::Path};

use concord_common::{
    digest::Digest,
    job::{AdapterPosition, TrainingSpec},
};
use tch::{Kind, Tensor};

pub(crate) use self::layer::add_dense;
pub use self::{
    config::{BackboneConfig, Family},
    files::BackboneFiles,
};
use self::{
    family::Embeddings,
    layer::{AttentionMask, Layer},
};
use crate::{error::LearningError, weights::WeightsFile};

/// Rows of tokens, padded to the longest of them.
#[derive(Debug)]
pub struct Batch {
    /// Token ids, `[n, t]`, i64.
    pub input_ids: Tensor,
    /// Token types (segments), `[n, t]`, i64; read by BERT only.
    pub token_types: Tensor,
    /// 1 at a token, 0 at padding, `[n, t]`, i64.
    pub mask: Tensor,
}

/// What happens inside a layer between one of its two parts (attention, feed-forward network) and the residual connection around that part.
pub trait LayerHook {
    /// The part that it follows, in every layer.
    fn position(&self) -> AdapterPosition;

    /// Called after that part of `layer` (the output of its last dense layer), before the residual and its LayerNorm. `h` and the result are
    /// `[n, t, d]`.
    ///
    /// `h` may share memory with a cached prefix, so it must not be written to in place.
    ///
    /// # Errors
    /// Whatever the hook finds wrong; it ends the forward pass.
    fn adapt(&mut self, layer: usize, h: Tensor) -> Result<Tensor, LearningError>;

    /// Adds what [`LayerHook::adapt`] gives to `sum` in place, both as matrices `[n·t, d]`. A hook whose last operation is a product can add
    /// it up there, which saves a tensor of this size in every layer.
    ///
    /// # Errors
    /// As [`LayerHook::adapt`].
    fn add_adapted(
        &mut self,
        layer: usize,
        h: Tensor,
        sum: &mut Tensor,
    ) -> Result<(), LearningError> {
        let adapted = self.adapt(layer, h)?;
        let _ = sum.f_add_(&flat(&adapted)?)?;
        Ok(())
    }
}

/// The plain backbone, in the operations that a hook at this position gets: another one may differ in the last bits.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHook(pub AdapterPosition);

impl LayerHook for NoHook {
    fn position(&self) -> AdapterPosition {
        self.0
    }

    fn adapt(&mut self, _layer: usize, h: Tensor) -> Result<Tensor, LearningError> {
        Ok(h)
    }
}

/// Where the first adapter stands: nothing below it depends on adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The lowest layer that carries an adapter.
    pub layer: usize,
    /// The part of the layer that it follows.
    pub position: AdapterPosition,
}

impl Place {
    /// Of the first adapter in a job.
    pub fn first(spec: &TrainingSpec) -> Self {
        Self {
            layer: spec
                .adapter_layers()
                .first()
                .map_or(0, |&layer| layer as usize),
            position: spec.adapter.position,
        }
    }
}

/// Everything that the layers below the first adapter, and that adapter's own layer up to the adapter, have to say about a batch.
#[derive(Debug)]
pub struct Prefix {
    /// The place of the first adapter.
    pub place: Place,
    /// What the hook is given there, `[n, t, d]`: the output of the attention or of the feed-forward network.
    pub output: Tensor,
    /// What is added to the hook's result before the LayerNorm, `[n, t, d]`.
    pub residual: Tensor,
}

/// A frozen encoder. Its tensors live on the CPU in f32 or f64.
#[derive(Debug)]
pub struct Backbone {
    config: BackboneConfig,
    digest: Digest,
    embeddings: Embeddings,
    layers: Vec<Layer>,
}

// tch leaves `Sync` out because a tensor can be written to through a shared reference. Nothing here does that: a loaded backbone is only read,
// and libtorch allows several threads to read one tensor (its reference count is atomic). So one backbone can serve many trainers.
#[expect(
    unsafe_code,
    reason = "the weights are private to this module and never written to after loading"
)]
unsafe impl Sync for Backbone {}

impl Backbone {
    /// Loads a Hugging Face folder: `config.json` and `model.safetensors`, at the top or where the sentence-transformers layout has them
    /// (see [`BackboneFiles::find`]). `kind` is the kind to compute in, `Float` or `Double`; weights stored in another are cast.
    ///
    /// # Errors
    /// [`LearningError::Io`] for a file that cannot be read, [`LearningError::Config`] for a `config.json` that describes none of the
    /// known families, [`LearningError::Weights`] that names every tensor that is missing, unexpected or of a wrong shape.
    pub fn load(folder: &Path, kind: Kind) -> Result<Self, LearningError> {
        if !matches!(kind, Kind::Float | Kind::Double) {
            return Err(LearningError::Config(format!(
                "a backbone computes in Float or Double, not in {kind:?}"
            )));
        }
        let files = BackboneFiles::find(folder)?;
        let config = BackboneConfig::read(&files.config)?;
        let weights = WeightsFile::open(&files.weights)?;
        let _frozen = tch::no_grad_guard();
        let mut tensors = weights.load_strict(
            family::naming(config.family),
            &family::expected(&config),
            kind,
        )?;
        let embeddings = Embeddings::take(&config, &mut tensors)?;
        let layers = (0..config.layers)
            .map(|index| Layer::take(&config, index, &mut tensors))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            digest: *weights.digest(),
            config,
            embeddings,
            layers,
        })
    }

    /// Sizes and family.
    pub fn config(&self) -> &BackboneConfig {
        &self.config
    }

    /// BLAKE3 of the weights file: what a vault or a job binds itself to.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The kind it computes in.
    pub fn kind(&self) -> Kind {
        self.embeddings.kind()
    }

    /// The hidden state that enters layer 0, `[n, t, d]`.
    ///
    /// # Errors
    /// [`LearningError::Data`] if a row is longer than the model's positions or the tensors' shapes differ, [`LearningError::Torch`] for an
    /// id outside the vocabulary.
    pub fn embed(&self, batch: &Batch) -> Result<Tensor, LearningError> {
        let shape = batch.input_ids.size();
        if shape.len() != 2 || batch.mask.size() != shape || batch.token_types.size() != shape {
            return Err(LearningError::Data(format!(
                "a batch holds ids, types and mask of one shape [n, t]; these are {shape:?}, {:?} and {:?}",
                batch.token_types.size(),
                batch.mask.size()
            )));
        }
        if shape[1] as usize > self.config.max_positions {
            return Err(LearningError::Data(format!(
                "a row has {} tokens, but the backbone has positions for {}; lower max_length",
                shape[1], self.config.max_positions
            )));
        }
        self.embeddings.run(batch)
    }

    /// Runs the hidden state `[n, t, d]` that enters `layers.start` through those layers; `mask` is the batch's, `[n, t]`.
    ///
    /// Gradients flow through `hidden` and through whatever the hook adds; the weights themselves have none.
    ///
    /// # Errors
    /// [`LearningError::Config`] if there are no such layers, [`LearningError::Data`] if a row of the mask is empty, and the hook's.
    pub fn run_layers(
        &self,
        hidden: &Tensor,
        mask: &Tensor,
        layers: Range<usize>,
        hook: &mut dyn LayerHook,
    ) -> Result<Tensor, LearningError> {
        if layers.end > self.layers.len() {
            return Err(self.no_such_layer(layers.end - 1));
        }
        let mask = AttentionMask::new(mask, self.kind())?;
        let shape = hidden.size3()?;
        // The layers write over what they are given.
        let hidden = copied(&flat(hidden)?)?;
        unflat(&self.run_masked(hidden, shape, &mask, layers, hook)?, shape)
    }

    /// The whole encoder: [`Backbone::embed`] and all layers.
    ///
    /// # Errors
    /// Theirs.
    pub fn forward(
        &self,
        batch: &Batch,
        hook: &mut dyn LayerHook,
    ) -> Result<Tensor, LearningError> {
        let hidden = self.embed(batch)?;
        self.run_layers(&hidden, &batch.mask, 0..self.layers.len(), hook)
    }

    /// Computes all that lies below the first adapter, without gradients. Continue with [`Backbone::run_from_prefix`].
    ///
    /// # Errors
    /// [`LearningError::Config`] if there is no such layer, and those of [`Backbone::embed`].
    pub fn run_prefix(&self, batch: &Batch, first: Place) -> Result<Prefix, LearningError> {
        let layer = self.layer(first.layer)?;
        let _frozen = tch::no_grad_guard();
        let hidden = self.embed(batch)?;
        let mask = AttentionMask::new(&batch.mask, self.kind())?;
        let shape = hidden.size3()?;
        let hidden = flat(&hidden)?;
        let mut plain = NoHook(first.position);
        let hidden = self.run_masked(hidden, shape, &mask, 0..first.layer, &mut plain)?;
        let (output, residual) = match first.position {
            AdapterPosition::Attention => {
                let output = layer.attention(&hidden, rows_and_tokens(shape), &mask)?;
                (output, hidden)
            }
            AdapterPosition::Ffn => {
                let attended = layer.attend(hidden, rows_and_tokens(shape), &mask)?;
                (layer.feed_forward(&attended)?, attended)
            }
        };
        Ok(Prefix {
            place: first,
            output: unflat(&output, shape)?,
            residual: unflat(&residual, shape)?,
        })
    }

    /// The encoder's output `[n, t, d]` from a prefix of the same batch. The operations are those of [`Backbone::forward`], so the result is
    /// the same to the bit.
    ///
    /// # Errors
    /// Those of [`Backbone::run_layers`], and [`LearningError::Config`] if the hook's position is not the prefix's.
    pub fn run_from_prefix(
        &self,
        prefix: &Prefix,
        mask: &Tensor,
        hook: &mut dyn LayerHook,
    ) -> Result<Tensor, LearningError> {
        let Place { layer, position } = prefix.place;
        if hook.position() != position {
            return Err(LearningError::Config(format!(
                "the prefix ends before adapters with position {position}, these have {}",
                hook.position()
            )));
        }
        let mask = AttentionMask::new(mask, self.kind())?;
        let shape = prefix.residual.size3()?;
        // The prefix may stand in a cache: the sum is made in a copy.
        let mut sum = copied(&flat(&prefix.residual)?)?;
        hook.add_adapted(layer, prefix.output.shallow_clone(), &mut sum)?;
        let hidden = match position {
            AdapterPosition::Attention => self.layer(layer)?.above_attention(&sum)?,
            AdapterPosition::Ffn => self.layer(layer)?.close(&sum)?,
        };
        let layers = layer + 1..self.layers.len();
        unflat(&self.run_masked(hidden, shape, &mask, layers, hook)?, shape)
    }

    /// `hidden` is `[n·t, d]`, as the result, and is written over; `shape` is (n, t, d).
    fn run_masked(
        &self,
        mut hidden: Tensor,
        shape: Shape,
        mask: &AttentionMask,
        layers: Range<usize>,
        hook: &mut dyn LayerHook,
    ) -> Result<Tensor, LearningError> {
        for index in layers {
            let layer = &self.layers[index];
            hidden = match hook.position() {
                AdapterPosition::Attention => {
                    let output = layer.attention(&hidden, rows_and_tokens(shape), mask)?;
                    hook.add_adapted(index, unflat(&output, shape)?, &mut hidden)?;
                    layer.above_attention(&hidden)?
                }
                AdapterPosition::Ffn => {
                    let mut sum = layer.attend(hidden, rows_and_tokens(shape), mask)?;
                    let ffn_out = layer.feed_forward(&sum)?;
                    hook.add_adapted(index, unflat(&ffn_out, shape)?, &mut sum)?;
                    layer.close(&sum)?
                }
            };
        }
        Ok(hidden)
    }

    fn layer(&self, layer: usize) -> Result<&Layer, LearningError> {
        self.layers
            .get(layer)
            .ok_or_else(|| self.no_such_layer(layer))
    }

    fn no_such_layer(&self, layer: usize) -> LearningError {
        LearningError::Config(format!(
            "there is no layer {layer}: this backbone has {}, counted from 0",
            self.layers.len()
        ))
    }
}

/// (n, t, d)
type Shape = (i64, i64, i64);

fn rows_and_tokens((n, t, _): Shape) -> (i64, i64) {
    (n, t)
}

/// `[n, t, d]` as `[n·t, d]`.
fn flat(hidden: &Tensor) -> Result<Tensor, LearningError> {
    let (_, _, d) = hidden.size3()?;
    Ok(hidden.f_reshape([-1, d])?)
}

/// A copy, through which gradients flow.
fn copied(x: &Tensor) -> Result<Tensor, LearningError> {
    let mut copy = x.f_empty_like()?;
    copy.f_copy_(x)?;
    Ok(copy)
}

/// `[n·t, d]` as `[n, t, d]`.
fn unflat(hidden: &Tensor, (n, t, d): Shape) -> Result<Tensor, LearningError> {
    Ok(hidden.f_view([n, t, d])?)
}

#[cfg(test)]
mod tests;
