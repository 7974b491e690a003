//! How unlike each other the images of a set are, and how near they come to those of another.

use serde::{Deserialize, Serialize};

use crate::image::Image;

/// Sides of the thumbnails that are compared.
const SIDE: u32 = 8;

/// Thumbnails of the images of a set: what is left of each once it was looked at.
#[derive(Debug, Clone, Default)]
pub struct Thumbnails(Vec<Vec<f64>>);

impl Thumbnails {
    /// Adds an image.
    pub fn add(&mut self, image: &Image) {
        let cells = image.thumbnail(SIDE);
        self.0.push(cells.into_iter().flatten().collect());
    }

    /// The mean over all pairs of the root mean square difference of 8 x 8 thumbnails (channels in 0..1): 0 for equal images, about
    /// 0.4 for random colours. None below two images.
    ///
    /// It sees layout and colour, not meaning; it is here to notice a model that begins to draw the same picture for every prompt.
    pub fn diversity(&self) -> Option<f64> {
        let (mut sum, mut pairs) = (0.0, 0_u64);
        for (index, first) in self.0.iter().enumerate() {
            for second in &self.0[..index] {
                sum += distance(first, second);
                pairs += 1;
            }
        }
        (pairs > 0).then(|| sum / pairs as f64)
    }

    /// Of every image the distance, as in [`Self::diversity`], to the nearest of the others; nothing if there are no others.
    ///
    /// # Errors
    /// What `go_on` says, which is asked before every image: they may be many on both sides.
    pub fn distances<E>(
        &self,
        others: &Self,
        go_on: impl Fn() -> Result<(), E>,
    ) -> Result<Vec<f64>, E> {
        let mut all = Vec::new();
        for image in &self.0 {
            go_on()?;
            let distances = others.0.iter().map(|other| distance(image, other));
            all.extend(distances.reduce(f64::min));
        }
        Ok(all)
    }
}

/// How near an arm's held-out images come to the images X' that its model was trained on, and how near the base's come to the same. It is
/// here to notice a model that draws what it was trained on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nearest {
    /// Mean distance to the nearest X', in 0..1; see [`Thumbnails::distances`].
    pub arm: f64,
    /// The same of the base's images.
    pub base: f64,
    /// Share of the arm's images that are nearer than all but a twentieth of the base's (of fewer than twenty: than all of them): about 0.05
    /// if they are like the base's, more if there are copies among them.
    pub near: f64,
}

impl Nearest {
    /// From the distances of both. None if there are none.
    pub fn of(arm: &[f64], base: &[f64]) -> Option<Self> {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let mut sorted = base.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let limit = *sorted.get(base.len() / 20)?;
        let near = arm.iter().filter(|distance| **distance < limit).count();
        (!arm.is_empty()).then(|| Self {
            arm: mean(arm),
            base: mean(base),
            near: near as f64 / arm.len() as f64,
        })
    }
}

/// Root mean square difference of two thumbnails.
fn distance(first: &[f64], second: &[f64]) -> f64 {
    let squares: f64 = first.iter().zip(second).map(|(a, b)| (a - b).powi(2)).sum();
    (squares / first.len() as f64).sqrt()
}
