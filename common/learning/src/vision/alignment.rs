//! Two linear projections into one space, trained so that an image lies near its caption and far from the others' (InfoNCE in both directions, as in
//! Radford et al. 2021, arXiv 2103.00020).
//!
//! ```text
//! i = unit(A (x - m) / s + a)        t = unit(B y + b)
//! loss = mean over the batch of the cross entropies of  scale i·t  over the batch's texts and over its images
//! ```
//!
//! The towers below stay as they are; only A, a, B, b and the scale are trained, in minutes. A batch holds each subject once, so that no caption is
//! wrong for another image of the same thing.

mod fit;

use std::path::Path;

use concord_common::Digest;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

pub use self::fit::{AlignmentSettings, Captioned, Pair};
use super::{Rows, texts::unit};
use crate::{
    error::LearningError,
    named::{HostTensor, NamedTensors, Taker, from_safetensors, to_safetensors},
};

/// Largest file of projections that is read.
const MOST_BYTES: u64 = 16 << 20;

/// What projections belong to, and how they came about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlignmentFacts {
    /// BLAKE3 of the image tower's weights.
    pub vision: Digest,
    /// BLAKE3 of the text tower's weights.
    pub text: Digest,
    /// Pixels of a side at which images are seen.
    pub side: i64,
    /// Whether the early layers over a grid stand after the features.
    pub looks: bool,
    /// How they were trained.
    pub settings: AlignmentSettings,
    /// BLAKE3 over the features that they were trained on.
    pub data: Digest,
    /// Cosine that 1 in 20 new clean drawings falls below with its plain prompt.
    pub low: f64,
    /// The median of that cosine.
    pub typical: f64,
}

/// The projections.
#[derive(Debug)]
pub struct Alignment {
    mean: Tensor,
    spread: Tensor,
    image: (Tensor, Tensor),
    text: (Tensor, Tensor),
    scale: f64,
}

impl Alignment {
    /// Values of a vector in the common space.
    pub fn width(&self) -> usize {
        self.image.1.numel()
    }

    /// What cosines were multiplied by in training: the inverse temperature.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Unit vectors of images from their features.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the features are not as wide as those trained on.
    pub fn project_images(&self, features: &Rows) -> Result<Rows, LearningError> {
        let _frozen = tch::no_grad_guard();
        Rows::from_tensor(&self.images(&self.standardised(&features.to_tensor()?)?)?)
    }

    /// Unit vectors of texts from theirs.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if they are not as wide as those trained on.
    pub fn project_texts(&self, texts: &Rows) -> Result<Rows, LearningError> {
        let _frozen = tch::no_grad_guard();
        Rows::from_tensor(&self.texts(&texts.to_tensor()?)?)
    }

    fn standardised(&self, features: &Tensor) -> Result<Tensor, LearningError> {
        Ok(features.f_sub(&self.mean)?.f_div(&self.spread)?)
    }

    fn images(&self, standardised: &Tensor) -> Result<Tensor, LearningError> {
        unit(&standardised.f_linear(&self.image.0, Some(&self.image.1))?)
    }

    fn texts(&self, texts: &Tensor) -> Result<Tensor, LearningError> {
        unit(&texts.f_linear(&self.text.0, Some(&self.text.1))?)
    }

    /// The file's bytes; equal projections and facts give equal bytes.
    ///
    /// # Errors
    /// [`LearningError::State`] if the facts cannot be written.
    pub fn to_bytes(&self, facts: &AlignmentFacts) -> Result<Vec<u8>, LearningError> {
        let facts = serde_json::to_string(facts)
            .map_err(|error| LearningError::State(format!("the facts: {error}")))?;
        let mut tensors = NamedTensors::new();
        for (name, tensor) in [
            ("image.mean", &self.mean),
            ("image.spread", &self.spread),
            ("image.weight", &self.image.0),
            ("image.bias", &self.image.1),
            ("text.weight", &self.text.0),
            ("text.bias", &self.text.1),
        ] {
            tensors.insert(name.to_owned(), HostTensor::from_tensor(tensor)?);
        }
        let scale = HostTensor {
            shape: vec![1],
            values: vec![self.scale as f32],
        };
        tensors.insert("scale".to_owned(), scale);
        to_safetensors(&tensors, &facts)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`LearningError::Io`]; [`LearningError::State`] that says what is wrong with the file.
    pub fn load(path: &Path) -> Result<(Self, AlignmentFacts), LearningError> {
        let io = |source| LearningError::io(path, source);
        if std::fs::metadata(path).map_err(io)?.len() > MOST_BYTES {
            return Err(LearningError::State(format!(
                "{} has more than {MOST_BYTES} bytes: these are no projections",
                path.display()
            )));
        }
        Self::from_bytes(&std::fs::read(path).map_err(io)?)
    }

    /// The reverse of [`Alignment::to_bytes`].
    ///
    /// # Errors
    /// [`LearningError::State`] that names what is missing, of another shape or not finite.
    pub fn from_bytes(bytes: &[u8]) -> Result<(Self, AlignmentFacts), LearningError> {
        let (tensors, facts) = from_safetensors(bytes)?;
        let facts: AlignmentFacts = serde_json::from_str(&facts)
            .map_err(|error| LearningError::State(format!("the projections' facts: {error}")))?;
        let shape_of = |name: &str| -> Result<[usize; 2], LearningError> {
            match tensors.get(name).map(|tensor| tensor.shape.as_slice()) {
                Some(&[outer, inner]) if outer > 0 && inner > 0 => Ok([outer, inner]),
                _ => Err(LearningError::State(format!(
                    "the projections hold no matrix `{name}`"
                ))),
            }
        };
        let [width, image] = shape_of("image.weight")?;
        let [_, text] = shape_of("text.weight")?;
        let mut taker = Taker::new("the projections", tensors);
        let mut take = |name: &str, shape: &[usize]| taker.tensor(name, shape, Kind::Float);
        let alignment = Self {
            mean: take("image.mean", &[image])?,
            spread: take("image.spread", &[image])?,
            image: (
                take("image.weight", &[width, image])?,
                take("image.bias", &[width])?,
            ),
            text: (
                take("text.weight", &[width, text])?,
                take("text.bias", &[width])?,
            ),
            scale: f64::from(taker.host("scale", &[1])?.values[0]),
        };
        taker.finish()?;
        Ok((alignment, facts))
    }
}

/// The cosine of two unit vectors.
///
/// # Panics
/// If they are not of one width.
pub fn cosine(first: &[f32], second: &[f32]) -> f64 {
    assert_eq!(first.len(), second.len(), "vectors of one space");
    first
        .iter()
        .zip(second)
        .map(|(a, b)| f64::from(*a) * f64::from(*b))
        .sum()
}
