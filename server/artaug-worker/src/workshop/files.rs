//! The files of a model's folder, looked at before any is opened: a folder that was fetched from elsewhere is not taken on trust.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::run::PartsError;

/// Most files and folders in a model's folder.
const MOST: usize = 1000;
/// Deepest folder in it.
const DEEPEST: usize = 8;

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ModelFile {
    /// Its path in the model's folder.
    pub(super) name: String,
    /// Where its bytes are, without links.
    pub(super) path: PathBuf,
    /// As it was then.
    stamp: Stamp,
}

/// What is another one after a file was written, or another one took its place; seen without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    /// When its bytes changed last, and when anything of it did: seconds and nanoseconds.
    written: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(found: &Metadata) -> Self {
        Self {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.len(),
            written: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }
}

/// All files of a model, by name. Links are followed, for a snapshot in the cache of Hugging Face consists of them, and must end at files and
/// folders below the `allowed` ones: what they lead to is read, and with `output.fused` some of it is published. What has a name with a dot in
/// front is no part of a model and is read by nobody.
///
/// # Errors
/// [`PartsError::Model`] naming the entry that leads elsewhere, is neither file nor folder, or cannot be looked at.
pub(super) fn files_of(folder: &Path, allowed: &[PathBuf]) -> Result<Vec<ModelFile>, PartsError> {
    let roots: Vec<PathBuf> = allowed
        .iter()
        .filter_map(|root| root.canonicalize().ok())
        .collect();
    let (mut files, mut seen) = (Vec::new(), 0);
    let mut folders = vec![(PathBuf::new(), 0)];
    while let Some((below, depth)) = folders.pop() {
        let unreadable = |error: io::Error| refused(&below, &error.to_string());
        for entry in fs::read_dir(folder.join(&below)).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            seen += 1;
            let is_hidden = name.as_encoded_bytes().starts_with(b".");
            let below = below.join(name);
            if seen > MOST || depth > DEEPEST {
                let bounds = format!(
                    "a model's folder may hold {MOST} files and folders, in folders {DEEPEST} deep; take away what does not belong to the model"
                );
                return Err(refused(&below, &bounds));
            }
            if is_hidden {
                continue;
            }
            let look = |path: PathBuf| fs::metadata(&path).map(|found| (path, found));
            let (path, found) = folder
                .join(&below)
                .canonicalize()
                .and_then(look)
                .map_err(|error| refused(&below, &error.to_string()))?;
            if !roots.iter().any(|root| path.starts_with(root)) {
                return Err(refused(
                    &below,
                    "this leads out of the folders that this worker allows; put the file itself there, or name a folder that holds both in the \
                     worker's `allowed.model_folders`",
                ));
            }
            if found.is_dir() {
                folders.push((below, depth + 1));
            } else if found.is_file() {
                let name = below.display().to_string();
                let stamp = Stamp::of(&found);
                files.push(ModelFile { name, path, stamp });
            } else {
                return Err(refused(
                    &below,
                    "this is neither a file nor a folder; take it away",
                ));
            }
        }
    }
    files.sort();
    Ok(files)
}

fn refused(below: &Path, what: &str) -> PartsError {
    PartsError::Model {
        key: "model.folder",
        what: format!("{}: {what}", Path::new(".").join(below).display()),
    }
}
