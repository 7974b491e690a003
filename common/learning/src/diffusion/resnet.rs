//! Residual blocks and the changes of resolution between them.

use tch::Tensor;

use super::{
    layers::{Conv, GroupNorm},
    linear::{Linear, Shape, sites},
    params::Params,
};
use crate::error::LearningError;

/// Two convolutions, each after a norm and SiLU, added to the input; the time's embedding comes in between.
#[derive(Debug)]
pub struct Resnet {
    norm1: GroupNorm,
    conv1: Conv,
    time: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv,
    shortcut: Option<Conv>,
}
sites!(Resnet { time });

/// What all residual blocks of a model share.
#[derive(Debug, Clone, Copy)]
pub struct ResnetSizes {
    /// Values of the time's embedding; `None` in an autoencoder.
    pub time: Option<i64>,
    /// Groups of the norms.
    pub groups: i64,
    /// Epsilon of the norms.
    pub eps: f64,
}

impl Resnet {
    /// Takes one.
    ///
    /// # Errors
    /// [`LearningError::Config`] if the groups do not divide the channels, and those of [`Params::take`].
    pub fn take(
        params: &mut Params,
        name: &str,
        (inputs, outputs): (i64, i64),
        sizes: ResnetSizes,
    ) -> Result<Self, LearningError> {
        let at = |part: &str| format!("{name}.{part}");
        let ResnetSizes { time, groups, eps } = sizes;
        Ok(Self {
            norm1: GroupNorm::take(params, &at("norm1"), inputs, groups, eps)?,
            conv1: Conv::take(params, &at("conv1"), (inputs, outputs), 3)?,
            time: time
                .map(|time| {
                    Linear::take(
                        params,
                        &at("time_emb_proj"),
                        (time, outputs),
                        true,
                        Shape::Matrix,
                    )
                })
                .transpose()?,
            norm2: GroupNorm::take(params, &at("norm2"), outputs, groups, eps)?,
            conv2: Conv::take(params, &at("conv2"), (outputs, outputs), 3)?,
            shortcut: (inputs != outputs)
                .then(|| Conv::take(params, &at("conv_shortcut"), (inputs, outputs), 1))
                .transpose()?,
        })
    }

    /// `x` is `[n, inputs, h, w]`; `time` is SiLU of the time's embedding, `[n, time]`, where the model has one.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn run(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor, LearningError> {
        let mut hidden = self.conv1.run(&self.norm1.run(x)?.f_silu()?)?;
        if let (Some(linear), Some(time)) = (&self.time, time) {
            hidden = hidden.f_add(&linear.run(time)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?)?;
        }
        let hidden = self.conv2.run(&self.norm2.run(&hidden)?.f_silu()?)?;
        match &self.shortcut {
            Some(conv) => Ok(conv.run(x)?.f_add(&hidden)?),
            None => Ok(x.f_add(&hidden)?),
        }
    }
}

/// Doubles height and width by repetition, or brings them to a given size, and smooths with a convolution.
#[derive(Debug)]
pub struct Upsample(Conv);

impl Upsample {
    /// Takes `<name>.conv`.
    ///
    /// # Errors
    /// Those of [`Params::take`].
    pub fn take(params: &mut Params, name: &str, channels: i64) -> Result<Self, LearningError> {
        Conv::take(params, &format!("{name}.conv"), (channels, channels), 3).map(Self)
    }

    /// To `size` (height, width), or to twice of each.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn run(&self, x: &Tensor, size: Option<(i64, i64)>) -> Result<Tensor, LearningError> {
        let (_, _, h, w) = x.size4()?;
        let (height, width) = size.unwrap_or((2 * h, 2 * w));
        self.0
            .run(&x.f_upsample_nearest2d([height, width], None, None)?)
    }
}

/// Halves height and width.
#[derive(Debug)]
pub struct Downsample {
    conv: Conv,
    /// An autoencoder pads below and on the right only.
    lopsided: bool,
}

impl Downsample {
    /// Takes `<name>.conv`.
    ///
    /// # Errors
    /// Those of [`Params::take`].
    pub fn take(
        params: &mut Params,
        name: &str,
        channels: i64,
        lopsided: bool,
    ) -> Result<Self, LearningError> {
        let conv = Conv::take(params, &format!("{name}.conv"), (channels, channels), 3)?;
        Ok(Self {
            conv: conv.strided(2, i64::from(!lopsided)),
            lopsided,
        })
    }

    /// `[n, c, h, w]` to half of each, rounded up in a UNet and down in an autoencoder.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        if self.lopsided {
            return self.conv.run(&x.f_pad([0, 1, 0, 1], "constant", 0.0)?);
        }
        self.conv.run(x)
    }
}
