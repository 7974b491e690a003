//! What comes in at the start of a round and what goes out at its end.

use std::{collections::HashMap, marker::PhantomData};

use concord_common::adapter::{AdapterLayout, AdapterShape, AdapterVersion, split_payload};
use tch::{Kind, Tensor};

use super::{Adapter, Global};
use crate::{
    error::LearningError,
    head::{Head, Linear},
    named::HostTensor,
};

/// The global adapter that a round starts from, as received: checked and never changed.
#[derive(Debug)]
pub struct GlobalBase {
    shape: AdapterShape,
    layout: AdapterLayout,
    version: AdapterVersion,
    tensors: HashMap<String, Vec<f32>>,
}

impl GlobalBase {
    /// Reads a payload of the job's layout.
    ///
    /// # Errors
    /// [`LearningError::Payload`] if its size is not the layout's or an element is not finite, with the tensor's name.
    pub fn receive(shape: &AdapterShape, payload: &[u8]) -> Result<Self, LearningError> {
        let layout = shape.layout()?;
        let tensors = split_payload(&layout, payload)?;
        for spec in layout.tensors() {
            if tensors[&spec.name].iter().any(|value| !value.is_finite()) {
                return Err(LearningError::Data(format!(
                    "the received global adapter has values that are not finite in tensor `{}`",
                    spec.name
                )));
            }
        }
        Ok(Self {
            shape: shape.clone(),
            version: AdapterVersion::of(payload),
            layout,
            tensors,
        })
    }

    /// Names, shapes and order of the tensors.
    pub fn layout(&self) -> &AdapterLayout {
        &self.layout
    }

    /// The content address of the payload.
    pub fn version(&self) -> AdapterVersion {
        self.version
    }

    /// A fresh adapter with these values.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if libtorch gives no memory.
    pub fn adapter(&self, kind: Kind) -> Result<Adapter<Global>, LearningError> {
        Adapter::build(&self.shape, |spec| {
            self.tensor(&spec.name, &spec.shape, kind)
        })
    }

    /// A fresh shared head with these values, if the head travels in this job.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if libtorch gives no memory.
    pub fn head(&self, kind: Kind) -> Result<Option<Head<Global>>, LearningError> {
        let Some(classes) = self.shape.shared_head else {
            return Ok(None);
        };
        Ok(Some(Head {
            linear: Linear {
                weight: self.tensor("head.weight", &[classes, self.shape.hidden], kind)?,
                bias: self.tensor("head.bias", &[classes], kind)?,
            },
            sharing: PhantomData,
        }))
    }

    fn tensor(&self, name: &str, shape: &[u64], kind: Kind) -> Result<Tensor, LearningError> {
        HostTensor {
            shape: shape.iter().map(|&dim| dim as usize).collect(),
            values: self.tensors[name].clone(),
        }
        .to_tensor(kind)
    }
}

/// What a silo contributes: the difference between its global adapter after training and the one it received, in layout order, `f32`
/// little-endian. Made by [`Adapter::export`] of a global adapter and by nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlobalUpdate {
    layout: AdapterLayout,
    base: AdapterVersion,
    payload: Vec<u8>,
}

impl GlobalUpdate {
    /// Names, shapes and order of the tensors.
    pub fn layout(&self) -> &AdapterLayout {
        &self.layout
    }

    /// The adapter that the differences are to.
    pub fn base(&self) -> AdapterVersion {
        self.base
    }

    /// The bytes.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The bytes, to keep.
    pub fn into_payload(self) -> Vec<u8> {
        self.payload
    }
}

impl Adapter<Global> {
    /// The differences to the adapter that the round began with, and those of the shared head where the head travels.
    ///
    /// # Errors
    /// [`LearningError::Config`] if adapter or head are not of the base's layout, [`LearningError::Training`] if a difference is not finite.
    pub fn export(
        &self,
        head: Option<&Head<Global>>,
        base: &GlobalBase,
    ) -> Result<GlobalUpdate, LearningError> {
        let mut trained: HashMap<String, &Tensor> = self.named().into_iter().collect();
        if let Some(head) = head {
            trained.extend(head.linear.named("head."));
        }
        let mut payload = Vec::with_capacity(base.layout.payload_bytes() as usize);
        for spec in base.layout.tensors() {
            let tensor = trained.remove(&spec.name).ok_or_else(|| {
                LearningError::Config(format!(
                    "the job's layout has a tensor `{}`, the trained adapter has none",
                    spec.name
                ))
            })?;
            let values = HostTensor::from_tensor(tensor)?.values;
            let before = &base.tensors[&spec.name];
            if values.len() != before.len() {
                return Err(LearningError::Config(format!(
                    "tensor `{}` has {} elements, the job's layout {}",
                    spec.name,
                    values.len(),
                    before.len()
                )));
            }
            for (after, before) in values.iter().zip(before) {
                let difference = after - before;
                if !difference.is_finite() {
                    return Err(LearningError::Training(format!(
                        "tensor `{}` of the global adapter is not finite after training; lower the learning rate",
                        spec.name
                    )));
                }
                payload.extend_from_slice(&difference.to_le_bytes());
            }
        }
        if let Some(name) = trained.into_keys().min() {
            return Err(LearningError::Config(format!(
                "the trained adapter has a tensor `{name}` that is not in the job's layout"
            )));
        }
        Ok(GlobalUpdate {
            layout: base.layout.clone(),
            base: base.version,
            payload,
        })
    }
}
