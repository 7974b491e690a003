//! The linear layer from a pooled hidden state to classes or a number, of the same two kinds as adapters.

use std::marker::PhantomData;

use concord_common::{
    adapter::{InitialScale, TensorSpec},
    job::Pool,
    seed::Seed,
};
use tch::{Kind, Tensor};

use crate::{
    adapter::{Private, Sharing, drawn},
    error::LearningError,
    named::{Taker, deep_copy},
};

/// Weights of a dense layer.
#[derive(Debug)]
pub(crate) struct Linear {
    /// `[c, d]`
    pub(crate) weight: Tensor,
    /// `[c]`
    pub(crate) bias: Tensor,
}

impl Linear {
    pub(crate) fn named(&self, prefix: &str) -> [(String, &Tensor); 2] {
        [
            (format!("{prefix}weight"), &self.weight),
            (format!("{prefix}bias"), &self.bias),
        ]
    }

    /// `[n, d]` to the first `outputs` of the layer's own, `[n, outputs]`.
    ///
    /// # Errors
    /// [`LearningError::Config`] if it has fewer.
    pub(crate) fn forward(&self, x: &Tensor, outputs: usize) -> Result<Tensor, LearningError> {
        let own = self.weight.size()[0] as usize;
        if own < outputs {
            return Err(LearningError::Config(format!(
                "the head has {own} outputs, the task needs {outputs}; raise `head.classes`"
            )));
        }
        let outputs = outputs as i64;
        Ok(x.f_linear(
            &self.weight.f_narrow(0, 0, outputs)?,
            Some(&self.bias.f_narrow(0, 0, outputs)?),
        )?)
    }

    pub(crate) fn from_host(
        prefix: &str,
        outputs: usize,
        hidden: usize,
        taker: &mut Taker,
        kind: Kind,
    ) -> Result<Self, LearningError> {
        Ok(Self {
            weight: taker.tensor(&format!("{prefix}weight"), &[outputs, hidden], kind)?,
            bias: taker.tensor(&format!("{prefix}bias"), &[outputs], kind)?,
        })
    }
}

/// A head that travels ([`crate::adapter::Global`]) or stays ([`Private`]).
#[derive(Debug)]
pub struct Head<S: Sharing> {
    pub(crate) linear: Linear,
    pub(crate) sharing: PhantomData<fn() -> S>,
}

impl Head<Private> {
    /// Normal weights with a standard deviation of 0.02, biases 0.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if libtorch gives no memory.
    pub(crate) fn draw(
        outputs: usize,
        hidden: usize,
        seed: Seed,
        kind: Kind,
    ) -> Result<Self, LearningError> {
        let (c, d) = (outputs as u64, hidden as u64);
        let make = |spec: TensorSpec| drawn(&spec, InitialScale::default(), seed, kind);
        Ok(Self::own(Linear {
            weight: make(TensorSpec::new("head.weight", &[c, d]))?,
            bias: make(TensorSpec::new("head.bias", &[c]))?,
        }))
    }

    /// Takes a copy of any head's weights: what is private may start from what is shared.
    pub(crate) fn copy_of(head: &Linear) -> Result<Self, LearningError> {
        Ok(Self::own(Linear {
            weight: deep_copy(&head.weight)?,
            bias: deep_copy(&head.bias)?,
        }))
    }

    pub(crate) fn own(linear: Linear) -> Self {
        Self {
            linear,
            sharing: PhantomData,
        }
    }
}

/// What the tokens of each row count in its mean: `mask / number of tokens`, `[n, t]`.
pub(crate) fn token_weights(mask: &Tensor, kind: Kind) -> Result<Tensor, LearningError> {
    let mask = mask.f_to_kind(kind)?;
    Ok(mask.f_div(&mask.f_sum_dim_intlist(1, true, kind)?)?)
}

/// The mean over each row's real tokens: `[n, t, w]` and `[n, t]` to `[n, w]`.
pub(crate) fn token_mean(x: &Tensor, weights: &Tensor) -> Result<Tensor, LearningError> {
    Ok(weights.f_unsqueeze(1)?.f_matmul(x)?.f_squeeze_dim(1)?)
}

/// One vector a row from the last hidden states `[n, t, d]`: `[n, d]`.
pub(crate) fn pooled(
    pool: Pool,
    hidden: &Tensor,
    weights: &Tensor,
) -> Result<Tensor, LearningError> {
    match pool {
        Pool::Mean => token_mean(hidden, weights),
        Pool::Cls => Ok(hidden.f_select(1, 0)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::named::HostTensor;

    fn linear() -> Linear {
        Linear {
            weight: Tensor::from_slice(&[1.0_f32, 0.0, 0.0, 1.0, 2.0, 2.0]).view([3, 2]),
            bias: Tensor::from_slice(&[0.0_f32, 1.0, 0.0]),
        }
    }

    #[test]
    fn a_shared_head_serves_a_task_with_fewer_classes_by_its_first_outputs() {
        let x = Tensor::from_slice(&[3.0_f32, 5.0]).view([1, 2]);
        let logits = linear().forward(&x, 2).unwrap();
        assert_eq!(HostTensor::from_tensor(&logits).unwrap().values, [3.0, 6.0]);
    }

    #[test]
    fn a_task_with_more_classes_than_the_shared_head_is_told_what_to_raise() {
        let x = Tensor::from_slice(&[3.0_f32, 5.0]).view([1, 2]);
        let error = linear().forward(&x, 4).unwrap_err().to_string();
        assert!(error.contains("head.classes"), "{error}");
    }

    #[test]
    fn the_mean_leaves_padding_out() {
        let hidden = Tensor::from_slice(&[1.0_f32, 3.0, 100.0, 4.0, 6.0, 8.0]).view([2, 3, 1]);
        let mask = Tensor::from_slice(&[1_i64, 1, 0, 1, 1, 1]).view([2, 3]);
        let weights = token_weights(&mask, Kind::Float).unwrap();
        let mean =
            HostTensor::from_tensor(&pooled(Pool::Mean, &hidden, &weights).unwrap()).unwrap();
        assert_eq!(mean.shape, [2, 1]);
        assert!((mean.values[0] - 2.0).abs() < 1e-6 && (mean.values[1] - 6.0).abs() < 1e-6);
        let first =
            HostTensor::from_tensor(&pooled(Pool::Cls, &hidden, &weights).unwrap()).unwrap();
        assert_eq!(first.values, [1.0, 4.0]);
    }
}
