//! Fits that lower their loss, resume to the byte, and need no more memory than they must.

use super::*;
use crate::{
    diffusion::{
        lora::{self, Placement},
        params::Compute,
        pipeline::TextToImage,
        testing::{self, PLAIN},
    },
    error::LearningError,
};

const RECIPE: Recipe = Recipe {
    learning_rate: 5e-3,
    adamw: AdamWSettings {
        weight_decay: 0.0,
        warmup_steps: 2,
        clip_norm: 1.0,
    },
    batch: 2,
    accumulation: 2,
    steps: 6,
};

fn model() -> (tempfile::TempDir, TextToImage) {
    let folder = testing::checkpoint("sd2", PLAIN);
    let model = TextToImage::load(folder.path(), Compute::CPU).unwrap();
    (folder, model)
}

fn examples(model: &TextToImage, label: &str) -> Vec<Example> {
    ["a red fox", "the snow", "a fox in the snow"]
        .iter()
        .enumerate()
        .map(|(index, prompt)| Example {
            latent: testing::values(&format!("{label}{index}"), &[1, 4, 8, 8], 1.0, Kind::Float),
            condition: model.condition(&[prompt]).unwrap(),
        })
        .collect()
}

fn trainer(model: &mut TextToImage, adapter: &str) -> Trainer {
    lora::attach_fresh(
        model.sites(),
        adapter,
        Placement::Transformers,
        3,
        Seed(5).derive(adapter),
        Compute::CPU,
    )
    .unwrap();
    Trainer::new(lora_leaves(model.sites(), adapter), RECIPE).unwrap()
}

#[test]
fn an_interrupted_fit_ends_in_the_same_bytes() {
    let seed = Seed(9);
    let straight = {
        let (_folder, mut model) = model();
        let mut trainer = trainer(&mut model, "one");
        let examples = examples(&model, "x");
        while !trainer.done() {
            trainer.pass(&model, &examples, seed).unwrap();
        }
        trainer.save().unwrap()
    };
    // Interrupted after an odd number of passes: in the middle of an accumulation.
    let saved = {
        let (_folder, mut model) = model();
        let mut trainer = trainer(&mut model, "one");
        let examples = examples(&model, "x");
        for _ in 0..5 {
            trainer.pass(&model, &examples, seed).unwrap();
        }
        trainer.save().unwrap()
    };
    let (_folder, mut model) = model();
    let mut trainer = trainer(&mut model, "one");
    trainer.restore(&saved).unwrap();
    assert_eq!(trainer.step(), 2);
    assert_eq!(trainer.save().unwrap(), saved);
    let examples = examples(&model, "x");
    while !trainer.done() {
        trainer.pass(&model, &examples, seed).unwrap();
    }
    assert_eq!(trainer.save().unwrap(), straight);
}

#[test]
fn a_state_of_another_fit_is_refused() {
    let (_folder, mut model) = model();
    let one = trainer(&mut model, "one");
    let saved = one.save().unwrap();
    lora::detach(model.sites(), "one").unwrap();
    lora::attach_fresh(
        model.sites(),
        "one",
        Placement::Attention,
        3,
        Seed(1),
        Compute::CPU,
    )
    .unwrap();
    let mut other = Trainer::new(lora_leaves(model.sites(), "one"), RECIPE).unwrap();
    assert!(matches!(
        other.restore(&saved),
        Err(LearningError::State(_))
    ));
}

/// LoRA_1 fits X and is frozen; LoRA_2 fits X' on top; taking LoRA_1 away leaves the enhancement.
#[test]
fn differential_training_keeps_the_second_adapter() {
    let (_folder, mut model) = model();
    let compute = model.compute();
    let recipe = Recipe {
        steps: 30,
        accumulation: 1,
        batch: 3,
        ..RECIPE
    };
    let mut fit = |adapter: &str, label: &str| -> (f64, f64) {
        lora::attach_fresh(
            model.sites(),
            adapter,
            Placement::All,
            4,
            Seed(5).derive(adapter),
            compute,
        )
        .unwrap();
        let mut trainer = Trainer::new(lora_leaves(model.sites(), adapter), recipe).unwrap();
        let examples = examples(&model, label);
        let mut losses = Vec::new();
        while !trainer.done() {
            losses.push(trainer.pass(&model, &examples, Seed(2)).unwrap());
        }
        lora::set_frozen(model.sites(), adapter, true).unwrap();
        assert!(lora_leaves(model.sites(), adapter).is_empty());
        (
            losses[..5].iter().sum::<f64>() / 5.0,
            losses[25..].iter().sum::<f64>() / 5.0,
        )
    };
    let (first, last) = fit("one", "x");
    assert!(last < 0.8 * first, "{first} {last}");
    let (first, last) = fit("two", "y");
    assert!(last < first, "{first} {last}");
    let one = lora::extract(model.sites(), "one").unwrap();
    let two = lora::extract(model.sites(), "two").unwrap();
    assert_eq!(one.pairs.len(), two.pairs.len());
    lora::detach(model.sites(), "one").unwrap();
    lora::merge(model.sites(), "two").unwrap();
    assert!(lora::extract(model.sites(), "two").is_err());
}

