//! Reading weights: safetensors files into tensors, checked name by name.
//!
//! The file is mapped, hashed and copied tensor by tensor (tch carries an old `safetensors` of its own, so tensors are made
//! from bytes, not from its types). Nothing is taken on trust: a tensor that is missing, left over, of another shape, of a
//! kind that holds no weights, or not finite is an error that names it.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    fs::File,
    path::{Path, PathBuf},
};

use concord_common::digest::Digest;
use memmap2::Mmap;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, TensorView},
};
use tch::{Kind, Tensor};

use crate::error::LearningError;

/// Longest header of a safetensors file that is read. Those of large models have a few hundred kilobytes; what a hostile one becomes in memory is
/// several times its text, and its library would take a hundred megabytes of it.
pub(crate) const MOST_HEADER: u64 = 8 << 20;

/// How many names an error spells out before it says how many more there are.
const NAMES_SHOWN: usize = 40;

/// A mapped safetensors file whose header has been checked.
#[derive(Debug)]
pub struct WeightsFile {
    path: PathBuf,
    map: Mmap,
    header_bytes: usize,
    metadata: Metadata,
    digest: Digest,
}

/// A tensor that a model needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Its name, without the family's prefix.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
}

/// Tensors of a file that a backbone has no use for.
#[derive(Debug, Clone, Copy)]
pub struct Ignored {
    /// What the name starts with, without the family's prefix.
    pub start: &'static str,
    /// Why leaving it out changes nothing.
    pub reason: &'static str,
}

/// How a family's checkpoints name their tensors.
#[derive(Debug, Clone, Copy)]
pub struct Naming {
    /// In front of the backbone's names when the file was saved with a head (`bert.`); absent otherwise.
    pub prefix: &'static str,
    /// What may stand in the file besides the backbone.
    pub ignored: &'static [Ignored],
}

impl Naming {
    /// The name that the loader knows a stored tensor by: without the prefix, and with the `gamma` and `beta` of checkpoints
    /// that came from TensorFlow called `weight` and `bias`.
    fn plain_name(&self, stored: &str) -> String {
        let name = stored.strip_prefix(self.prefix).unwrap_or(stored);
        if let Some(stem) = name.strip_suffix("LayerNorm.gamma") {
            return format!("{stem}LayerNorm.weight");
        }
        if let Some(stem) = name.strip_suffix("LayerNorm.beta") {
            return format!("{stem}LayerNorm.bias");
        }
        name.to_owned()
    }

    fn ignores(&self, plain: &str) -> bool {
        self.ignored
            .iter()
            .any(|ignored| plain.starts_with(ignored.start))
    }
}

