//! The job as a pure state machine: which work is left, and what the evaluation decides.
//!
//! An iteration goes generate -> advise -> regenerate -> score -> filter -> (review) -> train LoRA_1 -> train LoRA_2 ->
//! (train the control) -> fuse -> evaluate -> decide. The worker asks [`Machine::work`] what may be done now, does it, writes the
//! [`Event`] to the journal and applies it here. After a restart the journal's events are applied again: nothing that was
//! finished is done twice. Items do not wait for each other until the filter, so that advising, scoring and writing can
//! overlap with generation; only the images of one batch are computed together ([`Group`]).
//!
//! The models of a job are never changed in place. Each is made anew from the base and one joined `LoRA` out of the store:
//! [`Machine::current`] and [`Machine::control`] for work of an iteration, [`Machine::lora_of`] for an arm of its evaluation.

mod apply;
mod decide;
mod event;
mod ingredients;
mod kinds;
mod manifest;
mod paired;
mod progress;
mod summary;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod work;

use std::collections::{BTreeMap, BTreeSet};

use concord_common::Digest;

pub use self::{
    decide::{Decision, StopReason, StopRules},
    event::{
        Advised, Checkpoint, Evaluated, Event, Fused, Generated, Regenerated, Sampled, Scored,
        Trained,
    },
    ingredients::Ingredients,
    kinds::{Arm, Group, Misfit, Stage, Training, Work},
    manifest::{HeldOutLine, ManifestLine},
    progress::{Estimate, Pace, Progress},
    summary::{ArmSummary, Made, OtherScore, Summary},
};
use crate::{
    filter::{Candidate, FilterRules, Verdict, judge},
    photometry::Nearest,
    stats::{Bootstrap, Interval},
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
    /// Images computed together, at least 1; see [`Group`].
    pub batch: u32,
    /// Steps of `LoRA_1`, for each pair if `per_pair`.
    pub first_steps: u32,
    /// Steps of `LoRA_2` and of the control, for each pair if `per_pair`.
    pub second_steps: u32,
    /// Whether every kept pair gets trainings of its own, whose `LoRA` are averaged.
    pub per_pair: bool,
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

impl Plan {
    /// Whether the filter chooses pairs by the score that guards the alignment.
    pub fn filter_sees_guard(&self) -> bool {
        let guard = self.stop.alignment.as_ref();
        guard.is_some_and(|guard| self.filter.least_gain.contains_key(guard))
    }
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
    nearest: Option<Nearest>,
}

/// The job's state.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    plan: Plan,
    specification: Digest,
    began: bool,
    ingredients: Ingredients,
    iteration: u32,
    items: BTreeMap<u32, Item>,
    filtered: bool,
    raw_gain: Option<Interval>,
    /// Why the raw gain says nothing, if so; known with the filter.
    lack: Option<StopReason>,
    reviewed: BTreeSet<u32>,
    checkpoints: BTreeMap<Training, Checkpoint>,
    trained: BTreeMap<Training, Trained>,
    /// What each training drew on its way, by step.
    samples: BTreeMap<Training, Vec<Sampled>>,
    fused: Option<Fused>,
    arms: BTreeMap<Arm, Judged>,
    /// The enhanced arm of the iteration before.
    previous: Option<Judged>,
    history: Vec<Summary>,
    /// What the finished iterations made, in order.
    made: Vec<Made>,
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
            ingredients: Ingredients::default(),
            iteration: 1,
            filtered: false,
            raw_gain: None,
            lack: None,
            reviewed: BTreeSet::new(),
            checkpoints: BTreeMap::new(),
            trained: BTreeMap::new(),
            samples: BTreeMap::new(),
            fused: None,
            arms: BTreeMap::new(),
            previous: None,
            history: Vec::new(),
            made: Vec::new(),
            over: false,
        }
    }

    /// What the job is to do.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The iteration under way, from 1.
    pub fn iteration(&self) -> u32 {
        self.iteration
    }

    /// What the finished iterations came to.
    pub fn history(&self) -> &[Summary] {
        &self.history
    }

    /// What the finished iterations made, in order; the iteration under way is not among them.
    pub fn made(&self) -> &[Made] {
        &self.made
    }

    /// Whether [`Event::Began`] was applied; the first event of a journal.
    pub fn has_begun(&self) -> bool {
        self.began
    }

    /// Digest of the specification.
    pub fn specification(&self) -> Digest {
        self.specification
    }

    /// What the job is made from beside its specification, as it was when the job began; none before.
    pub fn ingredients(&self) -> &Ingredients {
        &self.ingredients
    }

    /// The newest checkpoint of the training under way, with the names of all finished pairs.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        self.checkpoints.values().next()
    }

    /// The step whose samples a training of this iteration drew last; 0 before the first.
    pub fn sampled(&self, training: Training) -> u64 {
        let samples = self.samples.get(&training);
        let last = samples.and_then(|samples| samples.last());
        last.map_or(0, |sampled| sampled.step)
    }

    /// The first event of a journal, with what the job is made from.
    pub fn beginning(&self, ingredients: Ingredients) -> Event {
        Event::Began {
            specification: self.specification,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ingredients,
        }
    }

    /// The items trained on, ascending, once the filter (and the review) are through.
    pub fn kept(&self) -> Vec<u32> {
        self.items
            .iter()
            .filter(|(_, item)| item.verdict.as_ref().is_some_and(Verdict::is_kept))
            .map(|(number, _)| *number)
            .collect()
    }

    /// The stored images X' that the iterations up to this one were trained on.
    pub fn taught(&self) -> Vec<Digest> {
        let before = self
            .made
            .iter()
            .flat_map(|made| made.taught.iter().copied());
        before.chain(self.taught_now()).collect()
    }

    /// Those of the iteration under way.
    fn taught_now(&self) -> impl Iterator<Item = Digest> + '_ {
        let kept = |item: &&Item| item.verdict.as_ref().is_some_and(Verdict::is_kept);
        let enhanced = |item: &Item| Some(item.regenerated.as_ref()?.image);
        self.items.values().filter(kept).filter_map(enhanced)
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

    /// This iteration's joined `LoRA`, once they are joined.
    pub fn fused(&self) -> Option<&Fused> {
        self.fused.as_ref()
    }

    /// The joined `LoRA_2` of the iterations before this one. The model that this iteration draws with and trains on is the base
    /// with it; none means the base alone.
    pub fn current(&self) -> Option<Digest> {
        Some(self.before()?.merged)
    }

    /// The same for the control: the joined plain `LoRA` of the iterations before this one, on which this iteration's
    /// [`Training::Control`] is trained.
    pub fn control(&self) -> Option<Digest> {
        self.before()?.control
    }

    fn before(&self) -> Option<&Fused> {
        let finished = self.iteration.checked_sub(2)? as usize;
        self.made.get(finished)?.fused.as_ref()
    }

    /// The joined `LoRA` with which an arm of this iteration is drawn; none means the base alone, which is right for
    /// [`Arm::Base`] and [`Arm::Rewriting`], and for the others before [`Event::Fused`].
    pub fn lora_of(&self, arm: Arm) -> Option<Digest> {
        let fused = self.fused.as_ref()?;
        match arm {
            Arm::Base | Arm::Rewriting => None,
            Arm::Enhanced => Some(fused.merged),
            Arm::PlainLora => fused.control,
        }
    }

    /// The iteration whose model is the result, once the job is over; 0 is the base.
    pub fn result(&self) -> Option<u32> {
        match self.history.last()?.decision {
            Decision::Stop { keep, .. } => Some(keep),
            Decision::Continue => None,
        }
    }

    /// The joined `LoRA` of the result; none while the job goes on, or if the result is the base.
    pub fn result_lora(&self) -> Option<&Fused> {
        let kept = self.result()?.checked_sub(1)? as usize;
        self.made.get(kept)?.fused.as_ref()
    }

    /// Steps of a training of this iteration, over all kept pairs where each has its own. Step s of a pair is then step
    /// (place of the pair among the kept) x steps + s.
    pub fn steps_of(&self, training: Training) -> u64 {
        let steps = match training {
            Training::First => self.plan.first_steps,
            Training::Second | Training::Control => self.plan.second_steps,
        };
        let times = if self.plan.per_pair {
            self.kept().len() as u64
        } else {
            1
        };
        u64::from(steps) * times
    }

    /// The held-out results of an arm, by prompt.
    pub fn evaluated(&self, arm: Arm) -> impl Iterator<Item = (u32, &Evaluated)> {
        self.arms
            .get(&arm)
            .into_iter()
            .flat_map(|judged| judged.items.iter().map(|(item, result)| (*item, result)))
    }

    /// The held-out result of an arm for one prompt.
    pub fn evaluated_item(&self, arm: Arm, item: u32) -> Option<&Evaluated> {
        self.arms.get(&arm)?.items.get(&item)
    }

    /// The iteration whose model is the best so far: of the result once the job is over, else the one before the iteration under way; 0 is
    /// the base.
    pub fn newest_kept(&self) -> u32 {
        self.result().unwrap_or(self.iteration - 1)
    }

    /// The held-out results of [`Machine::newest_kept`].
    pub fn evaluated_result(&self) -> impl Iterator<Item = (u32, &Evaluated)> {
        let kept = self.newest_kept();
        let judged = if kept == 0 {
            self.arms.get(&Arm::Base)
        } else if kept == self.iteration {
            self.arms.get(&Arm::Enhanced)
        } else {
            self.previous.as_ref()
        };
        judged
            .into_iter()
            .flat_map(|judged| judged.items.iter().map(|(item, result)| (*item, result)))
    }

    /// The filter's event, from all items' scores.
    pub fn filtered(&self) -> Event {
        Event::Filtered {
            iteration: self.iteration,
            kept: kept_of(&self.verdicts()),
            raw_gain: self.measured_raw_gain(),
        }
    }

    /// The decision's event, from what the iteration came to.
    pub fn decided(&self) -> Event {
        Event::Decided {
            iteration: self.iteration,
            decision: self.decision(),
        }
    }

    /// The event that ends a job whose time is used up, at any moment: the last finished iteration is the result.
    pub fn out_of_time(&self, limit: std::time::Duration) -> Event {
        Event::Decided {
            iteration: self.iteration,
            decision: Decision::Stop {
                keep: self.iteration - 1,
                reason: StopReason::Time {
                    seconds: limit.as_secs(),
                },
            },
        }
    }

    fn candidates(&self) -> Vec<Candidate> {
        self.items
            .iter()
            .map(|(number, item)| candidate(*number, item))
            .collect()
    }

    /// The filter's verdict on every item. It follows from what is recorded, so the journal holds only the kept ones.
    fn verdicts(&self) -> Vec<(u32, Verdict)> {
        let candidates = self.candidates();
        let verdicts = judge(&candidates, &self.plan.filter);
        candidates
            .iter()
            .map(|candidate| candidate.item)
            .zip(verdicts)
            .collect()
    }
}

fn kept_of(verdicts: &[(u32, Verdict)]) -> Vec<u32> {
    verdicts
        .iter()
        .filter(|(_, verdict)| verdict.is_kept())
        .map(|(item, _)| *item)
        .collect()
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
