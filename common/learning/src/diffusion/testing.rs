//! Tiny checkpoints whose weights follow from their names, and what Python computed with them: the other side of
//! `deploy/interop/diffusion_rule.py`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use concord_common::seed::Seed;
use safetensors::{Dtype, tensor::TensorView};
use tch::{Device, Kind, Reduction, Tensor};
use tempfile::TempDir;

use super::params::Compute;
use crate::{named::HostTensor, weights::WeightsFile};

/// What this project promises against Python.
pub(super) const FORWARD: [(Kind, f64); 2] = [(Kind::Float, 1e-5), (Kind::Double, 1e-9)];
pub(super) const GRADIENT: [(Kind, f64); 2] = [(Kind::Float, 1e-6), (Kind::Double, 1e-9)];

pub(super) const CHECKPOINTS: [&str; 2] = ["sd1", "sd2"];

pub(super) fn compute(kind: Kind) -> Compute {
    Compute {
        kind,
        device: Device::Cpu,
    }
}

pub(super) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/diffusion")
        .join(name)
}

pub(super) fn prefix(kind: Kind) -> &'static str {
    if kind == Kind::Double { "f64" } else { "f32" }
}

/// Uniform numbers in -1..1 that follow from a name.
fn signed(name: &str, count: usize) -> Vec<f64> {
    let start = name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    let mut rng = Seed(start).rng();
    (0..count)
        .map(|_| (rng.next_u64() >> 40) as f64 / f64::from(1 << 24) * 2.0 - 1.0)
        .collect()
}

fn host(name: &str, shape: &[usize], value: impl Fn(f64) -> f64) -> HostTensor {
    HostTensor {
        shape: shape.to_vec(),
        values: signed(name, shape.iter().product())
            .into_iter()
            .map(|x| value(x) as f32)
            .collect(),
    }
}

/// An input that Python makes from the same name.
pub(super) fn values(name: &str, shape: &[usize], bound: f64, kind: Kind) -> Tensor {
    host(name, shape, |x| x * bound).to_tensor(kind).unwrap()
}

fn weight(name: &str, shape: &[usize]) -> HostTensor {
    let flat = shape.len() == 1;
    if flat && name.contains("norm") && name.ends_with("weight") {
        return host(name, shape, |x| 1.0 + 0.2 * x);
    }
    if flat {
        return host(name, shape, |x| x * 0.1);
    }
    if name.contains("embedding.weight") {
        return host(name, shape, |x| x * 0.5);
    }
    let fan_in = shape[1..].iter().product::<usize>();
    let bound = (3.0 / fan_in as f64).sqrt();
    host(name, shape, |x| x * bound)
}

/// How a checkpoint is written.
#[derive(Clone, Copy)]
pub(super) struct Spelling {
    pub(super) dtype: Dtype,
    /// Part and name to the name in the file.
    pub(super) name: fn(&str, &str) -> String,
}

pub(super) const PLAIN: Spelling = Spelling {
    dtype: Dtype::F32,
    name: |_, name| name.to_owned(),
};

fn encoded(tensor: &HostTensor, dtype: Dtype) -> Vec<u8> {
    tensor
        .values
        .iter()
        .flat_map(|&value| match dtype {
            Dtype::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
            Dtype::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
            Dtype::F32 => value.to_le_bytes().to_vec(),
            other => panic!("no test writes {other:?}"),
        })
        .collect()
}

/// Writes tensors as a safetensors file.
pub(super) fn write(file: &Path, tensors: &BTreeMap<String, HostTensor>, dtype: Dtype) {
    let bytes: Vec<(&String, &HostTensor, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| (name, tensor, encoded(tensor, dtype)))
        .collect();
    let views = bytes.iter().map(|(name, tensor, data)| {
        (
            name.as_str(),
            TensorView::new(dtype, tensor.shape.clone(), data).unwrap(),
        )
    });
    fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The weights of a part, by the names that the library gives them.
pub(super) fn weights(name: &str, part: &str) -> BTreeMap<String, HostTensor> {
    let keys: BTreeMap<String, Vec<usize>> =
        serde_json::from_slice(&fs::read(fixture(name).join(part).join("keys.json")).unwrap())
            .unwrap();
    keys.into_iter()
        .map(|(key, shape)| {
            let tensor = weight(&format!("{part}.{key}"), &shape);
            (key, tensor)
        })
        .collect()
}

/// Where a part's weights stand.
pub(super) fn weights_file(folder: &Path, part: &str) -> PathBuf {
    let stem = if part == "text_encoder" {
        "model"
    } else {
        "diffusion_pytorch_model"
    };
    folder.join(part).join(format!("{stem}.safetensors"))
}

/// A whole model folder.
pub(super) fn checkpoint(name: &str, spelling: Spelling) -> TempDir {
    let folder = TempDir::new().unwrap();
    let source = fixture(name);
    fs::copy(
        source.join("model_index.json"),
        folder.path().join("model_index.json"),
    )
    .unwrap();
    for part in ["unet", "vae", "text_encoder", "scheduler", "tokenizer"] {
        fs::create_dir(folder.path().join(part)).unwrap();
        for entry in fs::read_dir(source.join(part)).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name() != "keys.json" {
                fs::copy(
                    entry.path(),
                    folder.path().join(part).join(entry.file_name()),
                )
                .unwrap();
            }
        }
    }
    for part in ["unet", "vae", "text_encoder"] {
        let tensors = weights(name, part)
            .into_iter()
            .map(|(key, tensor)| ((spelling.name)(part, &key), tensor))
            .collect();
        write(&weights_file(folder.path(), part), &tensors, spelling.dtype);
    }
    folder
}

