//! Batches that repeat to the byte, and refusals before anything is drawn.

use super::*;
use crate::diffusion::{
    params::Compute,
    pipeline::TextToImage,
    testing::{self, PLAIN},
};

const SAMPLING: Sampling = Sampling {
    sampler: Sampler::Ddim,
    steps: 3,
    guidance: 3.0,
    negative: String::new(),
    size: Some([24, 32]),
};

fn model() -> (tempfile::TempDir, TextToImage) {
    let folder = testing::checkpoint("sd2", PLAIN);
    let model = TextToImage::load(folder.path(), Compute::CPU).unwrap();
    (folder, model)
}

fn wish(prompt: &str, seed: u64, regions: usize) -> Wish {
    let region = Region {
        left: 0.0,
        top: 0.25,
        right: 0.5,
        bottom: 1.0,
        prompt: "a bright fox".to_owned(),
        strength: 1.0,
    };
    Wish {
        prompt: prompt.to_owned(),
        seed: Seed(seed),
        regions: vec![region; regions],
    }
}

#[test]
fn a_batch_is_drawn_again_to_the_byte() {
    let (_folder, model) = model();
    let easel = SAMPLING.ready(&model).unwrap();
    let wishes = [wish("a red fox", 1, 0), wish("the snow", 2, 2)];
    let draw = |wishes: &[Wish]| easel.draw(&model, wishes, &mut |_| Ok(())).unwrap();
    let first = draw(&wishes);
    assert_eq!(first, draw(&wishes));
    // Two pictures and their negatives, and two regions, for three steps.
    assert_eq!(first.rows, 3 * 6);
    let picture = &first.pictures[0];
    assert_eq!((picture.width, picture.height), (24, 32));
    assert_eq!(picture.pixels.len(), 24 * 32 * 3);
    assert_ne!(first.pictures[0], first.pictures[1]);
    let plain = draw(&[wish("a red fox", 1, 0), wish("the snow", 2, 0)]);
    assert_ne!(first.pictures[1], plain.pictures[1]);
}

#[test]
fn samplings_that_do_not_suit_the_model_are_refused_before_anything_is_drawn() {
    let (_folder, model) = model();
    for (bad, named) in [
        (
            Sampling {
                size: Some([25, 32]),
                ..SAMPLING
            },
            "multiples of 4",
        ),
        (
            Sampling {
                size: Some([4096, 32]),
                ..SAMPLING
            },
            "4096",
        ),
        (
            Sampling {
                steps: 2000,
                ..SAMPLING
            },
            "2000",
        ),
        (
            Sampling {
                guidance: 0.5,
                ..SAMPLING
            },
            "guidance 0.5",
        ),
    ] {
        let refusal = bad.ready(&model).unwrap_err();
        assert!(matches!(refusal, LearningError::Config(_)), "{refusal}");
        assert!(refusal.to_string().contains(named), "{refusal}");
    }
    let own = Sampling {
        size: None,
        ..SAMPLING
    };
    assert_eq!(own.ready(&model).unwrap().latent, [4, 24, 24]);
    let easel = SAMPLING.ready(&model).unwrap();
    assert!(easel.draw(&model, &[], &mut |_| Ok(())).is_err());
}

#[test]
fn a_flow_is_not_sampled_with_another_solver() {
    let folder = testing::checkpoint("sd2", PLAIN);
    std::fs::write(
        folder.path().join("scheduler/scheduler_config.json"),
        r#"{"_class_name":"FlowMatchEulerDiscreteScheduler","num_train_timesteps":1000,"shift":1.0}"#,
    )
    .unwrap();
    let model = TextToImage::load(folder.path(), Compute::CPU).unwrap();
    let refusal = SAMPLING.ready(&model).unwrap_err().to_string();
    assert!(refusal.contains("Euler"), "{refusal}");
    let euler = Sampling {
        sampler: Sampler::Euler,
        ..SAMPLING
    };
    assert!(euler.ready(&model).is_ok());
}

#[test]
fn pictures_become_examples_of_their_own_size() {
    let (_folder, model) = model();
    let picture = |width: u32, height: u32| Picture {
        width,
        height,
        pixels: (0..width * height * 3).map(|x| (x % 251) as u8).collect(),
    };
    let example = Example::of(&model, "a fox", &picture(24, 32)).unwrap();
    assert_eq!(example.latent.size(), [1, 4, 8, 6]);
    assert!(!example.latent.requires_grad());
    assert_eq!(example.condition.len(), 1);
    let refusal = Example::of(&model, "a fox", &picture(23, 32)).unwrap_err();
    assert!(refusal.to_string().contains("multiples of 4"), "{refusal}");
    let short = Picture {
        pixels: vec![0; 5],
        ..picture(24, 32)
    };
    assert!(Example::of(&model, "a fox", &short).is_err());
}
