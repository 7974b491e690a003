//! The prompts of a job: from its specification or a file, bounded, and never both trained on and held out.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    rc::Rc,
};

use concord_common::{job::artaug::stays_below, seed::Seed};

/// Largest file of prompts.
const MAX_FILE: u64 = 64 << 20;
/// Longest prompt in bytes.
const MAX_PROMPT: usize = 1000;
/// Most prompts.
const MAX_PROMPTS: usize = 1_000_000;

/// Why there are no prompts, or no folder.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// It would lead out of the allowed folders.
    #[error(
        "`{path}` is not below any of the folders that this worker allows: {}",
        listed(allowed)
    )]
    Outside {
        /// As in the specification.
        path: String,
        /// The folders of the settings.
        allowed: Vec<PathBuf>,
    },
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of prompts is not acceptable.
    #[error("{path}: {what}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and in which line.
        what: String,
    },
    /// A prompt is on both sides.
    #[error("the prompt `{0}` is both trained on and held out; take it out of one of the lists")]
    NotHeldOut(String),
}

fn listed(folders: &[PathBuf]) -> String {
    if folders.is_empty() {
        return "none is set".to_owned();
    }
    let names: Vec<String> = folders
        .iter()
        .map(|folder| folder.display().to_string())
        .collect();
    names.join(", ")
}

/// The file or folder `path` below the first of the `allowed` folders that has it. Links are followed and must end below that
/// folder too.
///
/// # Errors
/// If no allowed folder has it, or it leads elsewhere.
pub fn resolve(path: &str, allowed: &[PathBuf]) -> Result<PathBuf, PathError> {
    if stays_below(path) {
        for folder in allowed {
            let Ok(root) = folder.canonicalize() else {
                continue;
            };
            match root.join(path).canonicalize() {
                Ok(found) if found.starts_with(&root) => return Ok(found),
                _ => {}
            }
        }
    }
    Err(PathError::Outside {
        path: path.to_owned(),
        allowed: allowed.to_vec(),
    })
}

/// The prompts of a text file: one on each line, empty lines left out, each only once.
///
/// # Errors
/// If it cannot be read, is too large or no text, or a line is too long or holds a control character.
pub fn read_prompts(path: &Path) -> Result<Vec<String>, PathError> {
    let failed = |source| PathError::Io {
        path: path.to_owned(),
        source,
    };
    let refuse = |what: String| PathError::Content {
        path: path.to_owned(),
        what,
    };
    // Opening a pipe would wait for someone who writes.
    if !path.metadata().map_err(failed)?.is_file() {
        return Err(refuse("is no plain file".to_owned()));
    }
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_FILE + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(refuse(format!("has more than {MAX_FILE} bytes")));
    }
    let (mut seen, mut prompts) = (BTreeSet::new(), Vec::new());
    for (number, line) in text.lines().enumerate() {
        let prompt = line.trim();
        if prompt.is_empty() {
            continue;
        }
        if prompt.len() > MAX_PROMPT || prompt.chars().any(char::is_control) {
            return Err(refuse(format!(
                "line {} must have at most {MAX_PROMPT} printable characters",
                number + 1
            )));
        }
        if seen.insert(prompt) {
            prompts.push(prompt.to_owned());
        }
        if prompts.len() > MAX_PROMPTS {
            return Err(refuse(format!("has more than {MAX_PROMPTS} prompts")));
        }
    }
    if prompts.is_empty() {
        return Err(refuse("holds no prompt".to_owned()));
    }
    Ok(prompts)
}

/// Makes sure that no prompt is on both sides.
///
/// # Errors
/// The first that is.
pub fn check_apart(trained: &[String], held_out: &[String]) -> Result<(), PathError> {
    let trained: BTreeSet<&String> = trained.iter().collect();
    match held_out.iter().find(|prompt| trained.contains(prompt)) {
        Some(prompt) => Err(PathError::NotHeldOut(prompt.clone())),
        None => Ok(()),
    }
}

/// What an item draws: the prompts are gone through in an order of each iteration's own, again and again.
///
/// # Panics
/// If there are no prompts.
pub fn prompt_of(prompts: &[String], job: Seed, iteration: u32, item: u32) -> &str {
    let round = item as usize / prompts.len();
    let seed = job.derive(&format!("artaug prompts {iteration} {round}"));
    &prompts[order(prompts.len(), seed)[item as usize % prompts.len()]]
}

/// An order of prompts and the seed that it comes from.
type Shuffled = (Seed, Rc<[usize]>);

thread_local! {
    /// What this thread asked for last: one item after another wants the same order, several times, and a list may have a million prompts.
    static LAST: RefCell<Option<Shuffled>> = const { RefCell::new(None) };
}

/// The numbers below `count` as a seed shuffles them.
fn order(count: usize, seed: Seed) -> Rc<[usize]> {
    LAST.with_borrow_mut(|last| {
        if let Some((of, order)) = last
            && *of == seed
            && order.len() == count
        {
            return Rc::clone(order);
        }
        let mut order: Vec<usize> = (0..count).collect();
        seed.rng().shuffle(&mut order);
        let order: Rc<[usize]> = order.into();
        *last = Some((seed, Rc::clone(&order)));
        order
    })
}

