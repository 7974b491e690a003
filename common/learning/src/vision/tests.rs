use std::{collections::BTreeMap, env, path::Path};

use concord_common::{Digest, seed::Seed};
use serde::Deserialize;
use tch::Kind;

use super::{efficientnet::SIDE, *};
use crate::{
    named::{NamedTensors, to_safetensors},
    testing,
    torch::seeded_randn,
};

/// What PyTorch computed; made by `deploy/interop/efficientnet.py`.
#[derive(Deserialize)]
pub(super) struct Fixture {
    image_seed: u64,
    first_weight_seed: u64,
    shapes: BTreeMap<String, Vec<usize>>,
    seeded: Results,
    real: Results,
}

#[derive(Deserialize)]
struct Results {
    features: Vec<f64>,
    features_sum: f64,
    logits: Vec<f64>,
    logits_sum: f64,
    largest: usize,
}

pub(super) fn fixture() -> Fixture {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/vision/efficientnet_lite0.json");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// 32 x 32 pixels of noise, as Python makes them.
fn image(seed: u64) -> Vec<u8> {
    let noise = seeded_randn(seed, &[3, 32, 32], Kind::Float).unwrap();
    let bytes = (noise * 64.0 + 127.0)
        .clamp(0.0, 255.0)
        .to_kind(Kind::Uint8)
        .permute([1, 2, 0])
        .contiguous()
        .view([-1]);
    Vec::<u8>::try_from(&bytes).unwrap()
}

fn picture(pixels: &[u8]) -> Picture<'_> {
    Picture {
        width: 32,
        height: 32,
        pixels,
    }
}

/// Weights that follow from seeds, as Python makes them.
pub(super) fn seeded_weights(fixture: &Fixture) -> NamedTensors {
    let mut weights = NamedTensors::new();
    for (place, (name, shape)) in fixture.shapes.iter().enumerate() {
        let sizes: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
        let drawn = seeded_randn(
            fixture.first_weight_seed + place as u64,
            &sizes,
            Kind::Float,
        )
        .unwrap();
        let values = if shape.len() > 1 {
            let fan_in: usize = shape[1..].iter().product();
            drawn * (2.0 / fan_in as f64).sqrt()
        } else if name.ends_with("running_var")
            || (name.ends_with(".weight") && !name.contains("_fc"))
        {
            drawn.tanh() * 0.25 + 1.0
        } else {
            drawn * 0.125
        };
        weights.insert(name.clone(), HostTensor::from_tensor(&values).unwrap());
    }
    weights
}

fn network(weights: &NamedTensors) -> Result<EfficientNetLite0, LearningError> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    std::fs::write(&file, to_safetensors(weights, "").unwrap()).unwrap();
    EfficientNetLite0::load(&file)
}

fn agrees(network: &EfficientNetLite0, expected: &Results, seed: u64) {
    let pixels = image(seed);
    let (features, _) = network.see(&[picture(&pixels)], SIDE).unwrap();
    let logits = network.logits(&[picture(&pixels)]).unwrap();
    for (found, expected, sum) in [
        (&features, &expected.features, expected.features_sum),
        (&logits, &expected.logits, expected.logits_sum),
    ] {
        for (a, b) in found.row(0).iter().zip(expected) {
            assert!((f64::from(*a) - b).abs() < 2e-4, "{a} {b}");
        }
        let total: f64 = found.row(0).iter().map(|value| f64::from(*value)).sum();
        assert!((total - sum).abs() < 2e-2, "{total} {sum}");
    }
    let largest =
        (0..logits.width()).max_by(|a, b| logits.row(0)[*a].total_cmp(&logits.row(0)[*b]));
    assert_eq!(largest, Some(expected.largest));
}

#[test]
fn features_and_logits_are_those_of_pytorch_with_weights_from_seeds() {
    let fixture = fixture();
    let network = network(&seeded_weights(&fixture)).unwrap();
    agrees(&network, &fixture.seeded, fixture.image_seed);
}

