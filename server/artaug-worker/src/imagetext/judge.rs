//! Whether what a base model draws can be recognised: 100 of its subjects, two classifiers, and the same question about real drawings.

use std::collections::BTreeMap;

use concord_artaug::{
    data::{BACKGROUNDS, Rendering, STYLES, clean_image, example, plain_prompt},
    image::Image,
    words::{Dimension, Level, Place, Statement, describe},
};
use concord_common::seed::Seed;
use concord_learning::vision::cosine;
use serde::{Deserialize, Serialize};

use super::{Drawings, ImageText, ImageTextError, Recognised, SIDE};

/// What the base model's images are like. Chance is 1 in the number of subjects.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BaseFigures {
    /// By the image-text model, which knows the subjects from real drawings: the prompt with the right subject against those with the others.
    pub by_words: Recognised,
    /// By the nearest clean drawing of the same style and background, on the features of the ImageNet classifier alone.
    pub by_drawings: Recognised,
    /// Real drawings, rendered as well and badly as in the base model's training, judged by words: what is within reach.
    pub real_by_words: Recognised,
    /// The same, judged by drawings.
    pub real_by_drawings: Recognised,
    /// Mean alignment of the generated images with their prompts.
    pub alignment: f64,
    /// That of the real ones.
    pub real_alignment: f64,
    /// Part recognised first by words, by style.
    pub by_style: BTreeMap<String, f64>,
}

/// What draws an image of each prompt.
pub type Draw<'a> = dyn FnMut(&[String]) -> Result<Vec<Image>, ImageTextError> + 'a;

/// Something to be recognised.
struct Asked {
    subject: usize,
    style: usize,
    background: usize,
    /// Its number among those of the same subject.
    number: u64,
}

impl Asked {
    fn new(k: usize, subjects: usize) -> Self {
        let number = k / subjects;
        Self {
            subject: k % subjects,
            style: (k + number) % STYLES.len(),
            background: (k * 3 + number) % BACKGROUNDS.len(),
            number: number as u64,
        }
    }
}

/// The judge.
#[derive(Debug)]
pub struct Judge<'a> {
    model: &'a ImageText,
    drawings: &'a Drawings,
    names: Vec<&'static str>,
    /// By style and background.
    nearest: BTreeMap<(usize, usize), Known>,
}

/// Features of the subjects' drawings on one background in one style.
#[derive(Debug)]
struct Known {
    mean: Vec<f64>,
    /// Less the mean, of length 1; none for a subject without such a drawing.
    rows: Vec<Option<Vec<f32>>>,
}

impl<'a> Judge<'a> {
    /// A judge of the hundred subjects on which the image-text model's own figures are measured.
    pub fn new(model: &'a ImageText, drawings: &'a Drawings) -> Self {
        Self {
            model,
            drawings,
            names: drawings.held_out().iter().copied().collect(),
            nearest: BTreeMap::new(),
        }
    }

    /// Has `draw` make `samples` images from plain prompts, or with the words for good looks after them, and judges them. The images come back with
    /// their prompts.
    ///
    /// # Errors
    /// If `draw` or a classifier fails.
    pub fn base(
        &mut self,
        draw: &mut Draw<'_>,
        (samples, good_words): (usize, bool),
        seed: Seed,
        say: &mut dyn FnMut(String),
    ) -> Result<(BaseFigures, Vec<(String, Image)>), ImageTextError> {
        let asked: Vec<Asked> = (0..samples)
            .map(|k| Asked::new(k, self.names.len()))
            .collect();
        let wishes: Vec<Statement> = Dimension::ALL
            .into_iter()
            .filter(|_| good_words)
            .map(|dimension| Statement {
                dimension,
                level: Level::Good,
                place: Place::Whole,
            })
            .collect();
        let prompts: Vec<String> = asked
            .iter()
            .map(|asked| describe(&self.prompt(asked, asked.subject), &wishes))
            .collect();
        let images = draw(&prompts)?;
        if images.len() != prompts.len() {
            return Err(ImageTextError::Unusable(format!(
                "{} images were drawn for {} prompts",
                images.len(),
                prompts.len()
            )));
        }
        let drawn: Vec<(String, Image)> = prompts.into_iter().zip(images).collect();
        let rendering = Rendering::new(SIDE);
        let real = asked
            .iter()
            .map(|asked| {
                let icons = self.drawings.of(self.names[asked.subject]);
                let own = icons
                    .iter()
                    .find(|(icon, _)| icon.set == STYLES[asked.style]);
                let (icon, raster) = own.ok_or_else(|| self.no_drawing(asked))?;
                let made = example(icon, raster, &rendering, seed, asked.number)?;
                // The background is drawn with the example: the question is about the one that it has.
                let background = BACKGROUNDS
                    .iter()
                    .position(|(name, _)| made.subject.ends_with(&format!(", {name} background")))
                    .unwrap_or(asked.background);
                let asked = Asked {
                    background,
                    ..*asked
                };
                Ok((asked, made.image))
            })
            .collect::<Result<Vec<_>, ImageTextError>>()?;
        let generated: Vec<(Asked, Image)> = asked
            .into_iter()
            .zip(drawn.iter().map(|(_, image)| image.clone()))
            .collect();
        say("judging".to_owned());
        let (words, right) = self.by_words(&generated)?;
        let (real_words, real_right) = self.by_words(&real)?;
        let mut by_style = BTreeMap::new();
        for (style, name) in STYLES.iter().enumerate() {
            let own: Vec<bool> = generated
                .iter()
                .zip(&right)
                .filter(|((asked, _), _)| asked.style == style)
                .map(|(_, (first, _))| *first)
                .collect();
            let found = own.iter().filter(|first| **first).count();
            by_style.insert((*name).to_owned(), found as f64 / own.len().max(1) as f64);
        }
        let mean = |right: &[(bool, f64)]| {
            right.iter().map(|(_, alignment)| alignment).sum::<f64>() / right.len().max(1) as f64
        };
        let figures = BaseFigures {
            by_words: words,
            by_drawings: self.by_drawings(&generated)?,
            real_by_words: real_words,
            real_by_drawings: self.by_drawings(&real)?,
            alignment: mean(&right),
            real_alignment: mean(&real_right),
            by_style,
        };
        Ok((figures, drawn))
    }

