//! A personal model as a folder for other programs: plain safetensors with a model card, or the layout of the AdapterHub library
//! `adapters`.
//!
//! An export holds the silo's private adapter and head. It is made by the silo for itself and goes nowhere by itself.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use concord_common::{Digest, fsutil};
use concord_learning::{
    LearningError,
    backbone::{BackboneConfig, BackboneFiles},
    model::PersonalModel,
};

use crate::vault::{Header, private_folder};

mod adapterhub;
mod card;
#[cfg(test)]
mod tests;

/// The layout of the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ExportFormat {
    /// `model.safetensors` with all tensors under their own names, and a model card.
    Safetensors,
    /// What `model.load_adapter(folder, use_safetensors=True)` of the library `adapters` reads.
    Adapterhub,
}

/// An export that was not written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The model or the backbone cannot be read.
    #[error(transparent)]
    Learning(#[from] LearningError),
    /// The backbone is not the one that the model was trained on.
    #[error(
        "the backbone in {} has digest {found}, the model was trained on {wanted}",
        .folder.display()
    )]
    Backbone {
        /// Its folder.
        folder: PathBuf,
        /// BLAKE3 of its weights.
        found: Digest,
        /// BLAKE3 that the model names.
        wanted: Digest,
    },
    /// The folder is there already.
    #[error("{} is there already; name a new folder", .0.display())]
    Exists(PathBuf),
    /// The folder cannot be written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// A file of an export.
struct Part {
    name: &'static str,
    bytes: Vec<u8>,
}

/// The facts about a backbone that an export needs.
struct Base {
    config: BackboneConfig,
}

/// Writes the folder, whole or not at all, with mode 0700, and names its files.
///
/// # Errors
/// [`ExportError`].
pub fn write(
    model: &PersonalModel,
    header: &Header,
    backbone: &Path,
    format: ExportFormat,
    out: &Path,
) -> Result<Vec<PathBuf>, ExportError> {
    let base = base(model, backbone)?;
    let parts = match format {
        ExportFormat::Safetensors => vec![
            Part {
                name: "model.safetensors",
                bytes: model.to_bytes()?,
            },
            Part {
                name: "README.md",
                bytes: card::plain(model, header).into_bytes(),
            },
        ],
        ExportFormat::Adapterhub => adapterhub::parts(model, header, &base.config)?,
    };
    write_folder(out, &parts)
}

/// The backbone's sizes, after a look at the weights: an adapter on another backbone is noise.
fn base(model: &PersonalModel, folder: &Path) -> Result<Base, ExportError> {
    let files = BackboneFiles::find(folder)?;
    let io = |source| ExportError::Io {
        path: files.weights.clone(),
        source,
    };
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(fs::File::open(&files.weights).map_err(io)?)
        .map_err(io)?;
    let found = Digest::from(hasher.finalize());
    if found != model.facts.backbone {
        return Err(ExportError::Backbone {
            folder: folder.to_path_buf(),
            found,
            wanted: model.facts.backbone,
        });
    }
    Ok(Base {
        config: BackboneConfig::read(&files.config)?,
    })
}

fn write_folder(out: &Path, parts: &[Part]) -> Result<Vec<PathBuf>, ExportError> {
    if out.exists() {
        return Err(ExportError::Exists(out.to_path_buf()));
    }
    let io = |source| ExportError::Io {
        path: out.to_path_buf(),
        source,
    };
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(io)?;
    let unfinished = tempfile::tempdir_in(parent).map_err(io)?;
    let made = unfinished.path().join("export");
    private_folder(&made).map_err(|error| io(io::Error::other(error.to_string())))?;
    for part in parts {
        fsutil::write_atomic(&made.join(part.name), &part.bytes, 0o600).map_err(io)?;
    }
    fs::rename(&made, out).map_err(io)?;
    fsutil::sync_folder(parent).map_err(io)?;
    Ok(parts.iter().map(|part| out.join(part.name)).collect())
}
