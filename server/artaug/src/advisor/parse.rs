//! Reads the answers of understanding models: tolerant of their habits (code fences, prose around, trailing commas, other names
//! for the same thing), strict in what passes on. Every answer is hostile until read: bounded work, no panic, nothing but boxes
//! and plain prompts comes out.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{InvalidPrompt, MAX_REGIONS, Region, RegionPrompt};
use crate::region::Area;

/// Longest answer that is read, in bytes.
pub const MAX_REPLY_BYTES: usize = 64 << 10;
/// Places at which a JSON value is tried; prose holds few braces.
const MAX_STARTS: usize = 64;
/// How far outside the image a box may reach before it is taken for another convention, in parts of the image.
const SLACK: f64 = 0.05;
/// A box must cover this part of the image.
const LEAST_SHARE: f64 = 1e-3;

/// How an understanding model writes its boxes. It is declared, told to the model, and checked; it is never guessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BoxConvention {
    /// Fractions of the sides, 0 to 1.
    Fraction,
    /// Pixels of the image as sent.
    Pixel,
    /// Thousandths of the sides, 0 to 1000.
    Thousand,
}

impl BoxConvention {
    /// What stands for the far edge of an image, horizontally and vertically.
    pub fn full(self, width: u32, height: u32) -> (f64, f64) {
        match self {
            Self::Fraction => (1.0, 1.0),
            Self::Pixel => (f64::from(width), f64::from(height)),
            Self::Thousand => (1000.0, 1000.0),
        }
    }
}

/// Why an answer as a whole cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// More bytes than are read.
    #[error("the answer has {0} bytes, at most {MAX_REPLY_BYTES} are read")]
    Long(usize),
    /// No JSON in it.
    #[error("the answer holds no JSON value that could be read")]
    NoJson,
    /// JSON without a list of regions.
    #[error("the answer's JSON holds no list of regions")]
    NoRegions,
    /// Every region was wrong.
    #[error("none of the answer's {count} regions can be used; the first: {first}")]
    AllRejected {
        /// Regions in the answer.
        count: usize,
        /// What was wrong with the first.
        first: RejectedRegion,
    },
}

impl ReplyError {
    /// Short name, for counting.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Long(_) => "long",
            Self::NoJson => "no-json",
            Self::NoRegions => "no-regions",
            Self::AllRejected { .. } => "all-regions-rejected",
        }
    }
}

/// Why one region was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum RejectedRegion {
    /// Not an object.
    #[error("a region is no object")]
    NoObject,
    /// No four finite numbers.
    #[error("a region has no box of four numbers")]
    NoBox,
    /// Outside what was declared.
    #[error("a box is not in the declared convention")]
    Convention,
    /// Turned over, or too small to matter.
    #[error("a box is empty or turned over")]
    EmptyBox,
    /// No prompt.
    #[error("a region has no prompt")]
    NoPrompt,
    /// A prompt that may not pass.
    #[error("{0}")]
    Prompt(String),
    /// A confidence outside 0..1.
    #[error("a confidence is no number from 0 to 1")]
    Confidence,
    /// More regions than were asked for.
    #[error("more regions than were asked for")]
    TooMany,
}

impl From<InvalidPrompt> for RejectedRegion {
    fn from(error: InvalidPrompt) -> Self {
        Self::Prompt(error.to_string())
    }
}

/// What an answer said.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ParsedReply {
    /// The regions that may pass, the surest first.
    pub regions: Vec<Region>,
    /// Those left out.
    pub rejected: Vec<RejectedRegion>,
}

