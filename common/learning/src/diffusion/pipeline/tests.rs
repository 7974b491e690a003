//! Whole runs against Python's `StableDiffusionPipeline`.

use std::{fs, os::unix::fs::PermissionsExt as _};

use serde_json::{Map, Value};
use tempfile::TempDir;

use super::*;
use crate::diffusion::{
    lora::{self, Lora, Placement},
    region::{Order, Texts, generate},
    schedule::{NoiseTable, Sampler, Spacing},
    testing::{self, CHECKPOINTS, PLAIN},
    train,
};

fn load(name: &str) -> (TempDir, TextToImage) {
    let folder = testing::checkpoint(name, PLAIN);
    let model = TextToImage::load(folder.path(), Compute::CPU).unwrap();
    (folder, model)
}

fn size(name: &str) -> (usize, usize) {
    if name == "sd1" { (32, 32) } else { (18, 12) }
}

fn latents(
    name: &str,
    model: &TextToImage,
    spacing: Spacing,
    sampler: Sampler,
    steps: usize,
) -> Tensor {
    let table: NoiseTable = match model.objective() {
        Objective::Noise(table) => table.clone().spaced(spacing),
        Objective::Flow(_) => panic!("no flow"),
    };
    let plan = Objective::Noise(table).plan(sampler, steps).unwrap();
    let (height, width) = size(name);
    let kind = model.compute().kind;
    let noise = testing::values("input.noise", &[1, 4, height, width], 1.7, kind);
    let texts = Texts {
        positive: model.condition(&["a red fox in the snow"]).unwrap(),
        negative: model.condition(&[""]).unwrap(),
        guidance: 7.5,
    };
    let order = Order {
        prompt: 0,
        advice: None,
    };
    generate(model, &plan, &noise, &[order], &texts, &mut |_| Ok(())).unwrap()
}

#[test]
fn twenty_steps_with_guidance_give_the_latents_and_pixels_of_diffusers() {
    for name in CHECKPOINTS {
        let reference = testing::results(name, "samples.safetensors");
        let (_folder, model) = load(name);
        let ours = latents(name, &model, Spacing::Leading, Sampler::Ddim, 20);
        let theirs = reference.tensor("sample.ddim20").unwrap();
        let apart = testing::apart(&ours, &theirs);
        println!("{name}: 20-step latents {apart:.1e}");
        assert!(apart < 5e-4, "{name}: {apart}");

        let bytes = to_bytes(&model.codec().decode(&ours).unwrap()).unwrap();
        let theirs = reference.tensor("sample.pixels").unwrap();
        let pixels = Vec::<u8>::try_from(theirs.reshape([-1])).unwrap();
        assert_eq!(bytes.len(), pixels.len());
        let off = bytes
            .iter()
            .zip(&pixels)
            .filter(|(a, b)| a.abs_diff(**b) > 1)
            .count();
        let unlike = bytes.iter().zip(&pixels).filter(|(a, b)| a != b).count();
        println!(
            "{name}: {unlike} of {} bytes differ, {off} by more than 1",
            bytes.len()
        );
        assert!(off * 1000 <= bytes.len(), "{name}: {off}");
    }
}

#[test]
fn in_f64_twenty_steps_with_guidance_give_the_latents_of_diffusers_to_nine_digits() {
    for name in CHECKPOINTS {
        let reference = testing::results(name, "samples.safetensors");
        let folder = testing::checkpoint(name, PLAIN);
        let model = TextToImage::load(folder.path(), testing::compute(Kind::Double)).unwrap();
        let ours = latents(name, &model, Spacing::Leading, Sampler::Ddim, 20);
        let apart = testing::apart(&ours, &reference.tensor("f64.ddim20").unwrap());
        println!("{name}: 20-step latents in f64 {apart:.1e}");
        assert!(apart < 1e-9, "{name}: {apart}");
    }
}

#[test]
fn every_sampler_and_spacing_gives_the_latents_of_diffusers() {
    for name in CHECKPOINTS {
        let reference = testing::results(name, "samples.safetensors");
        let (_folder, model) = load(name);
        for (spacing, named) in [
            (Spacing::Leading, "leading"),
            (Spacing::Trailing, "trailing"),
            (Spacing::Linspace, "linspace"),
        ] {
            for (sampler, label) in [
                (Sampler::Ddim, "ddim"),
                (Sampler::Dpm, "dpm"),
                (Sampler::Euler, "euler"),
            ] {
                let ours = latents(name, &model, spacing, sampler, 8);
                let theirs = reference
                    .tensor(&format!("sample.{label}.{named}"))
                    .unwrap();
                let apart = testing::apart(&ours, &theirs);
                println!("{name} {label} {named}: {apart:.1e}");
                assert!(apart < 5e-4, "{name} {label} {named}: {apart}");
            }
        }
    }
}

