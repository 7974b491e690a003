//! The page on which an operator judges the kept pairs: as the gallery, with two buttons for each pair. No script runs; the choices
//! themselves make up the line to be typed, by style sheet alone.

use std::fmt::Write as _;

use super::{PairView, document, escape, page};
use crate::image::ImageError;

/// What an operator is asked to judge.
#[derive(Debug, Clone)]
pub struct ReviewPage {
    job: String,
    iteration: u32,
    pairs: Vec<PairView>,
    /// Pairs that wait for a word, those shown and others.
    waiting: usize,
}

/// A job whose name does not belong into a command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no job's id: letters, digits and `-` alone can stand in the line to be typed")]
pub struct InvalidJob(String);

const STYLE: &str = "
.line { position: sticky; top: 0; padding: .7rem 0; background: Canvas; border-bottom: 1px solid var(--line); z-index: 1; }
.line code { user-select: all; font-size: .95rem; overflow-wrap: anywhere; }
.line input { position: absolute; opacity: 0; pointer-events: none; }
.line .word:not(:has(:checked)) { display: none; }
.line .comma, .line .number { display: none; }
.line :checked + .comma + .number { display: inline; }
.line :checked ~ :checked + .comma { display: inline; }
.choices { display: flex; gap: .6rem; margin-top: .6rem; }
.choices label { border: 1px solid var(--line); border-radius: .4rem; padding: .2rem .9rem; cursor: pointer; }
";

impl ReviewPage {
    /// A page for these pairs of a job.
    ///
    /// # Errors
    /// If the job's id is none.
    pub fn new(job: &str, iteration: u32, pairs: Vec<PairView>) -> Result<Self, InvalidJob> {
        let plain = |character: char| character.is_ascii_alphanumeric() || character == '-';
        if job.is_empty() || job.starts_with('-') || !job.chars().all(plain) {
            return Err(InvalidJob(job.to_owned()));
        }
        Ok(Self {
            job: job.to_owned(),
            iteration,
            waiting: pairs.len(),
            pairs,
        })
    }

    /// The same as the first of `waiting` pairs.
    pub(super) fn of(self, waiting: usize) -> Self {
        Self { waiting, ..self }
    }

    /// The page: one file that shows itself without a network, a script or another file.
    ///
    /// # Errors
    /// If an image cannot be packed, which one within its bounds does not bring about.
    pub fn to_html(&self) -> Result<String, ImageError> {
        let title = format!("{}: review of iteration {}", self.job, self.iteration);
        let shown = if self.pairs.len() < self.waiting {
            format!(
                "{} of the {} pairs that wait for a word are shown here; the others come on the next page, once these have one.",
                self.pairs.len(),
                self.waiting
            )
        } else {
            format!("{} pairs wait for a word.", self.waiting)
        };
        let notes = [
            format!(
                "{shown} They passed the filter. Accept those whose enhanced image is better: the model is trained on them."
            ),
            "Then copy the line below into a terminal. Pairs without a word go on waiting."
                .to_owned(),
        ];
        let mut body = String::new();
        page::heading(&mut body, &title, &notes);
        self.line(&mut body);
        body.push_str("<div class=\"cards\">\n");
        let mut style = STYLE.to_owned();
        for pair in &self.pairs {
            let item = pair.item;
            body.push_str("<div>");
            page::pair(&mut body, pair)?;
            let _ = writeln!(
                body,
                "<div class=\"choices\"><label for=\"a{item}\">accept</label><label for=\"r{item}\">reject</label></div></div>"
            );
            let _ = writeln!(
                style,
                "body:has(#a{item}:checked) [for=a{item}] {{ background: var(--good); color: #fff; }}\n\
                 body:has(#r{item}:checked) [for=r{item}] {{ background: var(--bad); color: #fff; }}"
            );
        }
        body.push_str("</div>\n");
        Ok(document(&title, &style, &body))
    }

    /// The line to be typed, with a hidden button in front of each number: a number shows while its button is chosen, and its comma
    /// if an earlier number shows too.
    fn line(&self, body: &mut String) {
        let _ = write!(
            body,
            "<div class=\"line\"><code>concord artaug review {}",
            escape(&self.job)
        );
        for (word, letter) in [("accept", 'a'), ("reject", 'r')] {
            let _ = write!(body, "<span class=\"word\"> --{word} ");
            for pair in &self.pairs {
                let item = pair.item;
                let _ = write!(
                    body,
                    "<input type=\"radio\" name=\"p{item}\" id=\"{letter}{item}\" aria-label=\"{word} pair {item}\">\
                     <span class=\"comma\">,</span><span class=\"number\">{item}</span>"
                );
            }
            body.push_str("</span>");
        }
        body.push_str("</code></div>\n");
    }
}