/// Running blocks twice must give the gradients of the plain way, for weights and adapters alike.
#[test]
fn checkpointed_gradients_are_the_plain_ones() {
    let folder = testing::checkpoint("sd2", PLAIN);
    let compute = testing::compute(Kind::Double);
    let mut model = TextToImage::load(folder.path(), compute).unwrap();
    lora::attach_fresh(model.sites(), "one", Placement::All, 3, Seed(5), compute).unwrap();
    let sample = testing::values("input.sample", &[2, 4, 18, 12], 1.7, Kind::Double);
    let times = Tensor::from_slice(&[951_i64, 420]);
    let condition = model.condition(&["a red fox", "the snow"]).unwrap();
    let mut leaves = lora_leaves(model.sites(), "one");
    for (name, leaf) in &leaves {
        // B = 0 would hide what goes through A.
        let shape: Vec<usize> = leaf.size().iter().map(|&size| size as usize).collect();
        let values = testing::values(name, &shape, 0.2, Kind::Double);
        tch::no_grad(|| leaf.shallow_clone().copy_(&values));
    }
    let adapters_only: Vec<Tensor> = leaves.values().map(Tensor::shallow_clone).collect();
    let pulled = |model: &TextToImage, leaves: &[&Tensor]| {
        model
            .predict_and_pull(&sample, &times, &condition, leaves, &mut |output| {
                Ok(output * 2.0)
            })
            .unwrap()
    };
    let compare = |model: &mut TextToImage, leaves: &[&Tensor]| {
        model.set_checkpointing(false);
        let plain = pulled(model, leaves);
        model.set_checkpointing(true);
        let lean = pulled(model, leaves);
        assert_eq!(plain.len(), lean.len());
        for (place, (plain, lean)) in plain.iter().zip(&lean).enumerate() {
            assert!(plain.defined() && lean.defined(), "{place}");
            let apart = testing::apart(plain, lean);
            assert!(apart < 1e-9, "{place}: {apart}");
        }
    };
    compare(&mut model, &adapters_only.iter().collect::<Vec<_>>());
    for (name, tensor) in model.unet().tensors() {
        let _ = tensor.set_requires_grad(true);
        leaves.insert(name.clone(), tensor.shallow_clone());
    }
    compare(&mut model, &leaves.values().collect::<Vec<_>>());
}

#[test]
fn recipes_that_cannot_be_followed_are_refused() {
    let (_folder, mut model) = model();
    assert!(Trainer::new(lora_leaves(model.sites(), "none"), RECIPE).is_err());
    let mut fit = trainer(&mut model, "one");
    assert!(fit.pass(&model, &[], Seed(1)).is_err());
    for bad in [
        Recipe { batch: 0, ..RECIPE },
        Recipe {
            accumulation: 0,
            ..RECIPE
        },
        Recipe {
            learning_rate: f64::NAN,
            ..RECIPE
        },
    ] {
        assert!(Trainer::new(lora_leaves(model.sites(), "one"), bad).is_err());
    }
}

/// A model in half precision is trained through f32 copies: small steps are not lost to rounding.
#[test]
fn leaves_of_another_kind_follow_their_parameters() {
    let leaf = Tensor::from_slice(&[1.0_f32, -2.0]).to_kind(Kind::BFloat16);
    let leaves = BTreeMap::from([("leaf".to_owned(), leaf.shallow_clone())]);
    let recipe = Recipe {
        learning_rate: 1e-3,
        accumulation: 1,
        adamw: AdamWSettings {
            warmup_steps: 0,
            ..RECIPE.adamw
        },
        ..RECIPE
    };
    let mut trainer = Trainer::new(leaves, recipe).unwrap();
    for _ in 0..40 {
        let gradient = Tensor::from_slice(&[1.0_f32, 1.0]).to_kind(Kind::BFloat16);
        trainer.gather(vec![gradient]).unwrap();
    }
    // 40 steps of 1e-3 each; a single one is below half a step of bf16 at 2.
    let values = Vec::<f64>::try_from(leaf.to_kind(Kind::Double)).unwrap();
    assert!((values[0] - 0.96).abs() < 0.005, "{values:?}");
    assert!((values[1] + 2.04).abs() < 0.01, "{values:?}");
}
