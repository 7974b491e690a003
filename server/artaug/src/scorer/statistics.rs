//! The embedded evaluation scorer: a linear discriminant (Fisher, "The use of multiple measurements in taxonomic problems", 1936)
//! between good and badly rendered images on statistics of an image, of its quarters, and their squares. It is trained on
//! rendered icons and measures neither beauty nor meaning.

use serde::{Deserialize, Serialize};

use super::{ForEvaluation, ScoreError, Scorer};
use crate::{image::Image, photometry::moments};

/// Statistics of one part of an image.
const OF_PART: usize = 5;
/// Of the whole, of four quarters, and their spread over the quarters; four more of the whole.
const STATISTICS: usize = 6 * OF_PART + 4;
/// Each statistic and its square.
const FEATURES: usize = 2 * STATISTICS;
/// Half the window of the local normalisation; its weights are a Gaussian of sigma 7/6 (Mittal, Moorthy and Bovik 2012).
const WINDOW: i64 = 3;
/// Keeps the normalisation finite in flat parts, in units of luma 0..1.
const FLOOR: f64 = 1.0 / 255.0;
/// Added to the variance of each standardised feature, so that the fit stays well conditioned.
const RIDGE: f64 = 0.02;
/// A standardised statistic counts at most this much.
const MOST: f64 = 6.0;

/// The trained discriminant.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Discriminant {
    mean: [f64; STATISTICS],
    spread: [f64; STATISTICS],
    weights: [f64; FEATURES],
    offset: f64,
}

/// As it stands in a file.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    mean: Vec<f64>,
    spread: Vec<f64>,
    weights: Vec<f64>,
    offset: f64,
}

/// A file that holds no discriminant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a discriminant has {STATISTICS} means and spreads above 0 and {FEATURES} weights; train it again"
)]
pub struct InvalidDiscriminant;

impl TryFrom<Stored> for Discriminant {
    type Error = InvalidDiscriminant;

    fn try_from(stored: Stored) -> Result<Self, InvalidDiscriminant> {
        let spread: [f64; STATISTICS] =
            stored.spread.try_into().map_err(|_| InvalidDiscriminant)?;
        if spread.iter().any(|spread| *spread <= 0.0) {
            return Err(InvalidDiscriminant);
        }
        Ok(Self {
            mean: stored.mean.try_into().map_err(|_| InvalidDiscriminant)?,
            spread,
            weights: stored.weights.try_into().map_err(|_| InvalidDiscriminant)?,
            offset: stored.offset,
        })
    }
}

impl From<Discriminant> for Stored {
    fn from(trained: Discriminant) -> Self {
        Self {
            mean: trained.mean.to_vec(),
            spread: trained.spread.to_vec(),
            weights: trained.weights.to_vec(),
            offset: trained.offset,
        }
    }
}

/// Log odds that an image is a good one, as far as its statistics tell.
#[derive(Debug, Clone)]
pub struct StatisticsScorer(Discriminant);

impl StatisticsScorer {
    /// A scorer from a trained discriminant.
    pub fn new(trained: Discriminant) -> Self {
        Self(trained)
    }
}

impl Scorer for StatisticsScorer {
    type Use = ForEvaluation;

    fn name(&self) -> &'static str {
        "statistics"
    }

    fn score(&self, image: &Image, _prompt: &str) -> Result<f64, ScoreError> {
        let trained = &self.0;
        let features = trained.features(&statistics(image));
        let sum: f64 = features
            .iter()
            .zip(&trained.weights)
            .map(|(x, w)| x * w)
            .sum();
        Ok(sum + trained.offset)
    }
}

