//! The yardstick: compares a backbone with what Python's `transformers` computed.
//!
//! The reference files and their format come from `deploy/interop/reference.py`: one batch, two bottleneck adapters in one position,
//! a head on the mean over the tokens, and the encoder's output, logits, loss and the gradient of every parameter in f32 and f64.

use std::{collections::BTreeMap, path::Path};

use concord_common::job::AdapterPosition;
use tch::{Kind, Reduction, Tensor};

use crate::{
    backbone::{Backbone, Batch, LayerHook},
    error::LearningError,
    weights::WeightsFile,
};

/// A reference file.
#[derive(Debug)]
pub struct Reference {
    batch: Batch,
    labels: Tensor,
    /// `adapter.<layer>.<global|private>.<down|up>.<weight|bias>` and `head.<weight|bias>`.
    parameters: BTreeMap<String, Tensor>,
    /// `hidden`, `logits`, `loss` and `grad.<parameter>`, each after `f32.` or `f64.`.
    results: BTreeMap<String, Tensor>,
    position: AdapterPosition,
    scale_global: f64,
    scale_private: f64,
}

/// The largest absolute differences between ours and the reference.
#[derive(Debug, Clone, PartialEq)]
pub struct Differences {
    /// In the encoder's output at real tokens, the logits and the loss.
    pub forward: f64,
    /// In the gradients of adapters and head.
    pub gradient: f64,
    /// The parameter with the largest of them.
    pub worst_parameter: String,
}

/// How far apart results may be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// For the encoder's output, the logits and the loss.
    pub forward: f64,
    /// For the gradients.
    pub gradient: f64,
}

impl Bounds {
    /// What this project promises in f32.
    pub const F32: Self = Self {
        forward: 1e-5,
        gradient: 1e-6,
    };
    /// What this project promises in f64.
    pub const F64: Self = Self {
        forward: 1e-9,
        gradient: 1e-9,
    };
}

impl Differences {
    /// Whether they are below the bounds.
    pub fn within(&self, bounds: Bounds) -> bool {
        self.forward < bounds.forward && self.gradient < bounds.gradient
    }
}

impl Reference {
    /// Reads a reference file.
    ///
    /// # Errors
    /// [`LearningError::Io`] or [`LearningError::Weights`] that says what is missing.
    pub fn read(path: &Path) -> Result<Self, LearningError> {
        let file = WeightsFile::open(path)?;
        let scale = |name: &str| {
            file.note(name)
                .and_then(|text| text.parse::<f64>().ok())
                .ok_or_else(|| {
                    LearningError::weights(path, format!("no number {name} in its metadata"))
                })
        };
        let position = match file.note("position") {
            None | Some("ffn") => AdapterPosition::Ffn,
            Some("attention") => AdapterPosition::Attention,
            Some(other) => {
                let what = format!("its metadata has the unknown position {other}");
                return Err(LearningError::weights(path, what));
            }
        };
        let batch = Batch {
            input_ids: file.tensor("input_ids")?,
            token_types: file.tensor("token_types")?,
            mask: file.tensor("mask")?,
        };
        let (results, others): (BTreeMap<_, _>, BTreeMap<_, _>) = file
            .tensors()?
            .into_iter()
            .partition(|(name, _)| name.starts_with("f32.") || name.starts_with("f64."));
        let parameters = others
            .into_iter()
            .filter(|(name, _)| name.contains('.'))
            .collect();
        Ok(Self {
            batch,
            labels: file.tensor("labels")?,
            parameters,
            results,
            position,
            scale_global: scale("scale_global")?,
            scale_private: scale("scale_private")?,
        })
    }

    /// The batch.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Runs the batch through `backbone` with the adapters, in its own kind, and compares all results.
    ///
    /// # Errors
    /// [`LearningError::Torch`], and [`LearningError::Data`] if the file lacks a result.
    pub fn compare(&self, backbone: &Backbone) -> Result<Differences, LearningError> {
        let kind = backbone.kind();
        let precision = if kind == Kind::Double { "f64" } else { "f32" };
        let mut hook = self.adapters(kind)?;
        let hidden = backbone.forward(&self.batch, &mut hook)?;
        let pooled = mean_pool(&hidden, &self.batch.mask)?;
        let logits = pooled.f_linear(hook.get("head.weight")?, Some(hook.get("head.bias")?))?;
        let loss = logits.f_cross_entropy_loss(
            &self.labels,
            None::<&Tensor>,
            Reduction::Mean,
            -100,
            0.0,
        )?;
        loss.f_backward()?;

        // Nothing reads what stands at padding, and in f32 its rounding errors can be far larger than at a real token.
        let apart = self.apart(&format!("{precision}.hidden"), &hidden)?;
        let mut forward = largest(&apart.f_mul(&self.batch.mask.f_unsqueeze(-1)?)?)?;
        for (name, ours) in [("logits", &logits), ("loss", &loss)] {
            forward = forward.max(largest(&self.apart(&format!("{precision}.{name}"), ours)?)?);
        }
        let mut gradient = 0.0_f64;
        let mut worst_parameter = String::new();
        for (name, leaf) in &hook.parameters {
            let difference =
                largest(&self.apart(&format!("{precision}.grad.{name}"), &leaf.f_grad()?)?)?;
            if difference >= gradient {
                gradient = difference;
                worst_parameter.clone_from(name);
            }
        }
        Ok(Differences {
            forward,
            gradient,
            worst_parameter,
        })
    }

