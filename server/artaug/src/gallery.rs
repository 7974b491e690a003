//! The HTML gallery: one file that shows itself without a network, a script or another file.
//!
//! Everything that a model, a prompt or a file brought is escaped; pictures are embedded as PNG.

mod advice;
mod chart;
mod of_job;
mod page;
mod review;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;

pub use self::{
    advice::AdviceCounts,
    of_job::{Extent, Fetch},
    review::{InvalidJob, ReviewPage},
};
use crate::{
    advisor::{Region, RejectedReply},
    image::{Image, ImageError},
    machine::{Arm, ArmSummary, Summary},
    photometry::Nearest,
    stats::Interval,
};

/// What the gallery shows, in the order of the page.
#[derive(Debug, Clone, Default)]
pub struct Gallery {
    /// Name of the job.
    pub title: String,
    /// What is to be said first: what is small or planted about the set-up, when it was made, versions.
    pub notes: Vec<String>,
    /// What the iterations came to.
    pub iterations: Vec<Summary>,
    /// What was advised how often.
    pub advice: AdviceCounts,
    /// Pairs, kept and rejected.
    pub pairs: Vec<PairView>,
    /// Held-out images at equal seeds.
    pub held_out: Vec<HeldOutView>,
    /// How many there are of what is shown in part.
    pub totals: Totals,
    /// Losses.
    pub curves: Vec<Curve>,
    /// What it cost: names and values as they are to be read.
    pub costs: Vec<(String, String)>,
}

/// Counts over all finished iterations; where fewer are shown, the page says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Kept pairs.
    pub kept: usize,
    /// Rejected pairs.
    pub rejected: usize,
    /// Held-out images of an arm.
    pub held_out: usize,
}

/// One pair.
#[derive(Debug, Clone)]
pub struct PairView {
    /// The iteration, from 1.
    pub iteration: u32,
    /// The item.
    pub item: u32,
    /// The prompt.
    pub prompt: String,
    /// The base image.
    pub base: Image,
    /// The enhanced image, if there is one.
    pub enhanced: Option<Image>,
    /// The advice.
    pub regions: Vec<Region>,
    /// Answers that could not be used.
    pub rejected_replies: Vec<RejectedReply>,
    /// Names and scores before and after.
    pub scores: Vec<(String, f64, f64)>,
    /// Whether it is trained on.
    pub kept: bool,
    /// Why not, or by how much it gained.
    pub verdict: String,
}

/// One held-out prompt under several arms.
#[derive(Debug, Clone)]
pub struct HeldOutView {
    /// The prompt.
    pub prompt: String,
    /// Number of the held-out image, from which the seed that all of them share is derived.
    pub number: u32,
    /// The images with the name of the arm and the judging score; not a number if there is none.
    pub images: Vec<(String, Image, f64)>,
}

/// Losses of one training.
#[derive(Debug, Clone)]
pub struct Curve {
    /// Which.
    pub name: String,
    /// One number a step.
    pub losses: Vec<f64>,
    /// What was drawn on the way: the step, and the images of the same prompts and seeds each time.
    pub samples: Vec<(u64, Vec<Image>)>,
    /// How many times there were; where fewer are shown, the page says so.
    pub sampled: usize,
}

impl Gallery {
    /// The page.
    ///
    /// # Errors
    /// If an image cannot be packed, which one within its bounds does not bring about.
    pub fn to_html(&self) -> Result<String, ImageError> {
        let mut body = String::new();
        page::heading(&mut body, &self.title, &self.notes);
        if !self.iterations.is_empty() {
            page::iterations(&mut body, &self.iterations);
        }
        self.advice.show(&mut body);
        page::held_out(&mut body, &self.held_out, self.totals.held_out)?;
        let (kept, rejected): (Vec<&PairView>, Vec<&PairView>) =
            self.pairs.iter().partition(|pair| pair.kept);
        page::pairs(&mut body, "Kept pairs", &kept, self.totals.kept)?;
        page::pairs(&mut body, "Rejected pairs", &rejected, self.totals.rejected)?;
        chart::curves(&mut body, &self.curves)?;
        page::costs(&mut body, &self.costs);
        Ok(document(&self.title, "", &body))
    }
}

/// A whole page around its body.
fn document(title: &str, style: &str, body: &str) -> String {
    let mut html = String::with_capacity(body.len() + 4096);
    html.push_str("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n");
    // Nothing may be loaded or run, whatever slipped through.
    html.push_str(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n",
    );
    html.push_str("<meta name=\"viewport\" content=\"width=device-width\">\n");
    let _ = writeln!(html, "<title>{}</title>", escape(title));
    let _ = writeln!(html, "<style>{}{style}</style></head><body>", page::STYLE);
    html.push_str(body);
    html.push_str("</body></html>\n");
    html
}

/// The text with everything that HTML would read as its own replaced; also safe inside quoted attributes.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // Direction overrides would let a text from elsewhere rearrange what stands around it.
            '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' | '\0' => escaped.push('\u{FFFD}'),
            other => escaped.push(other),
        }
    }
    escaped
}

/// The name of an arm for people.
pub fn arm_name(arm: Arm) -> &'static str {
    match arm {
        Arm::Base => "base",
        Arm::Rewriting => "prompt rewriting alone",
        Arm::Enhanced => "enhanced",
        Arm::PlainLora => "plain LoRA",
    }
}

/// How near an arm's images come to those of training, for people.
pub(crate) fn nearest(nearest: Option<Nearest>) -> String {
    nearest.map_or_else(
        || "not measured".to_owned(),
        |it| format!("{:.3} ({:.3}; {:.0} %)", it.arm, it.base, 100.0 * it.near),
    )
}

/// What the evaluation scorers say that decide nothing: iteration, arm, scorer, score, gain and the prompts behind it, for people.
pub(crate) fn other_scores(summaries: &[Summary]) -> Vec<[String; 6]> {
    let mut rows = Vec::new();
    for summary in summaries {
        for (arm, result) in &summary.arms {
            for (name, other) in &result.others {
                rows.push([
                    summary.iteration.to_string(),
                    arm_name(*arm).to_owned(),
                    name.clone(),
                    format!("{:.3}", other.score),
                    interval(&other.gain),
                    other.gain.pairs.to_string(),
                ]);
            }
        }
    }
    rows
}

/// A gain with its ends, for people.
pub(crate) fn interval(gain: &Interval) -> String {
    format!("{:+.3} ({:+.3} to {:+.3})", gain.mean, gain.low, gain.high)
}

fn arm_cells(summary: &ArmSummary) -> [String; 8] {
    let number = |value: Option<f64>| {
        value.map_or_else(|| "not measured".to_owned(), |value| format!("{value:.3}"))
    };
    [
        format!("{:.3}", summary.score),
        interval(&summary.gain),
        format!("{:.0} %", 100.0 * summary.wins.rate()),
        summary.wins.ties.to_string(),
        summary.left_out.to_string(),
        number(summary.alignment),
        number(summary.diversity),
        nearest(summary.nearest),
    ]
}