#[test]
fn features_and_logits_are_those_of_pytorch_with_the_real_weights() {
    let folder = env::var("CONCORD_EFFICIENTNET").expect(
        "CONCORD_EFFICIENTNET must name the folder of EfficientNet-Lite0; `make test` fetches it and sets the variable",
    );
    let network = EfficientNetLite0::load(&Path::new(&folder).join("model.safetensors"))
        .unwrap_or_else(|error| panic!("CONCORD_EFFICIENTNET={folder}: {error}"));
    let fixture = fixture();
    agrees(&network, &fixture.real, fixture.image_seed);
}

#[test]
fn images_of_a_batch_and_of_other_sizes_are_seen_as_alone() {
    let network = network(&seeded_weights(&fixture())).unwrap();
    let (small, large) = (image(3), vec![90_u8; 3 * 100 * 140]);
    let large = Picture {
        width: 140,
        height: 100,
        pixels: &large,
    };
    let (both, looks) = network.see(&[picture(&small), large], 64).unwrap();
    let (alone, alone_looks) = network.see(&[large], 64).unwrap();
    assert_eq!(
        (both.len(), looks.width()),
        (2, efficientnet::LOOKS as usize)
    );
    for (together, single) in [(&both, &alone), (&looks, &alone_looks)] {
        for (a, b) in together.row(1).iter().zip(single.row(0)) {
            assert!((a - b).abs() < 1e-3, "{a} {b}");
        }
    }
    assert!(both.row(0) != both.row(1));
}

#[test]
fn missing_and_unexpected_tensors_are_named() {
    let mut weights = seeded_weights(&fixture());
    let moved = weights.remove("_blocks.3._bn2.bias").unwrap();
    weights.insert("_blocks.16._bn2.bias".to_owned(), moved);
    let error = network(&weights).unwrap_err().to_string();
    assert!(
        error.contains("missing tensors: _blocks.3._bn2.bias"),
        "{error}"
    );
    assert!(
        error.contains("unexpected tensors: _blocks.16._bn2.bias"),
        "{error}"
    );
}

#[test]
fn what_is_no_image_is_refused() {
    let network = network(&seeded_weights(&fixture())).unwrap();
    let short = Picture {
        width: 4,
        height: 4,
        pixels: &[0; 47],
    };
    assert!(matches!(
        network.see(&[short], 64),
        Err(LearningError::Data(_))
    ));
    assert!(matches!(network.see(&[], 64), Err(LearningError::Data(_))));
    let pixels = image(1);
    assert!(matches!(
        network.see(&[picture(&pixels)], 16),
        Err(LearningError::Config(_))
    ));
}

#[test]
fn texts_come_back_in_their_order_as_unit_vectors() {
    let tower = TextTower::load(&testing::fixture()).unwrap();
    let texts = [
        "the old town",
        "rain",
        "apples at the old clock of an old town",
    ];
    let all = tower.read(&texts).unwrap();
    for (place, text) in texts.iter().enumerate() {
        let alone = tower.read(&[text]).unwrap();
        assert!((alignment::cosine(alone.row(0), alone.row(0)) - 1.0).abs() < 1e-5);
        assert!(alignment::cosine(all.row(place), alone.row(0)) > 0.9999);
    }
}

