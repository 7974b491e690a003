//! The ranges that clean images keep, measured, and where an image leaves them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{GRID, Survey};
use crate::words::{Dimension, Level};

/// Between two quantiles of the clean images.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Range {
    /// Below this is `Low`.
    pub low: f64,
    /// Above this is `High`.
    pub high: f64,
}

/// The ranges of every dimension, for whole images and for each of the cells.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CleanRanges {
    /// By [`Dimension::ALL`].
    whole: [Range; 5],
    /// By cell, row by row, then by [`Dimension::REGIONAL`].
    cells: [[Range; 4]; GRID * GRID],
    /// Clean images that were measured.
    images: usize,
}

/// A difference that is plainly seen; excesses are counted in these, so that a measure which clean images hardly vary in is not
/// a fault at the first trace of noise.
fn visible_step(dimension: Dimension) -> f64 {
    match dimension {
        Dimension::Exposure | Dimension::Colour => 0.05,
        Dimension::Contrast => 0.03,
        Dimension::Sharpness => 0.3,
        Dimension::Placement => 0.1,
    }
}

/// Ranges cannot be measured without clean images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no clean image to measure the ranges from")]
pub struct NoImages;

/// A measure outside its range.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Finding {
    /// Which measure.
    pub dimension: Dimension,
    /// On which side of the range.
    pub level: Level,
    /// How far outside, in visible steps; above 0.
    pub excess: f64,
}

impl Range {
    fn between(mut values: Vec<f64>, tail: f64) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        let last = (values.len() - 1) as f64;
        let quantile = |part: f64| {
            let place = part * last;
            let (below, above) = (place.floor() as usize, place.ceil() as usize);
            values[below] + (values[above] - values[below]) * place.fract()
        };
        Self {
            low: quantile(tail),
            high: quantile(1.0 - tail),
        }
    }

    fn judge(self, dimension: Dimension, value: f64) -> Option<Finding> {
        let step = visible_step(dimension);
        let (level, excess) = if value < self.low {
            (Level::Low, (self.low - value) / step)
        } else if value > self.high && dimension.too_high_is_a_fault() {
            (Level::High, (value - self.high) / step)
        } else {
            return None;
        };
        Some(Finding {
            dimension,
            level,
            excess,
        })
    }
}

impl CleanRanges {
    /// Measures the ranges: the quantiles `tail` and 1 - `tail` (held to 0..0.5), linearly interpolated.
    ///
    /// # Errors
    /// If there is no image.
    pub fn measure(clean: &[Survey], tail: f64) -> Result<Self, NoImages> {
        if clean.is_empty() {
            return Err(NoImages);
        }
        let tail = tail.clamp(0.0, 0.5);
        let between = |measure: &dyn Fn(&Survey) -> f64| {
            Range::between(clean.iter().map(measure).collect(), tail)
        };
        let cells = std::array::from_fn(|cell| {
            Dimension::REGIONAL.map(|dimension| {
                between(&|survey| survey.cells[cell].get(dimension).unwrap_or_default())
            })
        });
        Ok(Self {
            whole: Dimension::ALL.map(|dimension| between(&|survey| survey.whole(dimension))),
            cells,
            images: clean.len(),
        })
    }

    /// The range of a measure of whole images.
    pub fn whole(&self, dimension: Dimension) -> Range {
        self.whole[dimension.index()]
    }

    /// Clean images behind the ranges.
    pub fn images(&self) -> usize {
        self.images
    }

    /// Where a measure of the whole image leaves its range.
    pub fn judge_whole(&self, survey: &Survey, dimension: Dimension) -> Option<Finding> {
        self.whole(dimension)
            .judge(dimension, survey.whole(dimension))
    }

    /// Where a cell leaves its range; cells are counted row by row. None for placement, which cells do not have.
    ///
    /// # Panics
    /// If there is no such cell.
    pub fn judge_cell(
        &self,
        survey: &Survey,
        cell: usize,
        dimension: Dimension,
    ) -> Option<Finding> {
        let value = survey.cells[cell].get(dimension)?;
        self.cells[cell][dimension.index()].judge(dimension, value)
    }
}

/// Fewer clean images make no context of their own.
const LEAST_OF_CONTEXT: usize = 20;

/// The ranges of clean images by context: words of a prompt that say what else an image must look like, such as a background.
/// White surroundings are no fault where the prompt asks for them.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CleanLooks {
    overall: CleanRanges,
    contexts: BTreeMap<String, CleanRanges>,
}

impl From<CleanRanges> for CleanLooks {
    /// The same ranges for every prompt.
    fn from(overall: CleanRanges) -> Self {
        Self {
            overall,
            contexts: BTreeMap::new(),
        }
    }
}

impl CleanLooks {
    /// Measures clean images with their contexts, over all and by context; `tail` as in [`CleanRanges::measure`].
    ///
    /// # Errors
    /// If there is no image.
    pub fn measure(clean: &[(String, Survey)], tail: f64) -> Result<Self, NoImages> {
        let mut by_context: BTreeMap<&str, Vec<Survey>> = BTreeMap::new();
        for (context, survey) in clean {
            by_context.entry(context).or_default().push(survey.clone());
        }
        let all: Vec<Survey> = clean.iter().map(|(_, survey)| survey.clone()).collect();
        let mut contexts = BTreeMap::new();
        for (context, surveys) in by_context {
            if surveys.len() >= LEAST_OF_CONTEXT && !context.is_empty() {
                contexts.insert(context.to_owned(), CleanRanges::measure(&surveys, tail)?);
            }
        }
        Ok(Self {
            overall: CleanRanges::measure(&all, tail)?,
            contexts,
        })
    }

    /// The ranges for a prompt: those of the longest context that stands in it, or the overall ones.
    pub fn for_prompt(&self, prompt: &str) -> &CleanRanges {
        self.contexts
            .iter()
            .filter(|(context, _)| prompt.contains(context.as_str()))
            .max_by_key(|(context, _)| context.len())
            .map_or(&self.overall, |(_, ranges)| ranges)
    }

    /// Clean images behind the ranges.
    pub fn images(&self) -> usize {
        self.overall.images()
    }
}
