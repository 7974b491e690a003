//! The image-text model at work: towers and projections on a thread of their own.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use concord_artaug::image::Image;
use concord_common::Digest;
use concord_learning::{
    LearningError,
    torch::{TorchSettings, TorchThread},
    vision::{Alignment, AlignmentFacts, EfficientNetLite0, Picture, Rows, TextTower, cosine},
};
use serde::Deserialize;

use super::features::beside;

/// Vectors of images and texts that are remembered, each; then all are forgotten.
const REMEMBERED: usize = 4096;

/// Where the model's files are.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageTextFiles {
    /// EfficientNet-Lite0's `model.safetensors`.
    pub vision: PathBuf,
    /// `MiniLM`'s folder.
    pub text: PathBuf,
    /// The projections.
    pub projections: PathBuf,
}

/// The loaded model. It may be shared: one image or text is looked at at a time, so a score depends on nothing that is asked beside it.
#[derive(Debug)]
pub struct ImageText {
    thread: TorchThread,
    towers: Arc<Mutex<Towers>>,
    facts: AlignmentFacts,
    digest: Digest,
    images: Mutex<HashMap<Digest, Vec<f32>>>,
    texts: Mutex<HashMap<String, Vec<f32>>>,
}

#[derive(Debug)]
struct Towers {
    vision: EfficientNetLite0,
    text: TextTower,
    alignment: Alignment,
    side: i64,
    looks: bool,
}

impl ImageText {
    /// Loads the model; it computes on `threads` threads.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the projections belong to other towers.
    pub fn load(files: &ImageTextFiles, threads: usize) -> Result<Self, LearningError> {
        let io = |source| LearningError::io(&files.projections, source);
        let bytes = std::fs::read(&files.projections).map_err(io)?;
        let (alignment, facts) = Alignment::from_bytes(&bytes)?;
        let vision = EfficientNetLite0::load(&files.vision)?;
        let text = TextTower::load(&files.text)?;
        for (what, found, wanted) in [
            ("vision", vision.digest(), &facts.vision),
            ("text", text.digest(), &facts.text),
        ] {
            if found != wanted {
                return Err(LearningError::State(format!(
                    "{} were trained on the {what} tower {}, this is {}; fetch it again with deploy/artaug/fetch.py or deploy/demo/fetch.py",
                    files.projections.display(),
                    wanted.short(),
                    found.short()
                )));
            }
        }
        let towers = Towers {
            vision,
            text,
            alignment,
            side: facts.side,
            looks: facts.looks,
        };
        Ok(Self {
            thread: TorchThread::start(TorchSettings {
                intra_op_threads: threads,
            })?,
            towers: Arc::new(Mutex::new(towers)),
            facts,
            digest: Digest::of(&bytes),
            images: Mutex::default(),
            texts: Mutex::default(),
        })
    }

    /// What the projections belong to, and what cosines are usual.
    pub fn facts(&self) -> &AlignmentFacts {
        &self.facts
    }

    /// BLAKE3 of the projections' file, for model cards.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// How well an image shows what a text says: their cosine, -1 to 1.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn alignment(&self, image: &Image, text: &str) -> Result<f64, LearningError> {
        Ok(cosine(&self.image(image)?, &self.text(text)?))
    }

    /// The unit vector of an image.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn image(&self, image: &Image) -> Result<Vec<f32>, LearningError> {
        let digest = image.digest();
        if let Some(known) = locked(&self.images).get(&digest) {
            return Ok(known.clone());
        }
        let (width, height) = (image.width() as usize, image.height() as usize);
        let pixels = image.pixels().to_vec();
        let towers = Arc::clone(&self.towers);
        let vector = self.thread.run_blocking("look at an image", move || {
            locked(&towers).look(Picture {
                width,
                height,
                pixels: &pixels,
            })
        })?;
        remember(&self.images, digest, &vector);
        Ok(vector)
    }

    /// The unit vector of a text.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn text(&self, text: &str) -> Result<Vec<f32>, LearningError> {
        if let Some(known) = locked(&self.texts).get(text) {
            return Ok(known.clone());
        }
        let towers = Arc::clone(&self.towers);
        let asked = text.to_owned();
        let vector = self.thread.run_blocking("read a text", move || {
            let towers = locked(&towers);
            let read = towers.text.read(&[&asked])?;
            Ok(first(&towers.alignment.project_texts(&read)?))
        })?;
        remember(&self.texts, text.to_owned(), &vector);
        Ok(vector)
    }

    /// The image tower's own features of an image, before the projection.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn features(&self, image: &Image) -> Result<Vec<f32>, LearningError> {
        let (width, height) = (image.width() as usize, image.height() as usize);
        let pixels = image.pixels().to_vec();
        let towers = Arc::clone(&self.towers);
        self.thread.run_blocking("look at an image", move || {
            let towers = locked(&towers);
            let seen = towers.vision.see(
                &[Picture {
                    width,
                    height,
                    pixels: &pixels,
                }],
                towers.side,
            )?;
            Ok(first(&seen.0))
        })
    }
}

impl Towers {
    fn look(&self, picture: Picture<'_>) -> Result<Vec<f32>, LearningError> {
        let (features, looks) = self.vision.see(&[picture], self.side)?;
        let rows = if self.looks {
            beside(&features, &looks).map_err(|error| LearningError::Data(error.to_string()))?
        } else {
            features
        };
        Ok(first(&self.alignment.project_images(&rows)?))
    }
}

fn first(rows: &Rows) -> Vec<f32> {
    rows.row(0).to_vec()
}

/// What stands behind these locks is whole at every moment, also after a panic.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remember<K: std::hash::Hash + Eq>(store: &Mutex<HashMap<K, Vec<f32>>>, key: K, vector: &[f32]) {
    let mut known = locked(store);
    if known.len() >= REMEMBERED {
        known.clear();
    }
    known.insert(key, vector.to_vec());
}
