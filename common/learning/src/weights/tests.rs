use std::fs;

use half::{bf16, f16};
use safetensors::serialize_to_file;
use tempfile::TempDir;

use super::*;

const NAMING: Naming = Naming {
    prefix: "bert.",
    ignored: &[Ignored {
        start: "cls.",
        reason: "a head",
    }],
};

struct Stored {
    name: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn floats(name: &'static str, values: &[f32]) -> Stored {
    Stored {
        name,
        dtype: Dtype::F32,
        shape: vec![values.len()],
        bytes: values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
    }
}

fn written(tensors: &[Stored]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let views: Vec<_> = tensors
        .iter()
        .map(|stored| {
            let view = TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes).unwrap();
            (stored.name, view)
        })
        .collect();
    serialize_to_file(views, None, &path).unwrap();
    (folder, path)
}

fn expected(name: &str, shape: &[i64]) -> Expected {
    Expected {
        name: name.to_owned(),
        shape: shape.to_vec(),
    }
}

fn load(tensors: &[Stored], wanted: &[Expected]) -> Result<HashMap<String, Tensor>, LearningError> {
    let (_folder, path) = written(tensors);
    WeightsFile::open(&path)?.load_strict(NAMING, wanted, Kind::Double)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(tensor).unwrap()
}

#[test]
fn half_precision_weights_are_cast() {
    let numbers = [0.5_f32, -1.25, 3.0];
    let stored = [
        Stored {
            name: "a",
            dtype: Dtype::F16,
            shape: vec![3],
            bytes: numbers
                .iter()
                .flat_map(|&value| f16::from_f32(value).to_le_bytes())
                .collect(),
        },
        Stored {
            name: "bert.b",
            dtype: Dtype::BF16,
            shape: vec![3],
            bytes: numbers
                .iter()
                .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
                .collect(),
        },
        floats("c", &numbers),
    ];
    let wanted = [
        expected("a", &[3]),
        expected("b", &[3]),
        expected("c", &[3]),
    ];
    let loaded = load(&stored, &wanted).unwrap();
    for name in ["a", "b", "c"] {
        assert_eq!(loaded[name].kind(), Kind::Double);
        assert_eq!(values(&loaded[name]), [0.5, -1.25, 3.0], "{name}");
    }
}

#[test]
fn all_missing_and_unexpected_tensors_are_named_at_once() {
    let stored = [
        floats("bert.a", &[1.0]),
        floats("bert.extra", &[1.0]),
        floats("classifier.weight", &[1.0]),
        floats("cls.bias", &[1.0]),
    ];
    let wanted = [
        expected("a", &[1]),
        expected("b", &[1]),
        expected("c", &[1]),
    ];
    let error = load(&stored, &wanted).unwrap_err().to_string();
    assert!(error.contains("2 missing tensors: b, c"), "{error}");
    assert!(
        error.contains("2 unexpected tensors: classifier.weight, bert.extra"),
        "{error}"
    );
    assert!(!error.contains("cls.bias"), "{error}");
    assert!(error.contains("model.safetensors"), "{error}");
}

#[test]
fn a_wrong_shape_names_the_tensor_and_both_shapes() {
    let error = load(&[floats("bert.a", &[1.0, 2.0])], &[expected("a", &[3])])
        .unwrap_err()
        .to_string();
    assert!(error.contains("bert.a has shape [2], not [3]"), "{error}");
}

#[test]
fn a_tensor_of_integers_is_no_weight() {
    let stored = [Stored {
        name: "a",
        dtype: Dtype::I64,
        shape: vec![1],
        bytes: 1_i64.to_le_bytes().to_vec(),
    }];
    let error = load(&stored, &[expected("a", &[1])])
        .unwrap_err()
        .to_string();
    assert!(error.contains("a is of dtype I64"), "{error}");
}

#[test]
fn a_tensor_with_and_without_the_prefix_is_ambiguous() {
    let stored = [floats("a", &[1.0]), floats("bert.a", &[2.0])];
    let error = load(&stored, &[expected("a", &[1])])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("a and bert.a stands there more than once"),
        "{error}"
    );
}

#[test]
fn the_names_of_old_tensorflow_checkpoints_are_understood() {
    let stored = [
        floats("bert.embeddings.LayerNorm.gamma", &[1.0]),
        floats("bert.embeddings.LayerNorm.beta", &[2.0]),
    ];
    let wanted = [
        expected("embeddings.LayerNorm.weight", &[1]),
        expected("embeddings.LayerNorm.bias", &[1]),
    ];
    let loaded = load(&stored, &wanted).unwrap();
    assert_eq!(values(&loaded["embeddings.LayerNorm.weight"]), [1.0]);
    assert_eq!(values(&loaded["embeddings.LayerNorm.bias"]), [2.0]);
}

#[test]
fn values_that_are_not_finite_are_refused_by_name() {
    for bad in [f32::NAN, f32::INFINITY] {
        let error = load(&[floats("bert.a", &[1.0, bad])], &[expected("a", &[2])])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("tensor bert.a holds values that are not finite"),
            "{error}"
        );
    }
}

#[test]
fn a_file_that_is_cut_short_lengthened_or_empty_is_refused_by_name() {
    let (_folder, path) = written(&[floats("a", &[1.0, 2.0, 3.0])]);
    let whole = fs::read(&path).unwrap();
    let mut longer = whole.clone();
    longer.push(0);
    for bytes in [
        &whole[..whole.len() - 1],
        &whole[..20],
        &whole[..4],
        &longer,
        &[],
    ] {
        fs::write(&path, bytes).unwrap();
        let error = WeightsFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }
    fs::write(&path, &whole).unwrap();
    assert!(WeightsFile::open(&path).is_ok());
}

#[test]
fn the_digest_is_that_of_the_whole_file() {
    let (_folder, path) = written(&[floats("a", &[1.0])]);
    let file = WeightsFile::open(&path).unwrap();
    assert_eq!(*file.digest(), Digest::of(&fs::read(&path).unwrap()));
}

#[test]
fn tensors_can_be_read_as_they_are_stored() {
    let stored = [
        floats("b", &[1.5]),
        Stored {
            name: "a",
            dtype: Dtype::I64,
            shape: vec![1, 2],
            bytes: [7_i64, 8]
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        },
    ];
    let (_folder, path) = written(&stored);
    let file = WeightsFile::open(&path).unwrap();
    assert_eq!(file.names(), ["a", "b"]);
    let tensors = file.tensors().unwrap();
    assert_eq!(tensors["a"].kind(), Kind::Int64);
    assert_eq!(tensors["a"].size(), [1, 2]);
    assert_eq!(tensors["b"].kind(), Kind::Float);
    let error = file.tensor("c").unwrap_err().to_string();
    assert!(error.contains("there is no tensor c"), "{error}");
}
