//! What was learned: joined, reduced, and in the files of other tools.

use std::{collections::BTreeMap, fs, io, path::Path};

use concord_artaug::engine::{EngineError, Joined};
use concord_learning::diffusion::lora::{Layout, Lora, Written};

use super::{
    container::{Sections, What, pack, unpack},
    failed, unusable,
};

/// Name of the one `LoRA` of an object that holds one.
pub(super) const ALL: &str = "all";

/// File names of an exported adapter, as `diffusers` and as kohya's scripts read it.
const FILES: [(Layout, &str); 2] = [
    (Layout::Diffusers, "lora.diffusers.safetensors"),
    (Layout::Kohya, "lora.kohya.safetensors"),
];

/// All `LoRA`s of an object.
pub(super) fn read(object: &[u8]) -> Result<BTreeMap<String, Lora>, EngineError> {
    let loras: BTreeMap<String, Lora> = unpack(What::Lora, object)?
        .into_iter()
        .map(|(name, bytes)| Ok((name, Lora::from_bytes(&bytes).map_err(unusable)?)))
        .collect::<Result<_, EngineError>>()?;
    if loras.is_empty() {
        return Err(EngineError::Unusable("an object without a LoRA".to_owned()));
    }
    Ok(loras)
}

/// The `LoRA` of an object that holds one: everything that was learned so far.
pub(super) fn read_joined(object: &[u8]) -> Result<Lora, EngineError> {
    let mut loras = read(object)?;
    match (loras.remove(ALL), loras.len()) {
        (Some(lora), 0) => Ok(lora),
        _ => Err(EngineError::Unusable(
            "one LoRA for every pair where one joined LoRA is needed; join them first".to_owned(),
        )),
    }
}

fn write(lora: &Lora) -> Result<Vec<u8>, EngineError> {
    let bytes = lora.to_bytes().map_err(failed)?;
    pack(What::Lora, &Sections::from([(ALL.to_owned(), bytes)]))
}

/// See [`concord_artaug::engine::Engine::join`].
pub(super) fn join(
    before: Option<&[u8]>,
    fitted: &[u8],
    reduced_rank: Option<u32>,
) -> Result<Joined, EngineError> {
    let before = before.map(read_joined).transpose()?;
    let fitted = read(fitted)?;
    let share = 1.0 / fitted.len() as f64;
    let mut parts: Vec<(&Lora, f64)> = before.iter().map(|lora| (lora, 1.0)).collect();
    parts.extend(fitted.values().map(|lora| (lora, share)));
    let layers = |lora: &Lora| lora.pairs.keys().cloned().collect::<Vec<_>>();
    let expected = parts.first().map(|(lora, _)| layers(lora));
    if parts.iter().any(|(lora, _)| Some(layers(lora)) != expected) {
        return Err(EngineError::Unusable(
            "adapters of different layers cannot be joined; `lora.targets` must be the same throughout a job"
                .to_owned(),
        ));
    }
    let joined = Lora::sum(&parts).map_err(unusable)?;
    let reduced = reduced_rank
        .map(|rank| {
            let (reduced, _lost) = joined.truncated(i64::from(rank)).map_err(failed)?;
            write(&reduced)
        })
        .transpose()?;
    Ok(Joined {
        merged: write(&joined)?,
        reduced,
    })
}

/// See [`concord_artaug::engine::Engine::export`].
pub(super) fn export(
    joined: &[u8],
    layers: &[Written],
    facts: &[(String, String)],
    folder: &Path,
) -> Result<Vec<(String, Vec<u8>)>, EngineError> {
    let lora = read_joined(joined)?;
    let rank = lora.rank().to_string();
    let refused = |error: io::Error| EngineError::Local(format!("{}: {error}", folder.display()));
    fs::create_dir(folder).map_err(refused)?;
    let files = FILES
        .iter()
        .map(|(layout, name)| {
            let mut notes: BTreeMap<&str, &str> = BTreeMap::from([("format", "pt")]);
            if *layout == Layout::Kohya {
                // What user interfaces look for; alpha is the rank.
                notes.extend([
                    ("ss_network_module", "networks.lora"),
                    ("ss_network_dim", rank.as_str()),
                    ("ss_network_alpha", rank.as_str()),
                ]);
            }
            for (key, text) in facts {
                notes.entry(key).or_insert(text);
            }
            let notes: Vec<(&str, &str)> = notes.into_iter().collect();
            let file = folder.join(name);
            lora.write(&file, *layout, layers, &notes)
                .map_err(unusable)?;
            let bytes = fs::read(&file).map_err(refused)?;
            fs::remove_file(&file).map_err(refused)?;
            Ok(((*name).to_owned(), bytes))
        })
        .collect::<Result<_, EngineError>>()?;
    fs::remove_dir(folder).map_err(refused)?;
    Ok(files)
}