#[test]
fn adapters_of_diffusers_and_kohya_give_the_output_of_diffusers() {
    for name in CHECKPOINTS {
        let reference = testing::results(name, "lora_reference.safetensors");
        for (kind, bound) in testing::FORWARD {
            let folder = testing::checkpoint(name, PLAIN);
            let mut model = TextToImage::load(folder.path(), testing::compute(kind)).unwrap();
            let layers = lora::layers(model.all_sites());
            let (height, width) = size(name);
            let sample = testing::values("input.sample", &[3, 4, height, width], 1.7, kind);
            let context = model.unet().config().context as usize;
            let condition = Condition::of(testing::values(
                "input.context",
                &[3, 11, context],
                1.7,
                kind,
            ));
            let times = Tensor::from_slice(&[951_i64, 420, 1]);
            let plain = model.predict(&sample, &times, &condition).unwrap();
            let theirs = reference
                .tensor(&format!("{}.lora", testing::prefix(kind)))
                .unwrap();
            // kohya's file is in half precision.
            for (file, bound) in [("lora.safetensors", bound), ("kohya.safetensors", 2e-2)] {
                let known = Lora::read(&testing::fixture(name).join(file), &layers).unwrap();
                let compute = model.compute();
                lora::attach(model.sites(), "known", &known, 1.0, compute).unwrap();
                lora::set_frozen(model.sites(), "known", false).unwrap();
                let ours = model.predict(&sample, &times, &condition).unwrap();
                let apart = testing::apart(&ours, &theirs);
                println!("{name} {kind:?} {file}: {apart:.1e}");
                assert!(apart < bound, "{name} {kind:?} {file}: {apart}");
                assert!(testing::apart(&plain, &theirs) > 0.1);
                if file == "lora.safetensors" {
                    gradients(name, &mut model, &ours);
                }
                lora::detach(model.sites(), "known").unwrap();
            }
            let again = model.predict(&sample, &times, &condition).unwrap();
            assert!(testing::same(&plain, &again));
        }
    }
}

/// Names leaves as peft does and compares their gradients.
fn gradients(name: &str, model: &mut TextToImage, output: &Tensor) {
    let leaves = train::lora_leaves(model.sites(), "known")
        .into_iter()
        .map(|(leaf, tensor)| {
            let plain = leaf.strip_prefix("unet.").unwrap();
            let stem = plain.rsplit_once('.').unwrap().0;
            let half = if leaf.rsplit('.').next() == Some("down") {
                "lora_A"
            } else {
                "lora_B"
            };
            (format!("{stem}.{half}.weight"), tensor)
        })
        .collect();
    let apart = testing::lora_gradients_apart(name, output, &leaves);
    println!("{name} {:?} adapters: gradients {apart:.1e}", output.kind());
    let bound = if output.kind() == Kind::Double {
        1e-9
    } else {
        1e-6
    };
    assert!(apart < bound, "{name}: {apart}");
}

#[test]
fn a_merged_adapter_computes_what_an_attached_one_does_and_is_saved() {
    let (folder, mut model) = load("sd1");
    let compute = model.compute();
    let layers = lora::layers(model.sites());
    let known = Lora::read(&testing::fixture("sd1").join("lora.safetensors"), &layers).unwrap();
    lora::attach(model.sites(), "known", &known, 0.7, compute).unwrap();
    let target = folder.path().join("fused");
    let refusal = model.save(&target).unwrap_err().to_string();
    assert!(refusal.contains("merge or detach"), "{refusal}");
    let output = |model: &TextToImage| {
        let sample = testing::values("input.sample", &[1, 4, 32, 32], 1.7, Kind::Float);
        let condition = model.condition(&["a fox"]).unwrap();
        let times = Tensor::from_slice(&[500.0_f64]);
        model.predict(&sample, &times, &condition).unwrap()
    };
    let attached = output(&model);
    let before = model.digest().unwrap();
    lora::merge(model.sites(), "known").unwrap();
    let merged = output(&model);
    assert_ne!(model.digest().unwrap(), before);
    assert!(testing::apart(&attached, &merged) < 1e-5);
    model.save(&target).unwrap();
    let loaded = TextToImage::load(&target, compute).unwrap();
    assert!(testing::same(&output(&loaded), &merged));
    assert_eq!(loaded.digest().unwrap(), model.digest().unwrap());
}

