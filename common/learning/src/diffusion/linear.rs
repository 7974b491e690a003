//! A linear layer with a stack of LoRA pairs (Hu et al. 2021, arXiv 2106.09685): y = W x + b + sum of s B (A x).

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::params::{Params, Start};
use crate::error::LearningError;

/// One low-rank change of a linear layer.
#[derive(Debug)]
pub struct LoraPair {
    /// Which adapter it belongs to; unlike within a layer.
    pub adapter: String,
    /// A: `[rank, inputs]`.
    pub down: Tensor,
    /// B: `[outputs, rank]`.
    pub up: Tensor,
    /// s: alpha / rank, times whatever strength the adapter is used at.
    pub scale: f64,
    /// Whether training leaves it alone.
    pub frozen: bool,
}

impl LoraPair {
    /// A's rows.
    pub fn rank(&self) -> i64 {
        self.down.size()[0]
    }
}

/// A linear layer, or a convolution of one pixel, which is one.
#[derive(Debug)]
pub struct Linear {
    name: String,
    weight: Tensor,
    bias: Option<Tensor>,
    inputs: i64,
    outputs: i64,
    pairs: Vec<LoraPair>,
    /// Whether the weight is no longer the one that was loaded.
    merged: bool,
}

/// How a linear layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// `[outputs, inputs]`.
    Matrix,
    /// `[outputs, inputs, 1, 1]`.
    Pixel,
}

impl Linear {
    /// Takes `<name>.weight` and, where there is one, `<name>.bias`.
    ///
    /// # Errors
    /// Those of [`Params::take`].
    pub fn take(
        params: &mut Params,
        name: &str,
        (inputs, outputs): (i64, i64),
        bias: bool,
        shape: Shape,
    ) -> Result<Self, LearningError> {
        let dims: &[i64] = match shape {
            Shape::Matrix => &[outputs, inputs],
            Shape::Pixel => &[outputs, inputs, 1, 1],
        };
        let weight = params.take(&format!("{name}.weight"), dims, Start::FanIn(inputs))?;
        let bias = bias
            .then(|| params.take(&format!("{name}.bias"), &[outputs], Start::FanIn(inputs)))
            .transpose()?;
        Ok(Self {
            name: name.to_owned(),
            weight,
            bias,
            inputs,
            outputs,
            pairs: Vec::new(),
            merged: false,
        })
    }

    /// Its place in the model: the stored name without `.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size of what it reads.
    pub fn inputs(&self) -> i64 {
        self.inputs
    }

    /// Size of what it writes.
    pub fn outputs(&self) -> i64 {
        self.outputs
    }

    /// Whether it is stored as a convolution.
    pub fn is_pixel(&self) -> bool {
        self.weight.dim() == 4
    }

    /// The stack.
    pub fn pairs(&self) -> &[LoraPair] {
        &self.pairs
    }

    /// The stack, to freeze or rescale.
    pub fn pairs_mut(&mut self) -> &mut [LoraPair] {
        &mut self.pairs
    }

    /// Puts a pair on top of the stack.
    ///
    /// # Errors
    /// [`LearningError::Config`] if its shapes do not fit this layer or the adapter is already here.
    pub fn attach(&mut self, pair: LoraPair) -> Result<(), LearningError> {
        let (down, up) = (pair.down.size(), pair.up.size());
        let fits = down.len() == 2
            && up.len() == 2
            && down[1] == self.inputs
            && up[0] == self.outputs
            && down[0] == up[1]
            && down[0] > 0;
        if !fits {
            return Err(LearningError::Config(format!(
                "adapter {}: shapes {down:?} and {up:?} do not fit {} of {} inputs and {} outputs",
                pair.adapter, self.name, self.inputs, self.outputs
            )));
        }
        if self
            .pairs
            .iter()
            .any(|present| present.adapter == pair.adapter)
        {
            return Err(LearningError::Config(format!(
                "adapter {} is attached to {} already",
                pair.adapter, self.name
            )));
        }
        self.pairs.push(pair);
        Ok(())
    }

    /// Takes an adapter's pair off the stack.
    pub fn detach(&mut self, adapter: &str) -> Option<LoraPair> {
        let place = self.pairs.iter().position(|pair| pair.adapter == adapter)?;
        Some(self.pairs.remove(place))
    }

    /// Adds an adapter's change to the weight and takes its pair off the stack: the layer computes what it did before, up to rounding. Happens once to
    /// a loaded weight: a second change would be rounded onto the first one's rounding, so that the weight's last bits would tell by which way it
    /// was reached.
    ///
    /// # Errors
    /// [`LearningError::Config`] if a change was merged already, [`LearningError::Torch`] if the product cannot be formed.
    pub fn merge(&mut self, adapter: &str) -> Result<bool, LearningError> {
        let weight = self.weight.shallow_clone();
        self.merge_onto(adapter, &weight)
    }

