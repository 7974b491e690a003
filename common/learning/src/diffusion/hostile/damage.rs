//! Damage to safetensors files, of every kind that we could think of.

use std::path::Path;

use proptest::{prelude::*, sample::Index};
use serde_json::{Map, Value, json};

use crate::error::LearningError;

/// What is done to a safetensors file.
#[derive(Debug, Clone)]
pub(crate) enum Damage {
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

/// Any of them.
pub(crate) fn damage() -> impl Strategy<Value = Damage> {
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
    let shape = prop_oneof![
        4 => prop::collection::vec(size.clone(), 0..5),
        1 => prop::collection::vec(size, 5..40),
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
        (any::<Index>(), shape, any::<bool>())
            .prop_map(|(which, shape, fitted)| Damage::Shape(which, shape, fitted)),
        (any::<Index>(), dtype).prop_map(|(which, dtype)| Damage::Dtype(which, dtype)),
        (any::<Index>(), any::<u64>(), any::<u64>())
            .prop_map(|(which, start, end)| Damage::Place(which, start, end)),
        (any::<Index>(), name).prop_map(|(which, name)| Damage::Name(which, name)),
        any::<Index>().prop_map(Damage::Gone),
    ]
}

/// A file taken apart.
pub(crate) struct Parts {
    pub(crate) header: Map<String, Value>,
    payload: Vec<u8>,
}

impl Parts {
    pub(crate) fn of(file: &[u8]) -> Self {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        Self {
            header: serde_json::from_slice(&file[8..8 + length]).unwrap(),
            payload: file[8 + length..].to_vec(),
        }
    }

    pub(crate) fn together(&self) -> Vec<u8> {
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

/// A good file with that damage.
pub(crate) fn damaged(good: &[u8], damage: &Damage) -> Vec<u8> {
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

/// The same for a file with metadata, which stays as it is where there is still a header to keep it in.
pub(crate) fn damaged_beside_metadata(good: &[u8], damage: &Damage) -> Vec<u8> {
    let mut parts = Parts::of(good);
    let facts = parts.header.remove("__metadata__").unwrap();
    let plain = damaged(&parts.together(), damage);
    let length = plain
        .first_chunk::<8>()
        .map(|length| u64::from_le_bytes(*length));
    let end = length.and_then(|length| usize::try_from(length).ok()?.checked_add(8));
    let header = end.and_then(|end| plain.get(8..end));
    if header.is_none_or(|header| serde_json::from_slice::<Map<String, Value>>(header).is_err()) {
        return plain;
    }
    let mut parts = Parts::of(&plain);
    parts.header.insert("__metadata__".to_owned(), facts);
    parts.together()
}

/// An error of a file names it.
pub(crate) fn named<T>(
    result: Result<T, LearningError>,
    file: &Path,
) -> Result<Option<T>, TestCaseError> {
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
