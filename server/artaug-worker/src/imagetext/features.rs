//! Captioned renderings, and what the two towers see in them.

use std::{collections::BTreeMap, path::Path};

use concord_artaug::{
    data::{DATA_VERSION, Rendering, example},
    image::Image,
    words::Statement,
};
use concord_common::{Digest, seed::Seed};
use concord_learning::{
    named::{HostTensor, NamedTensors, from_safetensors, to_safetensors},
    vision::{EfficientNetLite0, Picture, Rows, TextTower},
};
use serde::{Deserialize, Serialize};

use super::{Drawings, ImageTextError, SIDE};

/// Images in one forward pass.
const BATCH: usize = 16;

/// What is rendered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Clean renderings of each drawing of a subject that the base model draws.
    pub base_clean: u64,
    /// Renderings of these that may be damaged.
    pub base_damaged: u64,
    /// Clean and damaged renderings each of these that are kept for judging: with backgrounds and damages drawn anew.
    pub base_checks: u64,
    /// Clean renderings of each drawing of every other subject.
    pub other_clean: u64,
    /// And damaged.
    pub other_damaged: u64,
    /// Most subjects; 0 for all. For trials.
    pub most_subjects: usize,
    /// Pixels of a side at which the image tower sees.
    pub seen_at: i64,
    /// Seed of the renderings.
    pub seed: u64,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            base_clean: 2,
            base_damaged: 3,
            base_checks: 1,
            other_clean: 1,
            other_damaged: 0,
            most_subjects: 0,
            seen_at: 160,
            seed: 1,
        }
    }
}

/// One rendering.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shown {
    /// Place in [`Dataset::subjects`].
    pub subject: usize,
    /// The icon set.
    pub style: String,
    /// Whether nothing was damaged.
    pub clean: bool,
    /// Whether it is kept for judging.
    pub check: bool,
    /// All that is true of how it looks.
    pub truth: Vec<Statement>,
    /// Its prompt without a word on looks, as a place in [`Dataset::texts`].
    pub plain: usize,
    /// Its caption, with some of the statements; the plain prompt again where nothing is learned from the caption, because the rendering is kept for
    /// judging or its subject is none of the base model's.
    pub caption: usize,
}

/// Renderings and texts, by number.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dataset {
    /// Names of subjects.
    pub subjects: Vec<String>,
    /// Renderings.
    pub shown: Vec<Shown>,
    /// Texts, each once.
    pub texts: Vec<String>,
}

/// What the towers see in a dataset.
#[derive(Debug)]
pub struct Features {
    /// A row for each rendering: the classifier's last layer.
    pub features: Rows,
    /// A row for each rendering: early layers over a grid.
    pub looks: Rows,
    /// A row for each text.
    pub texts: Rows,
    /// BLAKE3 over all of them.
    pub digest: Digest,
}

/// What a file of features must be of to be used again.
#[derive(PartialEq, Serialize, Deserialize)]
struct Fingerprint {
    data: u32,
    recipe: Recipe,
    tower: Digest,
    rows: usize,
}

impl Dataset {
    /// Renders the drawings; the images stand beside, in the order of [`Dataset::shown`].
    ///
    /// # Errors
    /// If an image cannot be made.
    pub fn render(
        drawings: &Drawings,
        recipe: &Recipe,
    ) -> Result<(Self, Vec<Image>), ImageTextError> {
        let seed = Seed(recipe.seed).derive("image-text renderings");
        let clean = Rendering {
            damaged: 0.0,
            ..Rendering::new(SIDE)
        };
        let damaged = Rendering::new(SIDE);
        let (mut dataset, mut images) = (Self::default(), Vec::new());
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for (name, icons) in drawings.subjects() {
            if recipe.most_subjects > 0 && dataset.subjects.len() == recipe.most_subjects {
                break;
            }
            let (first, second, checks) = if drawings.in_base(name) {
                (recipe.base_clean, recipe.base_damaged, recipe.base_checks)
            } else {
                (recipe.other_clean, recipe.other_damaged, 0)
            };
            let numbers = (0..first)
                .map(|number| (number, &clean, false))
                .chain((first..first + second).map(|number| (number, &damaged, false)))
                // Far from the others' numbers, so that these may be more or fewer.
                .chain((1000..1000 + checks).map(|number| (number, &clean, true)))
                .chain((2000..2000 + checks).map(|number| (number, &damaged, true)));
            for (icon, raster) in icons {
                for (number, rendering, check) in numbers.clone() {
                    let made = example(icon, raster, rendering, seed, number)?;
                    let mut place = |text: String| {
                        let next = dataset.texts.len();
                        *places.entry(text.clone()).or_insert_with(|| {
                            dataset.texts.push(text);
                            next
                        })
                    };
                    let plain = place(made.subject);
                    let caption = if check || !drawings.in_base(name) {
                        plain
                    } else {
                        place(made.caption)
                    };
                    dataset.shown.push(Shown {
                        subject: dataset.subjects.len(),
                        style: icon.set.clone(),
                        clean: !made.truth.iter().copied().any(Statement::is_fault),
                        check,
                        truth: made.truth,
                        plain,
                        caption,
                    });
                    images.push(made.image);
                }
            }
            dataset.subjects.push(name.to_owned());
        }
        Ok((dataset, images))
    }

