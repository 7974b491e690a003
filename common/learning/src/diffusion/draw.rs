//! Drawing and learning in plain terms: prompts, seeds and regions to pictures of 8 bits a channel, and such pictures to examples.
//!
//! Whatever comes out depends on the model, the sampling and the members of the batch alone. Every text is encoded by itself and every picture is decoded
//! by itself, so that neither depends on what happens beside it; only the denoiser sees a batch whole, and its rows are cut into forward passes at fixed
//! numbers.

use concord_common::seed::Seed;
use tch::Tensor;

use super::{
    denoiser::{Condition, Denoiser},
    pipeline::{from_bytes, to_bytes},
    region::{Advice, Order, Region, Texts, generate_in_pieces},
    schedule::{Objective, Plan, Sampler},
    seeds,
    train::Example,
};
use crate::error::LearningError;

/// Pixels that a picture's side may have.
const LONGEST_SIDE: i64 = 2048;

/// Latent pixels, over all rows, that one forward pass of the denoiser may hold, with bounds on the rows: 16 rows at 64 by 64, which is what a picture of
/// 512 by 512 has.
const MOST_PIXELS: i64 = 65_536;
const ROWS: (i64, i64) = (4, 64);

/// A picture: red, green and blue of every pixel, row by row from the upper left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels from left to right.
    pub width: u32,
    /// Pixels from top to bottom.
    pub height: u32,
    /// 3 x width x height bytes.
    pub pixels: Vec<u8>,
}

/// How pictures are made.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// The solver. A flow has one, Euler.
    pub sampler: Sampler,
    /// Its steps.
    pub steps: usize,
    /// Classifier-free guidance; 1 leaves it out.
    pub guidance: f64,
    /// What pictures shall not be like.
    pub negative: String,
    /// Width and height in pixels; the model's own if absent.
    pub size: Option<[u32; 2]>,
}

/// A picture to be made.
#[derive(Debug, Clone, PartialEq)]
pub struct Wish {
    /// What it shall show.
    pub prompt: String,
    /// Of its noise.
    pub seed: Seed,
    /// What its parts shall show; none for a plain picture.
    pub regions: Vec<Region>,
}

/// Pictures, and what they cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pictures {
    /// In the order of the wishes.
    pub pictures: Vec<Picture>,
    /// Rows that went through the denoiser, over all steps.
    pub rows: u64,
}

/// A sampling made ready for a model.
#[derive(Debug)]
pub struct Easel {
    plan: Plan,
    negative: Condition,
    guidance: f64,
    /// Channels, height and width of a latent.
    latent: [i64; 3],
    factor: i64,
    most_rows: i64,
}

impl Sampling {
    /// Checks the sampling against a model and makes it ready.
    ///
    /// # Errors
    /// [`LearningError::Config`] if the model cannot be sampled so, with what can; [`LearningError::Tokenizer`] for the negative prompt.
    pub fn ready(&self, model: &dyn Denoiser) -> Result<Easel, LearningError> {
        let complain = |reason: String| Err(LearningError::Config(reason));
        if !(self.guidance >= 1.0 && self.guidance <= 100.0) {
            return complain(format!("guidance {} is not in 1..=100", self.guidance));
        }
        if matches!(model.objective(), Objective::Flow(_)) && self.sampler != Sampler::Euler {
            return complain(format!(
                "the model is one of flow matching, which is sampled with Euler steps, not {:?}",
                self.sampler
            ));
        }
        let [channels, height, width] = model.native_size();
        let factor = model.codec().factor();
        let [height, width] = match self.size {
            None => [height, width],
            Some([across, down]) => {
                let (across, down) = (i64::from(across), i64::from(down));
                if across % factor != 0 || down % factor != 0 {
                    return complain(format!(
                        "a picture of {across} x {down} pixels does not suit the model: sides must be multiples of {factor}"
                    ));
                }
                [down / factor, across / factor]
            }
        };
        for side in [height, width] {
            let pixels = side.saturating_mul(factor);
            if !(1..=LONGEST_SIDE).contains(&pixels) {
                return complain(format!(
                    "a picture's side of {pixels} pixels is not in 1..={LONGEST_SIDE}"
                ));
            }
        }
        Ok(Easel {
            plan: model.objective().plan(self.sampler, self.steps)?,
            negative: model.condition(&[&self.negative])?,
            guidance: self.guidance,
            latent: [channels, height, width],
            factor,
            most_rows: (MOST_PIXELS / (height * width)).clamp(ROWS.0, ROWS.1),
        })
    }
}

