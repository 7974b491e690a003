use concord_common::job::CkaEstimator::{self, Biased, Unbiased};
use tch::{Kind, Tensor};

use super::*;
use crate::testing::{check_gradient, normal, number};

fn value(x: &Tensor, y: &Tensor, estimator: CkaEstimator) -> f64 {
    number(&cka(x, y, estimator).unwrap())
}

/// Rows of a matrix in f64.
fn rows(x: &Tensor) -> Vec<Vec<f64>> {
    Vec::<Vec<f64>>::try_from(&x.to_kind(Kind::Double)).unwrap()
}

fn gram(x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    x.iter()
        .map(|a| {
            x.iter()
                .map(|b| a.iter().zip(b).map(|(p, q)| p * q).sum())
                .collect()
        })
        .collect()
}

/// HSIC_1 as Song et al. print it, with loops.
fn hsic_by_the_book(x: &Tensor, y: &Tensor) -> f64 {
    let tilde = |x: &Tensor| {
        let mut k = gram(&rows(x));
        for (i, row) in k.iter_mut().enumerate() {
            row[i] = 0.0;
        }
        k
    };
    let (k, l) = (tilde(x), tilde(y));
    let n = k.len();
    let nf = n as f64;
    let all = |k: &[Vec<f64>]| k.iter().flatten().sum::<f64>();
    let (mut trace, mut cross) = (0.0, 0.0);
    for i in 0..n {
        for j in 0..n {
            trace += k[i][j] * l[j][i];
            cross += k[i][j] * l[j].iter().sum::<f64>();
        }
    }
    (trace + all(&k) * all(&l) / ((nf - 1.0) * (nf - 2.0)) - 2.0 / (nf - 2.0) * cross)
        / (nf * (nf - 3.0))
}

fn cka_by_the_book(x: &Tensor, y: &Tensor) -> f64 {
    hsic_by_the_book(x, y) / (hsic_by_the_book(x, x) * hsic_by_the_book(y, y)).sqrt()
}

/// ‖Yc'Xc‖² / (‖Xc'Xc‖ ‖Yc'Yc‖) as Kornblith et al. print it.
fn biased_by_the_book(x: &Tensor, y: &Tensor) -> f64 {
    let centred = |x: &Tensor| {
        let x = x.to_kind(Kind::Double);
        &x - x.mean_dim(0_i64, true, Kind::Double)
    };
    let (x, y) = (centred(x), centred(y));
    let norm = |a: &Tensor, b: &Tensor| number(&a.tr().matmul(b).norm());
    norm(&y, &x).powi(2) / (norm(&x, &x) * norm(&y, &y))
}

fn close(got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance, "{got} is not {want}");
}

/// Two matrices that have something in common, with offsets that centring must remove.
fn related(n: usize, p: usize, q: usize) -> (Tensor, Tensor) {
    let common = normal(1, &[n, 3], Kind::Double);
    let x =
        common.matmul(&normal(2, &[3, p], Kind::Double)) + normal(3, &[n, p], Kind::Double) * 0.5;
    let y =
        common.matmul(&normal(4, &[3, q], Kind::Double)) + normal(5, &[n, q], Kind::Double) * 0.5;
    (x + 2.0, y - 1.0)
}

#[test]
fn both_estimators_are_the_published_formulae() {
    for (n, p, q) in [(4, 9, 7), (8, 20, 20), (12, 5, 3), (30, 6, 6), (10, 4, 30)] {
        let (x, y) = related(n, p, q);
        close(value(&x, &y, Unbiased), cka_by_the_book(&x, &y), 1e-9);
        close(value(&x, &y, Biased), biased_by_the_book(&x, &y), 1e-9);
    }
}