impl Discriminant {
    /// Trains on good and bad images; none if there are fewer than two of either.
    pub fn fit<'a>(
        good: impl IntoIterator<Item = &'a Image>,
        bad: impl IntoIterator<Item = &'a Image>,
    ) -> Option<Self> {
        let good: Vec<[f64; STATISTICS]> = good.into_iter().map(statistics).collect();
        let bad: Vec<[f64; STATISTICS]> = bad.into_iter().map(statistics).collect();
        if good.len() < 2 || bad.len() < 2 {
            return None;
        }
        let all = || good.iter().chain(&bad);
        let measured: [(f64, f64); STATISTICS] =
            std::array::from_fn(|i| moments(all().map(|row| row[i])));
        let mut trained = Self {
            mean: measured.map(|(mean, _)| mean),
            spread: measured.map(|(_, spread)| spread.max(1e-6)),
            weights: [0.0; FEATURES],
            offset: 0.0,
        };
        let features = |rows: &[[f64; STATISTICS]]| -> Vec<[f64; FEATURES]> {
            rows.iter().map(|row| trained.features(row)).collect()
        };
        let (good, bad) = (features(&good), features(&bad));
        let (good_mean, bad_mean) = (mean_of(&good), mean_of(&bad));
        let mut pooled = vec![[0.0; FEATURES]; FEATURES];
        for (rows, mean) in [(&good, &good_mean), (&bad, &bad_mean)] {
            let share = 0.5 / rows.len() as f64;
            for row in rows {
                for (i, line) in pooled.iter_mut().enumerate() {
                    for (j, cell) in line.iter_mut().enumerate().take(i + 1) {
                        *cell += share * (row[i] - mean[i]) * (row[j] - mean[j]);
                    }
                }
            }
        }
        for (i, line) in pooled.iter_mut().enumerate() {
            line[i] += RIDGE;
        }
        let gap = std::array::from_fn(|i| good_mean[i] - bad_mean[i]);
        trained.weights = solve(&pooled, &gap);
        trained.offset = -trained
            .weights
            .iter()
            .zip(good_mean.iter().zip(&bad_mean))
            .map(|(weight, (a, b))| weight * f64::midpoint(*a, *b))
            .sum::<f64>();
        Some(trained)
    }

    /// Standardised statistics and their squares.
    fn features(&self, statistics: &[f64; STATISTICS]) -> [f64; FEATURES] {
        let standard =
            |i: usize| ((statistics[i] - self.mean[i]) / self.spread[i]).clamp(-MOST, MOST);
        std::array::from_fn(|i| {
            if i < STATISTICS {
                standard(i)
            } else {
                standard(i - STATISTICS).powi(2)
            }
        })
    }
}

fn mean_of(rows: &[[f64; FEATURES]]) -> [f64; FEATURES] {
    std::array::from_fn(|i| moments(rows.iter().map(|row| row[i])).0)
}

/// Solves A x = b for a positive definite A, of which the lower triangle is read (Cholesky). The ridge keeps its diagonal positive;
/// rounding is held off all the same.
fn solve(matrix: &[[f64; FEATURES]], right: &[f64; FEATURES]) -> [f64; FEATURES] {
    let mut factor = vec![[0.0; FEATURES]; FEATURES];
    for i in 0..FEATURES {
        for j in 0..=i {
            let known: f64 = (0..j).map(|k| factor[i][k] * factor[j][k]).sum();
            let rest = matrix[i][j] - known;
            factor[i][j] = if i == j {
                rest.max(1e-9).sqrt()
            } else {
                rest / factor[j][j]
            };
        }
    }
    let mut solved = *right;
    for i in 0..FEATURES {
        let known: f64 = (0..i).map(|k| factor[i][k] * solved[k]).sum();
        solved[i] = (solved[i] - known) / factor[i][i];
    }
    for i in (0..FEATURES).rev() {
        let known: f64 = (i + 1..FEATURES).map(|k| factor[k][i] * solved[k]).sum();
        solved[i] = (solved[i] - known) / factor[i][i];
    }
    solved
}

