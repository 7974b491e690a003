//! Where a model folder keeps its files.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

use crate::error::LearningError;

/// The three files of a backbone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackboneFiles {
    /// `config.json`.
    pub config: PathBuf,
    /// `model.safetensors`.
    pub weights: PathBuf,
    /// `tokenizer.json`.
    pub tokenizer: PathBuf,
}

/// One entry of a sentence-transformers `modules.json`.
#[derive(Debug, Deserialize)]
struct Module {
    path: PathBuf,
    #[serde(rename = "type")]
    kind: String,
}

impl BackboneFiles {
    /// Finds them in a Hugging Face folder, or in the sentence-transformers layout: there `modules.json` names the transformer's folder,
    /// and older exports simply have it in `0_Transformer`.
    ///
    /// # Errors
    /// [`LearningError::Io`] that names the file that is not there, [`LearningError::Config`] for a `modules.json` without a
    /// transformer, or one that points out of the folder.
    pub fn find(folder: &Path) -> Result<Self, LearningError> {
        let home = transformer_folder(folder)?;
        let config = existing(home.join("config.json"))?;
        let weights = home.join("model.safetensors");
        if !weights.is_file() {
            return Err(LearningError::io(&weights, weights_hint(&home)));
        }
        let beside = home.join("tokenizer.json");
        let tokenizer = if beside.is_file() {
            beside
        } else {
            existing(folder.join("tokenizer.json"))?
        };
        Ok(Self {
            config,
            weights,
            tokenizer,
        })
    }
}

fn transformer_folder(folder: &Path) -> Result<PathBuf, LearningError> {
    let modules = folder.join("modules.json");
    if modules.is_file() {
        let text = fs::read(&modules).map_err(|source| LearningError::io(&modules, source))?;
        let complain =
            |reason: String| LearningError::Config(format!("{}: {reason}", modules.display()));
        let listed: Vec<Module> =
            serde_json::from_slice(&text).map_err(|error| complain(error.to_string()))?;
        let transformer = listed
            .into_iter()
            .find(|module| module.kind.ends_with(".Transformer"))
            .ok_or_else(|| complain("no module of type Transformer is listed".to_owned()))?;
        let inside = transformer
            .path
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if !inside {
            return Err(complain(format!(
                "the transformer's path {} leads out of the folder",
                transformer.path.display()
            )));
        }
        return Ok(folder.join(transformer.path));
    }
    let older = folder.join("0_Transformer");
    if older.is_dir() && !folder.join("config.json").exists() {
        return Ok(older);
    }
    Ok(folder.to_path_buf())
}

fn existing(path: PathBuf) -> Result<PathBuf, LearningError> {
    match fs::metadata(&path) {
        Ok(_) => Ok(path),
        Err(source) => Err(LearningError::io(path, source)),
    }
}

/// Why there is no `model.safetensors`, as far as the folder shows it.
fn weights_hint(home: &Path) -> io::Error {
    let reason = if home.join("model.safetensors.index.json").exists() {
        "the weights are split over several files; save them as one (save_pretrained with a larger max_shard_size)"
    } else if home.join("pytorch_model.bin").exists() {
        "there is only a pytorch_model.bin, which can carry code; convert it to safetensors (save_pretrained does that)"
    } else {
        "no such file"
    };
    io::Error::new(io::ErrorKind::NotFound, reason)
}
