//! The embedded evaluation scorer: how unusual an image's statistics are among those of clean images. It follows the idea of
//! NIQE (Mittal, Soundararajan and Bovik, "Making a completely blind image quality analyzer", IEEE SPL 2013): statistics of
//! locally normalised luma and of colours, a multivariate normal distribution fitted to clean images, the distance to it.
//! It measures neither beauty nor meaning.

use serde::{Deserialize, Serialize};

use super::{ForEvaluation, ScoreError, Scorer};
use crate::{image::Image, photometry::moments};

/// Statistics of one image.
const FEATURES: usize = 12;
/// Half the window of the local normalisation; its weights are a Gaussian of sigma 7/6 (Mittal et al. 2012).
const WINDOW: i64 = 3;
/// Keeps the normalisation finite in flat parts, in units of luma 0..1.
const FLOOR: f64 = 1.0 / 255.0;
/// Part of a feature's own variance that is added to it, so that a fit to few images stays invertible.
const SHRINKAGE: f64 = 0.05;

/// Mean and spread of the statistics of clean images.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CleanStatistics {
    mean: [f64; FEATURES],
    /// Lower triangle L of the covariance L L^T.
    factor: [[f64; FEATURES]; FEATURES],
    images: usize,
}

/// Minus the Mahalanobis distance of an image's statistics to those of clean images: about -3.3 for a clean image
/// (-sqrt(12 features)), lower the stranger.
#[derive(Debug, Clone)]
pub struct StatisticsScorer(CleanStatistics);

impl StatisticsScorer {
    /// A scorer that compares with these.
    pub fn new(clean: CleanStatistics) -> Self {
        Self(clean)
    }
}

impl Scorer for StatisticsScorer {
    type Use = ForEvaluation;

    fn name(&self) -> &'static str {
        "statistics"
    }

    fn score(&self, image: &Image, _prompt: &str) -> Result<f64, ScoreError> {
        Ok(-self.0.distance(&features(image)))
    }
}

impl CleanStatistics {
    /// Fits to clean images; none if there are fewer than two.
    pub fn fit<'a>(clean: impl IntoIterator<Item = &'a Image>) -> Option<Self> {
        let rows: Vec<[f64; FEATURES]> = clean.into_iter().map(features).collect();
        if rows.len() < 2 {
            return None;
        }
        let mean =
            std::array::from_fn(|i| rows.iter().map(|row| row[i]).sum::<f64>() / rows.len() as f64);
        let mut covariance = [[0.0; FEATURES]; FEATURES];
        for row in &rows {
            for (i, line) in covariance.iter_mut().enumerate() {
                for (j, cell) in line.iter_mut().enumerate() {
                    *cell += (row[i] - mean[i]) * (row[j] - mean[j]) / (rows.len() - 1) as f64;
                }
            }
        }
        for (i, line) in covariance.iter_mut().enumerate() {
            line[i] = line[i] * (1.0 + SHRINKAGE) + 1e-6;
        }
        Some(Self {
            mean,
            factor: cholesky(&covariance),
            images: rows.len(),
        })
    }

    /// Clean images behind the fit.
    pub fn images(&self) -> usize {
        self.images
    }

    /// sqrt((x - m)^T (L L^T)^-1 (x - m)), by solving L y = x - m.
    fn distance(&self, features: &[f64; FEATURES]) -> f64 {
        let mut solved = [0.0; FEATURES];
        for i in 0..FEATURES {
            let known: f64 = (0..i).map(|j| self.factor[i][j] * solved[j]).sum();
            solved[i] = (features[i] - self.mean[i] - known) / self.factor[i][i];
        }
        solved.iter().map(|value| value * value).sum::<f64>().sqrt()
    }
}

/// The lower triangle L of a positive definite matrix L L^T. Its diagonal is positive thanks to what was added to that of the
/// covariance; rounding is held off all the same.
fn cholesky(matrix: &[[f64; FEATURES]; FEATURES]) -> [[f64; FEATURES]; FEATURES] {
    let mut factor = [[0.0; FEATURES]; FEATURES];
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
    factor
}

/// Mean and spread of luma and of both opponent colours; mean size of horizontal and vertical steps of luma; mean size,
/// and mean product of neighbours, of the locally normalised luma; parts of the pixels that are nearly black and nearly white.
fn features(image: &Image) -> [f64; FEATURES] {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let pixels: Vec<[f64; 3]> = image
        .pixels()
        .chunks_exact(3)
        .map(|pixel| [pixel[0], pixel[1], pixel[2]].map(|value| f64::from(value) / 255.0))
        .collect();
    let luma: Vec<f64> = pixels
        .iter()
        .map(|[r, g, b]| 0.2126 * r + 0.7152 * g + 0.0722 * b)
        .collect();
    let (mean, spread) = moments(luma.iter().copied());
    let (mean_rg, spread_rg) = moments(pixels.iter().map(|[r, g, _]| r - g));
    let (mean_yb, spread_yb) = moments(pixels.iter().map(|[r, g, b]| f64::midpoint(*r, *g) - b));
    let normalised = normalised(&luma, width, height);
    let (size, _) = moments(normalised.iter().map(|value| value.abs()));
    let across = |plane: &[f64], join: fn(f64, f64) -> f64| {
        let steps = (0..height).flat_map(|y| (1..width).map(move |x| y * width + x));
        moments(steps.map(|at| join(plane[at - 1], plane[at]))).0
    };
    let down = |plane: &[f64], join: fn(f64, f64) -> f64| {
        moments((width..width * height).map(|at| join(plane[at - width], plane[at]))).0
    };
    let part = |test: fn(f64) -> bool| {
        luma.iter().filter(|value| test(**value)).count() as f64 / luma.len() as f64
    };
    [
        mean,
        spread,
        mean_rg,
        spread_rg,
        mean_yb,
        spread_yb,
        across(&luma, |a, b| (a - b).abs()) + down(&luma, |a, b| (a - b).abs()),
        size,
        across(&normalised, |a, b| a * b),
        down(&normalised, |a, b| a * b),
        part(|value| value < 0.06),
        part(|value| value > 0.94),
    ]
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
