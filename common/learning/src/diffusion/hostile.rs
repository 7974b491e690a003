//! Files of others can be anything: whatever is wrong with a model's or an adapter's file, the loader gives a usable model or an error that names the
//! file, and never comes down.

use std::{collections::BTreeMap, fs, path::Path};

use proptest::{prelude::*, sample::Index};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use super::{
    clip::ClipText,
    lora::{self, Lora, Pair, Written},
    params::Compute,
    pipeline::TextToImage,
    testing::{self, PLAIN, Spelling},
    unet::UNet,
    vae::Vae,
};
use crate::{error::LearningError, named::HostTensor};

/// What is done to a safetensors file.
#[derive(Debug, Clone)]
enum Damage {
    /// A bit of the whole file is turned over.
    Flip(Index, u8),
    /// A byte of the header becomes another.
    Header(Index, u8),
    /// The file ends early.
    Cut(Index),
    /// Bytes follow it.
    Longer(u8),
    /// The header says that it is this long.
    Length(u64),
    /// A tensor has another shape, with as many bytes as that needs, or with its own.
    Shape(Index, Vec<u64>, bool),
    /// A tensor is of another dtype.
    Dtype(Index, &'static str),
    /// A tensor is at another place.
    Place(Index, u64, u64),
    /// A tensor is called otherwise.
    Name(Index, String),
    /// A tensor is left out, and its bytes with it.
    Gone(Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let size = prop_oneof![
        0_u64..6,
        Just(1 << 31),
        Just(1 << 32),
        Just(1 << 62),
        Just(1 << 63),
        Just(u64::MAX)
    ];
    let length = prop_oneof![
        any::<u64>(),
        0_u64..300,
        Just(100_000_000),
        Just(100_000_001),
        Just(u64::MAX),
        Just(u64::MAX - 8)
    ];
    let dtype = prop::sample::select(vec![
        "F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "nothing",
    ]);
    let name = prop_oneof![
        Just(String::new()),
        Just("__metadata__".to_owned()),
        "[a-z_.]{1,40}",
        Just("x".repeat(70_000)),
    ];
    prop_oneof![
        (any::<Index>(), 0_u8..8).prop_map(|(place, bit)| Damage::Flip(place, bit)),
        (any::<Index>(), any::<u8>()).prop_map(|(place, byte)| Damage::Header(place, byte)),
        any::<Index>().prop_map(Damage::Cut),
        (1_u8..20).prop_map(Damage::Longer),
        length.prop_map(Damage::Length),
        (
            any::<Index>(),
            prop::collection::vec(size, 0..5),
            any::<bool>()
        )
            .prop_map(|(which, shape, fitted)| Damage::Shape(which, shape, fitted)),
        (any::<Index>(), dtype).prop_map(|(which, dtype)| Damage::Dtype(which, dtype)),
        (any::<Index>(), any::<u64>(), any::<u64>())
            .prop_map(|(which, start, end)| Damage::Place(which, start, end)),
        (any::<Index>(), name).prop_map(|(which, name)| Damage::Name(which, name)),
        any::<Index>().prop_map(Damage::Gone),
    ]
}

/// A file taken apart.
struct Parts {
    header: Map<String, Value>,
    payload: Vec<u8>,
}

impl Parts {
    fn of(file: &[u8]) -> Self {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        Self {
            header: serde_json::from_slice(&file[8..8 + length]).unwrap(),
            payload: file[8 + length..].to_vec(),
        }
    }

    fn together(&self) -> Vec<u8> {
        let header = Value::Object(self.header.clone()).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(&self.payload);
        file
    }

    fn name(&self, which: Index) -> String {
        let names: Vec<&String> = self.header.keys().collect();
        (*which.get(&names)).clone()
    }

    /// Gives a tensor another number of bytes and moves those behind it.
    fn resize(&mut self, name: &str, bytes: u64) {
        let offsets = |entry: &Value| [0, 1].map(|i| entry["data_offsets"][i].as_u64().unwrap());
        let [start, end] = offsets(&self.header[name]);
        self.payload.splice(
            start as usize..end as usize,
            std::iter::repeat_n(0, bytes as usize),
        );
        for (other, entry) in &mut self.header {
            let [from, to] = offsets(entry);
            if other == name {
                entry["data_offsets"] = json!([start, start + bytes]);
            } else if from >= end {
                entry["data_offsets"] =
                    json!([from - end + start + bytes, to - end + start + bytes]);
            }
        }
    }
}

fn damaged(good: &[u8], damage: &Damage) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let mut parts = Parts::of(good);
    let header = good.len() - parts.payload.len();
    match damage {
        Damage::Flip(place, bit) => bytes[place.index(good.len())] ^= 1 << bit,
        Damage::Header(place, byte) => bytes[8 + place.index(header - 8)] = *byte,
        Damage::Cut(place) => bytes.truncate(place.index(good.len())),
        Damage::Longer(count) => bytes.extend(vec![0; usize::from(*count)]),
        Damage::Length(length) => bytes[..8].copy_from_slice(&length.to_le_bytes()),
        Damage::Shape(which, shape, fitted) => {
            let name = parts.name(*which);
            parts.header[&name]["shape"] = json!(shape);
            let count = shape
                .iter()
                .try_fold(1_u64, |count, &size| count.checked_mul(size));
            if let (true, Some(count @ 0..10_000)) = (fitted, count) {
                parts.header[&name]["dtype"] = json!("F32");
                parts.resize(&name, 4 * count);
            }
            return parts.together();
        }
        Damage::Dtype(which, dtype) => {
            let name = parts.name(*which);
            parts.header[&name]["dtype"] = json!(dtype);
            return parts.together();
        }
        Damage::Place(which, start, end) => {
            let name = parts.name(*which);
            parts.header[&name]["data_offsets"] = json!([start, end]);
            return parts.together();
        }
        Damage::Name(which, new) => {
            let name = parts.name(*which);
            if let Some(entry) = parts.header.remove(&name) {
                parts.header.insert(new.clone(), entry);
            }
            return parts.together();
        }
        Damage::Gone(which) => {
            let name = parts.name(*which);
            parts.resize(&name, 0);
            parts.header.remove(&name);
            return parts.together();
        }
    }
    bytes
}

/// An error of a file names it.
fn named<T>(result: Result<T, LearningError>, file: &Path) -> Result<Option<T>, TestCaseError> {
    match result {
        Ok(usable) => Ok(Some(usable)),
        Err(error) => {
            let is_of_files = matches!(
                error,
                LearningError::Weights { .. } | LearningError::Io { .. }
            );
            let text = error.to_string();
            prop_assert!(is_of_files, "{text}");
            prop_assert!(text.contains(file.to_str().unwrap()), "{text}");
            Ok(None)
        }
    }
}

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
        let mut parts = Parts::of(&small_lora().to_bytes().unwrap());
        let facts = parts.header.remove("__metadata__").unwrap();
        let plain = damaged(&parts.together(), &damage);
        // The metadata goes back in where there is still a header to put it into.
        let length = plain.first_chunk::<8>().map(|length| u64::from_le_bytes(*length));
        let end = length.and_then(|length| usize::try_from(length).ok()?.checked_add(8));
        let bytes = match end.and_then(|end| plain.get(8..end)) {
            Some(header) => match serde_json::from_slice::<Map<String, Value>>(header) {
                Ok(_) => {
                    let mut parts = Parts::of(&plain);
                    parts.header.insert("__metadata__".to_owned(), facts);
                    parts.together()
                }
                Err(_) => plain,
            },
            None => plain,
        };
        match Lora::from_bytes(&bytes) {
            Ok(lora) => prop_assert!(is_whole(&lora)),
            Err(error) => prop_assert!(
                matches!(error, LearningError::State(_) | LearningError::Payload(_)),
                "{}", error
            ),
        }
    }
}

/// The small files of a model folder are read by people's hands and by hostile ones.
#[test]
fn damaged_configurations_never_bring_the_loader_down() {
    let folder = testing::checkpoint("sd2", HALF);
    let files = [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ];
    let good: Vec<Vec<u8>> = files
        .iter()
        .map(|file| fs::read(folder.path().join(file)).unwrap())
        .collect();
    let change = (
        0..files.len(),
        any::<Index>(),
        prop_oneof![
            prop::sample::select(b"0123456789{}[]\",:-.eE\xff\0".to_vec()).prop_map(Some),
            Just(None)
        ],
    );
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 128,
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
