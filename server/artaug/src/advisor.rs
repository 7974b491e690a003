//! The understanding model: it looks at an image and says which regions would be better under which prompt.

pub mod chat;
mod parse;
mod rewrite;
mod rules;
mod template;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub(crate) use self::parse::json_values;
pub use self::{
    parse::{BoxConvention, MAX_REPLY_BYTES, ParsedReply, RejectedRegion, ReplyError, parse_reply},
    rewrite::rewrite,
    rules::{RuleAdvisor, RuleSettings},
    template::{TEMPLATE_VERSION, reply_schema, system_text, user_text},
};
use crate::{endpoint::EndpointError, image::Image, region::Area};

/// Longest prompt of a region in characters.
pub const MAX_REGION_PROMPT: usize = 240;
/// Most regions of one image, whoever advises.
pub const MAX_REGIONS: usize = 16;

/// A prompt for a region: 1 to [`MAX_REGION_PROMPT`] plain characters on one line. Nothing else passes from an understanding
/// model to the engine, because text drawn inside an image may have told that model what to say.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RegionPrompt(String);

/// Why a text is no prompt for a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPrompt {
    /// Nothing but blanks.
    #[error("the prompt is empty")]
    Empty,
    /// Too long.
    #[error("the prompt has {0} characters, at most {MAX_REGION_PROMPT} are allowed")]
    Long(usize),
    /// A character that a description does not need.
    #[error(
        "the prompt holds the character {0:?}; letters, digits, blanks and . , ; ' - ( ) % are allowed"
    )]
    Character(char),
}

impl RegionPrompt {
    /// Checks a text: typographic quotes and dashes become plain ones, runs of blanks one blank.
    ///
    /// # Errors
    /// If it is empty, too long or holds another character than letters (Latin), digits, blanks and `. , ; ' - ( ) %`.
    pub fn new(text: &str) -> Result<Self, InvalidPrompt> {
        let plain: String = text.chars().map(plain).collect();
        let prompt = plain.split_whitespace().collect::<Vec<_>>().join(" ");
        let length = prompt.chars().count();
        if length == 0 {
            return Err(InvalidPrompt::Empty);
        }
        if length > MAX_REGION_PROMPT {
            return Err(InvalidPrompt::Long(length));
        }
        match prompt.chars().find(|character| !allowed(*character)) {
            Some(character) => Err(InvalidPrompt::Character(character)),
            None => Ok(Self(prompt)),
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn plain(character: char) -> char {
    match character {
        '\u{2018}' | '\u{2019}' | '\u{201C}' | '\u{201D}' | '"' => '\'',
        '\u{2010}'..='\u{2015}' => '-',
        '\n' | '\r' | '\t' | '\u{a0}' => ' ',
        other => other,
    }
}

fn allowed(character: char) -> bool {
    let latin_letter = character.is_alphabetic() && character < '\u{250}';
    latin_letter || character.is_ascii_digit() || " .,;'-()%".contains(character)
}

impl TryFrom<String> for RegionPrompt {
    type Error = InvalidPrompt;

    fn try_from(text: String) -> Result<Self, InvalidPrompt> {
        Self::new(&text)
    }
}

impl From<RegionPrompt> for String {
    fn from(prompt: RegionPrompt) -> Self {
        prompt.0
    }
}

/// One piece of advice.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Where.
    #[serde(rename = "box")]
    pub area: Area,
    /// What should be seen there; a prompt, not an editing command.
    pub prompt: RegionPrompt,
    /// How sure the advisor is, 0..1.
    pub confidence: f64,
}

/// An answer of an understanding model that was not used, kept as it came.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RejectedReply {
    /// The text, cut where it would make a line of the journal too long.
    pub raw: String,
    /// Short name of the reason, for counting.
    pub code: String,
    /// The reason in words.
    pub reason: String,
}

/// What an advisor answered about one image.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Advice {
    /// The regions to change, the surest first; none means that the image is good as it is.
    pub regions: Vec<Region>,
    /// The answer that they come from, as it came; none for advisors that speak no text.
    pub raw: Option<String>,
    /// Regions of that answer that were left out, with the reason.
    pub rejected_regions: Vec<RejectedRegion>,
    /// Answers that could not be used at all, in order.
    pub rejected_replies: Vec<RejectedReply>,
    /// What it cost.
    pub usage: Usage,
}

/// Rejected replies of one advice whose texts are kept: as many as one question may be tried. More come together when an endpoint goes
/// away in the middle and the question is asked again.
const MAX_TEXTS: usize = 10;

impl Advice {
    /// Adds what unfinished questions before this one brought: replies that could not be used, and what they cost. All of them count; of the
    /// oldest beyond ten the texts are dropped, so that the advice fits a line of the journal.
    pub fn add_before(&mut self, earlier: Self) {
        self.usage += earlier.usage;
        let later = std::mem::replace(&mut self.rejected_replies, earlier.rejected_replies);
        self.rejected_replies.extend(later);
        for reply in self.rejected_replies.iter_mut().rev().skip(MAX_TEXTS) {
            reply.raw.clear();
        }
    }
}

/// What advice cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Usage {
    /// Calls sent, failed ones included.
    pub calls: u64,
    /// Tokens read, as the endpoint counts them; 0 if it does not.
    pub prompt_tokens: u64,
    /// Tokens written.
    pub reply_tokens: u64,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.calls = self.calls.saturating_add(other.calls);
        self.prompt_tokens = self.prompt_tokens.saturating_add(other.prompt_tokens);
        self.reply_tokens = self.reply_tokens.saturating_add(other.reply_tokens);
    }
}

/// What an advisor is asked about.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The image.
    pub image: &'a Image,
    /// The prompt that it was made from.
    pub prompt: &'a str,
    /// Most regions wanted.
    pub max_regions: usize,
}

/// Why there is no advice.
#[derive(Debug, thiserror::Error)]
pub enum AdvisorError {
    /// This image got no usable answer; others may. It is recorded with the item and the job goes on.
    #[error("no usable answer in {} tries; the last: {}", .0.rejected_replies.len(), last_reason(.0))]
    NoUsableReply(Box<Advice>),
    /// The advisor cannot be asked at all now; the job waits or fails.
    #[error("the understanding model cannot be asked: {source}")]
    Unavailable {
        /// What happened.
        source: EndpointError,
        /// What it answered and cost before, without a region; to be added to the next answer with [`Advice::add_before`].
        so_far: Box<Advice>,
    },
    /// The image cannot be packed for sending.
    #[error(transparent)]
    Image(#[from] crate::image::ImageError),
}

impl From<EndpointError> for AdvisorError {
    fn from(source: EndpointError) -> Self {
        let so_far = Box::default();
        Self::Unavailable { source, so_far }
    }
}

fn last_reason(advice: &Advice) -> &str {
    advice
        .rejected_replies
        .last()
        .map_or("none was received", |reply| reply.reason.as_str())
}

/// Something that gives advice on images. Calls may come from several threads and may block; never from an async task.
pub trait Advisor: Send + Sync {
    /// Name and version, for the manifest and the model card.
    fn name(&self) -> String;

    /// Looks at one image.
    ///
    /// # Errors
    /// [`AdvisorError::NoUsableReply`] for this image alone, the others for the advisor as a whole.
    fn advise(&self, question: &Question<'_>) -> Result<Advice, AdvisorError>;
}
