//! The folder of a training run: the model's configuration files, two checkpoints that are written in turn, and a lock.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use concord_common::fsutil::{sweep_unfinished, write_atomic};
use concord_learning::diffusion::{
    params::Compute,
    pipeline::TextToImage,
    pretrain::{Pretrainer, StateFacts, load_average, read_facts},
};
use tempfile::TempDir;

use super::{BaseError, recipe::Recipe, vocabulary::Vocabulary};

/// Of the two, the older one is overwritten.
const STATES: [&str; 2] = ["state-0.safetensors", "state-1.safetensors"];

/// The folder of a run that this process alone writes to.
#[derive(Debug)]
pub(super) struct RunFolder {
    folder: PathBuf,
    next: usize,
    _lock: File,
}

/// Where the configuration files are.
pub(super) fn model_folder(folder: &Path) -> PathBuf {
    folder.join("model")
}

impl RunFolder {
    /// Makes or opens it, and removes what a kill left of a checkpoint.
    pub(super) fn open(folder: &Path) -> Result<Self, BaseError> {
        fs::create_dir_all(folder).map_err(|error| BaseError::io(folder, error))?;
        let path = folder.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| BaseError::io(&path, error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(BaseError::folder(folder, "another process trains in it"));
            }
            Err(TryLockError::Error(error)) => return Err(BaseError::io(path, error)),
        }
        sweep_unfinished(folder).map_err(|error| BaseError::io(folder, error))?;
        Ok(Self {
            folder: folder.to_path_buf(),
            next: 0,
            _lock: lock,
        })
    }

    /// Writes the configuration files, or insists that those which are there are the same.
    pub(super) fn prepare(&self, recipe: &Recipe, words: &Vocabulary) -> Result<(), BaseError> {
        let made = TempDir::new_in(&self.folder).map_err(|e| BaseError::io(&self.folder, e))?;
        let (new, model) = (made.path().join("model"), model_folder(&self.folder));
        recipe.write_folder(&new, words)?;
        if !model.exists() {
            return fs::rename(&new, &model).map_err(|error| BaseError::io(&model, error));
        }
        if contents(&new)? != contents(&model)? {
            return Err(BaseError::folder(
                &self.folder,
                "its model is of another recipe or vocabulary; choose a new folder",
            ));
        }
        Ok(())
    }

    /// Takes up the newest whole checkpoint, if there is one. A damaged one is passed over if the other is whole.
    pub(super) fn restore(&mut self, trainer: &mut Pretrainer) -> Result<(), BaseError> {
        if let Some((place, bytes)) = newest(&self.folder)? {
            trainer.restore(&bytes)?;
            self.next = 1 - place;
        }
        Ok(())
    }

    /// Writes a checkpoint; it appears whole or not at all, and the one before stays.
    pub(super) fn save(&mut self, bytes: &[u8]) -> Result<(), BaseError> {
        let path = self.folder.join(STATES[self.next]);
        write_atomic(&path, bytes, 0o600).map_err(|error| BaseError::io(path, error))?;
        self.next = 1 - self.next;
        Ok(())
    }
}

/// The model of a run with its averaged weights as of the newest checkpoint.
pub(super) fn averaged(folder: &Path) -> Result<(TextToImage, StateFacts), BaseError> {
    let (_, bytes) = newest(folder)?
        .ok_or_else(|| BaseError::folder(folder, "it holds no checkpoint; train-base makes one"))?;
    let model = TextToImage::fresh(
        &model_folder(folder),
        concord_common::seed::Seed(0),
        Compute::CPU,
    )?;
    let facts = load_average(&model, &bytes)?;
    Ok((model, facts))
}

/// Place and bytes of the whole checkpoint with most steps.
fn newest(folder: &Path) -> Result<Option<(usize, Vec<u8>)>, BaseError> {
    let mut best: Option<(u64, usize, Vec<u8>)> = None;
    let mut damaged = None;
    for (place, name) in STATES.iter().enumerate() {
        let file = folder.join(name);
        if !file.exists() {
            continue;
        }
        let bytes = fs::read(&file).map_err(|error| BaseError::io(&file, error))?;
        match read_facts(&bytes) {
            Ok(facts) if best.as_ref().is_none_or(|(step, _, _)| facts.step > *step) => {
                best = Some((facts.step, place, bytes));
            }
            Ok(_) => {}
            Err(error) => damaged = Some((file, error)),
        }
    }
    match (best, damaged) {
        (Some((step, place, bytes)), damaged) => {
            if let Some((file, error)) = damaged {
                tracing::warn!(file = %file.display(), %error, step, "damaged checkpoint passed over");
            }
            Ok(Some((place, bytes)))
        }
        (None, Some((file, error))) => Err(BaseError::folder(
            folder,
            format!(
                "{} cannot be read ({error}) and there is no other",
                file.display()
            ),
        )),
        (None, None) => Ok(None),
    }
}

/// Files below a folder with their bytes, by path.
fn contents(folder: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, BaseError> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::new()];
    while let Some(part) = open.pop() {
        let path = folder.join(&part);
        for entry in fs::read_dir(&path).map_err(|error| BaseError::io(&path, error))? {
            let entry = entry.map_err(|error| BaseError::io(&path, error))?;
            let name = part.join(entry.file_name());
            if entry.path().is_dir() {
                open.push(name);
            } else {
                let bytes =
                    fs::read(entry.path()).map_err(|error| BaseError::io(entry.path(), error))?;
                found.push((name, bytes));
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use concord_common::fsutil::UNFINISHED;

    use super::*;

    #[test]
    fn what_a_kill_left_of_a_checkpoint_is_removed_and_no_more() {
        let place = tempfile::tempdir().unwrap();
        let mut run = RunFolder::open(place.path()).unwrap();
        run.save(b"first").unwrap();
        run.save(b"second").unwrap();
        drop(run);
        let left = place.path().join(format!("{UNFINISHED}Ab12"));
        fs::write(&left, b"half").unwrap();
        // Not while another process writes there.
        let writing = RunFolder::open(place.path()).unwrap();
        assert!(!left.exists());
        fs::write(&left, b"half").unwrap();
        assert!(RunFolder::open(place.path()).is_err());
        assert!(left.exists());
        drop(writing);
        let states = STATES.map(|name| fs::read(place.path().join(name)).unwrap());
        assert_eq!(states, [b"first".to_vec(), b"second".to_vec()]);
    }
}