/// Of the whole image, each quarter, and the spread over the quarters: mean and spread of the luma, mean chroma, mean step of
/// luma, and that over the spread. Of the whole: mean size of the locally normalised luma and mean product of its neighbours, parts
/// of the pixels that are nearly black and nearly white.
fn statistics(image: &Image) -> [f64; STATISTICS] {
    let planes = Planes::of(image);
    let (width, height) = (planes.width, planes.height);
    let (middle_x, middle_y) = ((width / 2).max(1), (height / 2).max(1));
    let whole = planes.part(0, 0, width, height);
    let quarters = [
        planes.part(0, 0, middle_x, middle_y),
        planes.part(middle_x.min(width - 1), 0, width, middle_y),
        planes.part(0, middle_y.min(height - 1), middle_x, height),
        planes.part(
            middle_x.min(width - 1),
            middle_y.min(height - 1),
            width,
            height,
        ),
    ];
    let spreads: [f64; OF_PART] =
        std::array::from_fn(|i| moments(quarters.iter().map(|quarter| quarter[i])).1);
    let normalised = normalised(&planes.luma, width, height);
    let (size, _) = moments(normalised.iter().map(|value| value.abs()));
    let neighbours = (0..height).flat_map(|y| (1..width).map(move |x| y * width + x));
    let (product, _) = moments(neighbours.map(|at| normalised[at - 1] * normalised[at]));
    let share = |test: fn(f64) -> bool| {
        planes.luma.iter().filter(|value| test(**value)).count() as f64 / planes.luma.len() as f64
    };
    let mut all = [0.0; STATISTICS];
    let parts = std::iter::once(&whole)
        .chain(&quarters)
        .chain([&spreads])
        .flatten();
    let more = [
        size,
        product,
        share(|value| value < 0.06),
        share(|value| value > 0.94),
    ];
    for (slot, value) in all.iter_mut().zip(parts.chain(&more)) {
        *slot = *value;
    }
    all
}

struct Planes {
    width: usize,
    height: usize,
    luma: Vec<f64>,
    chroma: Vec<f64>,
}

impl Planes {
    fn of(image: &Image) -> Self {
        let (luma, chroma) = image
            .pixels()
            .chunks_exact(3)
            .map(|pixel| {
                let [red, green, blue] =
                    [pixel[0], pixel[1], pixel[2]].map(|v| f64::from(v) / 255.0);
                let luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
                let chroma = red.max(green).max(blue) - red.min(green).min(blue);
                (luma, chroma)
            })
            .unzip();
        Self {
            width: image.width() as usize,
            height: image.height() as usize,
            luma,
            chroma,
        }
    }

    fn part(&self, left: usize, top: usize, right: usize, bottom: usize) -> [f64; OF_PART] {
        let at = |x: usize, y: usize| y * self.width + x;
        let places = (top..bottom).flat_map(|y| (left..right).map(move |x| (x, y)));
        let (mean, spread) = moments(places.clone().map(|(x, y)| self.luma[at(x, y)]));
        let (chroma, _) = moments(places.clone().map(|(x, y)| self.chroma[at(x, y)]));
        let (step, _) = moments(places.map(|(x, y)| {
            let here = self.luma[at(x, y)];
            let right = self.luma[at((x + 1).min(self.width - 1), y)];
            let below = self.luma[at(x, (y + 1).min(self.height - 1))];
            (right - here).abs() + (below - here).abs()
        }));
        [mean, spread, chroma, step, step / (spread + 0.02)]
    }
}

/// (Y - local mean) / (local spread + 1/255), the window cut off at the image's edge.
fn normalised(luma: &[f64], width: usize, height: usize) -> Vec<f64> {
    let weight = |offset: i64| (-0.5 * (offset as f64 / (7.0 / 6.0)).powi(2)).exp();
    let weights: Vec<f64> = (-WINDOW..=WINDOW).map(weight).collect();
    let span = |middle: usize, length: usize| {
        let middle = middle as i64;
        (middle - WINDOW).max(0)..=(middle + WINDOW).min(length as i64 - 1)
    };
    let mut result = Vec::with_capacity(luma.len());
    for y in 0..height {
        for x in 0..width {
            let (mut total, mut sum, mut squares) = (0.0, 0.0, 0.0);
            for row in span(y, height) {
                for column in span(x, width) {
                    let weight = weights[(row - y as i64 + WINDOW) as usize]
                        * weights[(column - x as i64 + WINDOW) as usize];
                    let value = luma[row as usize * width + column as usize];
                    total += weight;
                    sum += weight * value;
                    squares += weight * value * value;
                }
            }
            let mean = sum / total;
            let spread = (squares / total - mean * mean).max(0.0).sqrt();
            result.push((luma[y * width + x] - mean) / (spread + FLOOR));
        }
    }
    result
}
