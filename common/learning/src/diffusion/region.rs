//! Interaction: the same run again with the advice of an understanding model mixed in, region by region (ArtAug, arXiv 2412.12888).
//!
//! ```text
//! eps(P | {(P_i, M_i)}) = [ eps(P) + sum of s_i eps(P_i) blur(M_i) ] / (1 + sum of s_i blur(M_i))
//! ```
//!
//! P_i is a prompt for the rectangle M_i. The regions join the positive branch; classifier-free guidance comes after the mix. The blur is that of
//! the authors' engine, a Gaussian of 10 latent pixels cut at 33 for latents of 128 by 128, scaled with the latent's size.

use tch::{Kind, Tensor};

use super::{
    denoiser::{Condition, Denoiser},
    schedule::{Plan, Walk},
};
use crate::error::LearningError;

/// The authors' blur: kernel and deviation at that latent size.
const KERNEL: f64 = 33.0;
const DEVIATION: f64 = 10.0;
const LATENT: f64 = 128.0;

/// Regions of one picture; more are not useful and cost a forward each.
pub const MOST_REGIONS: usize = 16;

/// A rectangle in parts of the picture (0 to 1, from its upper left) with a prompt and a weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Region {
    /// Left edge.
    pub left: f64,
    /// Upper edge.
    pub top: f64,
    /// Right edge.
    pub right: f64,
    /// Lower edge.
    pub bottom: f64,
    /// What the rectangle shall show.
    pub prompt: String,
    /// s: 1 weighs as much as the whole picture's prompt.
    pub strength: f64,
}

impl Region {
    fn check(&self) -> Result<(), LearningError> {
        let inside = 0.0 <= self.left
            && self.left < self.right
            && self.right <= 1.0
            && 0.0 <= self.top
            && self.top < self.bottom
            && self.bottom <= 1.0;
        if !inside {
            return Err(LearningError::Data(format!(
                "a region has edges {} {} {} {}; they must be 0 <= left < right <= 1 and 0 <= top < bottom <= 1",
                self.left, self.top, self.right, self.bottom
            )));
        }
        if !(self.strength > 0.0 && self.strength <= 100.0) {
            return Err(LearningError::Data(format!(
                "a region's strength {} is not above 0 and at most 100",
                self.strength
            )));
        }
        Ok(())
    }

    /// 0 and 1 at latent size, row by row: 1 where a pixel's middle lies in the rectangle. A rectangle that holds no middle covers the pixel that its
    /// own middle lies in.
    pub fn mask(&self, height: usize, width: usize) -> Vec<f64> {
        let span = |from: f64, to: f64, size: usize| {
            let first = (from * size as f64).round() as usize;
            let end = ((to * size as f64).round() as usize).min(size);
            if first < end {
                return first..end;
            }
            let middle = (f64::midpoint(from, to) * size as f64).floor() as usize;
            let own = middle.min(size - 1);
            own..own + 1
        };
        let rows = span(self.top, self.bottom, height);
        let columns = span(self.left, self.right, width);
        (0..height * width)
            .map(|place| {
                let covered = rows.contains(&(place / width)) && columns.contains(&(place % width));
                f64::from(u8::from(covered))
            })
            .collect()
    }
}

