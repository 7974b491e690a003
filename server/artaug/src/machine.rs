//! The job as a pure state machine: which work is left, and what the evaluation decides.
//!
//! An iteration goes generate -> advise -> regenerate -> score -> filter -> (review) -> train LoRA_1 -> train LoRA_2 ->
//! (train the control) -> fuse -> evaluate -> decide. The worker asks [`Machine::work`] what may be done now, does it, writes the
//! [`Event`] to the journal and applies it here. After a restart the journal's events are applied again: nothing that was
//! finished is done twice. Items do not wait for each other until the filter, so that advising, scoring and writing can
//! overlap with generation.

mod apply;
mod decide;
mod event;
mod manifest;
mod progress;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use concord_common::Digest;
use serde::{Deserialize, Serialize};

pub use self::{
    decide::{Decision, StopReason, StopRules},
    event::{
        Advised, Checkpoint, Evaluated, Event, Fused, Generated, Regenerated, Scored, Trained,
    },
    manifest::ManifestLine,
    progress::{Estimate, Pace, Progress},
};
use crate::{
    filter::{Candidate, FilterRules, Verdict, judge, reject_early},
    stats::{Bootstrap, Interval, Wins},
};

/// What the job is to do; fixed from the start.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Most iterations, at least 1.
    pub iterations: u32,
    /// Pairs made in each, at least 1.
    pub pairs: u32,
    /// Held-out prompts, at least 2.
    pub held_out: u32,
    /// Whether an operator reviews the kept pairs.
    pub review: bool,
    /// Whether the control arms (plain LoRA on the enhanced images, prompt rewriting alone) are run.
    pub control: bool,
    /// What the filter keeps.
    pub filter: FilterRules,
    /// When to stop.
    pub stop: StopRules,
    /// How intervals are made.
    pub bootstrap: Bootstrap,
}

/// Which training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Training {
    /// `LoRA_1` on the base images X; thrown away after the next.
    First,
    /// `LoRA_2` on the enhanced images X', with `LoRA_1` frozen below it.
    Second,
    /// The control arm: one plain `LoRA` on X'.
    Control,
}

/// What is compared on the held-out prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arm {
    /// The model that the job started from; once, in the first iteration.
    Base,
    /// Its answer to prompts rewritten by the advisor; once, in the first iteration.
    Rewriting,
    /// The model after this iteration.
    Enhanced,
    /// The model of the iteration before with the control `LoRA`.
    PlainLora,
}

/// A step of the job, for progress and settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Base images.
    Generate,
    /// Regions and prompts.
    Advise,
    /// Enhanced images.
    Regenerate,
    /// Filter scores.
    Score,
    /// Kept pairs.
    Filter,
    /// An operator's look at them.
    Review,
    /// `LoRA_1`.
    TrainFirst,
    /// `LoRA_2`.
    TrainSecond,
    /// The control arm's `LoRA`.
    TrainControl,
    /// `LoRA_2` into the model.
    Fuse,
    /// Held-out images and their scores.
    Evaluate,
    /// Go on, stop or roll back.
    Decide,
    /// Nothing left.
    Done,
}

/// What may be done now.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// Items, by what they need next. All of them may be worked on at once.
    Items {
        /// Need a base image.
        generate: Vec<u32>,
        /// Need advice.
        advise: Vec<u32>,
        /// Need an enhanced image.
        regenerate: Vec<u32>,
        /// Need scores.
        score: Vec<u32>,
    },
    /// Write [`Machine::filtered`].
    Filter,
    /// Wait for an operator to judge these items.
    Review(Vec<u32>),
    /// Train, from a checkpoint if there is one.
    Train(Training, Option<Checkpoint>),
    /// Put `LoRA_2` into the model.
    Fuse,
    /// Make and score held-out images of an arm.
    Evaluate(Arm, Vec<u32>),
    /// Measure the diversity of an arm's held-out images.
    Diversity(Arm),
    /// Write [`Machine::decided`].
    Decide,
    /// The job is over.
    Done,
}

/// An event that does not fit what happened before: a damaged or foreign journal, or a fault in the worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the event `{event}` does not fit: {what}")]
pub struct Misfit {
    /// The event's name.
    pub event: &'static str,
    /// Why not.
    pub what: String,
}

/// One pair in the making.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Item {
    pub(crate) generated: Option<Generated>,
    pub(crate) advised: Option<Advised>,
    pub(crate) regenerated: Option<Regenerated>,
    pub(crate) scored: Option<Scored>,
    pub(crate) verdict: Option<Verdict>,
}

/// The held-out images of one arm.
#[derive(Debug, Clone, PartialEq, Default)]
struct Judged {
    items: BTreeMap<u32, Evaluated>,
    diversity: Option<f64>,
}