/// A file of Python's results.
pub(super) fn results(name: &str, file: &str) -> WeightsFile {
    WeightsFile::open(&fixture(name).join(file)).unwrap()
}

/// The largest absolute difference.
pub(super) fn apart(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    let largest = (ours.to_kind(Kind::Double) - theirs.to_kind(Kind::Double))
        .abs()
        .max()
        .double_value(&[]);
    if largest.is_nan() {
        f64::INFINITY
    } else {
        largest
    }
}

/// Whether two tensors are equal to the bit (no NaN).
pub(super) fn same(ours: &Tensor, theirs: &Tensor) -> bool {
    apart(ours, theirs) <= 0.0
}

/// Lets every tensor collect gradients.
pub(super) fn track(tensors: &BTreeMap<String, Tensor>) {
    for tensor in tensors.values() {
        let _ = tensor.set_requires_grad(true);
    }
}

const KEPT: usize = 96;

/// Compares the gradients of the mean squared distance to Python's target, for all parameters that Python has gradients for.
/// The result is the largest difference of an element; sums of squares are checked here.
pub(super) fn gradients_apart(
    name: &str,
    label: &str,
    output: &Tensor,
    tensors: &BTreeMap<String, Tensor>,
) -> f64 {
    let reference = results(name, "reference.safetensors");
    compare_gradients(&reference, label, output, tensors)
}

/// The same for the adapters of `lora.safetensors`.
pub(super) fn lora_gradients_apart(
    name: &str,
    output: &Tensor,
    tensors: &BTreeMap<String, Tensor>,
) -> f64 {
    let reference = results(name, "lora_reference.safetensors");
    compare_gradients(&reference, "lora", output, tensors)
}

fn compare_gradients(
    reference: &WeightsFile,
    label: &str,
    output: &Tensor,
    tensors: &BTreeMap<String, Tensor>,
) -> f64 {
    let kind = output.kind();
    let shape: Vec<usize> = output.size().iter().map(|&size| size as usize).collect();
    let target = values(&format!("target.{label}"), &shape, 1.0, kind);
    let loss = output.mse_loss(&target, Reduction::Mean);
    let stem = format!("{}.{label}.grad.", prefix(kind));
    let expected: Vec<String> = reference
        .names()
        .into_iter()
        .filter_map(|key| key.strip_prefix(&stem).map(str::to_owned))
        .collect();
    assert!(expected.len() > 40, "{}", expected.len());
    let leaves: Vec<&Tensor> = expected.iter().map(|key| &tensors[key]).collect();
    let gradients = Tensor::f_run_backward(&[loss], &leaves, false, false).unwrap();
    let mut worst = 0.0_f64;
    for (key, gradient) in expected.iter().zip(&gradients) {
        let theirs = reference.tensor(&format!("{stem}{key}")).unwrap();
        let flat = gradient.reshape([-1]);
        let stride = flat.numel().div_ceil(KEPT) as i64;
        let kept = flat.slice(0, None, None, stride);
        let count = kept.numel() as i64;
        worst = worst.max(apart(&kept, &theirs.narrow(0, 0, count)));
        let squares = flat.to_kind(Kind::Double).square().sum(Kind::Double);
        let theirs = theirs.to_kind(Kind::Double).double_value(&[count]);
        let ours = squares.double_value(&[]);
        let bound = if kind == Kind::Double { 1e-9 } else { 1e-4 };
        assert!(
            (ours - theirs).abs() <= bound * theirs + bound * 1e-6,
            "{key}: sum of squares {ours} against {theirs}"
        );
    }
    worst
}
