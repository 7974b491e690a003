//! The tensors that may travel: their layout, their bytes, and where the first ones come from.
//!
//! A payload is the tensors' elements one after the other in layout order, little-endian `f32`, without padding: its size
//! follows from the layout, and it can be hashed, cut into chunks and averaged block by block without being parsed.

use std::{collections::HashMap, fmt};

use concord_proto::v1;
use serde::{Deserialize, Serialize};

use crate::{
    Digest,
    code::{ErrorCode, Refusal},
    seed::Seed,
};

mod initial;

/// Most tensors that a layout may have.
pub const MAX_TENSORS: usize = 4096;
/// Longest tensor name in bytes.
pub const MAX_NAME_BYTES: usize = 128;
/// Most dimensions of a tensor.
pub const MAX_RANK: usize = 4;
/// Most elements of a layout (4 GiB of `f32`).
pub const MAX_ELEMENTS: u64 = 1 << 30;
/// Bytes of one element.
pub const ELEMENT_BYTES: u64 = 4;

/// Content address of an adapter: BLAKE3 of its payload.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AdapterVersion(pub Digest);

impl AdapterVersion {
    /// The version of a payload.
    pub fn of(payload: &[u8]) -> Self {
        Self(Digest::of(payload))
    }
}

impl fmt::Display for AdapterVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for AdapterVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AdapterVersion({})", self.0.short())
    }
}

