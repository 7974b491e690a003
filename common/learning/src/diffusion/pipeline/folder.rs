//! The files of a model folder that hold no weights.

use std::{fs, io, path::Path};

use serde_json::{Map, Value, json};

use super::{CodecKind, Patches};
use crate::{diffusion::files, error::LearningError};

const INDEX: &str = "model_index.json";

/// The key of `model_index.json` that says how many pixels a side a patch has.
const PATCHES_KEY: &str = "_concord_patches";

fn entries(index: &Path) -> Result<Map<String, Value>, LearningError> {
    files::read_config(index, |text| {
        serde_json::from_slice(text).map_err(|error| error.to_string())
    })
}

/// Checks the parts that `model_index.json` names; gives what the model works on.
pub(super) fn read_index(folder: &Path) -> Result<CodecKind, LearningError> {
    let index = folder.join(INDEX);
    let parts = entries(&index)?;
    for (part, class) in [
        ("unet", "UNet2DConditionModel"),
        ("text_encoder", "CLIPTextModel"),
        ("tokenizer", "CLIPTokenizer"),
    ] {
        let found = parts
            .get(part)
            .and_then(|entry| entry.get(1))
            .and_then(Value::as_str)
            .unwrap_or("nothing");
        if found.trim_end_matches("Fast") != class {
            return Err(LearningError::Config(format!(
                "{}: {part} is {found}, only {class} is supported",
                index.display()
            )));
        }
    }
    let complain = |reason: String| {
        Err(LearningError::Config(format!(
            "{}: {reason}",
            index.display()
        )))
    };
    // A part that is left out is null, or [null, null].
    let has_vae = parts
        .get("vae")
        .is_some_and(|entry| !entry.is_null() && entry.get(1) != Some(&Value::Null));
    match (has_vae, parts.get(PATCHES_KEY)) {
        (true, None) => Ok(CodecKind::Latents),
        (false, None) => Ok(CodecKind::Pixels),
        (true, Some(_)) => complain(format!(
            "a model has either a vae or {PATCHES_KEY}, this one has both"
        )),
        (false, Some(value)) => match value.as_i64().map(Patches::new) {
            Some(Ok(patches)) => Ok(CodecKind::Patches(patches)),
            Some(Err(reason)) => complain(format!("{PATCHES_KEY} {reason}")),
            None => complain(format!("{PATCHES_KEY} {value} is not a number of pixels")),
        },
    }
}

/// Writes the index of a folder that holds only these parts of the model in `from`. `diffusers` does not load a model whose index names a part that is not
/// there; [null, null] says that it was left out.
pub(super) fn write_index(from: &Path, to: &Path, written: &[&str]) -> Result<(), LearningError> {
    let (from, to) = (from.join(INDEX), to.join(INDEX));
    let mut entries = entries(&from)?;
    let mut without = Vec::new();
    for (name, entry) in &mut entries {
        // A part is its library and its class; names with _ are remarks.
        let is_part = !name.starts_with('_') && entry.get(1).is_some_and(Value::is_string);
        if is_part && !written.contains(&name.as_str()) {
            *entry = json!([null, null]);
            without.push(name.clone());
        }
    }
    if without.is_empty() {
        return copy(&from, &to);
    }
    if without.iter().any(|part| part == "safety_checker") {
        entries.insert("requires_safety_checker".to_owned(), json!(false));
    }
    let text = format!("{:#}\n", Value::Object(entries));
    fs::write(&to, text).map_err(|source| LearningError::io(&to, source))
}

/// Copies a file, or what a link leads to.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), LearningError> {
    fs::copy(from, to)
        .map(drop)
        .map_err(|source| LearningError::io(from, source))
}

/// Copies those of these files that a folder has. Links are followed: a snapshot in the cache of Hugging Face consists of them. Nothing else in
/// the folder is copied, for who has the copy need not be allowed to see it.
pub(super) fn copy_named(from: &Path, to: &Path, names: &[&str]) -> Result<(), LearningError> {
    fs::create_dir(to).map_err(|source| LearningError::io(to, source))?;
    for name in names {
        let path = from.join(name);
        // A link that leads nowhere is there all the same.
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            found => found.map_err(|source| LearningError::io(&path, source))?,
        };
        let found = fs::metadata(&path).map_err(|source| LearningError::io(&path, source))?;
        if !found.is_file() {
            return Err(LearningError::Config(format!(
                "{}: this must be a plain file",
                path.display()
            )));
        }
        copy(&path, &to.join(name))?;
    }
    Ok(())
}
