//! One encoder layer in steps, with the hook after the attention or after the feed-forward network. Hidden states are matrices here,
//! `[n·t, d]`.

use std::collections::HashMap;

use tch::{Kind, Tensor};

use super::{
    BackboneConfig,
    family::{LayerNames, take},
};
use crate::error::LearningError;

/// A LayerNorm over the last dimension.
#[derive(Debug)]
pub(super) struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl Norm {
    pub(super) fn take(tensors: &mut HashMap<String, Tensor>, part: &str, eps: f64) -> Self {
        let (weight, bias) = take_pair(tensors, part);
        Self { weight, bias, eps }
    }

    pub(super) fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        Ok(x.f_layer_norm(
            self.weight.size(),
            Some(&self.weight),
            Some(&self.bias),
            self.eps,
            false,
        )?)
    }
}

/// A dense layer: `x W' + b`.
#[derive(Debug)]
struct Dense {
    weight: Tensor,
    bias: Tensor,
}

impl Dense {
    fn take(tensors: &mut HashMap<String, Tensor>, part: &str) -> Self {
        let (weight, bias) = take_pair(tensors, part);
        Self { weight, bias }
    }

    fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        Ok(x.f_linear(&self.weight, Some(&self.bias))?)
    }

    /// `sum += x W' + b` in place.
    fn add_to(&self, sum: &mut Tensor, x: &Tensor) -> Result<(), LearningError> {
        add_dense(sum, x, &self.weight, &self.bias)
    }
}

/// `sum += x W' + b` for matrices, in place: the product is added up where it belongs and takes no memory of its own.
pub(crate) fn add_dense(
    sum: &mut Tensor,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
) -> Result<(), LearningError> {
    let _ = sum.f_add_(bias)?.f_addmm_(x, &weight.f_tr()?)?;
    Ok(())
}

fn take_pair(tensors: &mut HashMap<String, Tensor>, part: &str) -> (Tensor, Tensor) {
    (
        take(tensors, &format!("{part}.weight")),
        take(tensors, &format!("{part}.bias")),
    )
}

/// What attention may look at.
pub(super) struct AttentionMask {
    /// 0 at a token, minus infinity at padding, `[n, 1, 1, t]`; `None` when no row is padded.
    additive: Option<Tensor>,
}

impl AttentionMask {
    /// From the batch's `[n, t]` mask of ones and zeros.
    pub(super) fn new(mask: &Tensor, kind: Kind) -> Result<Self, LearningError> {
        let (_, t) = mask.size2()?;
        let shortest = mask
            .f_sum_dim_intlist(1, false, Kind::Int64)?
            .f_min()?
            .f_int64_value(&[])?;
        if shortest == 0 {
            return Err(LearningError::Data(
                "a row of the batch is all padding; give it at least one token".to_owned(),
            ));
        }
        if shortest == t {
            return Ok(Self { additive: None });
        }
        let additive = mask
            .f_zeros_like()?
            .f_to_kind(kind)?
            .f_masked_fill(&mask.f_eq(0)?, f64::NEG_INFINITY)?
            .f_unsqueeze(1)?
            .f_unsqueeze(1)?;
        Ok(Self {
            additive: Some(additive),
        })
    }
}

/// The weights of one layer.
#[derive(Debug)]
pub(super) struct Layer {
    heads: i64,
    /// Query, key and value stacked, so that one product serves all three: `[3d, d]`.
    qkv: Dense,
    attention_out: Dense,
    attention_norm: Norm,
    up: Dense,
    down: Dense,
    norm: Norm,
}

impl Layer {
    pub(super) fn take(
        config: &BackboneConfig,
        index: usize,
        tensors: &mut HashMap<String, Tensor>,
    ) -> Result<Self, LearningError> {
        let names = LayerNames::new(config.family, index);
        let parts = [&names.query, &names.key, &names.value].map(|part| Dense::take(tensors, part));
        let qkv = Dense {
            weight: Tensor::f_cat(&parts.each_ref().map(|part| &part.weight), 0)?,
            bias: Tensor::f_cat(&parts.each_ref().map(|part| &part.bias), 0)?,
        };
        let eps = config.layer_norm_eps;
        Ok(Self {
            heads: config.heads as i64,
            qkv,
            attention_out: Dense::take(tensors, &names.attention_out),
            attention_norm: Norm::take(tensors, &names.attention_norm, eps),
            up: Dense::take(tensors, &names.up),
            down: Dense::take(tensors, &names.down),
            norm: Norm::take(tensors, &names.norm, eps),
        })
    }

    /// Self-attention with its residual and LayerNorm: what the feed-forward network reads, and what is added to its output. `[n·t, d]`, as
    /// `hidden`, which is written over: the sum takes its place, since nothing needs it any more.
    pub(super) fn attend(
        &self,
        mut hidden: Tensor,
        rows_and_tokens: (i64, i64),
        mask: &AttentionMask,
    ) -> Result<Tensor, LearningError> {
        let context = self.context(&hidden, rows_and_tokens, mask)?;
        self.attention_out.add_to(&mut hidden, &context)?;
        self.attention_norm.run(&hidden)
    }

    /// Self-attention up to its output projection, where a hook after the attention comes in.
    pub(super) fn attention(
        &self,
        hidden: &Tensor,
        rows_and_tokens: (i64, i64),
        mask: &AttentionMask,
    ) -> Result<Tensor, LearningError> {
        self.attention_out
            .run(&self.context(hidden, rows_and_tokens, mask)?)
    }

    /// The values that each token attends to, heads side by side.
    fn context(
        &self,
        hidden: &Tensor,
        (n, t): (i64, i64),
        mask: &AttentionMask,
    ) -> Result<Tensor, LearningError> {
        let (_, d) = hidden.size2()?;
        // [n·t, 3d] -> three of [n, heads, t, d / heads]. `unbind` rather than three selections: its gradient is one stack.
        let qkv = self
            .qkv
            .run(hidden)?
            .f_view([n, t, 3, self.heads, d / self.heads])?
            .f_permute([2, 0, 3, 1, 4])?
            .f_unbind(0)?;
        let context = Tensor::f_scaled_dot_product_attention(
            &qkv[0],
            &qkv[1],
            &qkv[2],
            mask.additive.as_ref(),
            0.0,
            false,
            None,
            false,
        )?;
        Ok(context.f_transpose(1, 2)?.f_reshape([n * t, d])?)
    }

    /// All that follows a hook after the attention: its LayerNorm, and the feed-forward network with its residual and LayerNorm.
    pub(super) fn above_attention(&self, sum: &Tensor) -> Result<Tensor, LearningError> {
        let mut attended = self.attention_norm.run(sum)?;
        let inner = self.inner(&attended)?;
        self.down.add_to(&mut attended, &inner)?;
        self.norm.run(&attended)
    }

    /// The feed-forward network up to its second dense layer, where a hook after it comes in.
    pub(super) fn feed_forward(&self, attended: &Tensor) -> Result<Tensor, LearningError> {
        self.down.run(&self.inner(attended)?)
    }

    fn inner(&self, attended: &Tensor) -> Result<Tensor, LearningError> {
        Ok(self.up.run(attended)?.f_gelu("none")?)
    }

    /// The LayerNorm after a hook after the feed-forward network.
    pub(super) fn close(&self, sum: &Tensor) -> Result<Tensor, LearningError> {
        self.norm.run(sum)
    }
}