/// What an iteration came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Its number, from 1.
    pub iteration: u32,
    /// Gain of the enhanced images over the base images before the filter, in spreads of the base scores.
    pub raw_gain: Option<Interval>,
    /// Pairs trained on.
    pub kept: usize,
    /// Pairs not trained on, by reason.
    pub rejected: BTreeMap<String, usize>,
    /// Answers of the advisor that could not be used.
    pub rejected_replies: usize,
    /// The arms that were evaluated.
    pub arms: BTreeMap<Arm, ArmSummary>,
    /// What followed.
    pub decision: Decision,
}

/// An arm against the base on the held-out prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArmSummary {
    /// Mean of the judging score.
    pub score: f64,
    /// Gain over the base.
    pub gain: Interval,
    /// Wins over the base.
    pub wins: Wins,
    /// Mean alignment of image and prompt, if it is measured.
    pub alignment: Option<f64>,
    /// Diversity of the images.
    pub diversity: Option<f64>,
}

/// The job's state.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    plan: Plan,
    specification: Digest,
    began: bool,
    iteration: u32,
    items: BTreeMap<u32, Item>,
    filtered: bool,
    raw_gain: Option<Interval>,
    reviewed: BTreeSet<u32>,
    checkpoints: BTreeMap<Training, Checkpoint>,
    trained: BTreeMap<Training, Trained>,
    fused: Option<Fused>,
    arms: BTreeMap<Arm, Judged>,
    /// The enhanced arm of the iteration before.
    previous: Option<Judged>,
    history: Vec<Summary>,
    over: bool,
}

impl Machine {
    /// A job at its start.
    pub fn new(plan: Plan, specification: Digest) -> Self {
        Self {
            items: open_items(plan.pairs),
            plan,
            specification,
            began: false,
            iteration: 1,
            filtered: false,
            raw_gain: None,
            reviewed: BTreeSet::new(),
            checkpoints: BTreeMap::new(),
            trained: BTreeMap::new(),
            fused: None,
            arms: BTreeMap::new(),
            previous: None,
            history: Vec::new(),
            over: false,
        }
    }

    /// The iteration under way, from 1.
    pub fn iteration(&self) -> u32 {
        self.iteration
    }

    /// What the finished iterations came to.
    pub fn history(&self) -> &[Summary] {
        &self.history
    }

    /// Whether [`Event::Began`] was applied; the first event of a journal.
    pub fn has_begun(&self) -> bool {
        self.began
    }

    /// The items trained on, once the filter (and the review) are through.
    pub fn kept(&self) -> Vec<u32> {
        self.items
            .iter()
            .filter(|(_, item)| item.verdict.as_ref().is_some_and(Verdict::is_kept))
            .map(|(number, _)| *number)
            .collect()
    }

    /// What was generated for an item.
    pub fn generated(&self, item: u32) -> Option<&Generated> {
        self.items.get(&item)?.generated.as_ref()
    }

    /// What was advised on an item.
    pub fn advised(&self, item: u32) -> Option<&Advised> {
        self.items.get(&item)?.advised.as_ref()
    }

    /// The enhanced image of an item.
    pub fn regenerated(&self, item: u32) -> Option<&Regenerated> {
        self.items.get(&item)?.regenerated.as_ref()
    }

    /// A finished training of this iteration.
    pub fn trained(&self, training: Training) -> Option<&Trained> {
        self.trained.get(&training)
    }

    /// This iteration's fused model.
    pub fn fused(&self) -> Option<&Fused> {
        self.fused.as_ref()
    }

    /// The held-out results of an arm.
    pub fn evaluated(&self, arm: Arm) -> impl Iterator<Item = (u32, &Evaluated)> {
        self.arms
            .get(&arm)
            .into_iter()
            .flat_map(|judged| judged.items.iter().map(|(item, result)| (*item, result)))
    }

    /// What may be done now.
    pub fn work(&self) -> Work {
        if self.over {
            return Work::Done;
        }
        if !self.filtered {
            return self.item_work();
        }
        if !self.may_train() {
            return Work::Decide;
        }
        let open = self.open_reviews();
        if !open.is_empty() {
            return Work::Review(open);
        }
        if self.has_too_few() {
            return Work::Decide; // The review left too few.
        }
        for training in self.trainings() {
            if !self.trained.contains_key(&training) {
                return Work::Train(training, self.checkpoints.get(&training).cloned());
            }
        }
        if self.fused.is_none() {
            return Work::Fuse;
        }
        for arm in self.arms_to_judge() {
            let judged = self.arms.get(&arm);
            let left: Vec<u32> = (0..self.plan.held_out)
                .filter(|item| judged.is_none_or(|judged| !judged.items.contains_key(item)))
                .collect();
            if !left.is_empty() {
                return Work::Evaluate(arm, left);
            }
            if judged.is_none_or(|judged| judged.diversity.is_none()) {
                return Work::Diversity(arm);
            }
        }
        Work::Decide
    }

