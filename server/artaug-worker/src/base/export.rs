//! From a training run to a model folder that can be kept.

use std::{fs, path::Path};

use concord_learning::diffusion::pretrain::StateFacts;

use super::{BaseError, card, state};

/// Writes the averaged weights of a run's newest checkpoint as a model folder in f16, with its card.
///
/// # Errors
/// If there is no checkpoint, or the folder exists or cannot be written.
pub fn export(run: &Path, folder: &Path) -> Result<StateFacts, BaseError> {
    let (model, facts) = state::averaged(run)?;
    model.save_half(folder)?;
    let file = folder.join("README.md");
    fs::write(&file, card::text(&model, &facts)?).map_err(|error| BaseError::io(&file, error))?;
    Ok(facts)
}