    /// Looks at all of it and reads all of it; what `folder` keeps of the same data and towers is not done again. `progress` is told how many images are
    /// done.
    ///
    /// # Errors
    /// If a tower fails or a file cannot be written.
    pub fn see(
        &self,
        images: &[Image],
        recipe: &Recipe,
        (vision, text): (&EfficientNetLite0, &TextTower),
        folder: Option<&Path>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Features, ImageTextError> {
        let fingerprint = |tower: &Digest, rows: usize| Fingerprint {
            data: DATA_VERSION,
            recipe: recipe.clone(),
            tower: *tower,
            rows,
        };
        let file = |name: &str| folder.map(|folder| folder.join(name));
        let wanted = fingerprint(vision.digest(), images.len());
        let mut seen = kept(file("images.safetensors").as_deref(), &wanted, &mut || {
            let (mut features, mut looks): (Option<Rows>, Option<Rows>) = (None, None);
            for (number, batch) in images.chunks(BATCH).enumerate() {
                let pictures: Vec<Picture<'_>> = batch.iter().map(picture).collect();
                let (first, second) = vision.see(&pictures, recipe.seen_at)?;
                add(&mut features, first)?;
                add(&mut looks, second)?;
                progress(number * BATCH + batch.len());
            }
            let nothing = || ImageTextError::Unusable("there is nothing to look at".to_owned());
            Ok(vec![
                features.ok_or_else(nothing)?,
                looks.ok_or_else(nothing)?,
            ])
        })?;
        let wanted = fingerprint(text.digest(), self.texts.len());
        let mut read = kept(file("texts.safetensors").as_deref(), &wanted, &mut || {
            let texts: Vec<&str> = self.texts.iter().map(String::as_str).collect();
            Ok(vec![text.read(&texts)?])
        })?;
        match (seen.pop(), seen.pop(), read.pop()) {
            (Some(looks), Some(features), Some(texts)) => Ok(Features::new(features, looks, texts)),
            _ => Err(ImageTextError::Unusable(
                "the kept features are not those of images and texts".to_owned(),
            )),
        }
    }
}

fn add(all: &mut Option<Rows>, more: Rows) -> Result<(), ImageTextError> {
    match all {
        Some(all) => all.append(&more)?,
        none => *none = Some(more),
    }
    Ok(())
}

/// What `file` keeps, if it is of the same, or what `make` gives, which is then kept there.
fn kept(
    file: Option<&Path>,
    wanted: &Fingerprint,
    make: &mut dyn FnMut() -> Result<Vec<Rows>, ImageTextError>,
) -> Result<Vec<Rows>, ImageTextError> {
    if let Some(file) = file.filter(|file| file.is_file()) {
        let bytes = std::fs::read(file).map_err(ImageTextError::io(file))?;
        if let Some(rows) = from_bytes(&bytes, wanted) {
            return Ok(rows);
        }
    }
    let rows = make()?;
    if let Some(file) = file {
        std::fs::write(file, to_bytes(&rows, wanted)?).map_err(ImageTextError::io(file))?;
    }
    Ok(rows)
}

fn to_bytes(all: &[Rows], fingerprint: &Fingerprint) -> Result<Vec<u8>, ImageTextError> {
    let mut tensors = NamedTensors::new();
    for (number, rows) in all.iter().enumerate() {
        let tensor = HostTensor {
            shape: vec![rows.len(), rows.width()],
            values: rows.values().to_vec(),
        };
        tensors.insert(format!("rows.{number}"), tensor);
    }
    let facts = serde_json::to_string(fingerprint)
        .map_err(|error| ImageTextError::Unusable(error.to_string()))?;
    Ok(to_safetensors(&tensors, &facts)?)
}

/// None if the file is of something else, or damaged: then all is made again.
fn from_bytes(bytes: &[u8], wanted: &Fingerprint) -> Option<Vec<Rows>> {
    let (tensors, facts) = from_safetensors(bytes).ok()?;
    if serde_json::from_str::<Fingerprint>(&facts).ok()? != *wanted {
        return None;
    }
    // The names are in their order.
    tensors
        .into_values()
        .map(|tensor| match tensor.shape.as_slice() {
            &[rows, width] if rows == wanted.rows => Rows::new(width, tensor.values).ok(),
            _ => None,
        })
        .collect()
}

impl Features {
    fn new(features: Rows, looks: Rows, texts: Rows) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("concord.v1 image-text features");
        for rows in [&features, &looks, &texts] {
            hasher.update(&(rows.width() as u64).to_le_bytes());
            for value in rows.values() {
                hasher.update(&value.to_le_bytes());
            }
        }
        Self {
            digest: hasher.finalize().into(),
            features,
            looks,
            texts,
        }
    }

    /// The image rows that projections read.
    ///
    /// # Errors
    /// If the rows do not fit together.
    pub fn images(&self, looks: bool) -> Result<Rows, ImageTextError> {
        if looks {
            beside(&self.features, &self.looks)
        } else {
            Ok(self.features.clone())
        }
    }
}

/// Two tables side by side.
pub(super) fn beside(left: &Rows, right: &Rows) -> Result<Rows, ImageTextError> {
    let values = (0..left.len())
        .flat_map(|row| left.row(row).iter().chain(right.row(row)).copied())
        .collect();
    Ok(Rows::new(left.width() + right.width(), values)?)
}

/// An image as the tower takes it.
pub(super) fn picture(image: &Image) -> Picture<'_> {
    Picture {
        width: image.width() as usize,
        height: image.height() as usize,
        pixels: image.pixels(),
    }
}
