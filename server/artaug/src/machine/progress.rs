//! How far a job is, for people: counts of the stage under way, rate and remaining time.

use std::time::Duration;

use concord_common::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Arm, Group, Machine, Stage, Work};

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// The iteration under way, from 1.
    pub iteration: u32,
    /// Most iterations.
    pub iterations: u32,
    /// The earliest stage that has work left.
    pub stage: Stage,
    /// What is done of it; training counts the steps of its last checkpoint.
    pub done: u64,
    /// What there is to do.
    pub total: u64,
}

impl Machine {
    /// Where the job stands.
    pub fn progress(&self) -> Progress {
        let stage = self.stage();
        let pairs = u64::from(self.plan.pairs);
        let missing =
            |groups: &[Group]| -> usize { groups.iter().map(|group| group.missing.len()).sum() };
        let (done, total) = match self.work() {
            Work::Items {
                generate,
                advise,
                regenerate,
                score,
            } => {
                let open = match stage {
                    Stage::Generate => missing(&generate),
                    Stage::Advise => advise.len(),
                    Stage::Regenerate => missing(&regenerate),
                    _ => score.len(),
                };
                (pairs - open as u64, pairs)
            }
            Work::Review(open) => {
                let kept = self.kept().len() as u64 + self.reviewed_out();
                (kept.saturating_sub(open.len() as u64), kept)
            }
            Work::Train(training, checkpoint) => (
                checkpoint.map_or(0, |checkpoint| checkpoint.step),
                self.steps_of(training),
            ),
            Work::Evaluate(..) | Work::Diversity(_) => {
                let arms = self.arms_to_judge();
                let done = |arm: &Arm| {
                    self.arms
                        .get(arm)
                        .map_or(0, |judged| judged.items.len() as u64)
                };
                let all = arms.len() as u64 * u64::from(self.plan.held_out);
                (arms.iter().map(done).sum(), all)
            }
            Work::Filter | Work::Fuse | Work::Decide => (0, 1),
            Work::Done => (1, 1),
        };
        Progress {
            iteration: self.iteration,
            iterations: self.plan.iterations,
            stage,
            done,
            total,
        }
    }

    /// Pairs that the review took out.
    fn reviewed_out(&self) -> u64 {
        let kept = self.kept();
        self.reviewed
            .iter()
            .filter(|item| !kept.contains(item))
            .count() as u64
    }
}

/// The rate of the stage under way, measured from its first count.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pace {
    started: Option<(u32, Stage, Timestamp, u64)>,
}

/// What a pace says.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Estimate {
    /// Done in a second.
    pub per_second: f64,
    /// Left of the stage at that rate; none where the total is not known.
    pub remaining: Option<Duration>,
}

impl Pace {
    /// Takes in where the job stands now; none until something was done and time has passed since the stage began.
    pub fn note(&mut self, progress: &Progress, now: Timestamp) -> Option<Estimate> {
        let (since, before) = match self.started {
            Some((iteration, stage, since, before))
                if iteration == progress.iteration
                    && stage == progress.stage
                    && before <= progress.done =>
            {
                (since, before)
            }
            _ => {
                self.started = Some((progress.iteration, progress.stage, now, progress.done));
                return None;
            }
        };
        let seconds = now.since(since).as_secs_f64();
        let done = progress.done - before;
        if seconds <= 0.0 || done == 0 {
            return None;
        }
        let per_second = done as f64 / seconds;
        let remaining = (progress.total >= progress.done && progress.total > 0).then(|| {
            let left = (progress.total - progress.done) as f64;
            Duration::from_secs_f64((left / per_second).min(1e9))
        });
        Some(Estimate {
            per_second,
            remaining,
        })
    }
}
