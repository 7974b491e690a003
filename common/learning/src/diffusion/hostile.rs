//! Files of others can be anything: whatever is wrong with a model's or an adapter's file, the loader gives a usable model or an error that names the
//! file, and never comes down.

pub(crate) mod damage;

use std::{collections::BTreeMap, fs, path::Path};

use proptest::{prelude::*, sample::Index};
use safetensors::Dtype;
use serde_json::json;
use tch::{Kind, Tensor};

use self::damage::{Parts, damage, damaged, damaged_beside_metadata, named};
use super::{
    clip::ClipText,
    files,
    lora::{self, Lora, Pair, Written},
    params::Compute,
    pipeline::TextToImage,
    testing::{self, PLAIN, Spelling},
    unet::UNet,
    vae::Vae,
};
use crate::{
    error::LearningError,
    named::HostTensor,
    weights::{MOST_HEADER, WeightsFile},
};

/// Half precision makes the files smaller.
const HALF: Spelling = Spelling {
    dtype: Dtype::F16,
    ..PLAIN
};

fn survives(part: &str, load: impl Fn(&Path, &Path) -> Result<(), TestCaseError>) {
    let folder = testing::checkpoint("sd2", HALF);
    let file = testing::weights_file(folder.path(), part);
    let home = folder.path().join(part);
    let good = fs::read(&file).unwrap();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 96,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&damage(), |damage| {
            fs::write(&file, damaged(&good, &damage)).unwrap();
            named(files::count(&file), &file)?;
            load(&home, &file)
        })
        .unwrap();
}

#[test]
fn damaged_weights_of_a_unet_are_a_named_error_or_a_usable_network() {
    let sample = testing::values("input.sample", &[1, 4, 4, 4], 1.7, Kind::Float);
    let context = testing::values("input.context", &[1, 3, 24], 1.7, Kind::Float);
    let times = Tensor::from_slice(&[420_i64]);
    survives("unet", |home, file| {
        if let Some(unet) = named(UNet::load(home, Compute::CPU), file)? {
            let output = unet.run(&sample, &times, &context);
            prop_assert_eq!(output.unwrap().size(), [1, 4, 4, 4]);
        }
        Ok(())
    });
}

#[test]
fn damaged_weights_of_an_autoencoder_are_a_named_error_or_a_usable_network() {
    let latent = testing::values("input.latent", &[1, 4, 3, 3], 1.7, Kind::Float);
    survives("vae", |home, file| {
        if let Some(vae) = named(Vae::load(home, Compute::CPU), file)? {
            prop_assert_eq!(vae.decode(&latent).unwrap().size(), [1, 3, 12, 12]);
        }
        Ok(())
    });
}

#[test]
fn damaged_weights_of_a_text_encoder_are_a_named_error_or_a_usable_network() {
    let ids = Tensor::from_slice(&[521_i64, 4, 522]).view([1, 3]);
    survives("text_encoder", |home, file| {
        if let Some(text) = named(ClipText::load(home, Compute::CPU), file)? {
            prop_assert_eq!(text.run(&ids).unwrap().size(), [1, 3, 24]);
        }
        Ok(())
    });
}

fn layers() -> Vec<Written> {
    ["unet.a.to_q", "unet.b.proj_in", "text_encoder.c.mlp.fc1"]
        .map(|name| Written {
            name: name.to_owned(),
            pixel: name.ends_with("proj_in"),
        })
        .to_vec()
}

fn small_lora() -> Lora {
    let pair = |name: &str| Pair {
        down: testing::values(&format!("{name}a"), &[2, 7], 1.0, Kind::Float),
        up: testing::values(&format!("{name}b"), &[5, 2], 1.0, Kind::Float),
        scale: 1.0,
    };
    let pairs: BTreeMap<String, Pair> = layers()
        .into_iter()
        .map(|layer| {
            let pair = pair(&layer.name);
            (layer.name, pair)
        })
        .collect();
    Lora { pairs }
}

