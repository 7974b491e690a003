//! The icons of the base model's subjects in all styles, drawn once, and the captioned images of each training step.

use std::{collections::BTreeMap, fs, path::Path};

use concord_artaug::data::{
    Icon, MAX_ICON_FILE, Raster, Rendering, STYLES, base_subjects, example, rasterise, read_icons,
};
use concord_common::{digest::Digest, seed::Seed};
use concord_learning::diffusion::pretrain::Batch;

use super::BaseError;

/// Drawings in memory.
#[derive(Debug)]
pub struct Corpus {
    drawings: Vec<(Icon, Raster)>,
    digests: BTreeMap<String, Digest>,
    side: u32,
}

impl Corpus {
    /// Reads `<set>/icons.json` of each style below a folder, as `deploy/artaug/fetch.py` leaves them.
    ///
    /// # Errors
    /// If a file cannot be read, a subject lacks in a set, or an icon cannot be drawn.
    pub fn read(folder: &Path, side: u32) -> Result<Self, BaseError> {
        let mut sets = Vec::new();
        for style in STYLES {
            let file = folder.join(style).join("icons.json");
            let size = fs::metadata(&file)
                .map_err(|error| BaseError::io(&file, error))?
                .len();
            if size > MAX_ICON_FILE as u64 {
                return Err(BaseError::Corpus(format!(
                    "{} has {size} bytes, more than {MAX_ICON_FILE}",
                    file.display()
                )));
            }
            let bytes = fs::read(&file).map_err(|error| BaseError::io(&file, error))?;
            sets.push((style.to_owned(), bytes));
        }
        let subjects: Vec<&str> = base_subjects().collect();
        Self::from_sets(&sets, &subjects, side)
    }

    /// From the contents of icon files by the sets' names.
    ///
    /// # Errors
    /// As [`Corpus::read`].
    pub fn from_sets(
        sets: &[(String, Vec<u8>)],
        subjects: &[&str],
        side: u32,
    ) -> Result<Self, BaseError> {
        let mut drawings = Vec::new();
        let mut digests = BTreeMap::new();
        for (set, bytes) in sets {
            digests.insert(set.clone(), Digest::of(bytes));
            let icons: BTreeMap<String, Icon> = read_icons(set, bytes)?
                .into_iter()
                .map(|icon| (icon.name.clone(), icon))
                .collect();
            for &name in subjects {
                let icon = icons.get(name).ok_or_else(|| {
                    BaseError::Corpus(format!("the icon set {set} has no {name}"))
                })?;
                drawings.push((icon.clone(), rasterise(icon, side)?));
            }
        }
        if drawings.is_empty() {
            return Err(BaseError::Corpus("there is no icon".to_owned()));
        }
        Ok(Self {
            drawings,
            digests,
            side,
        })
    }

    /// Drawings with their icons.
    pub fn drawings(&self) -> &[(Icon, Raster)] {
        &self.drawings
    }

    /// Digests of the icon files by set.
    pub fn digests(&self) -> &BTreeMap<String, Digest> {
        &self.digests
    }

    /// The images of a step. Every drawing comes once in each round through all of them, in an order of the round's own; a part of the captions is empty.
    ///
    /// # Errors
    /// If the side is out of bounds.
    pub fn batch(
        &self,
        seed: Seed,
        step: u64,
        rows: usize,
        empty: f64,
    ) -> Result<Batch, BaseError> {
        let rendering = Rendering::new(self.side);
        let here = seed.derive(&format!("artaug base step {step}"));
        let mut rng = here.rng();
        let count = self.drawings.len() as u64;
        let mut order: Option<(u64, Vec<usize>)> = None;
        let mut images = Vec::new();
        let mut captions = Vec::with_capacity(rows);
        for row in 0..rows as u64 {
            let number = step * rows as u64 + row;
            let round = number / count;
            let places = match order.take() {
                Some((of, places)) if of == round => places,
                _ => {
                    let mut places: Vec<usize> = (0..self.drawings.len()).collect();
                    seed.derive(&format!("artaug base round {round}"))
                        .rng()
                        .shuffle(&mut places);
                    places
                }
            };
            let (icon, raster) = &self.drawings[places[(number % count) as usize]];
            order = Some((round, places));
            let made = example(icon, raster, &rendering, seed, number)?;
            images.extend_from_slice(made.image.pixels());
            captions.push(if rng.uniform() < empty {
                String::new()
            } else {
                made.caption
            });
        }
        Ok(Batch {
            images,
            side: i64::from(self.side),
            captions,
            seed: here.derive("flow"),
        })
    }
}
