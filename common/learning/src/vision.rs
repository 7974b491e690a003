//! Images and texts in one space: an ImageNet classifier's features, a sentence encoder's features, and two linear projections trained here.
//!
//! Everything runs on the CPU in f32, without gradients but for the projections'. The interface is in plain numbers, so that its users need not name
//! `tch`.

pub mod alignment;
pub mod efficientnet;
pub mod texts;

pub use self::{
    alignment::{Alignment, AlignmentFacts, AlignmentSettings, Captioned, Pair, cosine},
    efficientnet::EfficientNetLite0,
    texts::TextTower,
};
use crate::{error::LearningError, named::HostTensor};

/// An RGB image: three bytes a pixel, row by row from the top left.
#[derive(Debug, Clone, Copy)]
pub struct Picture<'a> {
    /// Pixels from left to right.
    pub width: usize,
    /// Pixels from top to bottom.
    pub height: usize,
    /// Red, green and blue of every pixel.
    pub pixels: &'a [u8],
}

/// Numbers in rows of one width.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    width: usize,
    values: Vec<f32>,
}

impl Rows {
    /// Rows one after another.
    ///
    /// # Errors
    /// [`LearningError::Data`] if the width is 0 or the values do not fill whole rows.
    pub fn new(width: usize, values: Vec<f32>) -> Result<Self, LearningError> {
        if width == 0 || !values.len().is_multiple_of(width) {
            return Err(LearningError::Data(format!(
                "{} values do not fill rows of {width}",
                values.len()
            )));
        }
        Ok(Self { width, values })
    }

    /// Values of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.values.len() / self.width
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.width..(index + 1) * self.width]
    }

    /// All values, row by row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Adds the rows of another after the own ones.
    ///
    /// # Errors
    /// [`LearningError::Data`] if the widths differ.
    pub fn append(&mut self, other: &Self) -> Result<(), LearningError> {
        if other.width != self.width {
            return Err(LearningError::Data(format!(
                "rows of {} cannot follow rows of {}",
                other.width, self.width
            )));
        }
        self.values.extend_from_slice(&other.values);
        Ok(())
    }

    fn from_tensor(tensor: &tch::Tensor) -> Result<Self, LearningError> {
        let (_, width) = tensor.size2()?;
        Self::new(width as usize, HostTensor::from_tensor(tensor)?.values)
    }

    fn to_tensor(&self) -> Result<tch::Tensor, LearningError> {
        Ok(tch::Tensor::f_from_slice(&self.values)?
            .f_view([self.len() as i64, self.width as i64])?)
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