    /// The file's adapters as a hook, with parameters that collect gradients.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if a parameter cannot be copied.
    pub fn adapters(&self, kind: Kind) -> Result<ReferenceAdapters, LearningError> {
        let parameters = self
            .parameters
            .iter()
            .map(|(name, stored)| {
                let leaf = stored
                    .f_detach_copy()?
                    .f_to_kind(kind)?
                    .f_set_requires_grad(true)?;
                Ok((name.clone(), leaf))
            })
            .collect::<Result<_, LearningError>>()?;
        Ok(ReferenceAdapters {
            parameters,
            position: self.position,
            scale_global: self.scale_global,
            scale_private: self.scale_private,
        })
    }

    /// Ours less the reference's.
    fn apart(&self, name: &str, ours: &Tensor) -> Result<Tensor, LearningError> {
        let theirs = self
            .results
            .get(name)
            .ok_or_else(|| LearningError::Data(format!("the reference has no {name}")))?;
        if theirs.size() != ours.size() {
            return Err(LearningError::Data(format!(
                "{name} has shape {:?} in the reference, ours has {:?}",
                theirs.size(),
                ours.size()
            )));
        }
        Ok(ours
            .f_detach()?
            .f_to_kind(Kind::Double)?
            .f_sub(&theirs.f_to_kind(Kind::Double)?)?)
    }
}

/// The largest absolute value.
fn largest(apart: &Tensor) -> Result<f64, LearningError> {
    let largest = apart.f_abs()?.f_max()?.f_double_value(&[])?;
    // NaN would lose every comparison with a bound.
    Ok(if largest.is_nan() {
        f64::INFINITY
    } else {
        largest
    })
}

/// `h' = h + s_g A_g(h) + s_p A_p(h)` in the layers that have adapters.
#[derive(Debug)]
pub struct ReferenceAdapters {
    parameters: BTreeMap<String, Tensor>,
    position: AdapterPosition,
    scale_global: f64,
    scale_private: f64,
}

impl ReferenceAdapters {
    fn get(&self, name: &str) -> Result<&Tensor, LearningError> {
        self.parameters
            .get(name)
            .ok_or_else(|| LearningError::Data(format!("the reference has no parameter {name}")))
    }

    fn bottleneck(&self, stem: &str, h: &Tensor) -> Result<Tensor, LearningError> {
        let part = |name: &str| self.get(&format!("{stem}.{name}"));
        let inner = h
            .f_linear(part("down.weight")?, Some(part("down.bias")?))?
            .f_gelu("none")?;
        Ok(inner.f_linear(part("up.weight")?, Some(part("up.bias")?))?)
    }
}

impl LayerHook for ReferenceAdapters {
    fn position(&self) -> AdapterPosition {
        self.position
    }

    fn adapt(&mut self, layer: usize, h: Tensor) -> Result<Tensor, LearningError> {
        let stem = format!("adapter.{layer}");
        if !self
            .parameters
            .contains_key(&format!("{stem}.global.down.weight"))
        {
            return Ok(h);
        }
        let global = self.bottleneck(&format!("{stem}.global"), &h)?;
        let private = self.bottleneck(&format!("{stem}.private"), &h)?;
        Ok(h.f_add(&global.f_mul_scalar(self.scale_global)?)?
            .f_add(&private.f_mul_scalar(self.scale_private)?)?)
    }
}

/// Mean over the real tokens of each row: `[n, t, d]` and `[n, t]` to `[n, d]`.
///
/// # Errors
/// [`LearningError::Torch`] if the shapes do not fit.
pub fn mean_pool(hidden: &Tensor, mask: &Tensor) -> Result<Tensor, LearningError> {
    let weight = mask.f_to_kind(hidden.kind())?.f_unsqueeze(-1)?;
    let sum = hidden
        .f_mul(&weight)?
        .f_sum_dim_intlist(1, false, hidden.kind())?;
    Ok(sum.f_div(&weight.f_sum_dim_intlist(1, false, hidden.kind())?)?)
}
