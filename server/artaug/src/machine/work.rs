//! Which work is left.

use super::{Arm, Group, Item, Machine, Stage, Training, Work};
use crate::filter::reject_early;

impl Machine {
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
            let is_missing =
                |item: u32| judged.is_none_or(|judged| !judged.items.contains_key(&item));
            let left: Vec<Group> = batches(self.plan.held_out, self.plan.batch)
                .filter_map(|(first, end)| Group::of((first..end).collect(), is_missing))
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
            Work::Train(training, _) => training.into(),
            Work::Fuse => Stage::Fuse,
            Work::Evaluate(..) | Work::Diversity(_) => Stage::Evaluate,
            Work::Decide => Stage::Decide,
            Work::Done => Stage::Done,
        }
    }

    /// The batch of an item among `count`, with every member, whatever is recorded: for making one of its images again.
    pub fn batch_of(&self, item: u32, count: u32) -> Vec<u32> {
        let first = item - item % self.plan.batch.max(1);
        (first..first.saturating_add(self.plan.batch.max(1)).min(count)).collect()
    }

    /// The members of an item's batch that are regenerated together: those with usable regions.
    pub fn regenerated_with(&self, item: u32) -> Vec<u32> {
        self.batch_of(item, self.plan.pairs)
            .into_iter()
            .filter(|member| self.items.get(member).is_some_and(Item::is_to_be_enhanced))
            .collect()
    }

    fn item_work(&self) -> Work {
        let (mut generate, mut advise, mut regenerate, mut score) =
            (vec![], vec![], vec![], vec![]);
        for (first, end) in batches(self.plan.pairs, self.plan.batch) {
            let batch: Vec<(u32, &Item)> = self
                .items
                .range(first..end)
                .map(|(number, item)| (*number, item))
                .collect();
            let lacks = |wanted: fn(&Item) -> bool| {
                move |number: u32| self.items.get(&number).is_some_and(wanted)
            };
            generate.extend(Group::of(
                (first..end).collect(),
                lacks(|item| item.generated.is_none()),
            ));
            if batch.iter().all(|(_, item)| item.advised.is_some()) {
                let members = batch
                    .iter()
                    .filter(|(_, item)| item.is_to_be_enhanced())
                    .map(|(number, _)| *number)
                    .collect();
                regenerate.extend(Group::of(members, lacks(|item| item.regenerated.is_none())));
            }
            for (number, item) in batch {
                match item.next() {
                    Some(Stage::Advise) => advise.push(number),
                    Some(Stage::Score) => score.push(number),
                    _ => {}
                }
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

    /// Whether everything in an item's batch has been advised, so that the members of its regenerate group are known.
    pub(super) fn batch_is_advised(&self, item: u32) -> bool {
        self.batch_of(item, self.plan.pairs).iter().all(|member| {
            self.items
                .get(member)
                .is_some_and(|item| item.advised.is_some())
        })
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

    pub(super) fn arms_to_judge(&self) -> Vec<Arm> {
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

    pub(super) fn has_too_few(&self) -> bool {
        self.kept().len() < self.plan.stop.least_kept.max(1) as usize
    }

    /// Whether the pairs are worth training on.
    fn may_train(&self) -> bool {
        self.lack.is_none()
            && self.raw_gain.is_some_and(|gain| gain.is_gain())
            && !self.has_too_few()
    }
}

impl Group {
    /// A group whose missing members are those that `is_missing` names; none if nothing is missing.
    fn of(members: Vec<u32>, is_missing: impl Fn(u32) -> bool) -> Option<Self> {
        let missing: Vec<u32> = members
            .iter()
            .copied()
            .filter(|member| is_missing(*member))
            .collect();
        (!missing.is_empty()).then_some(Self { members, missing })
    }
}

/// First number and end of each batch of `count` items.
fn batches(count: u32, batch: u32) -> impl Iterator<Item = (u32, u32)> {
    let batch = batch.max(1);
    (0..count)
        .step_by(batch as usize)
        .map(move |first| (first, first.saturating_add(batch).min(count)))
}

impl Item {
    /// What it needs next; nothing if it is finished or rejected before scoring.
    pub(super) fn next(&self) -> Option<Stage> {
        if self.generated.is_none() {
            return Some(Stage::Generate);
        }
        if self.advised.is_none() {
            return Some(Stage::Advise);
        }
        let Some(regenerated) = &self.regenerated else {
            return self.is_to_be_enhanced().then_some(Stage::Regenerate);
        };
        let wants_score = self.scored.is_none() && self.changed(regenerated);
        wants_score.then_some(Stage::Score)
    }

    /// Whether its advice has regions to draw again.
    fn is_to_be_enhanced(&self) -> bool {
        self.advised
            .as_ref()
            .is_some_and(|advised| reject_early(advised.regions(), true).is_none())
    }

    pub(super) fn changed(&self, regenerated: &super::Regenerated) -> bool {
        self.generated
            .as_ref()
            .is_some_and(|generated| generated.image != regenerated.image)
    }
}
