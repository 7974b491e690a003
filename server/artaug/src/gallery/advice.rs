//! What was advised most: advice that is the same for nearly every image says little about any of them.

use std::{collections::BTreeMap, fmt::Write as _};

use super::escape;
use crate::machine::ManifestLine;

/// Most rows of the table.
const ROWS: usize = 10;
/// Different pieces of advice that are counted; what comes new after so many is not frequent.
const COUNTED: usize = 10_000;

/// How often which advice was given, over all iterations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdviceCounts {
    /// Pairs that were advised on, with whatever answer.
    pub pairs: usize,
    /// Those with a region at least.
    pub with_regions: usize,
    /// Pairs by words and box.
    counts: BTreeMap<(String, String), usize>,
}

impl AdviceCounts {
    /// Counts the advice of an iteration.
    pub fn add(&mut self, lines: &[ManifestLine]) {
        for line in lines {
            let (Some(base), Some(advised)) = (&line.base, &line.advice) else {
                continue;
            };
            self.pairs += 1;
            self.with_regions += usize::from(advised.regions().is_some_and(|count| count > 0));
            let mut given: Vec<(String, String)> = advised
                .advice
                .regions
                .iter()
                .map(|region| {
                    let words = beside(&base.prompt, region.prompt.as_str());
                    let edges = region.area.edges().map(|edge| format!("{edge:.2}"));
                    (words.to_owned(), edges.join(" "))
                })
                .collect();
            given.sort();
            given.dedup();
            for advice in given {
                if self.counts.len() < COUNTED || self.counts.contains_key(&advice) {
                    *self.counts.entry(advice).or_default() += 1;
                }
            }
        }
    }

    /// Words and boxes that more than one pair got, the most frequent first.
    fn most(&self) -> Vec<(&(String, String), usize)> {
        let counts = self.counts.iter().map(|(advice, pairs)| (advice, *pairs));
        let mut most: Vec<_> = counts.filter(|(_, pairs)| *pairs > 1).collect();
        most.sort_by_key(|(_, pairs)| std::cmp::Reverse(*pairs));
        most.truncate(ROWS);
        most
    }

    /// The part of the page; nothing if there was no advice.
    pub(super) fn show(&self, page: &mut String) {
        if self.pairs == 0 {
            return;
        }
        let _ = writeln!(
            page,
            "<h2>Advice</h2>\n<p class=\"small\">{} of {} pairs got advice. Advice that nearly all of them get says little about any.</p>",
            self.with_regions, self.pairs
        );
        let most = self.most();
        if most.is_empty() {
            return;
        }
        page.push_str("<table><tr><th>what was advised most, beside the prompt</th><th>box: left, top, right, bottom</th><th>pairs</th></tr>\n");
        for ((words, area), pairs) in most {
            let _ = writeln!(
                page,
                "<tr><td>{}</td><td>{area}</td><td>{pairs} ({:.0} %)</td></tr>",
                escape(words),
                100.0 * pairs as f64 / self.pairs as f64
            );
        }
        page.push_str("</table>\n");
    }
}

/// What a region's text says beside the pair's own prompt; all of it if it does not begin with that.
fn beside<'a>(prompt: &str, text: &'a str) -> &'a str {
    text.strip_prefix(prompt)
        .map(|rest| rest.trim_start_matches([',', ' ']))
        .filter(|rest| !rest.is_empty())
        .unwrap_or(text)
}
