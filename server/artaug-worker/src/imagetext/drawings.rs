//! The icon sets as drawings, by subject.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use concord_artaug::data::{Icon, Raster, STYLES, base_subjects, rasterise, read_icons};
use concord_common::seed::Seed;

use super::ImageTextError;

/// Pixels of a side of the drawings: those of the embedded base model.
pub const SIDE: u32 = 32;
/// Subjects of the base model that a first fit is not trained on, to measure what projections know of things that they have never seen.
const HELD_OUT: usize = 100;

/// All drawings of the icon sets.
#[derive(Debug)]
pub struct Drawings {
    by_subject: BTreeMap<String, Vec<(Icon, Raster)>>,
    base: BTreeSet<&'static str>,
    held_out: BTreeSet<&'static str>,
}

impl Drawings {
    /// Reads `folder/<set>/icons.json` of every set and draws the icons. Those that cannot be drawn are left out.
    ///
    /// # Errors
    /// If a set is missing or damaged, or has not every subject of the base model.
    pub fn read(folder: &Path) -> Result<Self, ImageTextError> {
        let mut icons = Vec::new();
        for set in STYLES {
            let file = folder.join(set).join("icons.json");
            let json = std::fs::read(&file).map_err(ImageTextError::io(&file))?;
            icons.extend(read_icons(set, &json)?);
        }
        Self::draw(icons)
    }

    /// Draws icons of several sets.
    ///
    /// # Errors
    /// If a subject of the base model is in none of them.
    pub fn draw(icons: Vec<Icon>) -> Result<Self, ImageTextError> {
        let mut by_subject: BTreeMap<String, Vec<(Icon, Raster)>> = BTreeMap::new();
        for icon in icons {
            if let Ok(raster) = rasterise(&icon, SIDE) {
                by_subject
                    .entry(icon.name.clone())
                    .or_default()
                    .push((icon, raster));
            }
        }
        let base: BTreeSet<&'static str> = base_subjects().collect();
        if let Some(name) = base.iter().find(|name| !by_subject.contains_key(**name)) {
            return Err(ImageTextError::Unusable(format!(
                "no icon set has the subject {name}; fetch the sets again with deploy/artaug/fetch.py"
            )));
        }
        let mut order: Vec<&'static str> = base.iter().copied().collect();
        Seed(0)
            .derive("image-text held-out subjects")
            .rng()
            .shuffle(&mut order);
        Ok(Self {
            by_subject,
            base,
            held_out: order.into_iter().take(HELD_OUT).collect(),
        })
    }

    /// Subjects with their drawings, in the order of the names.
    pub fn subjects(&self) -> impl Iterator<Item = (&str, &[(Icon, Raster)])> {
        self.by_subject
            .iter()
            .map(|(name, drawings)| (name.as_str(), drawings.as_slice()))
    }

    /// The drawings of one subject.
    pub fn of(&self, name: &str) -> &[(Icon, Raster)] {
        self.by_subject.get(name).map_or(&[], Vec::as_slice)
    }

    /// Whether the base model draws a subject.
    pub fn in_base(&self, name: &str) -> bool {
        self.base.contains(name)
    }

    /// The base model's subjects that a first fit is not trained on, in the order of the names: a draw by a fixed seed.
    pub fn held_out(&self) -> &BTreeSet<&'static str> {
        &self.held_out
    }
}
