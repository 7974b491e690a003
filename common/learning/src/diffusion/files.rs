//! What the parts of a model folder have in common: where their files are, and how their numbers are checked.

mod header;

use std::{
    collections::BTreeMap,
    fs::{self, File, Permissions},
    io::{self, BufWriter, Read as _, Write},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};
use tempfile::Builder;

use self::header::Numbers;
use crate::{error::LearningError, named::HostTensor, weights::MOST_HEADER};

/// Larger configuration files than this are not read.
const MOST_BYTES: u64 = 1 << 20;

/// Reads a configuration file with `parse`, whose complaint is given the file's name.
///
/// # Errors
/// [`LearningError::Io`], [`LearningError::Config`].
pub(crate) fn read_config<T>(
    file: &Path,
    parse: impl FnOnce(&[u8]) -> Result<T, String>,
) -> Result<T, LearningError> {
    let complain = |reason: String| LearningError::Config(format!("{}: {reason}", file.display()));
    let found = fs::metadata(file).map_err(|source| LearningError::io(file, source))?;
    // Reading a pipe would wait for someone who writes.
    if !found.is_file() {
        return Err(complain("this is no plain file".to_owned()));
    }
    let length = found.len();
    if length > MOST_BYTES {
        return Err(complain(format!(
            "{length} bytes are too many for a configuration"
        )));
    }
    let text = fs::read(file).map_err(|source| LearningError::io(file, source))?;
    parse(&text).map_err(complain)
}

/// Finds a part's weights: `<stem>.safetensors`, or the half-precision variant of it.
///
/// # Errors
/// [`LearningError::Io`] that says what is there instead.
pub(crate) fn weights(folder: &Path, stem: &str) -> Result<PathBuf, LearningError> {
    let plain = folder.join(format!("{stem}.safetensors"));
    for candidate in [&plain, &folder.join(format!("{stem}.fp16.safetensors"))] {
        if candidate.is_file() {
            return Ok(candidate.clone());
        }
    }
    let reason = if folder
        .join(format!("{stem}.safetensors.index.json"))
        .exists()
    {
        "the weights are split over several files; save them as one (save_pretrained with a larger max_shard_size)"
    } else if folder.join(format!("{stem}.bin")).exists() {
        "there is only a .bin file, which can carry code; convert it to safetensors (save_pretrained does that)"
    } else {
        "no such file"
    };
    Err(LearningError::io(
        plain,
        io::Error::new(io::ErrorKind::NotFound, reason),
    ))
}

/// How many numbers a safetensors file says that it holds. Whether it is whole is seen when it is loaded.
///
/// # Errors
/// [`LearningError::Io`], [`LearningError::Weights`].
pub(crate) fn count(file: &Path) -> Result<u64, LearningError> {
    let complain = |source| LearningError::io(file, source);
    let refuse = |what: String| LearningError::weights(file, what);
    let mut stream = File::open(file).map_err(complain)?;
    let mut length = [0; 8];
    stream.read_exact(&mut length).map_err(complain)?;
    let length = u64::from_le_bytes(length);
    if length > MOST_HEADER {
        return Err(refuse(format!("{length} bytes are too many for a header")));
    }
    let mut header = Vec::new();
    let mut stream = stream.take(length);
    stream.read_to_end(&mut header).map_err(complain)?;
    let Numbers(numbers) = serde_json::from_slice(&header)
        .map_err(|error| refuse(format!("not a whole safetensors file: {error}")))?;
    Ok(numbers)
}

/// Insists that fields which change what is not built are absent or have the values that leave it alone, given as JSON.
pub(crate) fn neutral(
    fields: &Map<String, Value>,
    expected: &[(&str, &str)],
) -> Result<(), String> {
    for (field, only) in expected {
        if let Some(value) = fields.get(*field) {
            let found = value.to_string();
            if found != *only {
                return Err(format!("{field} {found} is not supported, only {only}"));
            }
        }
    }
    Ok(())
}

/// A number from 1 to `most`.
pub(crate) fn within(field: &str, value: i64, most: i64) -> Result<(), String> {
    if (1..=most).contains(&value) {
        Ok(())
    } else {
        Err(format!("{field} {value} is not in 1..={most}"))
    }
}