/// Reads an answer about an image of `width` x `height` pixels whose boxes were declared to follow `convention`.
///
/// # Errors
/// If nothing of it can be used. An answer with an empty list is a good answer: nothing to improve.
pub fn parse_reply(
    text: &str,
    convention: BoxConvention,
    (width, height): (u32, u32),
    max_regions: usize,
) -> Result<ParsedReply, ReplyError> {
    if text.len() > MAX_REPLY_BYTES {
        return Err(ReplyError::Long(text.len()));
    }
    let full = convention.full(width, height);
    let listed = find_list(text)?;
    let count = listed.len();
    let mut parsed = ParsedReply::default();
    for value in listed {
        if parsed.rejected.len() >= MAX_REGIONS {
            break; // A list of thousands of wrong regions says no more than one of a few.
        }
        match read_region(&value, full) {
            Ok(region) => parsed.regions.push(region),
            Err(rejected) => parsed.rejected.push(rejected),
        }
    }
    // Models write them in any order. Equally sure ones stay in theirs.
    parsed
        .regions
        .sort_by(|first, second| second.confidence.total_cmp(&first.confidence));
    let wanted = max_regions.min(MAX_REGIONS).min(parsed.regions.len());
    let surplus = parsed
        .regions
        .drain(wanted..)
        .map(|_| RejectedRegion::TooMany);
    let room = MAX_REGIONS - parsed.rejected.len();
    parsed.rejected.extend(surplus.take(room));
    if parsed.regions.is_empty()
        && let Some(first) = parsed.rejected.first()
    {
        return Err(ReplyError::AllRejected {
            count,
            first: first.clone(),
        });
    }
    Ok(parsed)
}

/// The last list of regions in the text, whatever stands around it: models that think aloud write drafts first.
fn find_list(text: &str) -> Result<Vec<Value>, ReplyError> {
    if is_empty_list(text) {
        return Ok(Vec::new());
    }
    let mut found_json = false;
    json_values(text, |value| {
        found_json = true;
        regions_of(value)
    })
    .ok_or(if found_json {
        ReplyError::NoRegions
    } else {
        ReplyError::NoJson
    })
}

/// Whether a text is `[]` and nothing else, be it in a code fence: so models that were sent no schema say that nothing is to be improved.
/// With prose around it may mean anything.
fn is_empty_list(text: &str) -> bool {
    let text = text.trim();
    let fenced = text
        .strip_prefix("```")
        .and_then(|rest| rest.strip_suffix("```"));
    fenced
        .map_or(text, |inside| {
            // The language, which most models name.
            let inside = inside.trim_start();
            inside.trim_start_matches(|character: char| character.is_ascii_alphanumeric())
        })
        .trim()
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .is_some_and(|inside| inside.trim().is_empty())
}

/// What `read` makes of the last JSON value in the text that it can use. Values inside one that it cannot use are tried too.
pub(crate) fn json_values<T>(text: &str, mut read: impl FnMut(Value) -> Option<T>) -> Option<T> {
    let (mut found, mut next) = (None, 0);
    for _ in 0..MAX_STARTS {
        let Some(offset) = text[next..].find(['{', '[']) else {
            break;
        };
        let start = next + offset;
        next = start + 1;
        if let Some(length) = balanced(&text[start..])
            && let Some(value) = read_json(&text[start..start + length])
            && let Some(used) = read(value)
        {
            found = Some(used);
            next = start + length;
        }
    }
    found
}

/// Bytes up to the bracket that closes the first one, brackets inside strings not counted.
fn balanced(text: &str) -> Option<usize> {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (place, byte) in text.bytes().enumerate() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth -= 1; // The first byte opened one.
                if depth == 0 {
                    return Some(place + 1);
                }
            }
            _ => {}
        }
    }
    None
}

/// JSON as it stands, or without its trailing commas.
fn read_json(text: &str) -> Option<Value> {
    serde_json::from_str(text)
        .or_else(|_| serde_json::from_str(&without_trailing_commas(text)))
        .ok()
}

fn without_trailing_commas(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let (mut in_string, mut escaped) = (false, false);
    // Where a comma outside strings was written that may turn out to trail.
    let mut comma: Option<usize> = None;
    for character in text.chars() {
        if in_string {
            match character {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => in_string = false,
                _ => {}
            }
        } else {
            match character {
                '"' => {
                    in_string = true;
                    comma = None;
                }
                ',' => comma = Some(kept.len()),
                '}' | ']' => {
                    if let Some(place) = comma.take() {
                        kept.truncate(place);
                    }
                }
                _ if character.is_whitespace() => {}
                _ => comma = None,
            }
        }
        kept.push(character);
    }
    kept
}