impl Easel {
    /// Width and height of its pictures in pixels.
    pub fn size(&self) -> [u32; 2] {
        let [_, height, width] = self.latent;
        [width, height].map(|side| (side * self.factor) as u32)
    }

    /// Draws a batch on the model that this was made ready for: exactly these pictures together. `after_pass` is told after every forward pass, and
    /// between the pictures as they are decoded, how many steps are done; it may stop the run with an error.
    ///
    /// # Errors
    /// [`LearningError::Data`] for no wishes, regions that do not lie in the picture, or a model whose pictures are not finite;
    /// [`LearningError::Tokenizer`] for a prompt; what `after_pass` returns.
    pub fn draw(
        &self,
        model: &dyn Denoiser,
        wishes: &[Wish],
        after_pass: &mut dyn FnMut(usize) -> Result<(), LearningError>,
    ) -> Result<Pictures, LearningError> {
        let _frozen = tch::no_grad_guard();
        if wishes.is_empty() {
            return Err(LearningError::Data("a batch of no pictures".to_owned()));
        }
        let [_, height, width] = self.latent;
        let prompts = wishes
            .iter()
            .map(|wish| model.condition(&[&wish.prompt]))
            .collect::<Result<Vec<_>, _>>()?;
        let advice = wishes
            .iter()
            .map(|wish| {
                (!wish.regions.is_empty())
                    .then(|| Advice::prepare(model, &wish.regions, (height, width)))
                    .transpose()
            })
            .collect::<Result<Vec<_>, _>>()?;
        let orders: Vec<Order<'_>> = (0..)
            .zip(&advice)
            .map(|(prompt, advice)| Order {
                prompt,
                advice: advice.as_ref(),
            })
            .collect();
        let texts = Texts {
            positive: Condition::stack(&prompts.iter().collect::<Vec<_>>())?,
            negative: self.negative.share(),
            guidance: self.guidance,
        };
        let noises: Vec<Seed> = wishes.iter().map(|wish| wish.seed).collect();
        let latents = generate_in_pieces(
            model,
            &self.plan,
            &seeds::noise(&noises, self.latent, model.compute())?,
            &orders,
            &texts,
            self.most_rows,
            after_pass,
        )?;
        if latents.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            return Err(LearningError::Data(
                "the model drew values that are not finite; its weights, its numbers (bf16 or f32) or the guidance do not suit it".to_owned(),
            ));
        }
        let pictures = (0..orders.len() as i64)
            .map(|row| {
                if row > 0 {
                    after_pass(self.plan.steps.len())?;
                }
                decode(model, &latents.f_narrow(0, row, 1)?)
            })
            .collect::<Result<_, LearningError>>()?;
        Ok(Pictures {
            pictures,
            rows: self.rows(wishes),
        })
    }

    fn rows(&self, wishes: &[Wish]) -> u64 {
        let branches = if self.guidance > 1.0 { 2 } else { 1 };
        let regions: usize = wishes.iter().map(|wish| wish.regions.len()).sum();
        (self.plan.steps.len() * (branches * wishes.len() + regions)) as u64
    }
}

fn decode(model: &dyn Denoiser, latent: &Tensor) -> Result<Picture, LearningError> {
    let image = model.codec().decode(latent)?;
    let (_, _, height, width) = image.size4()?;
    Ok(Picture {
        width: width as u32,
        height: height as u32,
        pixels: to_bytes(&image)?,
    })
}

impl Example {
    /// A captioned picture as a model learns from it.
    ///
    /// # Errors
    /// [`LearningError::Data`] if the bytes are not those of the sides or the sides do not suit the model, [`LearningError::Tokenizer`] for the caption.
    pub fn of(
        model: &dyn Denoiser,
        caption: &str,
        picture: &Picture,
    ) -> Result<Self, LearningError> {
        let _frozen = tch::no_grad_guard();
        let (height, width) = (i64::from(picture.height), i64::from(picture.width));
        let factor = model.codec().factor();
        if height % factor != 0 || width % factor != 0 {
            return Err(LearningError::Data(format!(
                "a picture of {width} x {height} pixels does not suit the model: sides must be multiples of {factor}"
            )));
        }
        let image = from_bytes(&picture.pixels, (1, height, width), model.compute())?;
        Ok(Self {
            latent: model.codec().encode(&image)?,
            condition: model.condition(&[caption])?,
        })
    }
}

#[cfg(test)]
mod tests;