/// Subjects as points: the image is a mixture of the subject's coordinates, the text another.
fn toy(subjects: usize, copies: usize) -> (Rows, Rows, Vec<Pair>) {
    let mut rng = Seed(5).rng();
    let (hidden, image_width, text_width) = (6, 24, 12);
    let mut matrix = |count: usize| -> Vec<f64> { (0..count).map(|_| rng.normal()).collect() };
    let (to_image, to_text) = (matrix(hidden * image_width), matrix(hidden * text_width));
    let points: Vec<Vec<f64>> = (0..subjects).map(|_| matrix(hidden)).collect();
    let (mut images, mut texts, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
    for (subject, point) in points.iter().enumerate() {
        let mixed = |to: &[f64], width: usize| -> Vec<f32> {
            (0..width)
                .map(|i| {
                    (0..hidden)
                        .map(|k| point[k] * to[k * width + i])
                        .sum::<f64>() as f32
                })
                .collect()
        };
        texts.extend(mixed(&to_text, text_width));
        for _ in 0..copies {
            pairs.push(Pair {
                subject,
                image: images.len() / image_width,
                text: subject,
            });
            images.extend(mixed(&to_image, image_width));
        }
    }
    (
        Rows::new(image_width, images).unwrap(),
        Rows::new(text_width, texts).unwrap(),
        pairs,
    )
}

fn quick() -> AlignmentSettings {
    AlignmentSettings {
        width: 8,
        steps: 300,
        batch: 32,
        learning_rate: 0.02,
        weight_decay: 0.0,
        dropout: 0.1,
        seed: 3,
    }
}

fn facts() -> AlignmentFacts {
    AlignmentFacts {
        vision: Digest::of(b"v"),
        text: Digest::of(b"t"),
        side: SIDE,
        looks: false,
        settings: quick(),
        data: Digest::of(b"d"),
        low: 0.1,
        typical: 0.5,
    }
}

#[test]
fn projections_find_the_text_of_subjects_they_were_not_trained_on() {
    let (images, texts, pairs) = toy(80, 2);
    let (trained, others) = pairs.split_at(100);
    let data = Captioned {
        images: &images,
        texts: &texts,
        pairs: trained,
    };
    let mut losses = Vec::new();
    let alignment = Alignment::fit(data, &quick(), &mut |_, loss| losses.push(loss)).unwrap();
    assert!(losses[losses.len() - 1] < 0.5 * losses[0], "{losses:?}");
    let (seen, read) = (
        alignment.project_images(&images).unwrap(),
        alignment.project_texts(&texts).unwrap(),
    );
    let right = others
        .iter()
        .filter(|pair| {
            let own = alignment::cosine(seen.row(pair.image), read.row(pair.text));
            (50..80).all(|text| alignment::cosine(seen.row(pair.image), read.row(text)) <= own)
        })
        .count();
    assert!(right >= 50, "{right} of {}", others.len());
    assert!(alignment.scale() > 1.0 && alignment.scale() <= 100.0);
}

#[test]
fn equal_data_and_settings_give_equal_bytes_which_survive_their_file() {
    let (images, texts, pairs) = toy(20, 1);
    let data = Captioned {
        images: &images,
        texts: &texts,
        pairs: &pairs,
    };
    let settings = AlignmentSettings {
        steps: 20,
        ..quick()
    };
    let bytes = || {
        let alignment = Alignment::fit(data, &settings, &mut |_, _| {}).unwrap();
        alignment.to_bytes(&facts()).unwrap()
    };
    let (first, second) = (bytes(), bytes());
    assert_eq!(first, second);
    let (alignment, read) = Alignment::from_bytes(&first).unwrap();
    assert_eq!(read, facts());
    assert_eq!(alignment.to_bytes(&read).unwrap(), first);
    for length in [0, 9, first.len() - 1] {
        assert!(Alignment::from_bytes(&first[..length]).is_err());
    }
}

#[test]
fn pairs_and_settings_that_cannot_be_are_refused() {
    let (images, texts, mut pairs) = toy(4, 1);
    let fit = |pairs: &[Pair], settings: &AlignmentSettings| {
        let data = Captioned {
            images: &images,
            texts: &texts,
            pairs,
        };
        Alignment::fit(data, settings, &mut |_, _| {}).map(drop)
    };
    assert!(matches!(
        fit(&pairs[..1], &quick()),
        Err(LearningError::Data(_))
    ));
    let dropped = AlignmentSettings {
        dropout: 1.0,
        ..quick()
    };
    assert!(matches!(
        fit(&pairs, &dropped),
        Err(LearningError::Config(_))
    ));
    pairs[2].text = 4;
    assert!(matches!(fit(&pairs, &quick()), Err(LearningError::Data(_))));
}
