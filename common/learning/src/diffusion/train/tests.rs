//! Fits that lower their loss, resume to the byte, and need no more memory than they must.

#[cfg(target_os = "linux")]
mod memory;

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
fn a_fit_can_go_back_from_the_middle_of_a_step_to_its_beginning() {
    let (_folder, mut model) = model();
    let mut trainer = trainer(&mut model, "one");
    let examples = examples(&model, "x");
    let pass = |trainer: &mut Trainer| trainer.pass(&model, &examples, Seed(9)).unwrap();
    pass(&mut trainer);
    pass(&mut trainer);
    let saved = trainer.save().unwrap();
    let loss = pass(&mut trainer);
    assert_ne!(trainer.save().unwrap(), saved);
    trainer.back_to_step();
    assert_eq!(trainer.save().unwrap(), saved);
    assert_eq!(pass(&mut trainer).to_bits(), loss.to_bits());
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

/// Learning rate, batch and whatever else a fit was told belong to its state; its length does not.
#[test]
fn a_state_of_another_recipe_is_refused_by_name() {
    let fit = |recipe: Recipe, told: &str| {
        let (folder, mut model) = model();
        drop(trainer(&mut model, "one"));
        let fit = Trainer::new(lora_leaves(model.sites(), "one"), recipe).unwrap();
        (folder, model, fit.told(told))
    };
    let saved = {
        let (_folder, model, mut fit) = fit(RECIPE, "data 1");
        fit.pass(&model, &examples(&model, "x"), Seed(9)).unwrap();
        fit.save().unwrap()
    };
    let longer = Recipe {
        steps: 99,
        ..RECIPE
    };
    assert!(fit(longer, "data 1").2.restore(&saved).is_ok());
    let faster = Recipe {
        learning_rate: 1e-2,
        ..RECIPE
    };
    let wider = Recipe { batch: 3, ..RECIPE };
    for (recipe, told, named) in [
        (RECIPE, "data 2", "data 1"),
        (faster, "data 1", "learning rate 0.005"),
        (wider, "data 1", "batch 2"),
    ] {
        let refusal = fit(recipe, told).2.restore(&saved).unwrap_err();
        assert!(matches!(refusal, LearningError::State(_)), "{refusal}");
        assert!(refusal.to_string().contains(named), "{refusal}");
    }
}

#[test]
fn a_leaf_that_the_loss_does_not_depend_on_is_named() {
    let (_folder, model) = model();
    let mut trainer = Trainer::new(model.leaves(), RECIPE).unwrap();
    // The texts were encoded once, without gradients: the encoder would stay as it is.
    let examples = examples(&model, "x");
    for checkpointing in [false, true] {
        let (_folder, mut model) = self::model();
        model.set_checkpointing(checkpointing);
        let mut own = Trainer::new(model.leaves(), RECIPE).unwrap();
        let refusal = own.pass(&model, &examples, Seed(1)).unwrap_err();
        assert!(matches!(refusal, LearningError::Training(_)), "{refusal}");
        assert!(
            refusal.to_string().contains("text_encoder.embeddings"),
            "{refusal}"
        );
        assert_eq!(own.step(), 0);
    }
    let refusal = trainer.gather(Vec::new()).unwrap_err().to_string();
    assert!(refusal.contains("0 gradients for"), "{refusal}");
}

#[test]
fn a_model_in_f16_is_not_trained() {
    let folder = testing::checkpoint("sd2", PLAIN);
    let mut model = TextToImage::load(folder.path(), testing::compute(Kind::Half)).unwrap();
    let compute = model.compute();
    lora::attach_fresh(model.sites(), "one", Placement::All, 2, Seed(5), compute).unwrap();
    let refusal = Trainer::new(lora_leaves(model.sites(), "one"), RECIPE).unwrap_err();
    assert!(refusal.to_string().contains("bf16"), "{refusal}");
}

/// The way back runs on the sum of squares; dividing by their number comes last, and the step is that of the mean.
#[test]
fn a_pass_takes_the_step_of_the_mean_squared_error() {
    let (_folder, mut model) = model();
    let recipe = Recipe {
        accumulation: 1,
        ..RECIPE
    };
    let examples = examples(&model, "x");
    drop(trainer(&mut model, "one"));
    let by_pass = {
        let mut fit = Trainer::new(lora_leaves(model.sites(), "one"), recipe).unwrap();
        fit.pass(&model, &examples, Seed(9)).unwrap();
        fit.save().unwrap()
    };
    lora::detach(model.sites(), "one").unwrap();
    drop(trainer(&mut model, "one"));
    let by_hand = {
        let mut fit = Trainer::new(lora_leaves(model.sites(), "one"), recipe).unwrap();
        let here = Seed(9).derive("step 0 pass 0");
        let batch = draw(&model, &examples, recipe.batch, here).unwrap();
        let pair = model
            .training_pair(&batch.clean, &batch.noise, &batch.times)
            .unwrap();
        let output = model
            .predict(&pair.noisy, &pair.times, &batch.condition)
            .unwrap();
        let loss = output.mse_loss(&pair.target, tch::Reduction::Mean);
        let gradients = Tensor::f_run_backward(&[loss], &fit.leaves(), false, false).unwrap();
        fit.gather(gradients).unwrap();
        fit.save().unwrap()
    };
    let values = |bytes: &[u8]| named::from_safetensors(bytes).unwrap().0;
    let (by_pass, by_hand) = (values(&by_pass), values(&by_hand));
    let mut largest = 0.0_f32;
    for (name, ours) in &by_pass {
        for (a, b) in ours.values.iter().zip(&by_hand[name].values) {
            assert!((a - b).abs() < 1e-5, "{name}: {a} {b}");
            largest = largest.max(a.abs());
        }
    }
    assert!(largest > 1e-3);
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

/// Texts that were encoded with a graph carry gradients on into the text encoder, with and without checkpointing.
#[test]
fn checkpointed_gradients_reach_the_text_encoder() {
    let folder = testing::checkpoint("sd2", PLAIN);
    let compute = testing::compute(Kind::Double);
    let mut model = TextToImage::load(folder.path(), compute).unwrap();
    let sample = testing::values("input.sample", &[2, 4, 18, 12], 1.7, Kind::Double);
    let times = Tensor::from_slice(&[951_i64, 420]);
    let leaves = model.leaves();
    let wanted: Vec<&Tensor> = leaves.values().collect();
    let mut pulled = |checkpointing: bool| {
        model.set_checkpointing(checkpointing);
        let condition = model.encode_text(&["a red fox", "the snow"]).unwrap();
        model
            .predict_and_pull(&sample, &times, &condition, &wanted, &mut |output| {
                Ok(output * 2.0)
            })
            .unwrap()
    };
    let (plain, lean) = (pulled(false), pulled(true));
    for ((name, plain), lean) in leaves.keys().zip(&plain).zip(&lean) {
        assert!(plain.defined() && lean.defined(), "{name}");
        let apart = testing::apart(plain, lean);
        assert!(apart < 1e-9, "{name}: {apart}");
    }
    let text = leaves
        .keys()
        .position(|name| name.ends_with("token_embedding.weight"))
        .unwrap();
    assert!(lean[text].abs().max().double_value(&[]) > 1e-6);
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
