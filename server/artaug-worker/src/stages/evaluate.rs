//! Held-out images of every arm, with the same prompts and seeds, and what they are worth.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use concord_artaug::{
    advisor::rewrite,
    engine::Order,
    machine::{Advised, Arm, Evaluated, Event, Machine, Work},
    photometry::{Nearest, Thumbnails},
    prompts::held_out_seed,
};
use concord_common::Digest;

use super::{
    Job, Studio, items,
    line::{self, Batch, Chore, Line, Piece},
};
use crate::{brake::Halt, desk::Done};

/// Batches from the first unfinished one on for which advice is asked in the rewriting arm. It is recorded with the images, so a crash costs
/// as much of it.
const AHEAD: usize = 4;

/// Draws and scores the held-out images of an arm.
pub(super) fn run(job: &Job<'_>, studio: &mut Studio<'_>, arm: Arm) -> Result<(), Halt> {
    let (iteration, lora) = job
        .desk
        .look(|machine| (machine.iteration(), machine.lora_of(arm)));
    studio.open(lora)?;
    let held_out = HeldOut {
        job,
        iteration,
        arm,
        advice: Mutex::default(),
    };
    line::run(job.desk, studio, &held_out, job.helpers)
}

/// Measures how unlike each other an arm's images are and, if its model was trained, how near they come to the images of training.
pub(super) fn diversity(job: &Job<'_>, arm: Arm) -> Result<(), Halt> {
    let desk = job.desk;
    // One image at a time: all of them together may be more than the memory holds.
    let thumbnails = |images: Vec<Digest>| -> Result<Thumbnails, Halt> {
        let mut thumbnails = Thumbnails::default();
        for digest in images {
            desk.check()?;
            thumbnails.add(&desk.image(digest)?);
        }
        Ok(thumbnails)
    };
    // Images of training are needed for no decision: without one that is lost for good the job goes on unmeasured.
    let found = |images: &[Digest]| -> Result<bool, Halt> {
        for digest in images {
            desk.check()?;
            if desk.find(*digest)?.is_none() {
                tracing::warn!(image = %digest, "an image of training is lost; how near the held-out images come to it is not measured");
                return Ok(false);
            }
        }
        Ok(true)
    };
    let of = |arm: Arm| {
        desk.look(|machine| machine.evaluated(arm).map(|(_, made)| made.image).collect())
    };
    let (iteration, taught) = desk.look(|machine| (machine.iteration(), machine.taught()));
    let images = thumbnails(of(arm))?;
    let value = images
        .diversity()
        .ok_or_else(|| desk.fail("too few held-out images to compare"))?;
    let nearest = match arm {
        Arm::Enhanced | Arm::PlainLora if found(&taught)? => {
            let taught = thumbnails(taught)?;
            let base = thumbnails(of(Arm::Base))?;
            let distances = |images: &Thumbnails| images.distances(&taught, || desk.check());
            Nearest::of(&distances(&images)?, &distances(&base)?)
        }
        _ => None,
    };
    let event = Event::Diversity {
        iteration,
        arm,
        value,
        nearest,
    };
    desk.record(vec![Done::plain(event)])
}

/// The prompt of a held-out item: they are gone through in order, again and again with other seeds.
pub(crate) fn held_out_prompt(prompts: &[String], item: u32) -> &str {
    &prompts[item as usize % prompts.len()]
}

/// A prompt with the advice on its image in words; without usable advice it stays as it is.
pub(super) fn rewritten(prompt: &str, advised: &Advised) -> String {
    let regions = match advised.error {
        None => advised.advice.regions.as_slice(),
        Some(_) => &[],
    };
    rewrite(prompt, regions)
}

struct HeldOut<'a> {
    job: &'a Job<'a>,
    iteration: u32,
    arm: Arm,
    /// Advice on the base's images that is not recorded yet.
    advice: Mutex<BTreeMap<u32, Advised>>,
}

