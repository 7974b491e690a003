//! What a model card says of the parts of a job.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use concord_artaug::{advisor::Advisor, card::CardFacts, scorer::EXTERNAL_VERSION};
use concord_common::{
    Digest,
    job::artaug::{ArtaugSpec, EvaluationScorer, FilterScorer},
};

use super::{files::ModelFile, measures};
use crate::{brake::Halt, run::PartsError};

/// The key by which a model folder says that it is the embedded one.
const EMBEDDED: &str = "_concord_patches";

/// What is to be said of a job but for its model's files and its data.
pub(super) fn facts(
    spec: &ArtaugSpec,
    folder: &Path,
    threads: usize,
    advisor: &dyn Advisor,
) -> CardFacts {
    let version = |what: &str, version: String| (what.to_owned(), version);
    let mut versions = vec![
        version("worker", env!("CARGO_PKG_VERSION").to_owned()),
        version("libtorch", env!("CONCORD_LIBTORCH").to_owned()),
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
    if asks_in_words(spec) {
        let words = "words of the scorers of kind chat";
        versions.push(version(words, EXTERNAL_VERSION.to_owned()));
    }
    let mut licences = vec![
        "The adapters inherit the licence of the base model; see the card in its folder."
            .to_owned(),
    ];
    if measures(spec) {
        licences.push(
            "Clean looks were measured on Fluent Emoji (MIT), Noto Emoji (Apache-2.0) and Twemoji (CC BY 4.0).".to_owned(),
        );
    }
    CardFacts {
        licences,
        versions,
        limits: limits(spec, is_embedded(folder)),
        ..CardFacts::default()
    }
}

/// Whether a scorer asks a model elsewhere.
fn asks_in_words(spec: &ArtaugSpec) -> bool {
    let (filter, judges) = (&spec.scorers.filter, &spec.scorers.evaluation);
    let is_filter = |scorer: &FilterScorer| matches!(scorer, FilterScorer::Chat { .. });
    let is_judge = |scorer: &EvaluationScorer| matches!(scorer, EvaluationScorer::Chat { .. });
    filter.iter().any(is_filter) || judges.iter().any(is_judge)
}

/// Whether a model says that it is the embedded one.
pub(super) fn is_embedded(folder: &Path) -> bool {
    fs::read_to_string(folder.join("model_index.json")).is_ok_and(|text| text.contains(EMBEDDED))
}

/// What a reader must know to read the numbers rightly.
pub(super) fn limits(spec: &ArtaugSpec, embedded: bool) -> Vec<String> {
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
            "Held-out prompts are combinations of subject, style and background that no pair used; the base model's own training had them all. It draws few \
             subjects so that a classifier knows them: its card says how many.",
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

/// Digests of the files of a model, by name. They may be large, so `check` is asked before each.
pub(super) fn digests_of(
    files: &[ModelFile],
    check: &dyn Fn() -> Result<(), Halt>,
) -> Result<Vec<(String, Digest)>, PartsError> {
    files
        .iter()
        .map(|ModelFile { name, path, .. }| {
            check()?;
            let digest = digest_of(path).map_err(|error| PartsError::Model {
                key: "model.folder",
                what: format!("{name}: {error}"),
            })?;
            Ok((name.clone(), digest))
        })
        .collect()
}

fn digest_of(file: &Path) -> io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(file)?)?;
    Ok(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::workshop::files::files_of;

    #[test]
    fn a_halt_is_noticed_between_two_files() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        let files = files_of(folder.path(), &[folder.path().to_owned()]).unwrap();
        let asked = Cell::new(0);
        let check = || {
            asked.set(asked.get() + 1);
            if asked.get() == 2 {
                Err(Halt::Stop)
            } else {
                Ok(())
            }
        };
        let stopped = digests_of(&files, &check);
        assert!(matches!(stopped, Err(PartsError::Halt(Halt::Stop))));
        assert_eq!(asked.get(), 2);
        assert_eq!(digests_of(&files, &check).unwrap().len(), 3);
    }
}
