use tch::Kind;

use super::*;

const PLAIN: AdamWSettings = AdamWSettings {
    weight_decay: 0.01,
    warmup_steps: 0,
    clip_norm: 0.0,
};

fn parameter(name: &str, values: &[f64]) -> Parameter {
    Parameter {
        name: name.to_owned(),
        tensor: Tensor::from_slice(values),
        learning_rate: 0.1,
    }
}

fn values(parameter: &Parameter) -> Vec<f64> {
    Vec::<f64>::try_from(&parameter.tensor).unwrap()
}

fn close(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() < 1e-12, "{got:?} is not {want:?}");
    }
}

/// The formula in scalars, written out apart from the implementation.
fn by_hand(mut w: f64, gradients: &[f64], rate: f64, decay: f64) -> f64 {
    let (mut m, mut v) = (0.0, 0.0);
    for (k, g) in gradients.iter().enumerate() {
        let t = k as i32 + 1;
        w *= 1.0 - rate * decay;
        m = 0.9 * m + 0.1 * g;
        v = 0.999 * v + 0.001 * g * g;
        let m_hat = m / (1.0 - 0.9_f64.powi(t));
        let v_hat = v / (1.0 - 0.999_f64.powi(t));
        w -= rate * m_hat / (v_hat.sqrt() + 1e-8);
    }
    w
}

#[test]
fn the_first_step_moves_by_the_learning_rate_against_the_gradient() {
    let mut parameters = [parameter("w", &[1.0, -2.0])];
    let mut adam = AdamW::new(PLAIN);
    adam.step(&mut parameters, &[Tensor::from_slice(&[0.5, -4.0])])
        .unwrap();
    // w (1 - 0.1 * 0.01) - 0.1 * sign(g), up to eps.
    close(
        &values(&parameters[0]),
        &[
            0.999 - 0.1 * 0.5 / (0.5 + 1e-8),
            -1.998 + 0.1 * 4.0 / (4.0 + 1e-8),
        ],
    );
}

#[test]
fn three_steps_equal_the_formula() {
    let mut parameters = [parameter("w", &[1.0])];
    let mut adam = AdamW::new(PLAIN);
    for g in [0.5, -0.25, 2.0] {
        adam.step(&mut parameters, &[Tensor::from_slice(&[g])])
            .unwrap();
    }
    close(
        &values(&parameters[0]),
        &[by_hand(1.0, &[0.5, -0.25, 2.0], 0.1, 0.01)],
    );
}

#[test]
fn warm_up_is_counted_over_the_job_and_survives_forgotten_moments() {
    let settings = AdamWSettings {
        warmup_steps: 4,
        weight_decay: 0.0,
        ..PLAIN
    };
    let mut adam = AdamW::new(settings);
    let mut parameters = [parameter("global.w", &[0.0])];
    let mut moved = Vec::new();
    for step in 0..5 {
        if step == 2 {
            adam.forget_moments("global.");
        }
        let before = values(&parameters[0])[0];
        adam.step(&mut parameters, &[Tensor::from_slice(&[1.0])])
            .unwrap();
        moved.push(before - values(&parameters[0])[0]);
    }
    // A constant gradient of 1 moves by the learning rate itself.
    for (got, want) in moved.iter().zip([0.025, 0.05, 0.075, 0.1, 0.1]) {
        assert!((got - want).abs() < 1e-8, "{moved:?}");
    }
    assert_eq!(
        adam.counters()["global.w"],
        Counters {
            step: 3,
            lifetime: 5
        }
    );
}

#[test]
fn gradients_are_clipped_by_their_common_norm() {
    let settings = AdamWSettings {
        clip_norm: 1.0,
        ..PLAIN
    };
    let mut adam = AdamW::new(settings);
    let mut parameters = [parameter("a", &[0.0]), parameter("b", &[0.0])];
    let norm = adam
        .step(
            &mut parameters,
            &[Tensor::from_slice(&[3.0]), Tensor::from_slice(&[4.0])],
        )
        .unwrap();
    assert!((norm - 5.0).abs() < 1e-12);
    let moments = adam.moments("").unwrap();
    // m = 0.1 g after the first step, g = (0.6, 0.8).
    assert!((moments["m.a"].values[0] - 0.06).abs() < 1e-6);
    assert!((moments["m.b"].values[0] - 0.08).abs() < 1e-6);
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    let mut parameters = [parameter("a", &[1.0]), parameter("b", &[1.0])];
    let mut adam = AdamW::new(PLAIN);
    let error = adam
        .step(
            &mut parameters,
            &[Tensor::from_slice(&[1.0]), Tensor::from_slice(&[f64::NAN])],
        )
        .unwrap_err();
    assert!(matches!(error, LearningError::Training(_)));
    close(&values(&parameters[0]), &[1.0]);
    assert!(adam.counters().is_empty());
}

#[test]
fn a_restored_optimiser_goes_on_to_the_bit() {
    let single = |value: f32| Tensor::from_slice(&[value, value * 0.5]);
    let fresh = || Parameter {
        name: "w".to_owned(),
        tensor: Tensor::from_slice(&[0.3_f32, -0.7]),
        learning_rate: 0.01,
    };
    let mut whole = [fresh()];
    let mut adam = AdamW::new(PLAIN);
    let mut halves = [fresh()];
    let mut first = AdamW::new(PLAIN);
    for g in [0.1, 0.7, -0.2] {
        adam.step(&mut whole, &[single(g)]).unwrap();
        first.step(&mut halves, &[single(g)]).unwrap();
    }
    let mut taker = Taker::new("the test", first.moments("adam.").unwrap());
    let mut second = AdamW::restore(
        PLAIN,
        &first.counters(),
        "adam.",
        &mut taker,
        Kind::Float,
        |_| Some(vec![2]),
    )
    .unwrap();
    taker.finish().unwrap();
    for g in [0.4, 0.3] {
        adam.step(&mut whole, &[single(g)]).unwrap();
        second.step(&mut halves, &[single(g)]).unwrap();
    }
    assert_eq!(
        HostTensor::from_tensor(&whole[0].tensor).unwrap(),
        HostTensor::from_tensor(&halves[0].tensor).unwrap()
    );
}

#[test]
fn a_state_of_another_job_is_refused_by_name() {
    let counters = BTreeMap::from([(
        "private.layer.9.up.bias".to_owned(),
        Counters {
            step: 1,
            lifetime: 1,
        },
    )]);
    let mut taker = Taker::new("the test", NamedTensors::new());
    let error =
        AdamW::restore(PLAIN, &counters, "", &mut taker, Kind::Float, |_| None).unwrap_err();
    assert!(error.to_string().contains("private.layer.9.up.bias"));
}
