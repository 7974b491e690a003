//! What a model card says of the parts of a job.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use concord_artaug::{advisor::Advisor, card::CardFacts};
use concord_common::{
    Digest,
    job::artaug::{ArtaugSpec, EvaluationScorer, FilterScorer},
};

use super::measures;
use crate::run::PartsError;

/// Files of a model folder that a card names.
const MOST_FILES: usize = 1000;
/// Deepest folder in a model folder.
const DEEPEST: usize = 8;
/// The key by which a model folder says that it is the embedded one.
const EMBEDDED: &str = "_concord_patches";

/// What is to be said of a job but for its data: the same whenever they are made from the same files.
pub(super) fn facts(
    spec: &ArtaugSpec,
    folder: &Path,
    threads: usize,
    advisor: &dyn Advisor,
) -> Result<CardFacts, PartsError> {
    let embedded = fs::read_to_string(folder.join("model_index.json"))
        .is_ok_and(|text| text.contains(EMBEDDED));
    let version = |what: &str, version: String| (what.to_owned(), version);
    let mut versions = vec![
        version("worker", env!("CARGO_PKG_VERSION").to_owned()),
        version("advisor", advisor.name()),
        version("threads of the engine", threads.to_string()),
    ];
    let filter: Vec<&str> = spec.scorers.filter.iter().map(FilterScorer::name).collect();
    versions.push(version("filter scorers", filter.join(", ")));
    let judges: Vec<&str> = spec
        .scorers
        .evaluation
        .iter()
        .map(EvaluationScorer::name)
        .collect();
    versions.push(version("evaluation scorers", judges.join(", ")));
    let mut licences = vec![
        "The adapters inherit the licence of the base model; see the card in its folder."
            .to_owned(),
    ];
    if measures(spec) {
        licences.push(
            "Clean looks were measured on Fluent Emoji (MIT), Noto Emoji (Apache-2.0) and Twemoji (CC BY 4.0).".to_owned(),
        );
    }
    let failed = |error: io::Error| PartsError::Model {
        key: "model.folder",
        what: format!("{}: {error}", folder.display()),
    };
    Ok(CardFacts {
        base_files: base_files(folder).map_err(failed)?,
        data_files: Vec::new(),
        licences,
        versions,
        limits: limits(spec, embedded),
        results: Vec::new(),
    })
}

/// What a reader must know to read the numbers rightly.
fn limits(spec: &ArtaugSpec, embedded: bool) -> Vec<String> {
    let mut limits = Vec::new();
    let mut say = |text: &str| limits.push(text.to_owned());
    if embedded {
        say(
            "The base is Concord's embedded model, a toy that draws icons of 32 pixels. Its headroom is planted: three quarters of its training images were \
             rendered badly on purpose, and the captions said so.",
        );
        say(
            "Advice, captions and the filter's photometry share one vocabulary, which no real model has. What is shown is the loop, not what it would \
             bring to a large model.",
        );
        say(
            "Held-out prompts are combinations of subject, style and background that no pair used; their subjects were in the base model's training.",
        );
    }
    if measures(spec) {
        say(
            "The judge `statistics` tells well rendered drawings from badly rendered ones by statistics of the image. It has no taste, and nobody asked people.",
        );
    }
    say("One seed, one machine: intervals are over prompts, not over repeated jobs.");
    limits
}

/// Digests of the files below a model folder, by name.
fn base_files(folder: &Path) -> io::Result<Vec<(String, Digest)>> {
    let mut files = Vec::new();
    collect(folder, &mut files, DEEPEST)?;
    files.sort();
    files.truncate(MOST_FILES);
    files
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(folder).unwrap_or(&path);
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(File::open(&path)?)?;
            Ok((name.display().to_string(), hasher.finalize().into()))
        })
        .collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>, deeper: usize) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() && deeper > 0 {
            collect(&entry.path(), files, deeper - 1)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}
