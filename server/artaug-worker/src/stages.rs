//! The stages of a job: what [`concord_artaug::machine::Machine::work`] asks for is done, put down, and asked for again.

mod evaluate;
mod items;
mod learn;
mod line;
mod lost;
mod outside;
mod review;
mod studio;

use std::path::Path;

use concord_artaug::{
    advisor::Advisor,
    card::CardFacts,
    course::Course,
    engine::Engine,
    machine::{Decision, Event, Ingredients, Machine, Work},
    scorer::{ForEvaluation, ForFilter, Panel},
};
use concord_common::{Digest, job::artaug::ArtaugSpec, seed::Seed};

pub(crate) use self::{line::guarded, studio::Studio};
use crate::{
    artefacts,
    brake::Halt,
    desk::{Desk, Done},
    remote::Pace,
    run::PartsError,
};

/// What a job works with, made from its specification.
pub struct Parts {
    /// Draws and trains.
    pub engine: Box<dyn Engine>,
    /// What it has open.
    pub opened: Opened,
    /// All else.
    pub tools: Tools,
}

/// What an engine has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// Nothing, or nobody knows what.
    Nothing,
    /// The base with a joined `LoRA`; none means the base alone.
    Model(Option<Digest>),
}

/// What a job works with beside the engine.
pub struct Tools {
    /// The understanding model.
    pub advisor: Box<dyn Advisor>,
    /// Choose the training pairs.
    pub filter: Panel<ForFilter>,
    /// Judge the result.
    pub evaluation: Panel<ForEvaluation>,
    /// Prompts to train on.
    pub prompts: Vec<String>,
    /// Prompts held out.
    pub held_out: Vec<String>,
    /// Threads of the engine, if the bits of what it makes depend on their number.
    pub threads: Option<usize>,
    /// What the model card says of them; the results are added.
    pub card: CardFacts,
    /// Looks at the base model's files as they are now.
    pub base: Box<LookAgain>,
    /// Whether none of these files was written or exchanged since the worker took the job up, as far as that is seen without reading them.
    pub untouched: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Walks the base model's folder again: the digests of its files by name, in the order of [`CardFacts::base_files`].
pub type LookAgain = dyn Fn() -> Result<Vec<(String, Digest)>, PartsError> + Send + Sync;

impl Tools {
    /// What the job is made from beside its specification. Texts about a model, such as its card, are no part of it.
    pub(crate) fn ingredients(&self) -> Ingredients {
        let mut ingredients = Ingredients::default();
        ingredients.add_texts("the prompts", self.prompts.iter().map(String::as_str));
        ingredients.add_texts(
            "the held-out prompts",
            self.held_out.iter().map(String::as_str),
        );
        ingredients.add_texts("the advisor", [self.advisor.name().as_str()]);
        let model: Vec<String> = self
            .card
            .base_files
            .iter()
            .filter(|(name, _)| Path::new(name).extension() != Some("md".as_ref()))
            .flat_map(|(name, digest)| [name.clone(), digest.to_string()])
            .collect();
        ingredients.add_texts("the files of the model", model.iter().map(String::as_str));
        for (name, digest) in &self.card.data_files {
            ingredients.add(name, *digest);
        }
        let filter = self.filter.iter().map(|one| (one.name(), one.version()));
        let judges = self.evaluation.iter();
        let judges = judges.map(|one| (one.name(), one.version()));
        for (name, version) in filter.chain(judges) {
            if let Some(version) = version {
                ingredients.add_texts(&format!("the words of the scorer {name}"), [version]);
            }
        }
        if let Some(threads) = self.threads {
            // The number is in the name, so that a worker with another one says which it must be.
            let name = format!("{threads} threads of the engine");
            ingredients.add_texts(&name, [threads.to_string().as_str()]);
        }
        ingredients
    }
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Parts({})", self.tools.advisor.name())
    }
}

/// How a job's work ends, if nothing halts it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Ending {
    /// It is finished.
    Succeeded,
    /// It is over without a result that means something.
    Failed(String),
    /// It waits for operators' words.
    Waits {
        /// Number of the last word that was acted on.
        reviews: u64,
        /// The pairs without a word.
        waiting: Vec<u32>,
    },
}