/// A Gaussian kernel for a latent of that size (the geometric mean of its sides): odd, its weights sum to 1.
pub fn blur_kernel(height: usize, width: usize) -> Vec<f64> {
    let scale = (height as f64 * width as f64).sqrt() / LATENT;
    let radius = ((KERNEL - 1.0) / 2.0 * scale).round() as i64;
    let deviation = DEVIATION * scale;
    let weights: Vec<f64> = (-radius..=radius)
        .map(|place| (-0.5 * (place as f64 / deviation).powi(2)).exp())
        .collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

/// A blurred mask: the kernel over rows, then columns; beyond the edge a mask goes on as it was reflected there.
pub fn blurred(mask: &[f64], height: usize, width: usize) -> Vec<f64> {
    let kernel = blur_kernel(height, width);
    let radius = kernel.len() / 2;
    let along = |source: &[f64], size: usize, at: &dyn Fn(usize, usize) -> usize, lines: usize| {
        let mut result = vec![0.0; source.len()];
        for line in 0..lines {
            for place in 0..size {
                result[at(line, place)] = kernel
                    .iter()
                    .enumerate()
                    .map(|(tap, weight)| {
                        let from = place as i64 + tap as i64 - radius as i64;
                        weight * source[at(line, reflected(from, size))]
                    })
                    .sum();
            }
        }
        result
    };
    let rows = along(mask, width, &|line, place| line * width + place, height);
    along(&rows, height, &|line, place| place * width + line, width)
}

/// The place inside 0..size that a place outside mirrors to; the edge pixel itself is not repeated.
fn reflected(place: i64, size: usize) -> usize {
    if size == 1 {
        return 0;
    }
    let period = 2 * (size as i64 - 1);
    let wrapped = place.rem_euclid(period);
    wrapped.min(period - wrapped) as usize
}

/// The advice for one picture, ready to be mixed in: texts encoded, masks blurred.
#[derive(Debug)]
pub struct Advice {
    condition: Condition,
    /// s blur(M), `[regions, 1, h, w]`.
    weights: Tensor,
}

impl Advice {
    /// Prepares the regions of a picture of that latent size.
    ///
    /// # Errors
    /// [`LearningError::Data`] for no regions, too many, or one that does not lie in the picture; and the tokenizer's.
    pub fn prepare(
        model: &dyn Denoiser,
        regions: &[Region],
        (height, width): (i64, i64),
    ) -> Result<Self, LearningError> {
        if regions.is_empty() || regions.len() > MOST_REGIONS {
            return Err(LearningError::Data(format!(
                "a picture has 1 to {MOST_REGIONS} regions, not {}",
                regions.len()
            )));
        }
        let (h, w) = (height as usize, width as usize);
        let mut weights = Vec::with_capacity(regions.len() * h * w);
        for region in regions {
            region.check()?;
            weights.extend(
                blurred(&region.mask(h, w), h, w)
                    .into_iter()
                    .map(|value| value * region.strength),
            );
        }
        // One by one: the encoding of a text must not depend on what is encoded beside it.
        let conditions = regions
            .iter()
            .map(|region| model.condition(&[&region.prompt]))
            .collect::<Result<Vec<_>, _>>()?;
        let compute = model.compute();
        Ok(Self {
            condition: Condition::stack(&conditions.iter().collect::<Vec<_>>())?,
            weights: Tensor::f_from_slice(&weights)?
                .f_view([regions.len() as i64, 1, height, width])?
                .f_to_kind(compute.kind)?
                .f_to_device(compute.device)?,
        })
    }

    /// The mix of the whole picture's output `[1, c, h, w]` and the regions' `[regions, c, h, w]`.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn mix(&self, whole: &Tensor, regions: &Tensor) -> Result<Tensor, LearningError> {
        let kind: Option<Kind> = None;
        let sum = regions
            .f_mul(&self.weights)?
            .f_sum_dim_intlist(0, true, kind)?;
        let weight = self
            .weights
            .f_sum_dim_intlist(0, true, kind)?
            .f_add_scalar(1.0)?;
        Ok(whole.f_add(&sum)?.f_div(&weight)?)
    }

    fn len(&self) -> i64 {
        self.weights.size()[0]
    }
}

/// One picture of a batch that is generated together.
#[derive(Debug)]
pub struct Order<'a> {
    /// Row of its prompt in the positive condition.
    pub prompt: i64,
    /// What to mix in.
    pub advice: Option<&'a Advice>,
}