/// Name and shape of one `f32` tensor.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Unique in its layout.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// A tensor of this name and shape.
    pub fn new(name: impl Into<String>, shape: &[u64]) -> Self {
        Self {
            name: name.into(),
            shape: shape.to_vec(),
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// The ordered tensors that may travel in a job. Valid by construction: names unique and printable, sizes bounded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AdapterLayout {
    tensors: Vec<TensorSpec>,
    elements: u64,
}

impl AdapterLayout {
    /// Checks and takes a list of tensors.
    ///
    /// # Errors
    /// `INVALID_REQUEST` if there are none or too many, a name is empty, too long, has other characters than
    /// `[A-Za-z0-9._-]` or repeats, a tensor has no or too many dimensions or a dimension of 0, or all together have more
    /// than [`MAX_ELEMENTS`].
    pub fn new(tensors: Vec<TensorSpec>) -> Result<Self, Refusal> {
        let refuse = |message: String| Err(Refusal::new(ErrorCode::InvalidRequest, message));
        if tensors.is_empty() || tensors.len() > MAX_TENSORS {
            return refuse(format!(
                "a layout has 1 to {MAX_TENSORS} tensors; this one has {}",
                tensors.len()
            ));
        }
        let mut seen = std::collections::HashSet::new();
        let mut elements = 0_u64;
        for (index, tensor) in tensors.iter().enumerate() {
            if !is_tensor_name(&tensor.name) {
                return refuse(format!(
                    "the name of tensor {index} is not 1 to {MAX_NAME_BYTES} characters of [A-Za-z0-9._-]"
                ));
            }
            if !seen.insert(tensor.name.as_str()) {
                return refuse(format!("tensor `{}` is listed twice", tensor.name));
            }
            if tensor.shape.is_empty() || tensor.shape.len() > MAX_RANK {
                return refuse(format!(
                    "tensor `{}` has {} dimensions; 1 to {MAX_RANK} are allowed",
                    tensor.name,
                    tensor.shape.len()
                ));
            }
            let size = tensor
                .shape
                .iter()
                .try_fold(1_u64, |product, &dim| {
                    if dim == 0 {
                        None
                    } else {
                        product.checked_mul(dim)
                    }
                })
                .and_then(|size| elements.checked_add(size))
                .filter(|&total| total <= MAX_ELEMENTS);
            let Some(total) = size else {
                return refuse(format!(
                    "tensor `{}` has shape {:?}: dimensions start at 1 and a layout has at most {MAX_ELEMENTS} elements",
                    tensor.name, tensor.shape
                ));
            };
            elements = total;
        }
        Ok(Self { tensors, elements })
    }

    /// The tensors in payload order.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// Number of elements of all tensors.
    pub fn elements(&self) -> u64 {
        self.elements
    }

    /// Size of a payload in bytes.
    pub fn payload_bytes(&self) -> u64 {
        self.elements * ELEMENT_BYTES
    }

    /// The tensor that holds element `index` of a payload, for error messages.
    pub fn tensor_at(&self, index: u64) -> Option<&TensorSpec> {
        let mut end = 0;
        self.tensors.iter().find(|tensor| {
            end += tensor.elements();
            index < end
        })
    }

    /// BLAKE3 over each tensor's name length, name, rank and dimensions (all integers `u64` little-endian) and the byte 1
    /// for `f32`.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        for tensor in &self.tensors {
            hasher.update(&(tensor.name.len() as u64).to_le_bytes());
            hasher.update(tensor.name.as_bytes());
            hasher.update(&(tensor.shape.len() as u64).to_le_bytes());
            for dim in &tensor.shape {
                hasher.update(&dim.to_le_bytes());
            }
            hasher.update(&[1]);
        }
        hasher.finalize().into()
    }

    /// Checks that a peer's list of tensors is this layout.
    ///
    /// # Errors
    /// The first difference, with its own code: `TENSOR_COUNT`, `TENSOR_ORDER`, `TENSOR_NAME`, `TENSOR_DTYPE` or
    /// `TENSOR_SHAPE`.
    pub fn check_same(&self, other: &v1::AdapterLayout) -> Result<(), Refusal> {
        if other.tensors.len() != self.tensors.len() {
            return Err(Refusal::new(
                ErrorCode::TensorCount,
                format!(
                    "the job's layout has {} tensors, the contribution {}; send exactly the layout's tensors",
                    self.tensors.len(),
                    other.tensors.len()
                ),
            ));
        }
        for (index, (want, got)) in self.tensors.iter().zip(&other.tensors).enumerate() {
            if want.name != got.name {
                return Err(self.name_refusal(index, &want.name, &got.name));
            }
            if got.dtype != v1::DType::DtypeF32 as i32 {
                return Err(Refusal::new(
                    ErrorCode::TensorDtype,
                    format!("tensor `{}` must be f32", want.name),
                ));
            }
            if want.shape != got.shape {
                let shown = &got.shape[..got.shape.len().min(MAX_RANK + 1)];
                return Err(Refusal::new(
                    ErrorCode::TensorShape,
                    format!(
                        "tensor `{}` must have shape {:?}, the contribution has {shown:?}",
                        want.name, want.shape
                    ),
                ));
            }
        }
        Ok(())
    }

    fn name_refusal(&self, index: usize, want: &str, got: &str) -> Refusal {
        let shown: String = got.chars().take(MAX_NAME_BYTES).collect();
        if self.tensors.iter().any(|tensor| tensor.name == got) {
            Refusal::new(
                ErrorCode::TensorOrder,
                format!("tensor {index} must be `{want}`, not `{shown}`: keep the layout's order"),
            )
        } else {
            Refusal::new(
                ErrorCode::TensorName,
                format!("tensor {index} must be `{want}`; `{shown:?}` is not in the layout"),
            )
        }
    }

    /// The wire form.
    pub fn to_proto(&self) -> v1::AdapterLayout {
        v1::AdapterLayout {
            tensors: self
                .tensors
                .iter()
                .map(|tensor| v1::TensorInfo {
                    name: tensor.name.clone(),
                    shape: tensor.shape.clone(),
                    dtype: v1::DType::DtypeF32 as i32,
                })
                .collect(),
        }
    }

    /// From the wire form.
    ///
    /// # Errors
    /// As [`AdapterLayout::new`], and `TENSOR_DTYPE` for anything but `f32`.
    pub fn from_proto(proto: &v1::AdapterLayout) -> Result<Self, Refusal> {
        if proto.tensors.len() > MAX_TENSORS {
            return Err(Refusal::new(
                ErrorCode::TensorCount,
                format!("a layout has at most {MAX_TENSORS} tensors"),
            ));
        }
        if let Some(tensor) = proto
            .tensors
            .iter()
            .find(|tensor| tensor.dtype != v1::DType::DtypeF32 as i32)
        {
            let name: String = tensor.name.chars().take(MAX_NAME_BYTES).collect();
            return Err(Refusal::new(
                ErrorCode::TensorDtype,
                format!("tensor {name:?} must be f32"),
            ));
        }
        Self::new(
            proto
                .tensors
                .iter()
                .map(|tensor| TensorSpec::new(tensor.name.clone(), &tensor.shape))
                .collect(),
        )
    }
}