/// The list of regions in a value: the value itself, or under one of the usual names.
fn regions_of(value: Value) -> Option<Vec<Value>> {
    match value {
        // A bare list counts if it holds something with a box: other lists may stand in the prose.
        Value::Array(list) => {
            let has_box = |value: &Value| {
                value
                    .as_object()
                    .is_some_and(|o| field(o, BOX_NAMES).is_some())
            };
            list.iter().any(has_box).then_some(list)
        }
        Value::Object(mut object) => {
            for name in ["regions", "advice", "areas", "boxes"] {
                if let Some(Value::Array(list)) = object.remove(name) {
                    return Some(list);
                }
            }
            // A single region without a list around it.
            let single =
                field(&object, BOX_NAMES).is_some() && field(&object, PROMPT_NAMES).is_some();
            single.then(|| vec![Value::Object(object)])
        }
        _ => None,
    }
}

const BOX_NAMES: &[&str] = &["box", "bbox", "bbox_2d", "box_2d", "bounding_box"];
const PROMPT_NAMES: &[&str] = &[
    "prompt",
    "modification",
    "modification_prompt",
    "description",
];
const CONFIDENCE_NAMES: &[&str] = &["confidence", "score"];

fn field<'a>(object: &'a Map<String, Value>, names: &[&str]) -> Option<&'a Value> {
    names.iter().find_map(|name| object.get(*name))
}

fn read_region(value: &Value, full: (f64, f64)) -> Result<Region, RejectedRegion> {
    let object = value.as_object().ok_or(RejectedRegion::NoObject)?;
    let edges = field(object, BOX_NAMES)
        .and_then(read_edges)
        .ok_or(RejectedRegion::NoBox)?;
    let area = read_area(edges, full)?;
    let text = field(object, PROMPT_NAMES)
        .and_then(Value::as_str)
        .ok_or(RejectedRegion::NoPrompt)?;
    let prompt = RegionPrompt::new(text)?;
    let confidence = match field(object, CONFIDENCE_NAMES) {
        // Models leave it out more often than anything else; half sure, then.
        None | Some(Value::Null) => 0.5,
        Some(value) => value
            .as_f64()
            .filter(|confidence| (0.0..=1.0).contains(confidence))
            .ok_or(RejectedRegion::Confidence)?,
    };
    Ok(Region {
        area,
        prompt,
        confidence,
    })
}

/// Left, top, right and bottom from a list of four numbers or an object that names them.
fn read_edges(value: &Value) -> Option<[f64; 4]> {
    let number = |value: &Value| value.as_f64().filter(|number| number.is_finite());
    match value {
        Value::Array(list) => {
            let numbers: Option<Vec<f64>> = list.iter().take(5).map(number).collect();
            numbers?.try_into().ok()
        }
        Value::Object(object) => [
            ["left", "x1"],
            ["top", "y1"],
            ["right", "x2"],
            ["bottom", "y2"],
        ]
        .map(|names| field(object, &names).and_then(number))
        .into_iter()
        .collect::<Option<Vec<f64>>>()?
        .try_into()
        .ok(),
        _ => None,
    }
}

/// Divides by what the full sides are written as, refuses what cannot be in that convention, clamps the rest to the image.
fn read_area(
    edges: [f64; 4],
    (full_width, full_height): (f64, f64),
) -> Result<Area, RejectedRegion> {
    let [left, top, right, bottom] = edges;
    let fractions = [
        left / full_width,
        top / full_height,
        right / full_width,
        bottom / full_height,
    ];
    if fractions
        .iter()
        .any(|edge| !(-SLACK..=1.0 + SLACK).contains(edge))
    {
        return Err(RejectedRegion::Convention);
    }
    let [left, top, right, bottom] = fractions.map(|edge| edge.clamp(0.0, 1.0));
    let area = Area::new(left, top, right, bottom).map_err(|_| RejectedRegion::EmptyBox)?;
    if area.share() < LEAST_SHARE {
        return Err(RejectedRegion::EmptyBox);
    }
    Ok(area)
}
