//! The one error type of this crate.

use std::path::{Path, PathBuf};

use tch::TchError;

/// Everything that can go wrong in learning: each variant names the file, tensor or setting it is about.
#[derive(Debug, thiserror::Error)]
pub enum LearningError {
    /// A libtorch call failed (shape, kind, memory).
    #[error("libtorch: {}", torch_text(.0))]
    Torch(#[from] TchError),
    /// A weights file, or the set of tensors in it, is not what the reader needs.
    #[error("weights {}: {reason}", .file.display())]
    Weights {
        /// The safetensors file.
        file: PathBuf,
        /// What is wrong, with the names of the tensors.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A `tokenizer.json` cannot be used, or a text cannot be encoded.
    #[error("tokenizer {}: {reason}", .file.display())]
    Tokenizer {
        /// The `tokenizer.json`.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Examples that cannot be trained on or evaluated.
    #[error("data: {0}")]
    Data(String),
    /// A setting, or a model's `config.json`, asks for something that cannot be done.
    #[error("configuration: {0}")]
    Config(String),
    /// Training went wrong in its numbers.
    #[error("training: {0}")]
    Training(String),
    /// A saved state or model that does not belong here or is damaged.
    #[error("saved state: {0}")]
    State(String),
    /// A payload of the global adapter is not what the job's layout says.
    #[error("global adapter: {0}")]
    Payload(#[from] concord_common::code::Refusal),
    /// The caller asked to stop. The trainer is as it was before the round.
    #[error("training was cancelled")]
    Cancelled,
    /// A job on the torch thread panicked. The thread goes on.
    #[error("the torch job {job:?} panicked: {message}")]
    Panicked {
        /// Name of the job.
        job: &'static str,
        /// The panic's message.
        message: String,
    },
    /// The torch thread has been shut down, so the job was not run.
    #[error("the torch thread has stopped; the job {0:?} was not run")]
    Stopped(&'static str),
}

impl LearningError {
    /// An input/output error at `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    /// A complaint about the weights in `file`.
    pub fn weights(file: &Path, reason: impl Into<String>) -> Self {
        Self::Weights {
            file: file.to_path_buf(),
            reason: reason.into(),
        }
    }

    /// A complaint about the tokenizer in `file`.
    pub fn tokenizer(file: &Path, reason: impl Into<String>) -> Self {
        Self::Tokenizer {
            file: file.to_path_buf(),
            reason: reason.into(),
        }
    }
}

/// The first line of what libtorch said: the rest is a C++ stack trace.
fn torch_text(error: &TchError) -> String {
    error
        .to_string()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}
