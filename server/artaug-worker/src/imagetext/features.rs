//! Captioned renderings, and what the two towers see in them.

use std::{collections::BTreeMap, path::Path};

use concord_artaug::{
    data::{DATA_VERSION, Rendering, example},
    image::Image,
    words::{Level, Statement, describe},
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
    /// Its caption, with some of the statements.
    pub caption: usize,
    /// With all statements.
    pub full: usize,
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
    vision: Digest,
    text: Digest,
    shown: usize,
    texts: usize,
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
                    let full = describe(&made.subject, &made.truth);
                    let mut place = |text: String| {
                        let next = dataset.texts.len();
                        *places.entry(text.clone()).or_insert_with(|| {
                            dataset.texts.push(text);
                            next
                        })
                    };
                    let (plain, caption, full) =
                        (place(made.subject), place(made.caption), place(full));
                    dataset.shown.push(Shown {
                        subject: dataset.subjects.len(),
                        style: icon.set.clone(),
                        clean: !made.truth.iter().any(|statement| is_fault(*statement)),
                        check,
                        truth: made.truth,
                        plain,
                        caption,
                        full,
                    });
                    images.push(made.image);
                }
            }
            dataset.subjects.push(name.to_owned());
        }
        Ok((dataset, images))
    }

    /// Looks at all of it, or reads what was seen from `file` if that is of the same data and towers. `progress` is told how many images are done.
    ///
    /// # Errors
    /// If a tower fails or the file cannot be written.
    pub fn see(
        &self,
        images: &[Image],
        recipe: &Recipe,
        (vision, text): (&EfficientNetLite0, &TextTower),
        file: Option<&Path>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Features, ImageTextError> {
        let wanted = Fingerprint {
            data: DATA_VERSION,
            recipe: recipe.clone(),
            vision: *vision.digest(),
            text: *text.digest(),
            shown: self.shown.len(),
            texts: self.texts.len(),
        };
        if let Some(file) = file.filter(|file| file.is_file()) {
            let bytes = std::fs::read(file).map_err(ImageTextError::io(file))?;
            if let Some(features) = Features::from_bytes(&bytes, &wanted) {
                return Ok(features);
            }
        }
        let mut seen: Option<(Rows, Rows)> = None;
        for (number, batch) in images.chunks(BATCH).enumerate() {
            let pictures: Vec<Picture<'_>> = batch.iter().map(picture).collect();
            let (features, looks) = vision.see(&pictures, recipe.seen_at)?;
            match &mut seen {
                Some((all_features, all_looks)) => {
                    all_features.append(&features)?;
                    all_looks.append(&looks)?;
                }
                none => *none = Some((features, looks)),
            }
            progress(number * BATCH + batch.len());
        }
        let (features, looks) =
            seen.ok_or_else(|| ImageTextError::Unusable("there is nothing to look at".to_owned()))?;
        let texts: Vec<&str> = self.texts.iter().map(String::as_str).collect();
        let features = Features::new(features, looks, text.read(&texts)?);
        if let Some(file) = file {
            let bytes = features.to_bytes(&wanted)?;
            std::fs::write(file, bytes).map_err(ImageTextError::io(file))?;
        }
        Ok(features)
    }
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

    fn to_bytes(&self, fingerprint: &Fingerprint) -> Result<Vec<u8>, ImageTextError> {
        let mut tensors = NamedTensors::new();
        for (name, rows) in [
            ("features", &self.features),
            ("looks", &self.looks),
            ("texts", &self.texts),
        ] {
            let tensor = HostTensor {
                shape: vec![rows.len(), rows.width()],
                values: rows.values().to_vec(),
            };
            tensors.insert(name.to_owned(), tensor);
        }
        let facts = serde_json::to_string(fingerprint)
            .map_err(|error| ImageTextError::Unusable(error.to_string()))?;
        Ok(to_safetensors(&tensors, &facts)?)
    }

    /// None if the file is of something else, or damaged: then all is looked at again.
    fn from_bytes(bytes: &[u8], wanted: &Fingerprint) -> Option<Self> {
        let (mut tensors, facts) = from_safetensors(bytes).ok()?;
        if serde_json::from_str::<Fingerprint>(&facts).ok()? != *wanted {
            return None;
        }
        let mut rows = |name: &str, count: usize| {
            let tensor = tensors.remove(name)?;
            let (&[rows, width], values) = (tensor.shape.as_slice(), tensor.values) else {
                return None;
            };
            (rows == count).then(|| Rows::new(width, values).ok())?
        };
        Some(Self::new(
            rows("features", wanted.shown)?,
            rows("looks", wanted.shown)?,
            rows("texts", wanted.texts)?,
        ))
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

/// Whether a true statement names a fault.
pub(super) fn is_fault(statement: Statement) -> bool {
    match statement.level {
        Level::Low => true,
        Level::Good => false,
        Level::High => statement.dimension.too_high_is_a_fault(),
    }
}