    fn prompt(&self, asked: &Asked, subject: usize) -> String {
        let (background, _) = BACKGROUNDS[asked.background];
        plain_prompt(self.names[subject], STYLES[asked.style], background)
    }

    fn no_drawing(&self, asked: &Asked) -> ImageTextError {
        ImageTextError::Unusable(format!(
            "the set {} has no drawing of {}",
            STYLES[asked.style], self.names[asked.subject]
        ))
    }

    /// Whether each was recognised first, with its alignment.
    fn by_words(
        &self,
        asked: &[(Asked, Image)],
    ) -> Result<(Recognised, Vec<(bool, f64)>), ImageTextError> {
        let (mut ranks, mut each) = (Vec::new(), Vec::new());
        for (asked, image) in asked {
            let image = self.model.image(image)?;
            let scores = (0..self.names.len())
                .map(|subject| {
                    let text = self.model.text(&self.prompt(asked, subject))?;
                    Ok(cosine(&image, &text))
                })
                .collect::<Result<Vec<f64>, ImageTextError>>()?;
            let rank = rank(&scores, asked.subject);
            ranks.push(rank);
            each.push((rank == 0, scores[asked.subject]));
        }
        Ok((self.recognised(&ranks), each))
    }

    fn by_drawings(&mut self, asked: &[(Asked, Image)]) -> Result<Recognised, ImageTextError> {
        let mut ranks = Vec::new();
        for (asked, image) in asked {
            let features = self.model.features(image)?;
            let key = (asked.style, asked.background);
            if !self.nearest.contains_key(&key) {
                let known = self.look_at_drawings(asked)?;
                self.nearest.insert(key, known);
            }
            let known = &self.nearest[&key];
            let mine = centred(&features, &known.mean);
            let scores: Vec<f64> = known
                .rows
                .iter()
                .map(|known| known.as_ref().map_or(-1.0, |known| cosine(&mine, known)))
                .collect();
            ranks.push(rank(&scores, asked.subject));
        }
        Ok(self.recognised(&ranks))
    }

    fn look_at_drawings(&self, asked: &Asked) -> Result<Known, ImageTextError> {
        let mut known = Vec::new();
        for name in &self.names {
            let icons = self.drawings.of(name);
            let own = icons
                .iter()
                .find(|(icon, _)| icon.set == STYLES[asked.style]);
            known.push(match own {
                Some((_, raster)) => {
                    let image = clean_image(raster, SIDE, asked.background)?;
                    Some(self.model.features(&image)?)
                }
                None => None,
            });
        }
        let rows: Vec<&Vec<f32>> = known.iter().flatten().collect();
        let width = rows.first().map_or(0, |row| row.len());
        let mean: Vec<f64> = (0..width)
            .map(|i| rows.iter().map(|row| f64::from(row[i])).sum::<f64>() / rows.len() as f64)
            .collect();
        let rows = known
            .iter()
            .map(|row| row.as_ref().map(|row| centred(row, &mean)))
            .collect();
        Ok(Known { mean, rows })
    }

    fn recognised(&self, ranks: &[usize]) -> Recognised {
        let part = |most: usize| {
            ranks.iter().filter(|rank| **rank < most).count() as f64 / ranks.len().max(1) as f64
        };
        Recognised {
            images: ranks.len(),
            subjects: self.names.len(),
            top1: part(1),
            top5: part(5),
        }
    }
}

/// How many others score at least as high.
fn rank(scores: &[f64], own: usize) -> usize {
    let others = scores.iter().enumerate().filter(|(place, _)| *place != own);
    others.filter(|(_, score)| **score >= scores[own]).count()
}

/// Less the mean, of length 1.
fn centred(row: &[f32], mean: &[f64]) -> Vec<f32> {
    let moved: Vec<f64> = row
        .iter()
        .zip(mean)
        .map(|(value, mean)| f64::from(*value) - mean)
        .collect();
    let length = moved
        .iter()
        .map(|value| value * value)
        .sum::<f64>()
        .sqrt()
        .max(1e-9);
    moved.iter().map(|value| (value / length) as f32).collect()
}