/// As the index of Stable Diffusion 1.x and 2.x, the fixtures' names a safety checker, which Concord does not use and does not write.
#[test]
fn a_saved_model_names_only_parts_that_it_holds() {
    let (folder, model) = load("sd1");
    let target = folder.path().join("saved");
    model.save(&target).unwrap();
    let read = |folder: &Path| -> Map<String, Value> {
        serde_json::from_slice(&fs::read(folder.join("model_index.json")).unwrap()).unwrap()
    };
    let (before, after) = (read(folder.path()), read(&target));
    for (name, entry) in &before {
        if name == "requires_safety_checker" {
            assert_eq!(after[name], Value::Bool(false));
        } else if !entry.is_array() {
            assert_eq!(entry, &after[name]);
        } else if target.join(name).is_dir() {
            assert_eq!(entry, &after[name], "{name}");
        } else {
            assert!(["safety_checker", "feature_extractor"].contains(&name.as_str()));
            assert_eq!(after[name], serde_json::json!([null, null]), "{name}");
        }
    }
    assert_eq!(after.len(), before.len());
    // The saved model's own copy has nothing to leave out.
    let loaded = TextToImage::load(&target, Compute::CPU).unwrap();
    let again = folder.path().join("again");
    loaded.save(&again).unwrap();
    assert_eq!(read(&again), after);
}

#[test]
fn weights_that_are_saved_may_be_read_by_whoever_may_read_a_new_file() {
    let (folder, model) = load("sd2");
    let target = folder.path().join("saved");
    model.save(&target).unwrap();
    let plain = folder.path().join("plain");
    fs::write(&plain, "x").unwrap();
    let mode = |file: &Path| fs::metadata(file).unwrap().permissions().mode();
    for part in ["unet", "text_encoder", "vae"] {
        let file = testing::weights_file(&target, part);
        assert_eq!(mode(&file), mode(&plain), "{part}");
    }
}

/// A snapshot in the cache of Hugging Face is links to files of other names.
#[test]
fn a_model_of_links_is_saved_with_what_they_lead_to() {
    let (folder, model) = load("sd1");
    let blobs = folder.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    let mut count = 0;
    for part in ["tokenizer", "scheduler", "unet", "text_encoder", "vae"] {
        for entry in fs::read_dir(folder.path().join(part)).unwrap() {
            let file = entry.unwrap().path();
            let blob = blobs.join(count.to_string());
            fs::rename(&file, &blob).unwrap();
            std::os::unix::fs::symlink(&blob, &file).unwrap();
            count += 1;
        }
    }
    let target = folder.path().join("saved");
    model.save(&target).unwrap();
    let loaded = TextToImage::load(&target, Compute::CPU).unwrap();
    assert_eq!(loaded.digest().unwrap(), model.digest().unwrap());
    for part in ["tokenizer", "scheduler"] {
        for entry in fs::read_dir(folder.path().join(part)).unwrap() {
            let file = entry.unwrap();
            let copy = target.join(part).join(file.file_name());
            assert!(copy.symlink_metadata().unwrap().is_file());
            assert_eq!(fs::read(file.path()).unwrap(), fs::read(copy).unwrap());
        }
    }
    // What belongs to the model and cannot be copied is not left out without a word.
    let tokenizer = folder.path().join("tokenizer");
    let added = tokenizer.join("added_tokens.json");
    std::os::unix::fs::symlink("nowhere", &added).unwrap();
    let refusal = model.save(&folder.path().join("two")).unwrap_err();
    assert!(refusal.to_string().contains("added_tokens"), "{refusal}");
    fs::remove_file(&added).unwrap();
    fs::create_dir(&added).unwrap();
    let refusal = model.save(&folder.path().join("three")).unwrap_err();
    assert!(refusal.to_string().contains("added_tokens"), "{refusal}");
}

#[test]
fn what_is_no_part_of_a_model_is_not_saved_with_it() {
    let (folder, model) = load("sd2");
    let elsewhere = tempfile::tempdir().unwrap();
    let secret = elsewhere.path().join("secret");
    fs::write(&secret, "key").unwrap();
    for part in ["tokenizer", "scheduler"] {
        let link = folder.path().join(part).join("more.json");
        std::os::unix::fs::symlink(&secret, link).unwrap();
    }
    let target = folder.path().join("saved");
    model.save(&target).unwrap();
    for part in ["tokenizer", "scheduler"] {
        assert!(!target.join(part).join("more.json").exists());
    }
}