    /// [`Linear::merge`] where the weight is known better than the model holds it: a model in half precision has rounded it already. Base and change are
    /// added in f32 or better and rounded once.
    ///
    /// # Errors
    /// As [`Linear::merge`].
    pub fn merge_onto(&mut self, adapter: &str, base: &Tensor) -> Result<bool, LearningError> {
        if !self.pairs.iter().any(|pair| pair.adapter == adapter) {
            return Ok(false);
        }
        if self.merged {
            return Err(LearningError::Config(format!(
                "{} holds a merged change already; load the model again and merge the sum of both",
                self.name
            )));
        }
        let Some(pair) = self.detach(adapter) else {
            return Ok(false);
        };
        let _frozen = tch::no_grad_guard();
        let exact = match self.weight.kind() {
            Kind::Double => Kind::Double,
            _ => Kind::Float,
        };
        let change = pair
            .up
            .f_to_kind(exact)?
            .f_matmul(&pair.down.f_to_kind(exact)?)?
            .f_mul_scalar(pair.scale)?
            .f_view(&self.weight.size()[..])?
            .f_to_device(base.device())?;
        let sum = base
            .f_to_kind(exact)?
            .f_reshape(&self.weight.size()[..])?
            .f_add(&change)?;
        self.weight.f_copy_(&sum)?;
        self.merged = true;
        Ok(true)
    }

    /// `[.., inputs]` to `[.., outputs]`.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        let matrix;
        let weight = if self.is_pixel() {
            matrix = self.weight.f_view([self.outputs, self.inputs])?;
            &matrix
        } else {
            &self.weight
        };
        let mut y = x.f_linear(weight, self.bias.as_ref())?;
        for pair in &self.pairs {
            let change = x
                .f_linear(&pair.down, None::<&Tensor>)?
                .f_linear(&pair.up, None::<&Tensor>)?;
            y = y.f_add(&change.f_mul_scalar(pair.scale)?)?;
        }
        Ok(y)
    }
}

/// Anything with linear layers that adapters can sit on.
pub trait Sites {
    /// All of them, in a fixed order.
    fn linears_mut<'a>(&'a mut self, found: &mut Vec<&'a mut Linear>);

    /// All of them to look at, in the same order.
    fn linears<'a>(&'a self, found: &mut Vec<&'a Linear>);
}

/// All linear layers by name.
pub fn by_name(model: &mut dyn Sites) -> BTreeMap<String, &mut Linear> {
    let mut found = Vec::new();
    model.linears_mut(&mut found);
    found
        .into_iter()
        .map(|linear| (linear.name.clone(), linear))
        .collect()
}

/// Implements [`Sites`] over fields that are linear layers, or hold some.
macro_rules! sites {
    ($type:ty { $($field:ident),* $(,)? }) => {
        impl $crate::diffusion::linear::Sites for $type {
            fn linears_mut<'a>(
                &'a mut self,
                found: &mut Vec<&'a mut $crate::diffusion::linear::Linear>,
            ) {
                $($crate::diffusion::linear::Sites::linears_mut(&mut self.$field, found);)*
            }

            fn linears<'a>(&'a self, found: &mut Vec<&'a $crate::diffusion::linear::Linear>) {
                $($crate::diffusion::linear::Sites::linears(&self.$field, found);)*
            }
        }
    };
}
pub(crate) use sites;

impl Sites for Linear {
    fn linears_mut<'a>(&'a mut self, found: &mut Vec<&'a mut Linear>) {
        found.push(self);
    }

    fn linears<'a>(&'a self, found: &mut Vec<&'a Linear>) {
        found.push(self);
    }
}

impl<T: Sites> Sites for Option<T> {
    fn linears_mut<'a>(&'a mut self, found: &mut Vec<&'a mut Linear>) {
        if let Some(part) = self {
            part.linears_mut(found);
        }
    }

    fn linears<'a>(&'a self, found: &mut Vec<&'a Linear>) {
        if let Some(part) = self {
            part.linears(found);
        }
    }
}

impl<T: Sites> Sites for Vec<T> {
    fn linears_mut<'a>(&'a mut self, found: &mut Vec<&'a mut Linear>) {
        for part in self {
            part.linears_mut(found);
        }
    }

    fn linears<'a>(&'a self, found: &mut Vec<&'a Linear>) {
        for part in self {
            part.linears(found);
        }
    }
}