/// [`generate_in_pieces`] with all prompts, regions and negatives of a step in one forward pass.
///
/// # Errors
/// As [`generate_in_pieces`].
pub fn generate(
    model: &dyn Denoiser,
    plan: &Plan,
    noise: &Tensor,
    orders: &[Order<'_>],
    texts: &Texts,
    after_pass: &mut dyn FnMut(usize) -> Result<(), LearningError>,
) -> Result<Tensor, LearningError> {
    generate_in_pieces(model, plan, noise, orders, texts, i64::MAX, after_pass)
}

/// Runs a batch from noise `[n, c, h, w]` to clean latents, with at most `most_rows` prompts, regions and negatives in one forward pass.
///
/// The rows of a step are cut at multiples of `most_rows`, whatever they hold: what a batch comes to depends on its members and on that number alone.
/// `guidance` of 1 leaves the negative branch out. `after_pass` is told after every forward pass how many steps are done, and may stop the run with an error.
///
/// # Errors
/// [`LearningError::Data`] if noise, orders and texts are not as many, [`LearningError::Config`] if `most_rows` is less than 1, and those of the model
/// and of `after_pass`.
pub fn generate_in_pieces(
    model: &dyn Denoiser,
    plan: &Plan,
    noise: &Tensor,
    orders: &[Order<'_>],
    texts: &Texts,
    most_rows: i64,
    after_pass: &mut dyn FnMut(usize) -> Result<(), LearningError>,
) -> Result<Tensor, LearningError> {
    let _frozen = tch::no_grad_guard();
    let n = noise.size4()?.0;
    if orders.len() as i64 != n {
        return Err(LearningError::Data(format!(
            "{} orders for noise of shape {:?}",
            orders.len(),
            noise.size()
        )));
    }
    if most_rows < 1 {
        return Err(LearningError::Config(format!(
            "a forward pass needs room for a row, not {most_rows}"
        )));
    }
    let batch = Batch::lay_out(orders, texts, most_rows)?;
    let mut walk = Walk::start(plan, noise)?;
    while let Some((sample, time)) = walk.next(plan)? {
        let outputs = batch
            .pieces
            .iter()
            .enumerate()
            .map(|(place, piece)| {
                if place > 0 {
                    after_pass(walk.done)?;
                }
                let samples = sample.f_index_select(0, &piece.pictures)?;
                let count = samples.size()[0];
                let times = Tensor::f_full([count], time, (Kind::Double, samples.device()))?;
                model.predict(&samples, &times, &piece.condition)
            })
            .collect::<Result<Vec<_>, LearningError>>()?;
        let output = batch.combine(&Tensor::f_cat(&outputs, 0)?, orders, texts.guidance)?;
        walk.advance(plan, &output)?;
        after_pass(walk.done)?;
    }
    Ok(walk.sample)
}

/// Prompts of a batch, encoded, and how strongly they are followed.
#[derive(Debug)]
pub struct Texts {
    /// Prompts; orders name their rows.
    pub positive: Condition,
    /// One row: what to lead away from.
    pub negative: Condition,
    /// Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): negative + guidance (positive - negative).
    pub guidance: f64,
}

/// Which picture and text every row of a step belongs to: all whole pictures, all negatives, then the regions in their order.
#[derive(Debug)]
struct Batch {
    pieces: Vec<Piece>,
    guided: bool,
}

/// The rows of one forward pass.
#[derive(Debug)]
struct Piece {
    pictures: Tensor,
    condition: Condition,
}

impl Batch {
    fn lay_out(orders: &[Order<'_>], texts: &Texts, most_rows: i64) -> Result<Self, LearningError> {
        if !(texts.guidance >= 1.0 && texts.guidance <= 100.0) {
            return Err(LearningError::Config(format!(
                "guidance {} is not in 1..=100",
                texts.guidance
            )));
        }
        let guided = texts.guidance > 1.0;
        let prompts: Vec<i64> = orders.iter().map(|order| order.prompt).collect();
        let whole = texts.positive.rows(&prompts)?;
        let negative = texts.negative.rows(&vec![0; orders.len()])?;
        let mut parts = vec![&whole];
        let mut pictures: Vec<i64> = (0..orders.len() as i64).collect();
        if guided {
            parts.push(&negative);
            pictures.extend(0..orders.len() as i64);
        }
        for (picture, order) in orders.iter().enumerate() {
            if let Some(advice) = order.advice {
                parts.push(&advice.condition);
                pictures.extend(vec![picture as i64; advice.len() as usize]);
            }
        }
        let texts = Condition::stack(&parts)?;
        let pictures = Tensor::f_from_slice(&pictures)?.f_to_device(texts.context.device())?;
        let rows = pictures.size()[0];
        let mut pieces = Vec::new();
        let mut start = 0;
        while start < rows {
            let count = most_rows.min(rows - start);
            pieces.push(Piece {
                pictures: pictures.f_narrow(0, start, count)?,
                condition: texts.narrow(start, count)?,
            });
            start += count;
        }
        Ok(Self { pieces, guided })
    }

    fn combine(
        &self,
        outputs: &Tensor,
        orders: &[Order<'_>],
        guidance: f64,
    ) -> Result<Tensor, LearningError> {
        let n = orders.len() as i64;
        let mut next = if self.guided { 2 * n } else { n };
        let mut mixed = Vec::with_capacity(orders.len());
        for (picture, order) in orders.iter().enumerate() {
            let whole = outputs.f_narrow(0, picture as i64, 1)?;
            mixed.push(match order.advice {
                None => whole,
                Some(advice) => {
                    let regions = outputs.f_narrow(0, next, advice.len())?;
                    next += advice.len();
                    advice.mix(&whole, &regions)?
                }
            });
        }
        let positive = Tensor::f_cat(&mixed, 0)?;
        if !self.guided {
            return Ok(positive);
        }
        let negative = outputs.f_narrow(0, n, n)?;
        Ok(negative.f_add(&positive.f_sub(&negative)?.f_mul_scalar(guidance)?)?)
    }
}

#[cfg(test)]
mod tests;
