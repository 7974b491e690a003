//! Where a model's tensors come from: a safetensors file that must hold exactly what the model takes, or a seed.
//!
//! A model asks for each tensor by the name that the diffusers layout gives it. What a file lacks, holds besides, or holds in another shape is
//! collected and reported at the end, all at once and by name.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use concord_common::seed::Seed;
use tch::{Device, Kind, Tensor};

use crate::{error::LearningError, named::HostTensor, weights::WeightsFile};

/// How many names an error spells out before it says how many more there are.
const NAMES_SHOWN: usize = 40;

/// The largest tensor that is made from a seed: 1 GiB in f32.
const MOST_VALUES: i64 = 1 << 28;

/// Where a model computes, and in what numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compute {
    /// The kind of its weights and activations.
    pub kind: Kind,
    /// The device that holds them.
    pub device: Device,
}

impl Compute {
    /// f32 on the CPU.
    pub const CPU: Self = Self {
        kind: Kind::Float,
        device: Device::Cpu,
    };

    /// bf16 or f32, on the CPU or a GPU by its number.
    ///
    /// # Errors
    /// [`LearningError::Config`] if this libtorch or this machine has no such GPU.
    pub fn on(gpu: Option<usize>, bf16: bool) -> Result<Self, LearningError> {
        let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
        let device = match gpu {
            None => Device::Cpu,
            Some(number) => {
                let present = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
                if !tch::Cuda::is_available() || number >= present {
                    return Err(LearningError::Config(format!(
                        "there is no GPU {number}: libtorch finds {present} (one that was built for CUDA is needed)"
                    )));
                }
                Device::Cuda(number)
            }
        };
        Ok(Self { kind, device })
    }
}

/// How a tensor begins when a model is made from a seed, as `torch.nn` does it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Start {
    /// Uniform within 1 / sqrt(this many inputs).
    FanIn(i64),
    /// Normal with this standard deviation.
    Normal(f64),
    /// All ones.
    Ones,
    /// All zeros.
    Zeros,
}

/// What a stored name is called in the layout; `None` leaves the tensor out.
pub type Rename = fn(&str) -> Option<String>;

#[derive(Debug)]
enum Source {
    File(Box<Stored>),
    Seed(Seed),
}

#[derive(Debug)]
struct Stored {
    file: WeightsFile,
    path: PathBuf,
    /// Layout name to stored names; more than one is an error.
    names: BTreeMap<String, Vec<String>>,
}

/// Hands out tensors by name.
#[derive(Debug)]
pub struct Params {
    source: Source,
    compute: Compute,
    taken: BTreeMap<String, Tensor>,
    missing: Vec<String>,
    wrong: Vec<String>,
}

impl Params {
    /// From a safetensors file.
    ///
    /// # Errors
    /// [`LearningError::Io`] or [`LearningError::Weights`] if it is no whole file.
    pub fn open(path: &Path, rename: Rename, compute: Compute) -> Result<Self, LearningError> {
        let file = WeightsFile::open(path)?;
        let mut names: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for stored in file.names() {
            if let Some(name) = rename(&stored) {
                names.entry(name).or_default().push(stored);
            }
        }
        Ok(Self::new(
            Source::File(Box::new(Stored {
                file,
                path: path.to_path_buf(),
                names,
            })),
            compute,
        ))
    }

    /// Fresh tensors; each has a seed of its own, made from `seed` and its name.
    pub fn fresh(seed: Seed, compute: Compute) -> Self {
        Self::new(Source::Seed(seed), compute)
    }

    fn new(source: Source, compute: Compute) -> Self {
        Self {
            source,
            compute,
            taken: BTreeMap::new(),
            missing: Vec::new(),
            wrong: Vec::new(),
        }
    }

    /// Where and in what the model computes.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// The tensor of that name. One that the file cannot give is remembered for [`Params::finish`] and stands in as zeros until then.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if a tensor cannot be made, [`LearningError::Weights`] if its bytes cannot be read.
    pub fn take(
        &mut self,
        name: &str,
        shape: &[i64],
        start: Start,
    ) -> Result<Tensor, LearningError> {
        let tensor = match &self.source {
            Source::Seed(seed) => begin(*seed, name, shape, start)?,
            Source::File(source) => match source.names.get(name).map(Vec::as_slice) {
                None => {
                    self.missing.push(name.to_owned());
                    None
                }
                Some([stored]) => {
                    let tensor = source.file.tensor(stored)?;
                    match complaint(&tensor, shape)? {
                        None => Some(tensor),
                        Some(reason) => {
                            self.wrong.push(format!("{stored} {reason}"));
                            None
                        }
                    }
                }
                Some(several) => {
                    self.wrong.push(format!(
                        "{} are spellings of one tensor",
                        several.join(" and ")
                    ));
                    None
                }
            }
            .map_or_else(|| stand_in(shape), |tensor| Ok(tensor.f_reshape(shape)?))?,
        };
        // After a complaint the model is given up, so nothing more need be copied.
        let tensor = if self.missing.is_empty() && self.wrong.is_empty() {
            tensor
                .f_to_kind(self.compute.kind)?
                .f_to_device(self.compute.device)?
        } else {
            tensor
        };
        self.taken.insert(name.to_owned(), tensor.shallow_clone());
        Ok(tensor)
    }

