//! The small layers that all parts share: convolutions and normalisations.

use tch::Tensor;

use super::params::{Params, Start};
use crate::error::LearningError;

/// A square convolution.
#[derive(Debug)]
pub struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
}

impl Conv {
    /// Takes a convolution of `size` pixels that keeps height and width (at stride 1).
    ///
    /// # Errors
    /// Those of [`Params::take`].
    pub fn take(
        params: &mut Params,
        name: &str,
        (inputs, outputs): (i64, i64),
        size: i64,
    ) -> Result<Self, LearningError> {
        let start = Start::FanIn(inputs * size * size);
        Ok(Self {
            weight: params.take(
                &format!("{name}.weight"),
                &[outputs, inputs, size, size],
                start,
            )?,
            bias: params.take(&format!("{name}.bias"), &[outputs], start)?,
            stride: 1,
            padding: size / 2,
        })
    }

    /// The same weights at another stride and padding.
    #[must_use]
    pub fn strided(self, stride: i64, padding: i64) -> Self {
        Self {
            stride,
            padding,
            ..self
        }
    }

    /// `[n, inputs, h, w]` to `[n, outputs, h', w']`.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        Ok(x.f_conv2d(
            &self.weight,
            Some(&self.bias),
            self.stride,
            self.padding,
            1,
            1,
        )?)
    }
}

/// Normalisation over groups of channels.
#[derive(Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
    eps: f64,
}

impl GroupNorm {
    /// Takes the norm of `channels` channels.
    ///
    /// # Errors
    /// [`LearningError::Config`] if the groups do not divide the channels, and those of [`Params::take`].
    pub fn take(
        params: &mut Params,
        name: &str,
        channels: i64,
        groups: i64,
        eps: f64,
    ) -> Result<Self, LearningError> {
        if groups < 1 || channels % groups != 0 {
            return Err(LearningError::Config(format!(
                "norm_num_groups {groups} does not divide the {channels} channels of {name}"
            )));
        }
        Ok(Self {
            weight: params.take(&format!("{name}.weight"), &[channels], Start::Ones)?,
            bias: params.take(&format!("{name}.bias"), &[channels], Start::Zeros)?,
            groups,
            eps,
        })
    }

    /// `[n, c, ..]` to the same.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        Ok(x.f_group_norm(
            self.groups,
            Some(&self.weight),
            Some(&self.bias),
            self.eps,
            false,
        )?)
    }
}

/// Normalisation over the last dimension.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Takes the norm of `width` values.
    ///
    /// # Errors
    /// Those of [`Params::take`].
    pub fn take(
        params: &mut Params,
        name: &str,
        width: i64,
        eps: f64,
    ) -> Result<Self, LearningError> {
        Ok(Self {
            weight: params.take(&format!("{name}.weight"), &[width], Start::Ones)?,
            bias: params.take(&format!("{name}.bias"), &[width], Start::Zeros)?,
            eps,
        })
    }

    /// `[.., width]` to the same.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        Ok(x.f_layer_norm(
            self.weight.size(),
            Some(&self.weight),
            Some(&self.bias),
            self.eps,
            false,
        )?)
    }
}