fn is_whole(lora: &Lora) -> bool {
    lora.pairs.values().all(|pair| {
        let (down, up) = (pair.down.size(), pair.up.size());
        let finite = |tensor: &Tensor| tensor.isfinite().all().int64_value(&[]) == 1;
        down.len() == 2
            && up.len() == 2
            && down[0] == up[1]
            && down[0] > 0
            && finite(&pair.down)
            && finite(&pair.up)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_lora_files_are_a_named_error_or_whole_pairs(damage in damage(), kohya in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lora.safetensors");
        let layout = if kohya { lora::Layout::Kohya } else { lora::Layout::Diffusers };
        small_lora().write(&file, layout, &layers(), &[]).unwrap();
        let good = fs::read(&file).unwrap();
        fs::write(&file, damaged(&good, &damage)).unwrap();
        if let Some(lora) = named(Lora::read(&file, &layers()), &file)? {
            prop_assert!(is_whole(&lora));
        }
    }

    #[test]
    fn damaged_lora_bytes_of_a_job_are_an_error_or_whole_pairs(damage in damage()) {
        let bytes = damaged_beside_metadata(&small_lora().to_bytes().unwrap(), &damage);
        match Lora::from_bytes(&bytes) {
            Ok(lora) => prop_assert!(is_whole(&lora)),
            Err(error) => prop_assert!(
                matches!(error, LearningError::State(_) | LearningError::Payload(_)),
                "{}", error
            ),
        }
    }
}

/// A scheduler of straight flows, in place of the folder's own.
const FLOW: &str = r#"{"_class_name":"FlowMatchEulerDiscreteScheduler","base_image_seq_len":256,"max_shift":1.15,"num_train_timesteps":1000,"shift":3.0,"use_dynamic_shifting":false}"#;

/// The small files of a model folder are read by people's hands and by hostile ones.
#[test]
fn damaged_configurations_never_bring_the_loader_down() {
    const CONFIGURATIONS: [&str; 6] = [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
    ];
    changed_bytes("sd2", None, &CONFIGURATIONS);
    changed_bytes("sd2", None, &["tokenizer/tokenizer.json"]);
    changed_bytes(
        "sd1",
        None,
        &["tokenizer/vocab.json", "tokenizer/merges.txt"],
    );
    changed_bytes("sd1", Some(FLOW), &["scheduler/scheduler_config.json"]);
}

/// Changes a byte of one of the files, or cuts it short, again and again.
fn changed_bytes(checkpoint: &str, scheduler: Option<&str>, files: &[&str]) {
    let folder = testing::checkpoint(checkpoint, HALF);
    if let Some(text) = scheduler {
        fs::write(folder.path().join("scheduler/scheduler_config.json"), text).unwrap();
    }
    TextToImage::load(folder.path(), Compute::CPU).unwrap();
    let good: Vec<Vec<u8>> = files
        .iter()
        .map(|file| fs::read(folder.path().join(file)).unwrap())
        .collect();
    let change = (
        0..files.len(),
        any::<Index>(),
        prop_oneof![
            prop::sample::select(b"0123456789{}[]\",:-.eE\xff\0 \n".to_vec()).prop_map(Some),
            Just(None)
        ],
    );
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&change, |(which, place, byte)| {
            let mut text = good[which].clone();
            let place = place.index(text.len());
            match byte {
                Some(byte) => text[place] = byte,
                None => text.truncate(place),
            }
            fs::write(folder.path().join(files[which]), &text).unwrap();
            let loaded = TextToImage::load(folder.path(), Compute::CPU);
            fs::write(folder.path().join(files[which]), &good[which]).unwrap();
            if let Err(error) = loaded {
                prop_assert!(!matches!(error, LearningError::Torch(_)), "{error}");
            }
            Ok(())
        })
        .unwrap();
}

/// Next to a dimension of 0 the others cost no bytes, whatever they are.
#[test]
fn shapes_beyond_counting_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lora.safetensors");
    let tensor = HostTensor {
        shape: vec![0],
        values: Vec::new(),
    };
    let tensors = BTreeMap::from([("unet.a.to_q.lora_A.weight".to_owned(), tensor)]);
    testing::write(&file, &tensors, Dtype::F32);
    let good = fs::read(&file).unwrap();
    for shape in [
        vec![1_u64 << 62, 2, 0],
        vec![0, 1 << 63],
        vec![0, 1 << 62, 1 << 62],
    ] {
        let mut parts = Parts::of(&good);
        parts.header["unet.a.to_q.lora_A.weight"]["shape"] = json!(shape);
        fs::write(&file, parts.together()).unwrap();
        let refusal = Lora::read(&file, &layers()).unwrap_err().to_string();
        assert!(refusal.contains("impossible shape"), "{refusal}");
        assert!(refusal.contains("lora_A"), "{refusal}");
    }
}

#[test]
fn a_header_longer_than_any_models_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    for (length, right) in [(MOST_HEADER, true), (MOST_HEADER + 1, false)] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(b"{}");
        bytes.resize(8 + length as usize, b' ');
        fs::write(&file, &bytes).unwrap();
        let refusals = [
            files::count(&file).err(),
            WeightsFile::open(&file).err(),
            Lora::read(&file, &layers()).err(),
        ];
        for refusal in refusals.iter().flatten() {
            let text = refusal.to_string();
            assert_eq!(text.contains("too many for a header"), !right, "{text}");
            assert!(text.contains("model.safetensors"), "{text}");
        }
        assert_eq!(refusals[1].is_none(), right);
        assert_eq!(refusals[0].is_none(), right);
    }
}