/// The seed of an item's noise. Base and enhanced image share it.
pub fn image_seed(job: Seed, iteration: u32, item: u32) -> Seed {
    job.derive(&format!("artaug image {iteration} {item}"))
}

/// The seed of a held-out image: the same for every arm and iteration.
pub fn held_out_seed(job: Seed, item: u32) -> Seed {
    job.derive(&format!("artaug held out {item}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    fn file(text: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn a_path_is_found_below_an_allowed_folder_only() {
        let (allowed, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir_all(allowed.path().join("models/a")).unwrap();
        std::fs::write(outside.path().join("secret"), "s").unwrap();
        symlink(outside.path(), allowed.path().join("link")).unwrap();
        symlink(allowed.path().join("models"), allowed.path().join("inside")).unwrap();
        let roots = [outside.path().join("missing"), allowed.path().to_owned()];
        let expected = allowed.path().canonicalize().unwrap().join("models/a");
        assert_eq!(resolve("models/a", &roots).unwrap(), expected);
        assert_eq!(resolve("inside/a", &roots).unwrap(), expected);
        let absolute = outside.path().join("secret");
        for path in [
            "link/secret",
            "../x",
            "models/b",
            absolute.to_str().unwrap(),
            "",
        ] {
            let error = resolve(path, &roots).unwrap_err().to_string();
            assert!(error.contains("not below"), "{error}");
        }
        assert!(
            resolve("a", &[])
                .unwrap_err()
                .to_string()
                .contains("none is set")
        );
    }

    #[test]
    fn a_file_gives_each_prompt_once_in_order() {
        let file = file(b"red apple\n\n  blue car \r\nred apple\n");
        assert_eq!(
            read_prompts(file.path()).unwrap(),
            ["red apple", "blue car"]
        );
    }

    #[test]
    fn a_file_that_is_no_list_of_prompts_is_refused() {
        let long = format!("ok\n{}", "a".repeat(MAX_PROMPT + 1));
        for (text, what) in [
            (b"".as_slice(), "no prompt"),
            (b"\n\n", "no prompt"),
            (b"a\nb\x1b[2J", "line 2"),
            (long.as_bytes(), "line 2"),
            (&[0xFF, 0xFE], "UTF-8"),
        ] {
            let file = file(text);
            let error = read_prompts(file.path()).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        assert!(read_prompts(Path::new("/nonexistent/prompts")).is_err());
        let error = read_prompts(Path::new("/dev/null")).unwrap_err();
        assert!(error.to_string().contains("no plain file"), "{error}");
    }

    #[test]
    fn a_prompt_on_both_sides_is_named() {
        let list =
            |texts: &[&str]| -> Vec<String> { texts.iter().map(ToString::to_string).collect() };
        assert!(check_apart(&list(&["a", "b"]), &list(&["c"])).is_ok());
        let error = check_apart(&list(&["a", "b"]), &list(&["c", "b"])).unwrap_err();
        assert!(error.to_string().contains("`b`"));
    }

    #[test]
    fn every_prompt_is_drawn_once_in_each_round() {
        let prompts: Vec<String> = (0..5).map(|number| number.to_string()).collect();
        let drawn = |iteration, items: std::ops::Range<u32>| -> Vec<&str> {
            items
                .map(|item| prompt_of(&prompts, Seed(1), iteration, item))
                .collect()
        };
        for (iteration, items) in [(1, 0..5), (1, 5..10), (2, 0..5)] {
            assert_eq!(
                drawn(iteration, items)
                    .into_iter()
                    .collect::<BTreeSet<_>>()
                    .len(),
                5
            );
        }
        assert_eq!(drawn(1, 0..10), drawn(1, 0..10));
        assert!(drawn(1, 0..5) != drawn(1, 5..10) || drawn(1, 0..5) != drawn(2, 0..5));
    }

    #[test]
    fn an_order_is_made_once_for_all_items_that_follow_it() {
        let first = order(1000, Seed(1));
        assert!(Rc::ptr_eq(&first, &order(1000, Seed(1))));
        for (count, seed) in [(1000, Seed(2)), (999, Seed(2)), (1000, Seed(1))] {
            let mut expected: Vec<usize> = (0..count).collect();
            seed.rng().shuffle(&mut expected);
            assert_eq!(order(count, seed)[..], expected);
        }
    }

    #[test]
    fn the_prompt_of_an_item_never_changes() {
        let prompts: Vec<String> = (0..7).map(|number| number.to_string()).collect();
        let drawn: Vec<&str> = (0..14)
            .map(|item| prompt_of(&prompts, Seed(1), 1, item))
            .collect();
        assert_eq!(drawn.concat(), "43105620234516");
        assert_eq!(prompt_of(&prompts, Seed(1), 2, 3), "6");
    }

    #[test]
    fn seeds_differ_by_item_and_iteration_and_held_out_ones_stay() {
        let seeds: BTreeSet<u64> = (1..4)
            .flat_map(|iteration| (0..50).map(move |item| image_seed(Seed(9), iteration, item).0))
            .chain((0..50).map(|item| held_out_seed(Seed(9), item).0))
            .collect();
        assert_eq!(seeds.len(), 200);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_crash_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let file = file(&bytes);
            let _ = read_prompts(file.path());
        }
    }
}
