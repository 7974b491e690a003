//! The manifest: one JSON line for every item of an iteration, with all that is known of it.

use serde::{Deserialize, Serialize};

use super::{Advised, Generated, Machine, Regenerated, Scored};
use crate::filter::Verdict;

/// One item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestLine {
    /// The iteration, from 1.
    pub iteration: u32,
    /// The item, from 0.
    pub item: u32,
    /// Prompt, seed and base image.
    pub base: Option<Generated>,
    /// The advisor's raw answer, parsed regions, rejected answers and the error, if so.
    pub advice: Option<Advised>,
    /// The enhanced image.
    pub enhanced: Option<Regenerated>,
    /// The filter scores of both.
    pub scores: Option<Scored>,
    /// Kept, or the reason why not.
    pub verdict: Option<Verdict>,
}

impl Machine {
    /// The manifest of the iteration under way, complete once the filter (and the review) are through. It is rewritten from the
    /// journal, so it cannot be torn.
    pub fn manifest(&self) -> impl Iterator<Item = ManifestLine> {
        self.items.iter().map(|(number, item)| ManifestLine {
            iteration: self.iteration,
            item: *number,
            base: item.generated.clone(),
            advice: item.advised.clone(),
            enhanced: item.regenerated.clone(),
            scores: item.scored.clone(),
            verdict: item.verdict.clone(),
        })
    }
}
