//! The manifest: one JSON line for every item of an iteration, with all that is known of it; and the same for its held-out images.

use serde::{Deserialize, Serialize};

use super::{Advised, Arm, Evaluated, Generated, Machine, Regenerated, Scored};
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

/// A held-out image of an arm, with what it was drawn from and all its scores.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeldOutLine<'a> {
    /// The iteration, from 1.
    pub iteration: u32,
    /// Which model and prompt.
    pub arm: Arm,
    /// The held-out prompt, from 0.
    pub item: u32,
    /// What came out.
    #[serde(flatten)]
    pub result: &'a Evaluated,
}

impl Machine {
    /// The held-out images that were drawn in the iteration under way. Those of the base and of prompt rewriting are drawn in the first one and stay.
    pub fn held_out(&self) -> impl Iterator<Item = HeldOutLine<'_>> {
        let is_drawn_now =
            |arm: Arm| self.iteration == 1 || matches!(arm, Arm::Enhanced | Arm::PlainLora);
        let arms = self.arms.iter().filter(move |(arm, _)| is_drawn_now(**arm));
        arms.flat_map(|(arm, judged)| {
            judged.items.iter().map(|(item, result)| HeldOutLine {
                iteration: self.iteration,
                arm: *arm,
                item: *item,
                result,
            })
        })
    }

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