impl HeldOut<'_> {
    fn advice(&self) -> MutexGuard<'_, BTreeMap<u32, Advised>> {
        self.advice.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn prompt(&self, item: u32) -> &str {
        held_out_prompt(&self.job.tools.held_out, item)
    }

    /// The prompt that an item is drawn from in this arm; none while there is no advice on it.
    fn drawn_from(&self, item: u32, recorded: Option<&Evaluated>) -> Option<String> {
        if self.arm != Arm::Rewriting {
            return Some(self.prompt(item).to_owned());
        }
        if let Some(recorded) = recorded {
            return Some(recorded.prompt.clone());
        }
        let advice = self.advice();
        Some(rewritten(self.prompt(item), advice.get(&item)?))
    }

    fn left(&self, machine: &Machine) -> Vec<Batch> {
        match machine.work() {
            Work::Evaluate(arm, left) if arm == self.arm => left
                .into_iter()
                .map(|group| Batch {
                    enhanced: false,
                    group,
                })
                .collect(),
            _ => Vec::new(),
        }
    }

    fn evaluate(&self, piece: &Piece) -> Result<Done, Halt> {
        let Piece {
            item,
            ref image,
            cut,
            forwards,
            seconds,
        } = *piece;
        let tools = self.job.tools;
        let prompt = self
            .drawn_from(item, None)
            .ok_or_else(|| self.job.desk.fail(format!("item {item} has no prompt")))?;
        // Judged by what was asked for, not by what the advice made of it.
        let asked = self.prompt(item);
        let (judged, mut usage) = self.job.score(&tools.evaluation, image, asked)?;
        let (filter, more) = self.job.score(&tools.filter, image, asked)?;
        usage += more;
        let (digest, png) = items::packed(self.job, piece)?;
        Ok(Done {
            event: Event::Evaluated {
                iteration: self.iteration,
                arm: self.arm,
                item,
                result: Evaluated {
                    prompt,
                    seed: Some(held_out_seed(self.job.seed(), item).0),
                    image: digest,
                    cut,
                    scores: judged.scores,
                    filter_scores: filter.scores,
                    failures: judged.failures.into_iter().chain(filter.failures).collect(),
                    advice: self.advice().get(&item).cloned(),
                    forwards,
                    seconds,
                    usage,
                },
            },
            objects: vec![png],
        })
    }
}

impl Line for HeldOut<'_> {
    fn batches(&self, machine: &Machine) -> Vec<Batch> {
        let is_ready = |batch: &Batch| {
            batch.group.members.iter().all(|item| {
                self.drawn_from(*item, machine.evaluated_item(self.arm, *item))
                    .is_some()
            })
        };
        let mut left = self.left(machine);
        left.retain(is_ready);
        left
    }

    fn orders(&self, batch: &Batch) -> Result<Vec<Order>, Halt> {
        let job = self.job;
        batch
            .group
            .members
            .iter()
            .map(|item| {
                let prompt = job
                    .desk
                    .look(|machine| self.drawn_from(*item, machine.evaluated_item(self.arm, *item)))
                    .ok_or_else(|| job.desk.fail(format!("item {item} has no prompt")))?;
                Ok(Order {
                    prompt,
                    seed: held_out_seed(job.seed(), *item),
                    regions: Vec::new(),
                })
            })
            .collect()
    }

    fn chores(&self, machine: &Machine) -> Vec<Chore> {
        if self.arm != Arm::Rewriting {
            return Vec::new();
        }
        let advice = self.advice();
        self.left(machine)
            .into_iter()
            .take(AHEAD)
            .flat_map(|batch| batch.group.missing)
            .filter(|item| !advice.contains_key(item))
            .map(Chore::Advise)
            .collect()
    }

    fn portions(&self, pieces: Vec<Piece>) -> Vec<Vec<Piece>> {
        // Scorers elsewhere are asked about as many images at a time as there are helpers.
        pieces.into_iter().map(|piece| vec![piece]).collect()
    }

    fn keep(&self, batch: &Batch, portion: Vec<Piece>) -> Result<(), Halt> {
        // One by one: what scorers elsewhere answered was paid for, and a kill costs no more of it than one image's a helper.
        for piece in &portion {
            if batch.group.missing.contains(&piece.item) {
                let done = self.evaluate(piece)?;
                self.job.desk.record(vec![done])?;
            }
        }
        Ok(())
    }

    fn act(&self, chore: Chore) -> Result<(), Halt> {
        // Scores are made when a batch is put down.
        let Chore::Advise(item) = chore else {
            return Ok(());
        };
        let desk = self.job.desk;
        let base = desk
            .look(|machine| {
                machine
                    .evaluated_item(Arm::Base, item)
                    .map(|result| result.image)
            })
            .ok_or_else(|| desk.fail(format!("the held-out item {item} has no base image")))?;
        let advised = self.job.advise(&desk.image(base)?, self.prompt(item))?;
        self.advice().insert(item, advised);
        Ok(())
    }
}
