//! Generate, advise, regenerate and score: the pairs of an iteration.

use bytes::Bytes;
use concord_artaug::{
    advisor::Region,
    engine::Order,
    machine::{Event, Generated, Machine, Regenerated, Scored, Work},
    prompts::{image_seed, prompt_of},
};
use concord_common::Digest;

use super::{
    Job, Studio,
    line::{self, Batch, Chore, Line, Piece},
};
use crate::{brake::Halt, desk::Done};

/// Makes the pairs of the iteration under way.
pub(super) fn run(job: &Job<'_>, studio: &mut Studio<'_>) -> Result<(), Halt> {
    let (iteration, current) = job
        .desk
        .look(|machine| (machine.iteration(), machine.current()));
    studio.open(current)?;
    let items = Items { job, iteration };
    line::run(job.desk, studio, &items, job.helpers)
}

struct Items<'a> {
    job: &'a Job<'a>,
    iteration: u32,
}

/// What to draw for an item of an iteration; without regions its base image.
pub(super) fn order(job: &Job<'_>, iteration: u32, item: u32, regions: Vec<Region>) -> Order {
    Order {
        prompt: prompt_of(&job.tools.prompts, job.seed(), iteration, item).to_owned(),
        seed: image_seed(job.seed(), iteration, item),
        regions,
    }
}

/// An image as it is stored.
pub(super) fn packed(job: &Job<'_>, piece: &Piece) -> Result<(Digest, Bytes), Halt> {
    let png = piece.image.to_png().map_err(|error| job.desk.fail(error))?;
    Ok((Digest::of(&png), png.into()))
}

impl Items<'_> {
    fn prompt(&self, item: u32) -> &str {
        prompt_of(
            &self.job.tools.prompts,
            self.job.seed(),
            self.iteration,
            item,
        )
    }

    /// What an item has that must be there.
    fn known<T>(&self, what: &str, item: u32, known: Option<T>) -> Result<T, Halt> {
        known.ok_or_else(|| {
            self.job
                .desk
                .fail(format!("item {item} has no {what}, out of turn"))
        })
    }

    fn base(&self, item: u32) -> Result<Digest, Halt> {
        let known = self
            .job
            .desk
            .look(|machine| machine.generated(item).map(|made| made.image));
        self.known("base image", item, known)
    }
}

impl Line for Items<'_> {
    fn batches(&self, machine: &Machine) -> Vec<Batch> {
        let Work::Items {
            generate,
            regenerate,
            ..
        } = machine.work()
        else {
            return Vec::new();
        };
        // Enhanced images first: they end what is begun.
        let of = |enhanced| move |group| Batch { enhanced, group };
        let enhanced = regenerate.into_iter().map(of(true));
        enhanced
            .chain(generate.into_iter().map(of(false)))
            .collect()
    }

    fn orders(&self, batch: &Batch) -> Result<Vec<Order>, Halt> {
        batch
            .group
            .members
            .iter()
            .map(|item| {
                let regions = if batch.enhanced {
                    let advised = self.job.desk.look(|machine| {
                        machine
                            .advised(*item)
                            .map(|advised| advised.advice.regions.clone())
                    });
                    self.known("advice", *item, advised)?
                } else {
                    Vec::new()
                };
                Ok(order(self.job, self.iteration, *item, regions))
            })
            .collect()
    }

    fn chores(&self, machine: &Machine) -> Vec<Chore> {
        let Work::Items { advise, score, .. } = machine.work() else {
            return Vec::new();
        };
        let score = score.into_iter().map(Chore::Score);
        score.chain(advise.into_iter().map(Chore::Advise)).collect()
    }

    fn keep(&self, batch: &Batch, pieces: Vec<Piece>) -> Result<(), Halt> {
        let iteration = self.iteration;
        let missing = |piece: &Piece| batch.group.missing.contains(&piece.item);
        let mut done = Vec::new();
        for piece in pieces.into_iter().filter(missing) {
            let (image, png) = packed(self.job, &piece)?;
            let Piece {
                item,
                cut,
                forwards,
                seconds,
                ..
            } = piece;
            let event = if batch.enhanced {
                Event::Regenerated {
                    iteration,
                    item,
                    result: Regenerated {
                        image,
                        cut,
                        forwards,
                        seconds,
                    },
                }
            } else {
                Event::Generated {
                    iteration,
                    item,
                    result: Generated {
                        prompt: self.prompt(item).to_owned(),
                        seed: image_seed(self.job.seed(), iteration, item).0,
                        image,
                        cut,
                        forwards,
                        seconds,
                    },
                }
            };
            done.push(Done {
                event,
                objects: vec![png],
            });
        }
        self.job.desk.record(done)
    }

    fn act(&self, chore: Chore) -> Result<(), Halt> {
        let (job, iteration) = (self.job, self.iteration);
        let event = match chore {
            Chore::Advise(item) => {
                let image = job.desk.image(self.base(item)?)?;
                Event::Advised {
                    iteration,
                    item,
                    result: job.advise(&image, self.prompt(item))?,
                }
            }
            Chore::Score(item) => {
                let enhanced = job
                    .desk
                    .look(|machine| machine.regenerated(item).map(|made| made.image));
                let enhanced = self.known("enhanced image", item, enhanced)?;
                let score = |image: Digest| {
                    let image = job.desk.image(image)?;
                    job.score(&job.tools.filter, &image, self.prompt(item))
                };
                let (base, mut usage) = score(self.base(item)?)?;
                let (enhanced, more) = score(enhanced)?;
                usage += more;
                Event::Scored {
                    iteration,
                    item,
                    result: Scored {
                        base: base.scores,
                        enhanced: enhanced.scores,
                        failures: base.failures.into_iter().chain(enhanced.failures).collect(),
                        usage,
                    },
                }
            }
        };
        job.desk.record(vec![Done::plain(event)])
    }
}