/// A norm's epsilon.
pub(crate) fn epsilon(field: &str, value: f64) -> Result<f64, String> {
    if value > 0.0 && value < 0.1 {
        Ok(value)
    } else {
        Err(format!("{field} {value} is out of range"))
    }
}

/// The numbers of a written file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    /// f32.
    Single,
    /// f16, rounded to the nearest.
    Half,
}

impl Stored {
    fn dtype(self) -> &'static str {
        match self {
            Self::Single => "F32",
            Self::Half => "F16",
        }
    }

    fn size(self) -> usize {
        match self {
            Self::Single => 4,
            Self::Half => 2,
        }
    }

    fn encode(self, tensor: &Tensor) -> Result<Vec<u8>, LearningError> {
        match self {
            Self::Single => Ok(concord_common::adapter::encode_f32(
                &HostTensor::from_tensor(tensor)?.values,
            )),
            Self::Half => {
                let flat = tensor
                    .f_detach()?
                    .f_to_kind(Kind::Half)?
                    .f_contiguous()?
                    .f_view([-1])?
                    .f_view_dtype(Kind::Int16)?;
                let mut values = vec![0_i16; flat.numel()];
                let count = values.len();
                flat.f_copy_data(&mut values, count)?;
                Ok(values.into_iter().flat_map(i16::to_le_bytes).collect())
            }
        }
    }
}

fn fits_half(tensor: &Tensor) -> Result<bool, LearningError> {
    let finite = tensor
        .f_detach()?
        .f_to_kind(Kind::Half)?
        .f_isfinite()?
        .f_all()?;
    Ok(finite.f_int64_value(&[])? == 1)
}

/// [`write_weights_as`] in f32.
pub(crate) fn write_weights(
    file: &Path,
    tensors: &BTreeMap<String, Tensor>,
    notes: &[(&str, &str)],
) -> Result<(), LearningError> {
    write_weights_as(file, tensors, notes, Stored::Single)
}

/// Writes tensors as a safetensors file, one at a time, with `notes` as its metadata; it appears whole or not at all. Equal contents give equal
/// bytes: names are sorted, notes too.
pub(crate) fn write_weights_as(
    file: &Path,
    tensors: &BTreeMap<String, Tensor>,
    notes: &[(&str, &str)],
    stored: Stored,
) -> Result<(), LearningError> {
    let mut header = Map::new();
    if !notes.is_empty() {
        let notes: Map<String, Value> = notes
            .iter()
            .map(|(key, text)| ((*key).to_owned(), json!(text)))
            .collect();
        header.insert("__metadata__".to_owned(), Value::Object(notes));
    }
    let mut end = 0;
    for (name, tensor) in tensors {
        let start = end;
        end += stored.size() * tensor.numel();
        header.insert(
            name.clone(),
            json!({"dtype": stored.dtype(), "shape": tensor.size(), "data_offsets": [start, end]}),
        );
    }
    let mut header = Value::Object(header).to_string();
    // The data begins at a multiple of eight bytes.
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let complain = |source| LearningError::io(file, source);
    let parent = file.parent().unwrap_or(Path::new("."));
    // Who may read it is for the process's umask to say, as for the configurations beside it.
    let mut pending = Builder::new()
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(parent)
        .map_err(complain)?;
    {
        let mut stream = BufWriter::new(&mut pending);
        stream
            .write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| stream.write_all(header.as_bytes()))
            .map_err(complain)?;
        for (name, tensor) in tensors {
            // Beyond 65504 f16 has nothing but infinity.
            if stored == Stored::Half && !fits_half(tensor)? {
                return Err(LearningError::weights(
                    file,
                    format!("{name} holds values that f16 cannot hold"),
                ));
            }
            stream
                .write_all(&stored.encode(tensor)?)
                .map_err(complain)?;
        }
        stream.flush().map_err(complain)?;
    }
    pending.as_file().sync_all().map_err(complain)?;
    pending
        .persist(file)
        .map_err(|error| LearningError::io(file, error.error))?;
    Ok(())
}