    /// Insists that the file held all that was taken and nothing else, and gives all tensors by name. They share memory with the model's.
    ///
    /// # Errors
    /// One [`LearningError::Weights`] with every missing, unexpected and wrong tensor.
    pub fn finish(self) -> Result<BTreeMap<String, Tensor>, LearningError> {
        let Source::File(source) = &self.source else {
            return Ok(self.taken);
        };
        let unexpected: Vec<String> = source
            .names
            .iter()
            .filter(|(name, _)| !self.taken.contains_key(*name))
            .flat_map(|(_, stored)| stored.clone())
            .collect();
        let parts: Vec<String> = [
            ("missing tensors", &self.missing),
            ("unexpected tensors", &unexpected),
            ("wrong tensors", &self.wrong),
        ]
        .into_iter()
        .filter(|(_, listed)| !listed.is_empty())
        .map(|(what, listed)| format!("{} {what}: {}", listed.len(), shortened(listed)))
        .collect();
        if parts.is_empty() {
            Ok(self.taken)
        } else {
            Err(LearningError::weights(&source.path, parts.join("; ")))
        }
    }
}

/// One zero seen through a shape, so that a configuration cannot make the loader reserve what its file does not hold.
fn stand_in(shape: &[i64]) -> Result<Tensor, LearningError> {
    Ok(Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?.f_expand(shape, false)?)
}

/// What is wrong with a stored tensor. Of an older spelling are linear weights with two dimensions of 1 at the end.
fn complaint(tensor: &Tensor, shape: &[i64]) -> Result<Option<String>, LearningError> {
    let stored = tensor.size();
    let plain = |dims: &[i64]| -> Vec<i64> {
        match dims {
            [out, inner, 1, 1] => vec![*out, *inner],
            other => other.to_vec(),
        }
    };
    if plain(&stored) != plain(shape) {
        return Ok(Some(format!("has shape {stored:?}, not {shape:?}")));
    }
    if !matches!(
        tensor.kind(),
        Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double
    ) {
        return Ok(Some(format!(
            "is of kind {:?}, not one of f16, bf16, f32, f64",
            tensor.kind()
        )));
    }
    if tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
        return Ok(Some("holds values that are not finite".to_owned()));
    }
    Ok(None)
}

fn begin(seed: Seed, name: &str, shape: &[i64], start: Start) -> Result<Tensor, LearningError> {
    let count = shape
        .iter()
        .try_fold(1_i64, |count, &size| count.checked_mul(size))
        .filter(|&count| count <= MOST_VALUES)
        .ok_or_else(|| {
            LearningError::Config(format!(
                "{name} of shape {shape:?} is too large to be made from a seed"
            ))
        })? as usize;
    let mut rng = seed.derive(name).rng();
    let values: Vec<f32> = match start {
        Start::FanIn(inputs) => {
            let bound = 1.0 / (inputs.max(1) as f64).sqrt();
            (0..count)
                .map(|_| ((2.0 * rng.uniform() - 1.0) * bound) as f32)
                .collect()
        }
        Start::Normal(deviation) => (0..count)
            .map(|_| (rng.normal() * deviation) as f32)
            .collect(),
        Start::Ones => vec![1.0; count],
        Start::Zeros => vec![0.0; count],
    };
    HostTensor {
        shape: shape.iter().map(|&size| size as usize).collect(),
        values,
    }
    .to_tensor(Kind::Float)
}

/// The names, shortened when there are very many.
pub(crate) fn shortened(names: &[String]) -> String {
    let distinct: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    let shown: Vec<&str> = distinct.iter().copied().take(NAMES_SHOWN).collect();
    match distinct.len() - shown.len() {
        0 => shown.join(", "),
        more => format!("{}, and {more} more", shown.join(", ")),
    }
}
