//! Tensors outside libtorch: names, shapes and f32 values. What is saved, exported and compared.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Display,
};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tch::{Kind, Tensor};

use crate::error::LearningError;

/// Key under which the facts stand in a safetensors file's metadata.
const FACTS_KEY: &str = "concord";

/// A tensor's shape and its elements in row-major order.
#[derive(Clone, PartialEq, Debug)]
pub struct HostTensor {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Elements.
    pub values: Vec<f32>,
}

/// Tensors by name, in the names' order.
pub type NamedTensors = BTreeMap<String, HostTensor>;

impl HostTensor {
    /// A copy of a libtorch tensor.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if it cannot be copied.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self, LearningError> {
        let flat = tensor
            .f_detach()?
            .f_to_kind(Kind::Float)?
            .f_contiguous()?
            .f_view([-1])?;
        let mut values = vec![0.0; flat.numel()];
        let count = values.len();
        flat.f_copy_data(&mut values, count)?;
        Ok(Self {
            shape: tensor
                .size()
                .into_iter()
                .map(|size| size as usize)
                .collect(),
            values,
        })
    }

    /// A libtorch tensor of its own memory.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if shape and values do not fit.
    pub fn to_tensor(&self, kind: Kind) -> Result<Tensor, LearningError> {
        let shape: Vec<i64> = self.shape.iter().map(|&size| size as i64).collect();
        Ok(Tensor::f_from_slice(&self.values)?
            .f_view(&shape[..])?
            .f_to_kind(kind)?)
    }
}

/// Reads tensors out of a map one by one and then insists that none is left.
#[derive(Debug)]
pub(crate) struct Taker {
    what: &'static str,
    tensors: NamedTensors,
}