    /// The earliest stage that has work left.
    pub fn stage(&self) -> Stage {
        match self.work() {
            Work::Items { generate, .. } if !generate.is_empty() => Stage::Generate,
            Work::Items { advise, .. } if !advise.is_empty() => Stage::Advise,
            Work::Items { regenerate, .. } if !regenerate.is_empty() => Stage::Regenerate,
            Work::Items { .. } => Stage::Score,
            Work::Filter => Stage::Filter,
            Work::Review(_) => Stage::Review,
            Work::Train(Training::First, _) => Stage::TrainFirst,
            Work::Train(Training::Second, _) => Stage::TrainSecond,
            Work::Train(Training::Control, _) => Stage::TrainControl,
            Work::Fuse => Stage::Fuse,
            Work::Evaluate(..) | Work::Diversity(_) => Stage::Evaluate,
            Work::Decide => Stage::Decide,
            Work::Done => Stage::Done,
        }
    }

    /// The filter's event, from all items' scores.
    pub fn filtered(&self) -> Event {
        let candidates: Vec<Candidate> = self
            .items
            .iter()
            .map(|(number, item)| candidate(*number, item))
            .collect();
        let verdicts = judge(&candidates, &self.plan.filter);
        Event::Filtered {
            iteration: self.iteration,
            verdicts: candidates
                .iter()
                .map(|candidate| candidate.item)
                .zip(verdicts)
                .collect(),
            raw_gain: decide::raw_gain(&candidates, &self.plan),
        }
    }

    /// The decision's event, from what the iteration came to.
    pub fn decided(&self) -> Event {
        Event::Decided {
            iteration: self.iteration,
            decision: self.decision(),
        }
    }

    fn item_work(&self) -> Work {
        let (mut generate, mut advise, mut regenerate, mut score) =
            (vec![], vec![], vec![], vec![]);
        for (number, item) in &self.items {
            match item.next() {
                Some(Stage::Generate) => generate.push(*number),
                Some(Stage::Advise) => advise.push(*number),
                Some(Stage::Regenerate) => regenerate.push(*number),
                Some(_) => score.push(*number),
                None => {}
            }
        }
        if generate.is_empty() && advise.is_empty() && regenerate.is_empty() && score.is_empty() {
            return Work::Filter;
        }
        Work::Items {
            generate,
            advise,
            regenerate,
            score,
        }
    }

    fn open_reviews(&self) -> Vec<u32> {
        if !self.plan.review {
            return Vec::new();
        }
        self.kept()
            .into_iter()
            .filter(|item| !self.reviewed.contains(item))
            .collect()
    }

    fn trainings(&self) -> Vec<Training> {
        let mut trainings = vec![Training::First, Training::Second];
        if self.plan.control {
            trainings.push(Training::Control);
        }
        trainings
    }

    fn arms_to_judge(&self) -> Vec<Arm> {
        let mut arms = vec![Arm::Base];
        if self.plan.control {
            arms.push(Arm::Rewriting);
        }
        arms.push(Arm::Enhanced);
        if self.plan.control {
            arms.push(Arm::PlainLora);
        }
        arms
    }

    fn has_too_few(&self) -> bool {
        self.kept().len() < self.plan.stop.least_kept.max(1) as usize
    }

    /// Whether the pairs are worth training on.
    fn may_train(&self) -> bool {
        self.raw_gain.is_some_and(|gain| gain.is_gain()) && !self.has_too_few()
    }
}

impl Item {
    /// What it needs next; nothing if it is finished or rejected before scoring.
    fn next(&self) -> Option<Stage> {
        if self.generated.is_none() {
            return Some(Stage::Generate);
        }
        let Some(advised) = &self.advised else {
            return Some(Stage::Advise);
        };
        let Some(regenerated) = &self.regenerated else {
            let rejected = reject_early(advised.regions(), true).is_some();
            return (!rejected).then_some(Stage::Regenerate);
        };
        let wants_score = self.scored.is_none() && self.changed(regenerated);
        wants_score.then_some(Stage::Score)
    }

    fn changed(&self, regenerated: &Regenerated) -> bool {
        self.generated
            .as_ref()
            .is_some_and(|generated| generated.image != regenerated.image)
    }
}

fn candidate(number: u32, item: &Item) -> Candidate {
    let scored = item.scored.clone().unwrap_or_default();
    Candidate {
        item: number,
        regions: item.advised.as_ref().and_then(Advised::regions),
        changed: item
            .regenerated
            .as_ref()
            .is_some_and(|enhanced| item.changed(enhanced)),
        base: scored.base,
        enhanced: scored.enhanced,
    }
}

fn open_items(pairs: u32) -> BTreeMap<u32, Item> {
    (0..pairs).map(|number| (number, Item::default())).collect()
}