#[test]
fn trap_1_biased_cka_cannot_tell_random_adapters_apart_at_batch_size() {
    // Published for independent Gaussians at d = 384.
    for (n, biased) in [(8, 0.99), (16, 0.96), (32, 0.92), (64, 0.86)] {
        let draws = 12;
        let (mut sum_biased, mut sum_unbiased) = (0.0, 0.0);
        for seed in 0..draws {
            let x = normal(100 + seed, &[n, 384], Kind::Float);
            let y = normal(200 + seed, &[n, 384], Kind::Float);
            sum_biased += value(&x, &y, Biased);
            sum_unbiased += value(&x, &y, Unbiased);
        }
        close(sum_biased / draws as f64, biased, 0.015);
        close(sum_unbiased / draws as f64, 0.0, 0.1);
    }
}

#[test]
fn trap_1_batches_that_are_too_short_for_the_unbiased_estimate_are_refused() {
    let x = normal(1, &[3, 8], Kind::Float);
    assert!(
        cka(&x, &x, Unbiased)
            .unwrap_err()
            .to_string()
            .contains("at least 4")
    );
    assert!(cka(&x, &x, Biased).is_ok());
    let y = normal(1, &[5, 8], Kind::Float);
    assert!(cka(&x, &y, Biased).is_err());
}

#[test]
fn trap_2_zero_outputs_are_nan_in_the_formula_and_finite_here() {
    let zero = Tensor::zeros([8, 24], (Kind::Float, tch::Device::Cpu));
    let y = normal(1, &[8, 24], Kind::Float);
    assert!(biased_by_the_book(&zero, &y).is_nan());
    assert!(cka_by_the_book(&zero, &y).is_nan());
    for estimator in [Unbiased, Biased] {
        for (x, other) in [(&zero, &y), (&zero, &zero)] {
            let leaf = x.copy().set_requires_grad(true);
            let similarity = cka(&leaf, other, estimator).unwrap();
            close(number(&similarity), 0.0, 1e-9);
            let gradient = Tensor::f_run_backward(&[similarity], &[&leaf], false, false).unwrap();
            assert_eq!(gradient[0].isfinite().all().int64_value(&[]), 1);
        }
    }
}

#[test]
fn trap_4_the_gram_form_equals_the_feature_form() {
    // Columns of zeros change neither Gram matrix, but make the sides wide enough for the Gram form.
    let (x, y) = related(12, 5, 4);
    let wide = |x: &Tensor| {
        Tensor::cat(
            &[
                x.shallow_clone(),
                Tensor::zeros([12, 20], (Kind::Double, tch::Device::Cpu)),
            ],
            1,
        )
    };
    for estimator in [Unbiased, Biased] {
        close(
            value(&x, &y, estimator),
            value(&wide(&x), &wide(&y), estimator),
            1e-12,
        );
    }
}

#[test]
fn trap_5_cka_ignores_scale_shift_and_rotation_and_so_bounds_no_norm() {
    let (x, y) = related(10, 16, 16);
    let (rotation, _) = Tensor::linalg_qr(&normal(9, &[16, 16], Kind::Double), "reduced");
    for estimator in [Unbiased, Biased] {
        let plain = value(&x, &y, estimator);
        close(value(&(&x * 1e4), &y, estimator), plain, 1e-9);
        close(value(&(&x * 1e-6), &y, estimator), plain, 1e-6);
        close(value(&(&x + 100.0), &y, estimator), plain, 1e-9);
        close(value(&x.matmul(&rotation), &y, estimator), plain, 1e-9);
    }
    let far = half_squared_distance(&[(&(&x * 1e4), &x)]).unwrap();
    assert!(number(&far) > 1e6, "the proximal term does see it");
}

#[test]
fn a_matrix_is_entirely_similar_to_itself() {
    for (n, d) in [(8, 40), (40, 8)] {
        let x = normal(3, &[n, d], Kind::Double);
        for estimator in [Unbiased, Biased] {
            close(value(&x, &x, estimator), 1.0, 1e-6);
        }
    }
}

#[test]
fn single_precision_is_good_to_four_digits_at_training_sizes() {
    // Outputs as small as a new adapter's, beside a large common offset (the bias).
    for n in [4, 16, 32] {
        let (x, y) = related(n, 384, 384);
        let (x, y) = (x * 1e-3 + 0.5, y * 1e-3 - 0.5);
        let float = |x: &Tensor| x.to_kind(Kind::Float);
        close(
            value(&float(&x), &float(&y), Unbiased),
            value(&x, &y, Unbiased),
            1e-3,
        );
    }
}

