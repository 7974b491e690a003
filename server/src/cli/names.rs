//! Names that a server gives to files: which of them stay below a folder, and which an operator asked for.

use std::{collections::BTreeSet, path::PathBuf};

/// Longest name in bytes, as the protocol says.
const MAX_NAME: usize = 200;

/// The relative path that a name stands for: plain words separated by `/`.
///
/// # Errors
/// What is wrong with it.
pub(super) fn relative(name: &str) -> Result<PathBuf, &'static str> {
    if name.is_empty() {
        return Err("it is empty");
    }
    if name.len() > MAX_NAME {
        return Err("it is longer than 200 bytes");
    }
    let mut path = PathBuf::new();
    for part in name.split('/') {
        match part.as_bytes().first() {
            None => return Err("a part of it is empty"),
            Some(b'.' | b'-') => return Err("a part of it begins with a dot or a dash"),
            Some(_) => {}
        }
        if !part
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        {
            return Err(
                "it has characters other than letters, digits, dots, dashes and underscores",
            );
        }
        path.push(part);
    }
    Ok(path)
}

/// The first name that stands twice, or is a file and also the folder of another.
pub(super) fn clash<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    let mut files = BTreeSet::new();
    for name in names.clone() {
        if !files.insert(name) {
            return Some(name);
        }
    }
    names
        .flat_map(|name| name.match_indices('/').map(|(end, _)| &name[..end]))
        .find(|folder| files.contains(folder))
}

/// True if a pattern describes a whole name: `*` stands for any characters, `?` for one.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut read) = (0, 0);
    // The last star, and where in the name what comes after it was tried.
    let mut star: Option<(usize, usize)> = None;
    while read < name.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at, read));
                at += 1;
            }
            Some(wanted) if *wanted == '?' || *wanted == name[read] => {
                at += 1;
                read += 1;
            }
            _ => match star {
                Some((place, tried)) => {
                    star = Some((place, tried + 1));
                    (at, read) = (place + 1, tried + 1);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|rest| *rest == '*')
}

/// A text from elsewhere for a terminal: nothing in it can move the cursor, change colours or turn the writing around.
pub(super) fn plain(text: &str) -> String {
    text.chars()
        .map(|character| match character {
            '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' => '\u{FFFD}',
            other if other.is_control() => '\u{FFFD}',
            other => other,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_relative_names_are_taken() {
        for name in [
            "a",
            "lora/merged.safetensors",
            "fused/unet/config.json",
            "metrics_1-2.csv",
        ] {
            assert_eq!(relative(name), Ok(PathBuf::from(name)), "{name}");
        }
    }

    #[test]
    fn names_that_could_leave_the_folder_or_hide_in_it_are_refused() {
        for name in [
            "",
            "/etc/passwd",
            "..",
            "../x",
            "a/../../x",
            "a/./b",
            "a//b",
            "a/",
            ".ssh/authorized_keys",
            "a/.hidden",
            "-rf",
            "a\\b",
            "C:x",
            "a b",
            "a\nb",
            "a\0b",
            "\u{1b}[2Jx",
            "\u{e4}",
            &"x".repeat(201),
        ] {
            assert!(relative(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn two_names_for_one_file_are_found() {
        let clash_of = |names: &[&'static str]| clash(names.iter().copied());
        assert_eq!(clash_of(&["a", "b/c", "b/d"]), None);
        assert_eq!(clash_of(&["a", "b", "a"]), Some("a"));
        assert_eq!(clash_of(&["a/b/c", "a/b"]), Some("a/b"));
        assert_eq!(clash_of(&["a", "ab/c"]), None);
    }

    #[test]
    fn a_pattern_describes_the_whole_name() {
        for (pattern, name, expected) in [
            ("lora/*", "lora/merged.safetensors", true),
            ("*.safetensors", "lora/merged.safetensors", true),
            ("*merged*", "lora/merged.safetensors", true),
            ("metrics.???", "metrics.csv", true),
            ("metrics.???", "metrics.json", false),
            ("lora", "lora/x", false),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("?", "", false),
            ("a*b*c", "aXbXbXc", true),
            ("a*b*c", "aXbXbX", false),
            ("**a", "ba", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn a_patterns_time_grows_with_its_length_and_the_names_not_faster() {
        let name = "a".repeat(20_000);
        let pattern = "*a".repeat(50) + "b";
        let begin = std::time::Instant::now();
        assert!(!matches(&pattern, &name));
        assert!(begin.elapsed() < std::time::Duration::from_secs(5));
    }

    #[test]
    fn nothing_of_a_terminals_own_passes() {
        assert_eq!(
            plain("a\u{1b}[2Jb\u{202e}c\r\nd"),
            "a\u{fffd}[2Jb\u{fffd}c\u{fffd}\u{fffd}d"
        );
    }
}
