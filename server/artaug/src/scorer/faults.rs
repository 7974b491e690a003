//! Photometric and colour metrics for the filter: how far an image leaves the ranges of clean images.

use super::{ForFilter, ScoreError, Scorer};
use crate::{
    image::Image,
    photometry::{CleanLooks, Finding, GRID, survey},
    words::Dimension,
};

/// An excess counts at most this much, so that one strange cell does not decide.
const MOST_EXCESS: f64 = 5.0;

/// 0 for an image within the ranges of clean ones, below 0 for one outside:
/// -(e(whole) + mean over the cells of e(cell)) / 2 with e the sum of the excesses in its dimensions, each at most 5.
#[derive(Debug, Clone)]
pub struct FaultScorer {
    name: &'static str,
    dimensions: Vec<Dimension>,
    looks: CleanLooks,
}

impl FaultScorer {
    /// Exposure, contrast, sharpness and placement.
    pub fn photometry(looks: impl Into<CleanLooks>) -> Self {
        Self {
            name: "photometry",
            dimensions: vec![
                Dimension::Exposure,
                Dimension::Contrast,
                Dimension::Sharpness,
                Dimension::Placement,
            ],
            looks: looks.into(),
        }
    }

    /// Colourfulness.
    pub fn colour(looks: impl Into<CleanLooks>) -> Self {
        Self {
            name: "colour",
            dimensions: vec![Dimension::Colour],
            looks: looks.into(),
        }
    }
}

impl Scorer for FaultScorer {
    type Use = ForFilter;

    fn name(&self) -> &str {
        self.name
    }

    fn score(&self, image: &Image, prompt: &str) -> Result<f64, ScoreError> {
        let survey = survey(image);
        let ranges = self.looks.for_prompt(prompt);
        let excess = |finding: Option<Finding>| {
            finding.map_or(0.0, |finding| finding.excess.min(MOST_EXCESS))
        };
        let sum: f64 = self
            .dimensions
            .iter()
            .map(|dimension| {
                let whole = excess(ranges.judge_whole(&survey, *dimension));
                let cells: f64 = (0..GRID * GRID)
                    .map(|cell| excess(ranges.judge_cell(&survey, cell, *dimension)))
                    .sum();
                f64::midpoint(whole, cells / (GRID * GRID) as f64)
            })
            .sum();
        Ok(-sum)
    }
}
