//! What the parts of a model folder have in common: where their files are, and how their numbers are checked.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::error::LearningError;

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
    let length = fs::metadata(file)
        .map_err(|source| LearningError::io(file, source))?
        .len();
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
