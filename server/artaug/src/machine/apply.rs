//! Taking in events: what fits, and what it changes.

use super::{
    Arm, Decision, Event, Item, Machine, Made, Misfit, Stage, StopReason, Work, kept_of, open_items,
};
use crate::filter::{Reason, Verdict};

impl Machine {
    /// Whether an event fits what happened before.
    ///
    /// # Errors
    /// If it does not.
    pub fn check(&self, event: &Event) -> Result<(), Misfit> {
        self.fits(event).map_err(|what| Misfit {
            event: event.name(),
            what,
        })
    }

    /// Takes in what happened.
    ///
    /// # Errors
    /// If the event does not fit; the state is then as it was.
    pub fn apply(&mut self, event: Event) -> Result<(), Misfit> {
        self.check(&event)?;
        match event {
            Event::Began { ingredients, .. } => {
                self.began = true;
                self.ingredients = ingredients;
            }
            Event::Generated { item, result, .. } => self.item(item).generated = Some(result),
            Event::Advised { item, result, .. } => self.item(item).advised = Some(result),
            Event::Regenerated { item, result, .. } => self.item(item).regenerated = Some(result),
            Event::Scored { item, result, .. } => self.item(item).scored = Some(result),
            Event::Filtered { raw_gain, .. } => {
                self.lack = self.lack_of_pairs();
                for (item, verdict) in self.verdicts() {
                    self.item(item).verdict = Some(verdict);
                }
                self.raw_gain = raw_gain;
                self.filtered = true;
            }
            Event::Reviewed { item, accepted, .. } => {
                self.reviewed.insert(item);
                if !accepted {
                    let reason = Reason::Review;
                    self.item(item).verdict = Some(Verdict::Rejected { reason });
                }
            }
            Event::Checkpointed {
                training, result, ..
            } => {
                let before = self.checkpoints.remove(&training);
                let named = before.map_or_else(Vec::new, |before| before.finished);
                self.checkpoints.insert(training, result.after(named));
            }
            Event::Sampled {
                training, result, ..
            } => self.samples.entry(training).or_default().push(result),
            Event::Trained {
                training, result, ..
            } => {
                self.checkpoints.remove(&training);
                self.trained.insert(training, result);
            }
            Event::Fused { result, .. } => self.fused = Some(result),
            Event::Evaluated {
                arm, item, result, ..
            } => {
                self.arms.entry(arm).or_default().items.insert(item, result);
            }
            Event::Diversity {
                arm,
                value,
                nearest,
                ..
            } => {
                let judged = self.arms.entry(arm).or_default();
                judged.diversity = Some(value);
                judged.nearest = nearest;
            }
            Event::Decided { decision, .. } => self.close(decision),
        }
        Ok(())
    }

    fn item(&mut self, number: u32) -> &mut Item {
        self.items.entry(number).or_default()
    }

    /// Whether an event is one of those that [`Machine::work`] asks for.
    fn fits(&self, event: &Event) -> Result<(), String> {
        if let Event::Began { specification, .. } = event {
            return if self.began {
                Err("the job has begun already".to_owned())
            } else if *specification != self.specification {
                Err("it belongs to a job of another specification".to_owned())
            } else {
                Ok(())
            };
        }
        if !self.began {
            return Err("the job has not begun".to_owned());
        }
        if !event.is_finite() {
            return Err("it holds a number that is not finite".to_owned());
        }
        if event.iteration() != Some(self.iteration) {
            return Err(format!("iteration {} is under way", self.iteration));
        }
        // Items are many: theirs are judged without looking at all the others.
        let wanted = if let Some((item, stage)) = item_stage(event) {
            let next = self.items.get(&item).and_then(Item::next);
            let is_known = stage != Stage::Regenerate || self.batch_is_advised(item);
            !self.over && !self.filtered && next == Some(stage) && is_known
        } else {
            self.asks_for(event)
        };
        if wanted {
            Ok(())
        } else {
            Err(format!("the job is at {:?}", self.stage()))
        }
    }

    /// Whether an event that is not of an item is the one that the work at hand ends with.
    fn asks_for(&self, event: &Event) -> bool {
        match (event, self.work()) {
            (Event::Filtered { kept, .. }, Work::Filter) => *kept == kept_of(&self.verdicts()),
            (Event::Reviewed { item, .. }, Work::Review(open)) => open.contains(item),
            (
                Event::Checkpointed {
                    training, result, ..
                },
                Work::Train(wanted, from),
            ) => {
                let named = from.as_ref().map_or(0, |from| from.finished.len());
                *training == wanted
                    && from.is_none_or(|from| result.step > from.step)
                    && result.step <= self.steps_of(wanted)
                    && result.before <= named
                    && result.before + result.finished.len() <= self.most_finished()
            }
            (
                Event::Sampled {
                    training, result, ..
                },
                Work::Train(wanted, _),
            ) => {
                *training == wanted
                    && result.step > self.sampled(wanted)
                    && result.step <= self.steps_of(wanted)
            }
            (
                Event::Trained {
                    training, result, ..
                },
                Work::Train(wanted, _),
            ) => *training == wanted && result.steps == self.steps_of(wanted),
            (Event::Evaluated { arm, item, .. }, Work::Evaluate(wanted, left)) => {
                *arm == wanted && left.iter().any(|group| group.missing.contains(item))
            }
            (Event::Diversity { arm, .. }, Work::Diversity(wanted)) => *arm == wanted,
            (Event::Fused { result, .. }, Work::Fuse) => {
                result.control.is_some() == self.plan.control
            }
            (Event::Decided { decision, .. }, work) => match decision {
                Decision::Stop {
                    keep,
                    reason: StopReason::Time { .. },
                } => work != Work::Done && *keep == self.iteration - 1,
                _ => work == Work::Decide,
            },
            _ => false,
        }
    }

    /// Most pairs that are finished while a training is under way: all but the last.
    fn most_finished(&self) -> usize {
        if self.plan.per_pair {
            self.kept().len().saturating_sub(1)
        } else {
            0
        }
    }

    /// Ends the iteration, and the job unless it goes on.
    fn close(&mut self, decision: Decision) {
        let goes_on = decision == Decision::Continue;
        let summary = self.summary(decision);
        self.history.push(summary);
        self.made.push(Made {
            taught: self.taught_now().collect(),
            trained: self.trained.clone(),
            samples: std::mem::take(&mut self.samples),
            fused: self.fused.clone(),
        });
        self.checkpoints.clear();
        if !goes_on {
            self.over = true;
            return;
        }
        self.iteration += 1;
        self.items = open_items(self.plan.pairs);
        self.filtered = false;
        self.raw_gain = None;
        self.lack = None;
        self.reviewed.clear();
        self.trained.clear();
        self.fused = None;
        self.arms.remove(&Arm::PlainLora);
        self.previous = self.arms.remove(&Arm::Enhanced);
    }
}

/// The item of an event and what that item needed.
fn item_stage(event: &Event) -> Option<(u32, Stage)> {
    match event {
        Event::Generated { item, .. } => Some((*item, Stage::Generate)),
        Event::Advised { item, .. } => Some((*item, Stage::Advise)),
        Event::Regenerated { item, .. } => Some((*item, Stage::Regenerate)),
        Event::Scored { item, .. } => Some((*item, Stage::Score)),
        _ => None,
    }
}
