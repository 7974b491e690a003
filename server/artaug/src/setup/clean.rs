//! What good images look like, measured from captioned drawings.

use concord_common::seed::Seed;
use serde::{Deserialize, Serialize};

use crate::{
    data::{BACKGROUNDS, Icon, Raster, Rendering, clean_image, example},
    image::ImageError,
    photometry::{CleanLooks, NoImages, survey},
    scorer::Discriminant,
    words::Statement,
};

/// What good images look like, measured once from the data of the base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clean {
    /// For advice and the filter.
    pub looks: CleanLooks,
    /// For the evaluation.
    pub statistics: Discriminant,
}

/// Why nothing can be measured.
#[derive(Debug, thiserror::Error)]
pub enum CleanError {
    /// The side of the images.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No drawing.
    #[error(transparent)]
    NoImages(#[from] NoImages),
    /// Too few to tell good from bad.
    #[error(
        "{drawings} drawings give {good} good and {bad} bad renderings; at least two of each are needed"
    )]
    Few {
        /// Drawings given.
        drawings: usize,
        /// Good renderings.
        good: usize,
        /// Bad renderings.
        bad: usize,
    },
}

impl Clean {
    /// Measures the looks from each drawing on each background in turn, and trains the discriminant on one rendering of each.
    /// Give it drawings whose subjects are not held out.
    ///
    /// # Errors
    /// If there are too few drawings or the side is out of bounds.
    pub fn measure(
        drawings: &[(Icon, Raster)],
        side: u32,
        tail: f64,
        seed: Seed,
    ) -> Result<Self, CleanError> {
        let (mut surveys, mut good, mut bad) = (Vec::new(), Vec::new(), Vec::new());
        let rendering = Rendering::new(side);
        for (number, (icon, raster)) in drawings.iter().enumerate() {
            let (background, _) = BACKGROUNDS[number % BACKGROUNDS.len()];
            let clean = clean_image(raster, side, number)?;
            surveys.push((format!("{background} background"), survey(&clean)));
            let made = example(icon, raster, &rendering, seed, number as u64)?;
            if made.truth.iter().copied().any(Statement::is_fault) {
                bad.push(made.image);
            } else {
                good.push(made.image);
            }
        }
        let looks = CleanLooks::measure(&surveys, tail)?;
        let statistics = Discriminant::fit(&good, &bad).ok_or(CleanError::Few {
            drawings: drawings.len(),
            good: good.len(),
            bad: bad.len(),
        })?;
        Ok(Self { looks, statistics })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::{rasterise, read_icons},
        photometry::CleanRanges,
        scorer::{Scorer as _, StatisticsScorer},
        words::Dimension,
    };

    /// Discs of several sizes and colours.
    fn drawings(count: u32) -> Vec<(Icon, Raster)> {
        let icons: Vec<String> = (0..count)
            .map(|number| {
                let (radius, shade) = (6 + number % 8, 40 + number % 180);
                format!(
                    "\"disc-{number:03}\": {{\"body\": \"<circle cx='16' cy='16' r='{radius}' fill='rgb({shade},60,200)'/>\"}}"
                )
            })
            .collect();
        let json = format!(
            "{{\"width\": 32, \"height\": 32, \"icons\": {{{}}}}}",
            icons.join(", ")
        );
        read_icons("test", json.as_bytes())
            .unwrap()
            .into_iter()
            .map(|icon| {
                let raster = rasterise(&icon, 24).unwrap();
                (icon, raster)
            })
            .collect()
    }

    #[test]
    fn looks_and_discriminant_are_measured_from_drawings_and_survive_their_file() {
        let drawings = drawings(240);
        let clean = Clean::measure(&drawings, 24, 0.02, Seed(1)).unwrap();
        assert_eq!(clean, Clean::measure(&drawings, 24, 0.02, Seed(1)).unwrap());
        let text = serde_json::to_string(&clean).unwrap();
        assert_eq!(serde_json::from_str::<Clean>(&text).unwrap(), clean);
        // Thirty drawings stood on each background: each is a context of its own.
        let exposure = |ranges: &CleanRanges| ranges.whole(Dimension::Exposure);
        let (white, brown) = (
            clean.looks.for_prompt("disc, white background"),
            clean.looks.for_prompt("disc, brown background"),
        );
        assert!(exposure(white).low > exposure(brown).high);
        let judge = StatisticsScorer::new(clean.statistics);
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (icon, raster) in &drawings {
            let made = example(icon, raster, &Rendering::new(24), Seed(2), 0).unwrap();
            let score = judge.score(&made.image, "").unwrap();
            if made.truth.iter().copied().any(Statement::is_fault) {
                bad.push(score);
            } else {
                good.push(score);
            }
        }
        let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
        assert!(
            mean(&good) > mean(&bad) + 1.0,
            "{} {}",
            mean(&good),
            mean(&bad)
        );
    }

    #[test]
    fn too_few_drawings_are_refused() {
        assert!(matches!(
            Clean::measure(&[], 24, 0.02, Seed(1)),
            Err(CleanError::NoImages(_))
        ));
        assert!(matches!(
            Clean::measure(&drawings(1), 24, 0.02, Seed(1)),
            Err(CleanError::Few { drawings: 1, .. })
        ));
        assert!(matches!(
            Clean::measure(&drawings(2), 0, 0.02, Seed(1)),
            Err(CleanError::Image(_))
        ));
    }
}
