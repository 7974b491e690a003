//! A set of pairs as bytes, for objects of a job: equal sets give equal bytes, and nothing is rounded.

use std::collections::{BTreeMap, BTreeSet};

use tch::Kind;

use super::{Lora, Pair};
use crate::{
    error::LearningError,
    named::{self, HostTensor, NamedTensors, Taker},
};

/// What stands in the metadata, so that no other file is taken for one.
const FACTS: &str = r#"{"what":"lora","version":1}"#;

impl Lora {
    /// The pairs as a safetensors file of Concord's own: `<layer>.down` and `<layer>.up` in f32, with the scale in the latter (as it is 1 for what is
    /// trained here, nothing is rounded).
    ///
    /// # Errors
    /// [`LearningError::Torch`] if a tensor cannot be copied.
    pub fn to_bytes(&self) -> Result<Vec<u8>, LearningError> {
        let mut tensors = NamedTensors::new();
        for (name, pair) in &self.pairs {
            let up = pair.up.f_mul_scalar(pair.scale)?;
            tensors.insert(format!("{name}.down"), HostTensor::from_tensor(&pair.down)?);
            tensors.insert(format!("{name}.up"), HostTensor::from_tensor(&up)?);
        }
        named::to_safetensors(&tensors, FACTS)
    }

    /// The reverse of [`Lora::to_bytes`]. Whether a model has such layers is found out when the pairs are attached to it.
    ///
    /// # Errors
    /// [`LearningError::State`] that names the first tensor that is missing, left over or of a wrong shape.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, LearningError> {
        let (tensors, facts) = named::from_safetensors(bytes)?;
        if facts != FACTS {
            return Err(LearningError::State(format!(
                "it is no LoRA of this version: it says {}",
                facts.chars().take(80).collect::<String>()
            )));
        }
        let names: BTreeSet<String> = tensors
            .keys()
            .filter_map(|name| name.rsplit_once('.'))
            .map(|(layer, _)| layer.to_owned())
            .collect();
        let shapes: BTreeMap<String, Vec<usize>> = tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.shape.clone()))
            .collect();
        let mut taker = Taker::new("a LoRA", tensors);
        let mut pairs = BTreeMap::new();
        for name in names {
            let shape = |half: &str| {
                let stored = format!("{name}.{half}");
                (shapes.get(&stored).cloned().unwrap_or_default(), stored)
            };
            let ((rows, first), (columns, second)) = (shape("down"), shape("up"));
            let whole = rows.len() == 2
                && columns.len() == 2
                && rows[0] == columns[1]
                && rows.iter().chain(&columns).all(|&size| size > 0);
            if !whole {
                return Err(LearningError::State(format!(
                    "the halves of {name} have shapes {rows:?} and {columns:?}"
                )));
            }
            let down = taker.tensor(&first, &rows, Kind::Float)?;
            let up = taker.tensor(&second, &columns, Kind::Float)?;
            let scale = 1.0;
            pairs.insert(name, Pair { down, up, scale });
        }
        taker.finish()?;
        if pairs.is_empty() {
            return Err(LearningError::State("a LoRA without any pair".to_owned()));
        }
        Ok(Self { pairs })
    }
}