impl WeightsFile {
    /// Maps and hashes the file, and checks its header.
    ///
    /// # Errors
    /// [`LearningError::Io`] if it cannot be read, [`LearningError::Weights`] if it is no whole safetensors file.
    pub fn open(path: &Path) -> Result<Self, LearningError> {
        let failed = |source| LearningError::io(path, source);
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length == 0 {
            return Err(LearningError::weights(path, "the file is empty"));
        }
        // By reading, and before it is mapped: what a file system cannot give is an error here and, where the map is touched, the end of the process.
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&file).map_err(failed)?;
        let digest = hasher.finalize().into();
        #[expect(
            unsafe_code,
            reason = "mapping is the way to read weights without a second copy in memory; the file is only read, and every \
                      tensor is copied out before the map is dropped"
        )]
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        if let Some(announced) = map
            .first_chunk::<8>()
            .map(|bytes| u64::from_le_bytes(*bytes))
            && announced > MOST_HEADER
        {
            return Err(LearningError::weights(
                path,
                format!("{announced} bytes are too many for a header"),
            ));
        }
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map).map_err(|error| {
            LearningError::weights(path, format!("not a whole safetensors file: {error}"))
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            map,
            header_bytes,
            metadata,
            digest,
        })
    }

    /// BLAKE3 of the whole file.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The stored names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.metadata.offset_keys();
        names.sort();
        names
    }

    /// A text in the file's own metadata.
    pub fn note(&self, key: &str) -> Option<&str> {
        self.metadata
            .metadata()
            .as_ref()?
            .get(key)
            .map(String::as_str)
    }

    /// Copies one tensor out as it is stored.
    ///
    /// # Errors
    /// [`LearningError::Weights`] if there is none of that name or its dtype has no counterpart in libtorch.
    pub fn tensor(&self, name: &str) -> Result<Tensor, LearningError> {
        let info = self
            .metadata
            .info(name)
            .ok_or_else(|| self.complaint(format!("there is no tensor {name}")))?;
        let (start, end) = info.data_offsets;
        // The payload follows the header's length (8 bytes) and the header; `read_metadata` has checked that it is all there.
        let payload = &self.map[8 + self.header_bytes..];
        let view = TensorView::new(info.dtype, info.shape.clone(), &payload[start..end])
            .map_err(|error| self.complaint(format!("tensor {name} is damaged: {error}")))?;
        let kind = kind_of(view.dtype()).ok_or_else(|| {
            self.complaint(format!(
                "tensor {name} is of dtype {:?}, which is not supported",
                view.dtype()
            ))
        })?;
        let shape = dimensions(view.shape()).ok_or_else(|| {
            self.complaint(format!(
                "tensor {name} has the impossible shape {:?}",
                view.shape()
            ))
        })?;
        // `TensorView::new` has checked that the bytes are as many as shape and dtype ask for.
        Ok(Tensor::f_from_data_size(view.data(), &shape, kind)?)
    }

    /// All tensors as they are stored, by name.
    ///
    /// # Errors
    /// As [`WeightsFile::tensor`].
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>, LearningError> {
        self.names()
            .into_iter()
            .map(|name| {
                let tensor = self.tensor(&name)?;
                Ok((name, tensor))
            })
            .collect()
    }

    /// Copies out exactly the `expected` tensors, cast to `kind`; the keys of the result are their plain names.
    ///
    /// # Errors
    /// One [`LearningError::Weights`] that lists every missing, unexpected, ambiguous or wrongly shaped tensor, and every tensor
    /// that is no f16, bf16, f32 or f64; or names the first one with values that are not finite.
    pub fn load_strict(
        &self,
        naming: Naming,
        expected: &[Expected],
        kind: Kind,
    ) -> Result<HashMap<String, Tensor>, LearningError> {
        let mut stored: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for name in self.names() {
            let plain = naming.plain_name(&name);
            stored.entry(plain).or_default().push(name);
        }
        self.check_names(naming, expected, &stored)?;
        expected
            .iter()
            .map(|wanted| {
                let name = &stored[&wanted.name][0];
                let tensor = self.tensor(name)?.f_to_kind(kind)?;
                if tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                    return Err(self.complaint(format!(
                        "tensor {name} holds values that are not finite: the file is damaged"
                    )));
                }
                Ok((wanted.name.clone(), tensor))
            })
            .collect()
    }

    fn check_names(
        &self,
        naming: Naming,
        expected: &[Expected],
        stored: &BTreeMap<String, Vec<String>>,
    ) -> Result<(), LearningError> {
        let mut missing = Vec::new();
        let mut wrong = Vec::new();
        for wanted in expected {
            let Some(names) = stored.get(&wanted.name) else {
                missing.push(wanted.name.clone());
                continue;
            };
            if names.len() > 1 {
                wrong.push(format!(
                    "{} stands there more than once",
                    names.join(" and ")
                ));
            }
            let info = self
                .metadata
                .info(&names[0])
                .expect("the name was listed by this file");
            let shape: Vec<i64> = info.shape.iter().map(|&size| size as i64).collect();
            if shape != wanted.shape {
                wrong.push(format!(
                    "{} has shape {shape:?}, not {:?}",
                    names[0], wanted.shape
                ));
            }
            if !matches!(
                info.dtype,
                Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64
            ) {
                wrong.push(format!(
                    "{} is of dtype {:?}, not one of F16, BF16, F32, F64",
                    names[0], info.dtype
                ));
            }
        }
        let unexpected: Vec<String> = stored
            .iter()
            .filter(|(plain, _)| {
                !naming.ignores(plain) && !expected.iter().any(|wanted| &&wanted.name == plain)
            })
            .flat_map(|(_, names)| names.clone())
            .collect();

        let mut reason = String::new();
        for (what, names) in [
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("wrong tensors", wrong),
        ] {
            if !names.is_empty() {
                let separator = if reason.is_empty() { "" } else { "; " };
                let _ = write!(
                    reason,
                    "{separator}{} {what}: {}",
                    names.len(),
                    listed(&names)
                );
            }
        }
        if reason.is_empty() {
            Ok(())
        } else {
            Err(self.complaint(reason))
        }
    }

    fn complaint(&self, reason: impl Into<String>) -> LearningError {
        LearningError::weights(&self.path, reason)
    }
}

/// A stored shape as libtorch counts. None if it cannot count so far: next to a dimension of 0, others can be anything.
fn dimensions(stored: &[usize]) -> Option<Vec<i64>> {
    let shape = stored
        .iter()
        .map(|&size| i64::try_from(size).ok())
        .collect::<Option<Vec<i64>>>()?;
    shape
        .iter()
        .try_fold(1_i64, |count, &size| count.checked_mul(size.max(1)))?;
    Some(shape)
}

/// The names, comma-separated, shortened when there are very many.
fn listed(names: &[String]) -> String {
    let shown = names[..names.len().min(NAMES_SHOWN)].join(", ");
    match names.len().saturating_sub(NAMES_SHOWN) {
        0 => shown,
        more => format!("{shown}, and {more} more"),
    }
}

/// libtorch's kind for a stored dtype.
fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
