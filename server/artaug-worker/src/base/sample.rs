//! Pictures of a model, to look at.

use concord_artaug::image::Image;
use concord_common::seed::Seed;
use concord_learning::diffusion::{
    denoiser::Denoiser as _,
    pipeline::{TextToImage, to_bytes},
    region::{Order, Texts, generate},
    schedule::Sampler,
    seeds,
};

use super::BaseError;

/// Pictures of one forward pass.
const BATCH: usize = 16;
/// Pixels between two pictures of a sheet.
const GAP: u32 = 2;

/// How pictures are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawing {
    /// Steps of the sampler.
    pub steps: usize,
    /// Classifier-free guidance.
    pub guidance: f64,
    /// Of the noise.
    pub seed: Seed,
}

/// Pixels of a side of the model's own pictures.
///
/// # Errors
/// If they are not square.
pub fn side(model: &TextToImage) -> Result<u32, BaseError> {
    let [_, height, width] = model.native_size();
    if height != width {
        return Err(BaseError::Order(format!(
            "the model draws {height} by {width}, not squares"
        )));
    }
    Ok((height * model.codec().factor()) as u32)
}

/// One picture of each prompt. The noise of a picture follows from the seed and its place alone.
///
/// # Errors
/// For no prompts, and the engine's.
pub fn draw(
    model: &TextToImage,
    prompts: &[String],
    drawing: &Drawing,
) -> Result<Vec<Image>, BaseError> {
    if prompts.is_empty() {
        return Err(BaseError::Order("there is no prompt to draw".to_owned()));
    }
    let side = side(model)?;
    let plan = model.objective().plan(Sampler::Euler, drawing.steps)?;
    let mut images = Vec::with_capacity(prompts.len());
    for (piece, prompts) in prompts.chunks(BATCH).enumerate() {
        let places = piece * BATCH..piece * BATCH + prompts.len();
        let noises: Vec<Seed> = places
            .map(|place| drawing.seed.derive(&format!("artaug base sample {place}")))
            .collect();
        let noise = seeds::noise(&noises, model.native_size(), model.compute())?;
        let texts: Vec<&str> = prompts.iter().map(String::as_str).collect();
        let texts = Texts {
            positive: model.condition(&texts)?,
            negative: model.condition(&[""])?,
            guidance: drawing.guidance,
        };
        let orders: Vec<Order<'_>> = (0..prompts.len() as i64)
            .map(|prompt| Order {
                prompt,
                advice: None,
            })
            .collect();
        let latents = generate(model, &plan, &noise, &orders, &texts, &mut |_| Ok(()))?;
        let bytes = to_bytes(&model.codec().decode(&latents)?)?;
        for pixels in bytes.chunks(side as usize * side as usize * 3) {
            images.push(Image::new(side, side, pixels.to_vec())?);
        }
    }
    Ok(images)
}

/// Pictures of one size side by side, each pixel `enlarge` times as large.
///
/// # Errors
/// For no pictures, or if the sheet becomes too large.
pub fn contact_sheet(images: &[Image], columns: u32, enlarge: u32) -> Result<Image, BaseError> {
    let first = images
        .first()
        .ok_or_else(|| BaseError::Order("there is no picture".to_owned()))?;
    if columns == 0 || enlarge == 0 {
        return Err(BaseError::Order(
            "columns and enlargement are at least 1".to_owned(),
        ));
    }
    let columns = columns.min(images.len() as u32);
    let rows = (images.len() as u32).div_ceil(columns);
    let (width, height) = (first.width() * enlarge, first.height() * enlarge);
    let whole = |count: u32, size: u32| count * (size + GAP) + GAP;
    let mut sheet = Image::filled(whole(columns, width), whole(rows, height), [255; 3])?;
    for (place, image) in (0_u32..).zip(images) {
        let left = whole(place % columns, width);
        let top = whole(place / columns, height);
        for y in 0..height.min(image.height() * enlarge) {
            for x in 0..width.min(image.width() * enlarge) {
                sheet.put(left + x, top + y, image.at(x / enlarge, y / enlarge));
            }
        }
    }
    Ok(sheet)
}
