use std::env;

use serde::Deserialize;

use super::*;
use crate::named::{NamedTensors, to_safetensors};

#[derive(Deserialize)]
struct Expectation {
    width: usize,
    height: usize,
    score: f64,
}

/// As `deploy/interop/brisque_scores.py` makes it.
fn pattern(width: usize, height: usize) -> Vec<u8> {
    let mut pixels = Vec::new();
    for y in 0..height {
        for x in 0..width {
            let blocks = (x / 5 + y / 7) % 4 * 40;
            let grain = (x * x * 7 + y * y * 13 + x * y * 29) % 61;
            pixels.extend((0..3).map(|shift| ((blocks + grain + shift * 11) % 256) as u8));
        }
    }
    pixels
}

fn picture(width: usize, height: usize, pixels: &[u8]) -> Picture<'_> {
    Picture {
        width,
        height,
        pixels,
    }
}

#[test]
fn scores_are_those_of_the_package() {
    let folder = env::var("CONCORD_BRISQUE").expect(
        "CONCORD_BRISQUE must name the folder of BRISQUE's table; `make test` fetches it and sets the variable",
    );
    let table = Brisque::load(&Path::new(&folder).join("model.safetensors")).unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/vision/brisque.json");
    let expected: Vec<Expectation> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(expected.len(), 3);
    for Expectation {
        width,
        height,
        score,
    } in expected
    {
        let pixels = pattern(width, height);
        let found = table.score(picture(width, height, &pixels)).unwrap();
        assert!(
            (found - score).abs() < 0.01,
            "{width} x {height}: {found} {score}"
        );
    }
}

#[test]
fn the_gamma_function_is_that_of_the_tables() {
    for (x, expected) in [
        (0.5, std::f64::consts::PI.sqrt().ln()),
        (1.0, 0.0),
        (5.0, 24.0_f64.ln()),
        (10.5, 1_133_278.388_948_785_5_f64.ln()),
    ] {
        assert!((ln_gamma(x) - expected).abs() < 1e-11, "{x}");
    }
}

#[test]
fn the_exponent_of_a_normal_and_of_a_laplace_distribution_are_found() {
    // E|x|^2 / E x^2 of the two.
    assert!((alpha_of(2.0 / std::f64::consts::PI) - 2.0).abs() < 1e-9);
    assert!((alpha_of(0.5) - 1.0).abs() < 1e-9);
}

#[test]
fn images_that_are_small_damaged_or_even_are_refused() {
    let mut tensors = NamedTensors::new();
    for (name, shape) in [
        ("low", vec![FEATURES]),
        ("high", vec![FEATURES]),
        ("vectors", vec![VECTORS, FEATURES]),
        ("coefficients", vec![VECTORS]),
        ("gamma", vec![1]),
        ("rho", vec![1]),
    ] {
        let count = shape.iter().product();
        let value = if name == "high" { 1.0 } else { 0.5 };
        tensors.insert(
            name.to_owned(),
            HostTensor {
                shape,
                values: vec![value; count],
            },
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    std::fs::write(&file, to_safetensors(&tensors, "").unwrap()).unwrap();
    let table = Brisque::load(&file).unwrap();
    let refused = |width: usize, height: usize, pixels: &[u8]| {
        matches!(
            table.score(picture(width, height, pixels)),
            Err(LearningError::Data(_))
        )
    };
    assert!(refused(4, 64, &pattern(4, 64)));
    assert!(refused(32, 32, &[0; 5]));
    assert!(refused(32, 32, &[0; 3 * 32 * 32]));
    assert!(!refused(32, 32, &pattern(32, 32)));
    tensors.remove("rho");
    std::fs::write(&file, to_safetensors(&tensors, "").unwrap()).unwrap();
    assert!(
        Brisque::load(&file)
            .unwrap_err()
            .to_string()
            .contains("missing tensors: rho")
    );
}
