//! An advisor and scorers that look at the light of an image.

use std::{
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use concord_artaug::{
    advisor::{
        Advice, Advisor, AdvisorError, Question, Region, RegionPrompt, RejectedReply, Usage,
    },
    card::CardFacts,
    endpoint::EndpointError,
    image::Image,
    region::Area,
    scorer::{ForEvaluation, ForFilter, ScoreError, Scorer, Use},
    setup::GUARD,
};
use concord_common::job::artaug::ArtaugSpec;

use super::Overlap;
use crate::stages::Tools;

/// The scorer that decides.
const JUDGE: &str = "statistics";

/// Calls that fail before one succeeds again.
#[derive(Debug, Default)]
pub(crate) struct Outage {
    /// Of the advisor, for now.
    pub(crate) advisor: AtomicUsize,
    /// Of the scorers, for now.
    pub(crate) scorers: AtomicUsize,
    /// Of the advisor, after an answer that cannot be used but was paid for.
    pub(crate) paid: AtomicUsize,
    /// Of the advisor and of the scorers, for ever: the key is refused.
    pub(crate) key: AtomicUsize,
    pub(crate) scorers_key: AtomicUsize,
    /// How often the judge was asked, which is an outage of none.
    pub(crate) judged: AtomicUsize,
    /// How often the engine was told to train, which is none either.
    pub(crate) fits: AtomicUsize,
}

fn taken(counter: &AtomicUsize) -> bool {
    counter
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
            left.checked_sub(1)
        })
        .is_ok()
}

fn away() -> EndpointError {
    EndpointError::Connection {
        url: "http://vision".to_owned(),
        what: "connection refused".to_owned(),
    }
}

pub(crate) fn refused() -> EndpointError {
    EndpointError::Setting {
        key: "key_file",
        what: "the key is refused".to_owned(),
    }
}

fn useless() -> RejectedReply {
    RejectedReply {
        raw: "<script>".to_owned(),
        code: "no-json".to_owned(),
        reason: "the answer holds no JSON".to_owned(),
    }
}

struct FakeAdvisor(Arc<Outage>, Option<Arc<Overlap>>);

impl Advisor for FakeAdvisor {
    fn name(&self) -> String {
        "light".to_owned()
    }

    fn advise(&self, question: &Question<'_>) -> Result<Advice, AdvisorError> {
        if let Some(overlap) = &self.1 {
            overlap.advising();
        }
        if taken(&self.0.advisor) {
            return Err(away().into());
        }
        if taken(&self.0.paid) {
            let so_far = Box::new(Advice {
                rejected_replies: vec![useless()],
                usage: Usage {
                    calls: 2,
                    prompt_tokens: 100,
                    reply_tokens: 20,
                },
                ..Advice::default()
            });
            let source = away();
            return Err(AdvisorError::Unavailable { source, so_far });
        }
        if taken(&self.0.key) {
            return Err(refused().into());
        }
        // What it says of an image depends on nothing else.
        let number = question.image.digest().as_bytes()[0] % 8;
        if number == 0 {
            return Err(AdvisorError::NoUsableReply(Box::new(Advice {
                rejected_replies: vec![useless()],
                ..Advice::default()
            })));
        }
        let region = Region {
            area: Area::WHOLE,
            prompt: RegionPrompt::new(&format!("{}, well lit", question.prompt)).unwrap(),
            confidence: 0.5,
        };
        let regions = if number == 1 { vec![] } else { vec![region] };
        Ok(Advice {
            regions,
            ..Advice::default()
        })
    }
}

struct Light<U> {
    name: &'static str,
    outage: Arc<Outage>,
    overlap: Option<Arc<Overlap>>,
    purpose: PhantomData<fn() -> U>,
}

impl<U: Use> Scorer for Light<U> {
    type Use = U;

    fn name(&self) -> &str {
        self.name
    }

    fn score(&self, image: &Image, _prompt: &str) -> Result<f64, ScoreError> {
        if let Some(overlap) = &self.overlap {
            overlap.scoring(self.name);
        }
        if taken(&self.outage.scorers) {
            return Err(ScoreError::Unavailable {
                scorer: self.name.to_owned(),
                source: away().into(),
            });
        }
        if taken(&self.outage.scorers_key) {
            return Err(ScoreError::Unavailable {
                scorer: self.name.to_owned(),
                source: refused().into(),
            });
        }
        if self.name == JUDGE {
            self.outage.judged.fetch_add(1, Ordering::SeqCst);
        }
        if self.name == GUARD {
            return Ok(0.5);
        }
        let sum: u32 = image.pixels().iter().map(|value| u32::from(*value)).sum();
        Ok(f64::from(sum) / image.pixels().len() as f64 / 255.0)
    }
}

pub(crate) fn tools(
    spec: &ArtaugSpec,
    outage: &Arc<Outage>,
    overlap: Option<&Arc<Overlap>>,
) -> Tools {
    fn light<U: Use>(
        name: &'static str,
        outage: &Arc<Outage>,
        overlap: Option<&Arc<Overlap>>,
    ) -> Box<dyn Scorer<Use = U>> {
        Box::new(Light {
            name,
            outage: Arc::clone(outage),
            overlap: overlap.cloned(),
            purpose: PhantomData,
        })
    }
    Tools {
        advisor: Box::new(FakeAdvisor(Arc::clone(outage), overlap.cloned())),
        filter: vec![light::<ForFilter>("photometry", outage, overlap)],
        evaluation: vec![
            light::<ForEvaluation>(JUDGE, outage, overlap),
            light::<ForEvaluation>(GUARD, outage, overlap),
        ],
        prompts: spec.prompts.texts.clone(),
        held_out: spec.held_out.texts.clone(),
        threads: Some(1),
        card: CardFacts::default(),
        base: Box::new(|| Ok(Vec::new())),
        // So that every look is one at the files themselves.
        untouched: Box::new(|| false),
    }
}
