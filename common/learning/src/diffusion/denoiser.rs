//! What a text-to-image model must be able to do, so that generation, interaction and training need not know which it is.

use concord_common::Digest;
use tch::Tensor;

use super::{
    linear::{Linear, Sites},
    params::Compute,
    schedule::{Objective, TrainingPair, TrainingTime, training_pair},
};
use crate::error::LearningError;

/// Texts as a model reads them. Rows can be put together and repeated, so that many prompts share a forward pass.
#[derive(Debug)]
pub struct Condition {
    /// Hidden states, `[n, t, d]`.
    pub context: Tensor,
    /// One vector for each text, `[n, p]`, for models that read one besides (as SD3.5 and FLUX do).
    pub pooled: Option<Tensor>,
}

impl Condition {
    /// Hidden states alone.
    pub fn of(context: Tensor) -> Self {
        Self {
            context,
            pooled: None,
        }
    }

    /// The same rows again; nothing is copied.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            context: self.context.shallow_clone(),
            pooled: self.pooled.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// One after another.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the widths differ, [`LearningError::Data`] if some have a vector for each text and some have none.
    pub fn stack(parts: &[&Self]) -> Result<Self, LearningError> {
        let contexts: Vec<&Tensor> = parts.iter().map(|part| &part.context).collect();
        let pooled: Vec<&Tensor> = parts
            .iter()
            .filter_map(|part| part.pooled.as_ref())
            .collect();
        if !pooled.is_empty() && pooled.len() < parts.len() {
            return Err(LearningError::Data(
                "some texts have a vector of their own and some have none".to_owned(),
            ));
        }
        Ok(Self {
            context: Tensor::f_cat(&contexts, 0)?,
            pooled: (!pooled.is_empty())
                .then(|| Tensor::f_cat(&pooled, 0))
                .transpose()?,
        })
    }

    /// `count` rows from `start` on; nothing is copied.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if there are not as many.
    pub fn narrow(&self, start: i64, count: i64) -> Result<Self, LearningError> {
        self.map(|rows| Ok(rows.f_narrow(0, start, count)?))
    }

    /// The rows of these places.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if there is no such row.
    pub fn rows(&self, places: &[i64]) -> Result<Self, LearningError> {
        let index = Tensor::f_from_slice(places)?.f_to_device(self.context.device())?;
        self.map(|rows| Ok(rows.f_index_select(0, &index)?))
    }

    fn map(
        &self,
        rows: impl Fn(&Tensor) -> Result<Tensor, LearningError>,
    ) -> Result<Self, LearningError> {
        Ok(Self {
            context: rows(&self.context)?,
            pooled: self.pooled.as_ref().map(rows).transpose()?,
        })
    }

    /// Texts in it.
    pub fn len(&self) -> i64 {
        self.context.size()[0]
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Between images and what the denoiser works on.
pub trait LatentCodec {
    /// Pixels that a side of a latent's pixel covers.
    fn factor(&self) -> i64;

    /// Channels of a latent.
    fn channels(&self) -> i64;

    /// Images `[n, 3, h, w]` in -1..=1 to scaled latents (the most likely ones: no draw).
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    fn encode(&self, images: &Tensor) -> Result<Tensor, LearningError>;

    /// Scaled latents to images in -1..=1.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    fn decode(&self, latents: &Tensor) -> Result<Tensor, LearningError>;
}

/// A model that takes noise out of latents, told by texts what they show.
///
/// Linear layers that adapters can sit on are found through [`Sites`], by the names of the diffusers layout (`unet.…`, `text_encoder.…`).
pub trait Denoiser {
    /// Where and in what it computes.
    fn compute(&self) -> Compute;

    /// What it was trained to say.
    fn objective(&self) -> &Objective;

    /// Between its latents and images.
    fn codec(&self) -> &dyn LatentCodec;

    /// Channels, height and width that it was trained at, in latent pixels.
    fn native_size(&self) -> [i64; 3];

    /// Prompts as the model reads them. No gradient flows.
    ///
    /// # Errors
    /// [`LearningError::Tokenizer`] if a prompt cannot be encoded, [`LearningError::Data`] for none.
    fn condition(&self, prompts: &[&str]) -> Result<Condition, LearningError>;

    /// Whether a prompt is longer than what the model reads of it, so that its end has no effect.
    ///
    /// # Errors
    /// [`LearningError::Tokenizer`] if the prompt cannot be encoded.
    fn cuts(&self, prompt: &str) -> Result<bool, LearningError>;

    /// Its output for samples `[n, c, h, w]` at times `[n]`, each at its own.
    ///
    /// # Errors
    /// [`LearningError::Data`] if the batches differ.
    fn predict(
        &self,
        samples: &Tensor,
        times: &Tensor,
        condition: &Condition,
    ) -> Result<Tensor, LearningError>;

    /// [`Denoiser::predict`] and the gradients that a gradient of the output gives: for leaves of the model, in their order, and of what `condition`
    /// hangs on if it was made with a graph. Undefined where the output does not depend on a leaf. Blocks may be run twice instead of keeping what
    /// lies between their ends.
    ///
    /// # Errors
    /// As [`Denoiser::predict`]; and what `output_gradient` returns.
    fn predict_and_pull(
        &self,
        samples: &Tensor,
        times: &Tensor,
        condition: &Condition,
        leaves: &[&Tensor],
        output_gradient: &mut dyn FnMut(&Tensor) -> Result<Tensor, LearningError>,
    ) -> Result<Vec<Tensor>, LearningError>;

    /// Clean latents and noise as a training example.
    ///
    /// # Errors
    /// [`LearningError::Data`] if the times are not as many as the latents.
    fn training_pair(
        &self,
        clean: &Tensor,
        noise: &Tensor,
        times: &[TrainingTime],
    ) -> Result<TrainingPair, LearningError> {
        training_pair(clean, noise, times)
    }

    /// BLAKE3 over names, shapes and f32 values of all weights as they are now: what a stage's results depend on. Attached adapters do not count.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if a weight cannot be read.
    fn digest(&self) -> Result<Digest, LearningError>;

    /// Whether [`Denoiser::predict_and_pull`] runs blocks twice instead of keeping what lies between their ends.
    fn set_checkpointing(&mut self, on: bool);

    /// The linear layers of the denoiser itself, by which adapters are attached, with the layout's names.
    fn sites(&mut self) -> Vec<(String, &mut Linear)>;
}

/// All linear layers of a part, with the part's name in front.
pub(crate) fn named<'a>(part: &str, model: &'a mut dyn Sites) -> Vec<(String, &'a mut Linear)> {
    let mut found = Vec::new();
    model.linears_mut(&mut found);
    found
        .into_iter()
        .map(|linear| (format!("{part}.{}", linear.name()), linear))
        .collect()
}

#[cfg(test)]
mod tests;
