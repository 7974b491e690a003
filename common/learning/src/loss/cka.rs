//! Centred kernel alignment with a linear kernel.

use concord_common::job::CkaEstimator;
use tch::{Kind, Tensor};

use crate::error::LearningError;

/// Fewest rows that the unbiased estimator is defined for.
pub const MIN_ROWS: usize = 4;

/// Keeps the quotient finite where a side has no variance. The inputs are scaled to a norm of 1 first, so it means the same for all.
const EPSILON: f64 = 1e-12;

/// CKA(X, Y) = HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L) + ε) with K = XX', L = YY': a scalar with a gradient in both.
/// x is `[n, p]`, y is `[n, q]`; rows belong to the same examples.
///
/// `biased` (Kornblith et al. 2019, arXiv 1905.00414): HSIC(K, L) = tr(HKHL) = ‖Yc'Xc‖_F², columns centred. At batch sizes it is near 1 for
/// any two random matrices, because the diagonals of K and L always agree.
///
/// `unbiased` (HSIC_1 of Song et al. 2012, JMLR 13, in the quotient of Nguyen et al. 2021, arXiv 2010.15327):
/// HSIC(K, L) = \[tr(K~L~) + (1'K~1)(1'L~1)/((n−1)(n−2)) − 2/(n−2) · 1'K~L~1\] / (n(n−3)), K~ = K with a zero diagonal. About 0 for independent
/// rows at any n ≥ 4, and it may be a little negative.
///
/// Both are unchanged by a shift, a scale or a rotation of either side; columns are centred and scaled first, which changes nothing but the
/// rounding. With fewer rows than columns the n×n Gram matrices are used, otherwise p×q products; the value is the same.
///
/// # Errors
/// [`LearningError::Data`] if the numbers of rows differ or are below 4 (`biased`: 2).
pub fn cka(x: &Tensor, y: &Tensor, estimator: CkaEstimator) -> Result<Tensor, LearningError> {
    let ((n, p), (m, q)) = (x.size2()?, y.size2()?);
    let least = match estimator {
        CkaEstimator::Unbiased => MIN_ROWS as i64,
        CkaEstimator::Biased => 2,
    };
    if n != m || n < least {
        return Err(LearningError::Data(format!(
            "CKA compares at least {least} rows of one batch, here are {n} and {m}"
        )));
    }
    let (x, y) = (normalised(x)?, normalised(y)?);
    let sides = if n < p.max(q) {
        [Side::gram(&x)?, Side::gram(&y)?]
    } else {
        [Side::features(x)?, Side::features(y)?]
    };
    let [x, y] = &sides;
    let hsic = |a: &Side, b: &Side| match estimator {
        CkaEstimator::Unbiased => unbiased(n as f64, a, b),
        CkaEstimator::Biased => a.trace_of_product(b),
    };
    let scale = hsic(x, x)?
        .f_mul(&hsic(y, y)?)?
        .f_clamp_min(0.0)?
        .f_add_scalar(EPSILON)?
        .f_sqrt()?;
    Ok(hsic(x, y)?.f_div(&scale)?)
}

/// Columns centred, all divided by the Frobenius norm. The norm counts as a constant: CKA does not depend on it, so its gradient is 0.
fn normalised(x: &Tensor) -> Result<Tensor, LearningError> {
    const TINY: f64 = 1e-12;
    let centred = x.f_sub(&x.f_mean_dim(&[0_i64][..], true, x.kind())?)?;
    let norm = centred.f_detach()?.f_norm()?.f_add_scalar(TINY)?;
    Ok(centred.f_div(&norm)?)
}

/// n(n−3) · HSIC_1; the factor cancels in the quotient.
fn unbiased(n: f64, a: &Side, b: &Side) -> Result<Tensor, LearningError> {
    // tr(K~L~) = tr(KL) - sum_i K_ii L_ii;  K~1 = K1 - diag(K)
    let trace = a
        .trace_of_product(b)?
        .f_sub(&a.diagonal.f_dot(&b.diagonal)?)?;
    let (a_rows, b_rows) = (
        a.row_sums.f_sub(&a.diagonal)?,
        b.row_sums.f_sub(&b.diagonal)?,
    );
    let (a_all, b_all) = (a_rows.f_sum(a_rows.kind())?, b_rows.f_sum(b_rows.kind())?);
    let squares = a_all.f_mul(&b_all)?.f_div_scalar((n - 1.0) * (n - 2.0))?;
    let cross = a_rows.f_dot(&b_rows)?.f_mul_scalar(2.0 / (n - 2.0))?;
    Ok(trace.f_add(&squares)?.f_sub(&cross)?)
}

/// What both estimators need of one side.
struct Side {
    form: Form,
    /// Diagonal of K, `[n]`.
    diagonal: Tensor,
    /// K1, `[n]`: zero but for rounding, since the columns are centred.
    row_sums: Tensor,
}

enum Form {
    /// K = XX', `[n, n]`.
    Gram(Tensor),
    /// X itself, `[n, p]`.
    Features(Tensor),
}

impl Side {
    fn gram(x: &Tensor) -> Result<Self, LearningError> {
        let gram = x.f_matmul(&x.f_tr()?)?;
        Ok(Self {
            diagonal: gram.f_diagonal(0, 0, 1)?,
            row_sums: gram.f_sum_dim_intlist(1, false, gram.kind())?,
            form: Form::Gram(gram),
        })
    }

    fn features(x: Tensor) -> Result<Self, LearningError> {
        let kind: Kind = x.kind();
        Ok(Self {
            diagonal: x.f_square()?.f_sum_dim_intlist(1, false, kind)?,
            row_sums: x.f_mv(&x.f_sum_dim_intlist(0, false, kind)?)?,
            form: Form::Features(x),
        })
    }

    /// tr(KL) = Σ_ij K_ij L_ij = ‖X'Y‖_F².
    fn trace_of_product(&self, other: &Self) -> Result<Tensor, LearningError> {
        let product = match (&self.form, &other.form) {
            (Form::Gram(k), Form::Gram(l)) => k.f_mul(l)?,
            (Form::Features(x), Form::Features(y)) => x.f_tr()?.f_matmul(y)?.f_square()?,
            (Form::Gram(k), Form::Features(x)) | (Form::Features(x), Form::Gram(k)) => {
                k.f_mul(&x.f_matmul(&x.f_tr()?)?)?
            }
        };
        Ok(product.f_sum(product.kind())?)
    }
}
