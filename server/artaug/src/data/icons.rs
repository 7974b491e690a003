//! Icon sets in the layout of the iconify packages: one JSON file of SVG bodies by name.

use std::collections::BTreeMap;

use concord_common::seed::Seed;
use serde::Deserialize;

use super::DataError;

/// Longest file of a set.
pub const MAX_ICON_FILE: usize = 64 << 20;
/// Widest view box that is drawn.
const MAX_VIEW: f64 = 4096.0;

/// A drawing with a name.
#[derive(Debug, Clone, PartialEq)]
pub struct Icon {
    /// The set, which is its style.
    pub set: String,
    /// Its name there, such as `red-apple`; the same subject has the same name in every set.
    pub name: String,
    /// The inside of its `<svg>` element.
    pub body: String,
    /// Width and height of its view box.
    pub view: (f64, f64),
}

/// Which part of the data a subject belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Models see it in training.
    Training,
    /// Kept for evaluation, in every style.
    HeldOut,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    width: Option<f64>,
    #[serde(default)]
    height: Option<f64>,
    icons: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    body: String,
    #[serde(default)]
    width: Option<f64>,
    #[serde(default)]
    height: Option<f64>,
    #[serde(default)]
    hidden: bool,
}

impl Icon {
    /// The name as words: "red apple".
    pub fn subject(&self) -> String {
        self.name.replace(['-', '_'], " ")
    }

    /// The part of the data that its subject belongs to, by a hash of the name: the same in every set and at every time.
    pub fn split(&self, held_out: f64, seed: Seed) -> Split {
        let draw = seed
            .derive(&format!("artaug split {}", self.name))
            .rng()
            .uniform();
        if draw < held_out {
            Split::HeldOut
        } else {
            Split::Training
        }
    }
}

/// The icons of a set in the order of their names, without hidden ones and without variants by skin tone.
///
/// # Errors
/// If the text is no such file, or has no icon.
pub fn read_icons(set: &str, json: &[u8]) -> Result<Vec<Icon>, DataError> {
    let refuse = |what: String| DataError::Set {
        set: set.to_owned(),
        what,
    };
    if json.len() > MAX_ICON_FILE {
        return Err(refuse(format!("has more than {MAX_ICON_FILE} bytes")));
    }
    let file: File = serde_json::from_slice(json).map_err(|error| refuse(error.to_string()))?;
    let side = |own: Option<f64>, common: Option<f64>| {
        let side = own.or(common).unwrap_or(16.0); // iconify's default
        (side > 0.0 && side <= MAX_VIEW).then_some(side)
    };
    let mut icons = Vec::new();
    for (name, entry) in &file.icons {
        if entry.hidden || is_variant(name, &file.icons) {
            continue;
        }
        let view = side(entry.width, file.width).zip(side(entry.height, file.height));
        icons.push(Icon {
            set: set.to_owned(),
            name: name.clone(),
            body: entry.body.clone(),
            view: view.ok_or_else(|| refuse(format!("the icon {name} has no usable size")))?,
        });
    }
    if icons.is_empty() {
        return Err(refuse("holds no icon".to_owned()));
    }
    Ok(icons)
}

/// Whether a name is that of another icon with a skin tone.
fn is_variant(name: &str, icons: &BTreeMap<String, Entry>) -> bool {
    let numbered = |part: &str| {
        part.strip_prefix("tone")
            .is_some_and(|n| n.parse::<u8>().is_ok())
    };
    if name.contains("skin-tone") || name.split('-').any(numbered) {
        return true;
    }
    [
        "-medium-light",
        "-medium-dark",
        "-light",
        "-medium",
        "-dark",
    ]
    .iter()
    .filter_map(|tone| name.strip_suffix(tone))
    .any(|base| icons.contains_key(base))
}
