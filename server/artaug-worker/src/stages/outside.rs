//! Asking advisors and scorers, which may be models elsewhere: what says nothing of one image alone is tried again for a while, and then by later
//! leases. A refusal (a wrong key, a model that is not there) ends a job that got nothing yet, for it is most often a slip in the job.

use std::{
    mem,
    time::{Duration, Instant},
};

use concord_artaug::{
    advisor::{Advice, AdvisorError, Question, Usage},
    image::Image,
    machine::{Advised, ManifestLine},
    scorer::{Opinion, Panel, ScoreError, Use},
    setup::max_regions,
};

use super::Job;
use crate::brake::Halt;

/// How long an endpoint may be away before the job is given back for now.
const AWAY: Duration = Duration::from_mins(5);
/// Longest text of an error that is kept in the journal, in bytes.
const MAX_ERROR: usize = 2000;

/// What an error says.
enum Fault {
    /// The same call may succeed a little later.
    Passing(String),
    /// It may once someone has seen to the endpoint or to this worker's settings.
    Refused(String),
    /// It never will.
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
        let has_begun = |line: &ManifestLine| line.advice.is_some();
        let (mut advice, error) = self.persist("the advisor", has_begun, || {
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
        let (mut opinion, mut usage) = (Opinion::default(), Usage::default());
        let has_begun = |line: &ManifestLine| line.scores.is_some();
        // One by one: while one is away, the others are not asked, and paid, again.
        for scorer in panel {
            self.desk.brake().check_now()?;
            self.persist("a scorer", has_begun, || {
                let asked = opinion.ask(scorer.as_ref(), image, prompt, &mut usage);
                asked.map_err(|error| match &error {
                    ScoreError::Unavailable { source, .. } => {
                        fault_of(source).told_as(&error.to_string())
                    }
                    ScoreError::NoScore { .. } => Fault::Lasting(error.to_string()),
                })
            })?;
        }
        Ok((opinion, usage))
    }

    /// Tries until it succeeds, the fault is no passing one, the brake is pulled, or time is up. `has_begun` finds a pair that has what an earlier
    /// call would have given it.
    fn persist<T>(
        &self,
        what: &str,
        has_begun: impl Fn(&ManifestLine) -> bool,
        mut call: impl FnMut() -> Result<T, Fault>,
    ) -> Result<T, Halt> {
        let start = Instant::now();
        let mut delays = self.pace.delays();
        loop {
            let reason = match call() {
                Ok(answer) => return Ok(answer),
                Err(Fault::Passing(reason)) => reason,
                // What was done and paid for is not thrown away because a key was changed or a model has another name now.
                Err(Fault::Refused(reason)) if self.any_pair(&has_begun) => {
                    return Err(Halt::Trouble(format!(
                        "{what} refuses: {reason}; see to the endpoint, to its key file (read again with every lease) or to its settings (read when the \
                         worker starts), or cancel the job"
                    )));
                }
                Err(Fault::Refused(reason) | Fault::Lasting(reason)) => {
                    return Err(Halt::Failed(reason));
                }
            };
            // A pulled brake is the reason, and why a call was broken off.
            self.desk.brake().check()?;
            if start.elapsed() >= AWAY.min(10 * self.pace.longest) {
                return Err(Halt::Trouble(format!("{what} cannot be asked: {reason}")));
            }
            let delay = delays.next().unwrap_or(self.pace.longest);
            tracing::warn!(what, reason, ?delay, "no answer; trying again");
            self.desk.brake().wait(delay)?;
        }
    }

    /// Whether something is true of a pair. Those of the iterations before had all.
    fn any_pair(&self, is_true: impl Fn(&ManifestLine) -> bool) -> bool {
        self.desk.look(|machine| {
            machine.iteration() > 1 || machine.manifest().any(|line| is_true(&line))
        })
    }
}

impl Fault {
    fn told_as(self, text: &str) -> Self {
        match self {
            Self::Passing(_) => Self::Passing(text.to_owned()),
            Self::Refused(_) => Self::Refused(text.to_owned()),
            Self::Lasting(_) => Self::Lasting(text.to_owned()),
        }
    }
}

fn fault_of(error: &AdvisorError) -> Fault {
    match error {
        AdvisorError::Unavailable { source, .. } if source.is_passing() => {
            Fault::Passing(error.to_string())
        }
        AdvisorError::Unavailable { .. } => Fault::Refused(error.to_string()),
        _ => Fault::Lasting(error.to_string()),
    }
}
