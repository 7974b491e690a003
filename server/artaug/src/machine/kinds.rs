//! The words of the machine: stages, trainings, arms, and what may be done now.

use serde::{Deserialize, Serialize};

use super::Checkpoint;

/// Which training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Training {
    /// `LoRA_1` on the base images X; thrown away after the next.
    First,
    /// `LoRA_2` on the enhanced images X', with `LoRA_1` frozen below it.
    Second,
    /// The control arm: one plain `LoRA` on X', on top of the control's own chain ([`super::Machine::control`]).
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
    /// The base with the control's own chain: the plain `LoRA` of every iteration up to this one, each trained on the same X' as
    /// `LoRA_2`. No differential step is in it.
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

impl Stage {
    /// Its name as in the journal and on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Advise => "advise",
            Self::Regenerate => "regenerate",
            Self::Score => "score",
            Self::Filter => "filter",
            Self::Review => "review",
            Self::TrainFirst => "train-first",
            Self::TrainSecond => "train-second",
            Self::TrainControl => "train-control",
            Self::Fuse => "fuse",
            Self::Evaluate => "evaluate",
            Self::Decide => "decide",
            Self::Done => "done",
        }
    }
}

impl From<Training> for Stage {
    fn from(training: Training) -> Self {
        match training {
            Training::First => Self::TrainFirst,
            Training::Second => Self::TrainSecond,
            Training::Control => Self::TrainControl,
        }
    }
}

/// Images that are computed in one go. Which images share a batch changes the last bits of each of them, so membership is fixed
/// by number (item / batch) and never by what happens to be missing: after a kill the same images come out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// All that are computed together, ascending; never fewer because some are recorded already.
    pub members: Vec<u32>,
    /// Those of them that have no line yet, ascending and at least one; only these are recorded.
    pub missing: Vec<u32>,
}

/// What may be done now.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// Items, by what they need next. All of them may be worked on at once.
    Items {
        /// Need base images.
        generate: Vec<Group>,
        /// Need advice.
        advise: Vec<u32>,
        /// Need enhanced images. The members are those of a batch that have usable regions; a batch comes as soon as all of it
        /// has been advised.
        regenerate: Vec<Group>,
        /// Need scores.
        score: Vec<u32>,
    },
    /// Write [`super::Machine::filtered`].
    Filter,
    /// Wait for an operator to judge these items.
    Review(Vec<u32>),
    /// Train, from a checkpoint if there is one. A checkpoint whose state is lost may be left aside: the same steps from the
    /// beginning end in the same bytes.
    Train(Training, Option<Checkpoint>),
    /// Join `LoRA_2` (and the control's `LoRA`) to those before.
    Fuse,
    /// Make and score held-out images of an arm.
    Evaluate(Arm, Vec<Group>),
    /// Measure the diversity of an arm's held-out images.
    Diversity(Arm),
    /// Write [`super::Machine::decided`].
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