#[test]
fn the_size_of_a_model_is_known_before_it_is_loaded() {
    for name in ["sd1", "sd2"] {
        let (folder, model) = load(name);
        let target = folder.path().join("saved");
        model.save(&target).unwrap();
        let weights = model.parts();
        let all = weights.iter().flat_map(|(_, _, tensors)| tensors.values());
        let expected: usize = all.map(Tensor::numel).sum();
        assert_eq!(TextToImage::count(&target).unwrap(), expected as u64);
        let file = target.join("unet/diffusion_pytorch_model.safetensors");
        for damaged in [b"".as_slice(), &[255; 8], &[3, 0, 0, 0, 0, 0, 0, 0, b'{']] {
            fs::write(&file, damaged).unwrap();
            let refusal = TextToImage::count(&target).unwrap_err().to_string();
            assert!(refusal.contains("unet"), "{refusal}");
        }
    }
}

#[test]
fn a_model_without_autoencoder_works_on_pixels() {
    let folder = testing::checkpoint("sd2", PLAIN);
    let index = folder.path().join("model_index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replace("\"vae\"", "\"no_vae\"")).unwrap();
    let refusal = TextToImage::load(folder.path(), Compute::CPU)
        .unwrap_err()
        .to_string();
    assert!(refusal.contains("latents have 3"), "{refusal}");
    // As diffusers writes a part that was left out.
    let left_out = text.replace(r#"["diffusers","AutoencoderKL"]"#, "[null,null]");
    assert_ne!(left_out, text);
    fs::write(&index, left_out).unwrap();
    let refusal = TextToImage::load(folder.path(), Compute::CPU).unwrap_err();
    assert!(refusal.to_string().contains("latents have 3"), "{refusal}");
    assert_eq!(Pixels.factor(), 1);
}

#[test]
fn parts_of_another_kind_are_refused() {
    let folder = testing::checkpoint("sd2", PLAIN);
    let index = folder.path().join("model_index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(
        &index,
        text.replace("UNet2DConditionModel", "SD3Transformer2DModel"),
    )
    .unwrap();
    let refusal = TextToImage::load(folder.path(), Compute::CPU)
        .unwrap_err()
        .to_string();
    assert!(refusal.contains("SD3Transformer2DModel"), "{refusal}");
}

#[test]
fn images_survive_bytes() {
    let bytes: Vec<u8> = (0..2 * 3 * 4 * 3).map(|x| (x * 3) as u8).collect();
    let images = from_bytes(&bytes, (2, 3, 4), Compute::CPU).unwrap();
    assert_eq!(to_bytes(&images).unwrap(), bytes);
    assert!(from_bytes(&bytes[1..], (2, 3, 4), Compute::CPU).is_err());
}

#[test]
fn fresh_adapters_change_nothing_until_they_are_trained() {
    let (_folder, mut model) = load("sd2");
    let compute = model.compute();
    let sample = testing::values("input.sample", &[1, 4, 18, 12], 1.7, Kind::Float);
    let condition = model.condition(&["a fox"]).unwrap();
    let times = Tensor::from_slice(&[500.0_f64]);
    let before = model.predict(&sample, &times, &condition).unwrap();
    let seed = concord_common::seed::Seed(1);
    // Seven transformers of two blocks, eleven residual blocks, two layers for the time.
    for (placement, count) in [
        (Placement::Attention, 7 * 2 * 8),
        (Placement::Transformers, 7 * (2 + 2 * 10)),
        (Placement::All, 7 * (2 + 2 * 10) + 11 + 2),
    ] {
        let attached =
            lora::attach_fresh(model.sites(), "new", placement, 4, seed, compute).unwrap();
        assert_eq!(attached, count, "{placement:?}");
        let after = model.predict(&sample, &times, &condition).unwrap();
        assert!(testing::same(&before, &after));
        let again = lora::attach_fresh(model.sites(), "new", placement, 4, seed, compute);
        assert!(again.is_err());
        lora::detach(model.sites(), "new").unwrap();
    }
    assert!(lora::detach(model.sites(), "new").is_err());
}