/// A job at work.
pub(crate) struct Job<'a> {
    pub(crate) spec: &'a ArtaugSpec,
    pub(crate) desk: &'a Desk<'a>,
    pub(crate) tools: &'a Tools,
    /// Between two attempts to reach an advisor or a scorer.
    pub(crate) pace: Pace,
    /// Threads beside the engine's.
    pub(crate) helpers: usize,
    /// The job's own folder.
    pub(crate) folder: &'a Path,
}

impl Job<'_> {
    /// Seed of everything in the job.
    pub(crate) fn seed(&self) -> Seed {
        Seed(self.spec.seed)
    }

    /// Works until the job is over, waits for words, or halts.
    ///
    /// # Errors
    /// Why it halts.
    pub(crate) fn run(&self, studio: &mut Studio<'_>) -> Result<Ending, Halt> {
        let desk = self.desk;
        let found = self.tools.ingredients();
        if desk.look(Machine::has_begun) {
            let differing = desk.look(|machine| machine.ingredients().differing(&found));
            if !differing.is_empty() {
                return Err(Halt::Trouble(format!(
                    "the job began with something else than this worker has: {}; give the worker what the job began with, or start the job anew",
                    differing.join(", ")
                )));
            }
            lost::restore(self, studio)?;
        } else {
            let beginning = desk.look(|machine| machine.beginning(found));
            desk.record(vec![Done::plain(beginning)])?;
        }
        loop {
            match desk.course() {
                Course::Finish => {
                    desk.check()?;
                    return self.finish(studio);
                }
                Course::Pause | Course::Cancel => {
                    desk.brake().check()?;
                }
                Course::EndForTime => {
                    desk.record(vec![Done::plain(desk.out_of_time())])?;
                }
                Course::WaitForReview(open) => {
                    if let Some(waits) = review::read(self, &open)? {
                        return Ok(waits);
                    }
                }
                Course::Work(work) => {
                    desk.check()?;
                    self.work(studio, work)?;
                }
            }
        }
    }

    fn work(&self, studio: &mut Studio<'_>, work: Work) -> Result<(), Halt> {
        let desk = self.desk;
        tracing::info!(
            iteration = desk.look(Machine::iteration),
            stage = desk.look(Machine::stage).name(),
            "working"
        );
        match work {
            Work::Items { .. } => items::run(self, studio),
            Work::Filter => desk.record(vec![Done::plain(desk.look(Machine::filtered))]),
            Work::Train(training, from) => learn::train(self, studio, training, from.as_ref()),
            Work::Fuse => learn::fuse(self, studio),
            Work::Evaluate(arm, _) => evaluate::run(self, studio, arm),
            Work::Diversity(arm) => evaluate::diversity(self, arm),
            Work::Decide => self.decide(studio),
            // `course` gives these in its own words.
            Work::Review(_) | Work::Done => Ok(()),
        }
    }

    fn decide(&self, studio: &mut Studio<'_>) -> Result<(), Halt> {
        let event = self.desk.look(Machine::decided);
        if let Event::Decided {
            iteration,
            decision,
        } = &event
        {
            match decision {
                Decision::Continue => tracing::info!(iteration, "the iteration is good; going on"),
                Decision::Stop { keep, reason } => {
                    tracing::info!(iteration, keep, reason = %reason, "the job ends");
                }
            }
        }
        self.desk.record(vec![Done::plain(event)])?;
        // A stop between the two costs nothing: the end brings everything again.
        if self.desk.look(Machine::work) == Work::Done {
            return Ok(());
        }
        artefacts::of_iteration(self, studio)
    }

    fn finish(&self, studio: &mut Studio<'_>) -> Result<Ending, Halt> {
        artefacts::of_job(self, studio)?;
        let last = self.desk.look(|machine| machine.history().last().cloned());
        Ok(match last.map(|summary| summary.decision) {
            Some(Decision::Stop { reason, .. }) if reason.is_failure() => {
                Ending::Failed(reason.to_string())
            }
            _ => Ending::Succeeded,
        })
    }
}