#[test]
fn gradients_of_cka_agree_with_differences() {
    for (n, p, q) in [(6, 9, 8), (9, 3, 4)] {
        let (x, y) = related(n, p, q);
        for estimator in [Unbiased, Biased] {
            check_gradient(&[x.copy(), y.copy()], 1e-6, |leaves| {
                cka(&leaves[0], &leaves[1], estimator).unwrap()
            });
        }
    }
}

#[test]
fn gradients_of_the_contrastive_terms_agree_with_differences() {
    let leaves = [
        normal(1, &[6, 5], Kind::Double),
        normal(2, &[6, 5], Kind::Double),
        normal(3, &[6, 5], Kind::Double),
    ];
    check_gradient(&leaves, 1e-6, |z| {
        let pull = cka(&z[0], &z[1], Unbiased).unwrap();
        let push = cka(&z[0], &z[2], Unbiased).unwrap();
        contrast(&pull, &push, 0.5).unwrap()
    });
    check_gradient(&leaves, 1e-6, |z| moon(&z[0], &z[1], &z[2], 0.5).unwrap());
}

#[test]
fn the_contrastive_term_is_softplus_of_the_difference() {
    let scalar = |x: f64| Tensor::from(x);
    let term = |pull, push, tau| number(&contrast(&scalar(pull), &scalar(push), tau).unwrap());
    close(term(0.5, 0.5, 1.0), 2.0_f64.ln(), 1e-12);
    close(term(0.9, 0.1, 0.5), (1.0 + (-1.6_f64).exp()).ln(), 1e-12);
    assert!(term(0.9, 0.1, 0.5) < term(0.1, 0.9, 0.5));
}

#[test]
fn moons_term_is_the_published_ratio() {
    let cosine = |a: &[f64], b: &[f64]| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let (z, g, p) = (
        normal(1, &[5, 7], Kind::Double),
        normal(2, &[5, 7], Kind::Double),
        normal(3, &[5, 7], Kind::Double),
    );
    let tau = 0.5;
    let want = rows(&z)
        .iter()
        .zip(rows(&g))
        .zip(rows(&p))
        .map(|((z, g), p)| {
            let (pull, push) = ((cosine(z, &g) / tau).exp(), (cosine(z, &p) / tau).exp());
            -(pull / (pull + push)).ln()
        })
        .sum::<f64>()
        / 5.0;
    close(number(&moon(&z, &g, &p, tau).unwrap()), want, 1e-12);
}

#[test]
fn task_losses_are_cross_entropy_and_mean_squared_error() {
    let logits = Tensor::from_slice(&[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]).view([2, 3]);
    let classes = BatchTargets::Classes(Tensor::from_slice(&[2_i64, 0]));
    let first = -(3.0_f64.exp() / (1.0_f64.exp() + 2.0_f64.exp() + 3.0_f64.exp())).ln();
    close(
        number(&task_loss(&logits, &classes).unwrap()),
        f64::midpoint(first, 3.0_f64.ln()),
        1e-12,
    );
    let outputs = Tensor::from_slice(&[1.0, 3.0]).view([2, 1]);
    let values = BatchTargets::Values(Tensor::from_slice(&[0.0, 1.0]));
    close(number(&task_loss(&outputs, &values).unwrap()), 2.5, 1e-12);
}

#[test]
fn the_distance_pulls_towards_an_anchor_that_gets_no_gradient() {
    let w = Tensor::from_slice(&[1.0, 2.0]).set_requires_grad(true);
    let anchor = Tensor::from_slice(&[0.0, 4.0]).set_requires_grad(true);
    let distance = half_squared_distance(&[(&w, &anchor)]).unwrap();
    close(number(&distance), 2.5, 1e-12);
    let gradients = Tensor::f_run_backward(&[distance], &[&w, &anchor], false, false).unwrap();
    assert_eq!(Vec::<f64>::try_from(&gradients[0]).unwrap(), [1.0, -2.0]);
    assert!(!gradients[1].defined());
}