/// The way from nothing: a pixel model with a straight flow, trained for a few steps with its text encoder, saved and loaded.
#[test]
fn a_fresh_pixel_model_trains_and_survives_its_folder() {
    let folder = testing::checkpoint("sd2", PLAIN);
    let replace = |file: &str, changes: &[(&str, &str)]| {
        let file = folder.path().join(file);
        let mut text = fs::read_to_string(&file).unwrap();
        for (from, to) in changes {
            assert!(text.contains(from), "{from}");
            text = text.replace(from, to);
        }
        fs::write(&file, text).unwrap();
    };
    replace("model_index.json", &[("\"vae\"", "\"no_vae\"")]);
    replace(
        "unet/config.json",
        &[
            ("\"in_channels\":4", "\"in_channels\":3"),
            ("\"out_channels\":4", "\"out_channels\":3"),
        ],
    );
    fs::write(
        folder.path().join("scheduler/scheduler_config.json"),
        r#"{"_class_name":"FlowMatchEulerDiscreteScheduler","num_train_timesteps":1000,"shift":3.0}"#,
    )
    .unwrap();
    let seed = concord_common::seed::Seed(4);
    let model = TextToImage::fresh(folder.path(), seed, Compute::CPU).unwrap();
    let recipe = train::Recipe {
        learning_rate: 2e-3,
        adamw: crate::optimiser::AdamWSettings {
            weight_decay: 0.0,
            warmup_steps: 0,
            clip_norm: 1.0,
        },
        batch: 2,
        accumulation: 1,
        steps: 12,
    };
    let mut trainer = train::Trainer::new(model.leaves(), recipe).unwrap();
    let images = testing::values("image", &[2, 3, 8, 8], 1.0, Kind::Float);
    let noise = testing::values("noise", &[2, 3, 8, 8], 1.7, Kind::Float);
    let times = [0.2, 0.7].map(|place| model.objective().training_time(place));
    let pair = model.training_pair(&images, &noise, &times).unwrap();
    let mut losses = Vec::new();
    while !trainer.done() {
        let condition = model.encode_text(&["a red fox", "the snow"]).unwrap();
        let output = model.predict(&pair.noisy, &pair.times, &condition).unwrap();
        let loss = output.mse_loss(&pair.target, tch::Reduction::Mean);
        losses.push(loss.double_value(&[]));
        let gradients = Tensor::f_run_backward(&[loss], &trainer.leaves(), false, false).unwrap();
        assert!(gradients.iter().all(Tensor::defined));
        trainer.gather(gradients).unwrap();
    }
    assert!(losses[11] < 0.9 * losses[0], "{losses:?}");

    let saved = folder.path().join("saved");
    model.save(&saved).unwrap();
    let loaded = TextToImage::load(&saved, Compute::CPU).unwrap();
    let run = |model: &TextToImage| {
        let plan = model.objective().plan(Sampler::Euler, 3).unwrap();
        let texts = Texts {
            positive: model.condition(&["a red fox"]).unwrap(),
            negative: model.condition(&[""]).unwrap(),
            guidance: 2.0,
        };
        let order = Order {
            prompt: 0,
            advice: None,
        };
        let noise = noise.narrow(0, 0, 1);
        generate(model, &plan, &noise, &[order], &texts, &mut |_| Ok(())).unwrap()
    };
    assert!(testing::same(&run(&model), &run(&loaded)));
}

/// Files of others often adapt the text encoder too, under either of its names.
#[test]
fn adapters_of_the_text_encoder_are_attached() {
    let (folder, mut model) = load("sd1");
    let compute = model.compute();
    let layers = lora::layers(model.all_sites());
    let plain = model.condition(&["a fox"]).unwrap().context;
    let mut found = Vec::new();
    for stem in [
        "lora_te_text_model_encoder_layers_1_mlp_fc1",
        "lora_te_encoder_layers_1_mlp_fc1",
    ] {
        let half = |half: &str, shape: &[usize]| {
            let tensor = testing::values(half, shape, 0.5, Kind::Float);
            let name = format!("{stem}.lora_{half}.weight");
            (
                name,
                crate::named::HostTensor::from_tensor(&tensor).unwrap(),
            )
        };
        let tensors = [half("down", &[2, 32]), half("up", &[37, 2])].into();
        let file = folder.path().join("text.safetensors");
        testing::write(&file, &tensors, safetensors::Dtype::F32);
        let known = Lora::read(&file, &layers).unwrap();
        lora::attach(model.all_sites(), "known", &known, 1.0, compute).unwrap();
        found.push(model.condition(&["a fox"]).unwrap().context);
        lora::detach(model.all_sites(), "known").unwrap();
        // The UNet alone has no such layer, and says so.
        let refusal = lora::attach(model.sites(), "known", &known, 1.0, compute)
            .unwrap_err()
            .to_string();
        assert!(refusal.contains("text_encoder.encoder.layers.1.mlp.fc1"));
    }
    assert!(testing::same(&found[0], &found[1]));
    assert!(testing::apart(&found[0], &plain) > 1e-2);
}
