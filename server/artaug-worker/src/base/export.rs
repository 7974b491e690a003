//! From a training run to a model folder that can be kept.

use std::{fs, path::Path};

use concord_learning::diffusion::pretrain::StateFacts;

use super::{BaseError, card, state};

/// What the licences of the training's drawings want to be beside every copy of the weights.
const NOTICE: &str = include_str!("../../../../deploy/artaug/base/NOTICE.md");

/// Writes the averaged weights of a run's newest checkpoint as a model folder in f16, with its card and the notice of its data's licences.
///
/// # Errors
/// If there is no checkpoint, or the folder exists or cannot be written.
pub fn export(run: &Path, folder: &Path) -> Result<StateFacts, BaseError> {
    let (model, facts) = state::averaged(run)?;
    model.save_half(folder)?;
    let card = card::text(&model, &facts)?;
    for (name, text) in [("README.md", card.as_str()), ("NOTICE.md", NOTICE)] {
        let file = folder.join(name);
        fs::write(&file, text).map_err(|error| BaseError::io(&file, error))?;
    }
    Ok(facts)
}
