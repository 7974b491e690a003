//! The terms of the local objectives.
//!
//! | algorithm | objective | source |
//! |---|---|---|
//! | `local`, `fedavg`, `fedrep` | task loss | arXiv 1602.05629, 2102.07078 |
//! | `fedprox` | task loss + mu/2 ‖w − w^t‖² | 1812.06127 |
//! | `ditto` | personal model: task loss + lambda/2 ‖v − w^t‖² | 2012.04221 |
//! | `moon` | task loss + mu · mean over rows of −log(e^{s+/tau} / (e^{s+/tau} + e^{s−/tau})), s+ and s− the cosines of a row's representation with the received and with the silo's previous model's | 2103.16257 |
//! | `fedmcp` | task loss + alpha · R_g + mu · L_con | our reading of 2409.00116 |
//!
//! The task loss is cross-entropy for classes and the mean squared error of standardised targets for numbers.
//! L_con = mean over layers of softplus((s− − s+)/tau), s+ = CKA(z_g, z_g^t), s− = CKA(z_g, z_p); see [`cka`](fn@cka) for CKA and
//! [`crate::fusion`] for z. R_g is ½‖w_g − w_g^t‖² over the global adapter's tensors, or the task loss of the model with the global adapter alone.
//! w^t is what the round began with. Softplus of a difference is the −log of MOON's ratio, so both terms have one form.

mod cka;
#[cfg(test)]
mod tests;

use tch::{Kind, Reduction, Tensor};

pub use self::cka::{MIN_ROWS, cka};
use crate::error::LearningError;

/// What the model should say about a batch.
#[derive(Debug)]
pub(crate) enum BatchTargets {
    /// Indices of classes, `[n]`, i64.
    Classes(Tensor),
    /// Standardised numbers, `[n]`.
    Values(Tensor),
}

/// Cross-entropy of `[n, c]` logits, or the mean squared error of `[n, 1]` outputs: a scalar.
pub(crate) fn task_loss(logits: &Tensor, targets: &BatchTargets) -> Result<Tensor, LearningError> {
    Ok(match targets {
        BatchTargets::Classes(classes) => {
            logits.f_cross_entropy_loss::<Tensor>(classes, None, Reduction::Mean, -100, 0.0)?
        }
        BatchTargets::Values(values) => logits
            .f_squeeze_dim(1)?
            .f_mse_loss(values, Reduction::Mean)?,
    })
}

/// ½ Σ ‖w − anchor‖² over pairs of tensors: a scalar. The anchors get no gradient.
pub(crate) fn half_squared_distance(pairs: &[(&Tensor, &Tensor)]) -> Result<Tensor, LearningError> {
    let mut total: Option<Tensor> = None;
    for (w, anchor) in pairs {
        let term = w.f_sub(&anchor.f_detach()?)?.f_square()?.f_sum(w.kind())?;
        total = Some(match total {
            None => term,
            Some(sum) => sum.f_add(&term)?,
        });
    }
    Ok(match total {
        Some(sum) => sum.f_mul_scalar(0.5)?,
        None => Tensor::f_zeros([] as [i64; 0], (Kind::Float, tch::Device::Cpu))?,
    })
}

/// softplus((push − pull) / tau): small when `pull` is the larger. Scalars or vectors of one length.
pub(crate) fn contrast(pull: &Tensor, push: &Tensor, tau: f64) -> Result<Tensor, LearningError> {
    Ok(push.f_sub(pull)?.f_div_scalar(tau)?.f_softplus()?)
}

/// MOON's term: mean over rows of softplus((cos(z, previous) − cos(z, global)) / tau), all `[n, d]`.
pub(crate) fn moon(
    z: &Tensor,
    global: &Tensor,
    previous: &Tensor,
    tau: f64,
) -> Result<Tensor, LearningError> {
    const EPSILON: f64 = 1e-8;
    let cosine = |other: &Tensor| Tensor::f_cosine_similarity(z, other, 1, EPSILON);
    Ok(contrast(&cosine(global)?, &cosine(previous)?, tau)?.f_mean(z.kind())?)
}
