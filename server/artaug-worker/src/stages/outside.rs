//! Asking advisors and scorers, which may be models elsewhere: what says nothing of one image alone is tried again for a while.

use std::{
    mem,
    time::{Duration, Instant},
};

use concord_artaug::{
    advisor::{Advice, AdvisorError, Question, Usage},
    image::Image,
    machine::Advised,
    scorer::{Opinion, Panel, ScoreError, Use, score_all},
    setup::max_regions,
};

use super::Job;
use crate::brake::Halt;

/// How long an endpoint may be away before the job is given back for now.
const AWAY: Duration = Duration::from_mins(5);
/// Longest text of an error that is kept in the journal, in bytes.
const MAX_ERROR: usize = 2000;

/// Whether an error passes.
enum Fault {
    Passing(String),
    Lasting(String),
}

impl Job<'_> {
    /// Advice on an image that was made from a prompt; an image without usable advice is recorded as such.
    ///
    /// # Errors
    /// If the advisor cannot be asked at all, for long enough.
    pub(super) fn advise(&self, image: &Image, prompt: &str) -> Result<Advised, Halt> {
        let start = Instant::now();
        let question = Question {
            image,
            prompt,
            max_regions: max_regions(&self.spec.advisor),
        };
        // What was answered and paid for before the advisor went away in the middle.
        let mut earlier = Advice::default();
        let (mut advice, error) = self.persist("the advisor", || {
            match self.tools.advisor.advise(&question) {
                Ok(advice) => Ok((advice, None)),
                Err(AdvisorError::NoUsableReply(advice)) => {
                    let text = AdvisorError::NoUsableReply(advice.clone()).to_string();
                    Ok((*advice, Some(text)))
                }
                Err(error @ AdvisorError::Image(_)) => {
                    Ok((Advice::default(), Some(error.to_string())))
                }
                Err(error @ AdvisorError::Unavailable { .. }) => {
                    let fault = fault_of(&error);
                    if let AdvisorError::Unavailable { mut so_far, .. } = error {
                        so_far.add_before(mem::take(&mut earlier));
                        earlier = *so_far;
                    }
                    Err(fault)
                }
            }
        })?;
        advice.add_before(earlier);
        Ok(Advised {
            advisor: self.tools.advisor.name(),
            advice,
            error: error.map(|text| text[..text.floor_char_boundary(MAX_ERROR)].to_owned()),
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// What a panel says of an image, and what that cost, with the tries that came to nothing.
    ///
    /// # Errors
    /// If a scorer cannot be asked at all, for long enough.
    pub(super) fn score<U: Use>(
        &self,
        panel: &Panel<U>,
        image: &Image,
        prompt: &str,
    ) -> Result<(Opinion<U>, Usage), Halt> {
        let mut usage = Usage::default();
        let opinion = self.persist("a scorer", || {
            score_all(panel, image, prompt, &mut usage).map_err(|error| match &error {
                ScoreError::Unavailable { source, .. } => {
                    fault_of(source).told_as(&error.to_string())
                }
                ScoreError::NoScore { .. } => Fault::Lasting(error.to_string()),
            })
        })?;
        Ok((opinion, usage))
    }

    /// Tries until it succeeds, the fault is a lasting one, the brake is pulled, or time is up.
    fn persist<T>(
        &self,
        what: &str,
        mut call: impl FnMut() -> Result<T, Fault>,
    ) -> Result<T, Halt> {
        let start = Instant::now();
        let mut delays = self.pace.delays();
        loop {
            let reason = match call() {
                Ok(answer) => return Ok(answer),
                Err(Fault::Passing(reason)) => reason,
                Err(Fault::Lasting(reason)) => return Err(Halt::Failed(reason)),
            };
            if start.elapsed() >= AWAY.min(10 * self.pace.longest) {
                return Err(Halt::Trouble(format!("{what} cannot be asked: {reason}")));
            }
            let delay = delays.next().unwrap_or(self.pace.longest);
            tracing::warn!(what, reason, ?delay, "no answer; trying again");
            self.desk.brake().wait(delay)?;
        }
    }
}

impl Fault {
    fn told_as(self, text: &str) -> Self {
        match self {
            Self::Passing(_) => Self::Passing(text.to_owned()),
            Self::Lasting(_) => Self::Lasting(text.to_owned()),
        }
    }
}

fn fault_of(error: &AdvisorError) -> Fault {
    match error {
        AdvisorError::Unavailable { source, .. } if source.is_passing() => {
            Fault::Passing(error.to_string())
        }
        _ => Fault::Lasting(error.to_string()),
    }
}
