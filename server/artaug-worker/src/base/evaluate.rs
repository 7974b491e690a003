//! Whether the subjects of a base model can be told apart: each picture is compared with the clean renderings of all drawings.

use std::fmt;

use concord_artaug::{
    data::{BACKGROUNDS, STYLES, clean_image, plain_prompt},
    image::Image,
};
use concord_learning::diffusion::pipeline::TextToImage;

use super::{
    BaseError,
    corpus::Corpus,
    sample::{Drawing, draw, side},
};

/// How many pictures were recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evaluation {
    /// Pictures drawn.
    pub pictures: usize,
    /// Of these, those whose likest drawing has the subject of the prompt.
    pub subject: usize,
    /// Of these, also its style.
    pub both: usize,
    /// Those with the subject among the five likest subjects.
    pub among_five: usize,
    /// Subjects to choose from.
    pub subjects: usize,
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |count: usize| 100.0 * count as f64 / self.pictures as f64;
        write!(
            f,
            "{} pictures: subject recognised among {} in {:.1} % (chance {:.1} %), with its style {:.1} %, among the five likest {:.1} %",
            self.pictures,
            self.subjects,
            part(self.subject),
            100.0 / self.subjects as f64,
            part(self.both),
            part(self.among_five),
        )
    }
}

impl Evaluation {
    /// Draws `count` plain prompts, drawings and backgrounds chosen by the seed, with `words` behind each. A picture is as like a drawing as their
    /// pixels correlate, colour by colour, once the drawing is rendered on the prompt's background.
    ///
    /// # Errors
    /// For no prompts, and the engine's.
    pub fn run(
        model: &TextToImage,
        corpus: &Corpus,
        count: usize,
        words: &str,
        drawing: &Drawing,
    ) -> Result<Self, BaseError> {
        let side = side(model)?;
        let drawings = corpus.drawings();
        let mut rng = drawing.seed.derive("artaug base evaluation").rng();
        let chosen: Vec<(usize, usize)> = (0..count)
            .map(|_| {
                let place = rng.below(drawings.len() as u64) as usize;
                (place, rng.below(BACKGROUNDS.len() as u64) as usize)
            })
            .collect();
        let prompts: Vec<String> = chosen
            .iter()
            .map(|&(place, background)| {
                let icon = &drawings[place].0;
                let plain = plain_prompt(&icon.name, &icon.set, BACKGROUNDS[background].0);
                if words.is_empty() {
                    plain
                } else {
                    format!("{plain}, {words}")
                }
            })
            .collect();
        let images = draw(model, &prompts, drawing)?;
        let references = (0..BACKGROUNDS.len())
            .map(|background| {
                drawings
                    .iter()
                    .map(|(_, raster)| Ok(centred(&clean_image(raster, side, background)?)))
                    .collect::<Result<Vec<_>, BaseError>>()
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut found = Self {
            pictures: count,
            subject: 0,
            both: 0,
            among_five: 0,
            subjects: drawings.len() / STYLES.len(),
        };
        for (image, &(place, background)) in images.iter().zip(&chosen) {
            let own = centred(image);
            let mut likest: Vec<(f64, usize)> = references[background]
                .iter()
                .enumerate()
                .map(|(other, reference)| {
                    let product: f64 = own.iter().zip(reference).map(|(a, b)| a * b).sum();
                    (product, other)
                })
                .collect();
            likest.sort_by(|a, b| b.0.total_cmp(&a.0));
            let name = |place: usize| drawings[place].0.name.as_str();
            let mut names: Vec<&str> = Vec::new();
            for &(_, other) in &likest {
                if names.len() == 5 {
                    break;
                }
                if !names.contains(&name(other)) {
                    names.push(name(other));
                }
            }
            found.subject += usize::from(names.first() == Some(&name(place)));
            found.among_five += usize::from(names.contains(&name(place)));
            found.both += usize::from(likest.first().is_some_and(|&(_, other)| other == place));
        }
        Ok(found)
    }
}

/// Pixels with the mean of each colour taken away and scaled to length 1, so that a sum of products is a correlation.
fn centred(image: &Image) -> Vec<f64> {
    let mut values: Vec<f64> = image.pixels().iter().map(|&x| f64::from(x)).collect();
    for colour in 0..3 {
        let count = values.len() / 3;
        let mean = values.iter().skip(colour).step_by(3).sum::<f64>() / count as f64;
        for value in values.iter_mut().skip(colour).step_by(3) {
            *value -= mean;
        }
    }
    let length = values.iter().map(|x| x * x).sum::<f64>().sqrt();
    if length > 0.0 {
        for value in &mut values {
            *value /= length;
        }
    }
    values
}