fn is_tensor_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Sizes from which the layout of a job's global adapter follows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AdapterShape {
    /// Width `d` of the backbone.
    pub hidden: u64,
    /// Bottleneck `r`.
    pub bottleneck: u64,
    /// Layers that carry an adapter, ascending.
    pub layers: Vec<u32>,
    /// Outputs of a shared head, if the head travels.
    pub shared_head: Option<u64>,
}

impl AdapterShape {
    /// The layout: per layer `layer.<i>.down.weight` \[r, d\], `layer.<i>.down.bias` \[r\], `layer.<i>.up.weight` \[d, r\],
    /// `layer.<i>.up.bias` \[d\]; then, for a shared head with c outputs, `head.weight` \[c, d\] and `head.bias` \[c\].
    /// One adapter has 2dr + r + d elements a layer.
    ///
    /// # Errors
    /// As [`AdapterLayout::new`].
    pub fn layout(&self) -> Result<AdapterLayout, Refusal> {
        let (d, r) = (self.hidden, self.bottleneck);
        let mut tensors: Vec<TensorSpec> = self
            .layers
            .iter()
            .flat_map(|layer| {
                [
                    TensorSpec::new(format!("layer.{layer}.down.weight"), &[r, d]),
                    TensorSpec::new(format!("layer.{layer}.down.bias"), &[r]),
                    TensorSpec::new(format!("layer.{layer}.up.weight"), &[d, r]),
                    TensorSpec::new(format!("layer.{layer}.up.bias"), &[d]),
                ]
            })
            .collect();
        if let Some(classes) = self.shared_head {
            tensors.push(TensorSpec::new("head.weight", &[classes, d]));
            tensors.push(TensorSpec::new("head.bias", &[classes]));
        }
        AdapterLayout::new(tensors)
    }

    /// The first adapter of a job: weights by [`initial_values`], the same bytes for the same seed everywhere.
    ///
    /// # Errors
    /// As [`AdapterLayout::new`].
    pub fn initial_payload(&self, init: InitialScale, seed: Seed) -> Result<Vec<u8>, Refusal> {
        let mut payload = Vec::with_capacity(self.layout()?.payload_bytes() as usize);
        for values in self.initial_tensors(init, seed)? {
            payload.extend_from_slice(&encode_f32(&values));
        }
        Ok(payload)
    }

    /// The elements of [`Self::initial_payload`] one tensor after the other, each drawn when it is asked for.
    ///
    /// # Errors
    /// As [`AdapterLayout::new`].
    pub fn initial_tensors(
        &self,
        init: InitialScale,
        seed: Seed,
    ) -> Result<impl Iterator<Item = Vec<f32>> + use<>, Refusal> {
        let tensors = self.layout()?.tensors;
        Ok(tensors
            .into_iter()
            .map(move |tensor| initial_values(&tensor, init, seed)))
    }
}

pub use initial::{InitialScale, initial_values};

/// The elements of a payload.
///
/// # Errors
/// `PAYLOAD_SIZE` if `payload` is not a whole number of elements.
pub fn decode_f32(payload: &[u8]) -> Result<Vec<f32>, Refusal> {
    let (elements, rest) = payload.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(Refusal::new(
            ErrorCode::PayloadSize,
            format!("{} bytes are no whole number of f32", payload.len()),
        ));
    }
    Ok(elements
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect())
}

/// The payload of some elements.
pub fn encode_f32(values: &[f32]) -> Vec<u8> {
    let mut payload = vec![0; values.len() * 4];
    for (bytes, value) in payload.as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = value.to_le_bytes();
    }
    payload
}

/// Named tensors of a payload, each as its elements.
///
/// # Errors
/// `PAYLOAD_SIZE` if the payload has another size than the layout.
pub fn split_payload(
    layout: &AdapterLayout,
    payload: &[u8],
) -> Result<HashMap<String, Vec<f32>>, Refusal> {
    if payload.len() as u64 != layout.payload_bytes() {
        return Err(Refusal::new(
            ErrorCode::PayloadSize,
            format!(
                "the layout has {} bytes, the payload {}",
                layout.payload_bytes(),
                payload.len()
            ),
        ));
    }
    let mut rest = payload;
    let mut tensors = HashMap::with_capacity(layout.tensors().len());
    for tensor in layout.tensors() {
        let (head, tail) = rest.split_at((tensor.elements() * ELEMENT_BYTES) as usize);
        tensors.insert(tensor.name.clone(), decode_f32(head)?);
        rest = tail;
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests;