impl Taker {
    pub(crate) fn new(what: &'static str, tensors: NamedTensors) -> Self {
        Self { what, tensors }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of that name, which must have that shape and finite values.
    pub(crate) fn host(
        &mut self,
        name: &str,
        shape: &[usize],
    ) -> Result<HostTensor, LearningError> {
        let tensor = self
            .tensors
            .remove(name)
            .ok_or_else(|| self.complaint(format!("tensor `{name}` is missing")))?;
        if tensor.shape != shape {
            return Err(self.complaint(format!(
                "tensor `{name}` has shape {:?}, not {shape:?}",
                tensor.shape
            )));
        }
        if tensor.values.iter().any(|value| !value.is_finite()) {
            return Err(self.complaint(format!("tensor `{name}` has values that are not finite")));
        }
        Ok(tensor)
    }

    pub(crate) fn tensor(
        &mut self,
        name: &str,
        shape: &[usize],
        kind: Kind,
    ) -> Result<Tensor, LearningError> {
        self.host(name, shape)?.to_tensor(kind)
    }

    /// Everything whose name starts with `prefix`, without the prefix.
    pub(crate) fn section(&mut self, prefix: &str) -> NamedTensors {
        let names: Vec<String> = self
            .tensors
            .keys()
            .filter(|name| name.starts_with(prefix))
            .cloned()
            .collect();
        names
            .into_iter()
            .filter_map(|name| {
                let tensor = self.tensors.remove(&name)?;
                Some((name[prefix.len()..].to_owned(), tensor))
            })
            .collect()
    }

    pub(crate) fn finish(self) -> Result<(), LearningError> {
        match self.tensors.keys().next() {
            None => Ok(()),
            Some(name) => Err(self.complaint(format!(
                "there are {} tensors that do not belong, the first is `{name}`",
                self.tensors.len()
            ))),
        }
    }

    fn complaint(&self, reason: impl Display) -> LearningError {
        LearningError::State(format!("{}: {reason}", self.what))
    }
}

/// Tensors and a text as one safetensors file, the text in its metadata. Equal contents give equal bytes.
///
/// # Errors
/// [`LearningError::State`] if a tensor's shape and values do not fit.
pub fn to_safetensors(tensors: &NamedTensors, facts: &str) -> Result<Vec<u8>, LearningError> {
    let broken = |error: &dyn Display| LearningError::State(format!("cannot be written: {error}"));
    let bytes: Vec<(&String, &HostTensor, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            (
                name,
                tensor,
                concord_common::adapter::encode_f32(&tensor.values),
            )
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, tensor, data)| {
            let view = TensorView::new(Dtype::F32, tensor.shape.clone(), data)
                .map_err(|error| broken(&error))?;
            Ok((name.as_str(), view))
        })
        .collect::<Result<Vec<_>, LearningError>>()?;
    let metadata = HashMap::from([(FACTS_KEY.to_owned(), facts.to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(|error| broken(&error))
}

/// The reverse of [`to_safetensors`].
///
/// # Errors
/// [`LearningError::State`] if the bytes are no such file, or a tensor in it is not f32.
pub fn from_safetensors(bytes: &[u8]) -> Result<(NamedTensors, String), LearningError> {
    let broken = |reason: String| LearningError::State(reason);
    let (_, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| broken(format!("not a whole safetensors file: {error}")))?;
    let facts = metadata
        .metadata()
        .as_ref()
        .and_then(|entries| entries.get(FACTS_KEY))
        .ok_or_else(|| broken(format!("the file's metadata has no entry `{FACTS_KEY}`")))?
        .clone();
    let file = SafeTensors::deserialize(bytes)
        .map_err(|error| broken(format!("not a whole safetensors file: {error}")))?;
    let tensors = file
        .iter()
        .map(|(name, view)| {
            if view.dtype() != Dtype::F32 {
                return Err(broken(format!("tensor `{name}` is not f32")));
            }
            let values = concord_common::adapter::decode_f32(view.data())?;
            Ok((
                name.to_owned(),
                HostTensor {
                    shape: view.shape().to_vec(),
                    values,
                },
            ))
        })
        .collect::<Result<_, LearningError>>()?;
    Ok((tensors, facts))
}

/// A copy that shares neither memory nor graph.
pub(crate) fn deep_copy(tensor: &Tensor) -> Result<Tensor, LearningError> {
    let _frozen = tch::no_grad_guard();
    let mut copy = tensor.f_detach()?.f_empty_like()?;
    copy.f_copy_(&tensor.f_detach()?)?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> NamedTensors {
        NamedTensors::from([
            (
                "a".to_owned(),
                HostTensor {
                    shape: vec![2, 2],
                    values: vec![1.0, -0.0, 1e-40, 3.5],
                },
            ),
            (
                "b.c".to_owned(),
                HostTensor {
                    shape: vec![1],
                    values: vec![f32::MAX],
                },
            ),
        ])
    }

    #[test]
    fn tensors_and_facts_survive_a_file_to_the_bit() {
        let bytes = to_safetensors(&sample(), "{\"x\":1}").unwrap();
        let (tensors, facts) = from_safetensors(&bytes).unwrap();
        assert_eq!(facts, "{\"x\":1}");
        assert_eq!(tensors, sample());
        assert_eq!(bytes, to_safetensors(&tensors, &facts).unwrap());
    }

    #[test]
    fn a_file_that_is_cut_short_is_refused() {
        let bytes = to_safetensors(&sample(), "{}").unwrap();
        for length in [0, 5, bytes.len() / 2, bytes.len() - 1] {
            assert!(matches!(
                from_safetensors(&bytes[..length]),
                Err(LearningError::State(_))
            ));
        }
    }

    #[test]
    fn leftover_missing_misshapen_and_infinite_tensors_are_named() {
        let complaint = |result: Result<(), LearningError>| result.unwrap_err().to_string();
        let mut taker = Taker::new("the test", sample());
        assert!(complaint(taker.host("z", &[1]).map(drop)).contains("`z` is missing"));
        assert!(complaint(taker.host("a", &[4]).map(drop)).contains("[2, 2], not [4]"));
        assert!(complaint(taker.finish()).contains("`b.c`"));
        let mut infinite = sample();
        infinite.get_mut("a").unwrap().values[0] = f32::INFINITY;
        let mut taker = Taker::new("the test", infinite);
        assert!(complaint(taker.host("a", &[2, 2]).map(drop)).contains("not finite"));
    }

    #[test]
    fn a_copy_does_not_follow_its_original() {
        let mut original = Tensor::from_slice(&[1.0_f32, 2.0]);
        let copy = deep_copy(&original).unwrap();
        let _ = original.fill_(7.0);
        assert_eq!(HostTensor::from_tensor(&copy).unwrap().values, [1.0, 2.0]);
    }
}
