//! The small image-text model: whether an image shows what its prompt says.
//!
//! An ImageNet classifier's features (EfficientNet-Lite0) and a sentence encoder's (MiniLM) meet in 128 values through two linear projections, which are
//! trained here on renderings of captioned icon sets. It knows drawings of things at 32 pixels and the embedded base model's vocabulary; it is no CLIP.

mod advisor;
mod command;
mod drawings;
mod features;
mod figures;
mod judge;
mod model;
mod scorers;
#[cfg(test)]
mod tests;
mod train;

pub use self::{
    advisor::SubjectAdvisor,
    command::{JudgeBase, TrainImageText},
    drawings::{Drawings, SIDE},
    features::{Dataset, Features, Recipe, Shown},
    figures::{Figures, Recognised},
    judge::{BaseFigures, Draw, Judge},
    model::{ImageText, ImageTextFiles},
    scorers::TrainedModels,
    train::{Trained, train},
};

use std::path::PathBuf;

use concord_artaug::{data::DataError, image::ImageError};
use concord_learning::LearningError;

use crate::base::BaseError;

/// What can go wrong with the image-text model.
#[derive(Debug, thiserror::Error)]
pub enum ImageTextError {
    /// In the towers or projections.
    #[error(transparent)]
    Learning(#[from] LearningError),
    /// An icon set.
    #[error(transparent)]
    Data(#[from] DataError),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The base model could not draw.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// A file.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Something that is there cannot be used.
    #[error("{0}")]
    Unusable(String),
}

impl ImageTextError {
    fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
