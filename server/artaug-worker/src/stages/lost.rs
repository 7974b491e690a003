//! Objects that are lost, here and on the server: what made them is done again.

use std::collections::BTreeSet;

use bytes::Bytes;
use concord_artaug::{
    engine::Order,
    folder::JobFolder,
    machine::{Arm, Checkpoint, Event, Machine, Training},
    prompts::held_out_seed,
};
use concord_common::Digest;

use super::{Job, Studio, evaluate, items, learn};
use crate::brake::Halt;

/// Makes again what is lost of the objects that the journal names, in its order: whatever an object was made from comes before it. What
/// only one side has lost is brought there. A checkpoint that both have lost costs its steps and is not made again.
pub(super) fn restore(job: &Job<'_>, studio: &mut Studio<'_>) -> Result<(), Halt> {
    let desk = job.desk;
    let mut lost = lost(job)?;
    if lost.is_empty() {
        return Ok(());
    }
    tracing::warn!(
        objects = lost.len(),
        "objects of the job are lost; what made them is done again"
    );
    let retrace = desk.look_at_folder(JobFolder::retrace);
    let mut retrace = retrace.map_err(|error| desk.unkept(error))?;
    let mut done = BTreeSet::new();
    while let Some((machine, event)) = retrace.next_of(&lost).map_err(|error| desk.unkept(error))? {
        desk.check()?;
        // All objects of a training are made by doing it again; those that came out otherwise would do so a second time.
        let is_done = training_of(event).is_some_and(|training| !done.insert(training));
        let made = if is_done {
            Vec::new()
        } else {
            made_by(job, studio, machine, event)?
        };
        for bytes in made {
            if lost.remove(&Digest::of(&bytes)) {
                desk.keep(vec![bytes])?;
            }
        }
        for object in event.objects() {
            if lost.remove(&object) {
                // Not everything is needed again; who needs it says so.
                tracing::error!(
                    %object, event = event.name(),
                    "a lost object came out otherwise; another version, another number of threads or another machine made it"
                );
            }
        }
    }
    Ok(())
}

/// The iteration and training of an event whose objects come about by training.
fn training_of(event: &Event) -> Option<(u32, Training)> {
    match event {
        Event::Sampled {
            iteration,
            training,
            ..
        }
        | Event::Trained {
            iteration,
            training,
            ..
        } => Some((*iteration, *training)),
        _ => None,
    }
}

/// The objects that neither the server nor the folder has whole, without those of checkpoints; what only the server lacks is brought to it.
fn lost(job: &Job<'_>) -> Result<BTreeSet<Digest>, Halt> {
    let desk = job.desk;
    let (lasting, named) = desk.look_at_folder(|folder| {
        let lasting: BTreeSet<Digest> = folder.lasting().collect();
        let checkpoint = folder.machine().checkpoint().into_iter();
        let checkpoint = checkpoint.flat_map(Checkpoint::objects);
        let named: Vec<Digest> = lasting.iter().copied().chain(checkpoint).collect();
        (lasting, named)
    });
    let mut lost = BTreeSet::new();
    for digest in desk.lease().missing(&named)? {
        match desk.find_here(digest)? {
            Some(bytes) => desk.keep(vec![bytes])?,
            None if lasting.contains(&digest) => {
                lost.insert(digest);
            }
            None => {}
        }
    }
    Ok(lost)
}

/// The objects of an event, and of those that were made with it, made again by the machine as it was before.
fn made_by(
    job: &Job<'_>,
    studio: &mut Studio<'_>,
    machine: &Machine,
    event: &Event,
) -> Result<Vec<Bytes>, Halt> {
    match event {
        Event::Generated {
            iteration, item, ..
        } => {
            let members = machine.batch_of(*item, machine.plan().pairs);
            let orders: Vec<Order> = members
                .into_iter()
                .map(|member| items::order(job, *iteration, member, Vec::new()))
                .collect();
            draw(job, studio, machine.current(), &orders)
        }
        Event::Regenerated {
            iteration, item, ..
        } => {
            let of = |member: u32| {
                let advised = machine.advised(member)?;
                let regions = advised.advice.regions.clone();
                Some(items::order(job, *iteration, member, regions))
            };
            let members = machine.regenerated_with(*item);
            let orders: Vec<Order> = members.into_iter().filter_map(of).collect();
            draw(job, studio, machine.current(), &orders)
        }
        Event::Evaluated { arm, item, .. } => {
            let orders = machine
                .batch_of(*item, machine.plan().held_out)
                .into_iter()
                .map(|member| {
                    Ok(Order {
                        prompt: held_out_prompt(job, machine, *arm, member)?,
                        seed: held_out_seed(job.seed(), member),
                        regions: Vec::new(),
                    })
                })
                .collect::<Result<Vec<_>, Halt>>()?;
            draw(job, studio, machine.lora_of(*arm), &orders)
        }
        // With the samples comes what the training ends in.
        Event::Sampled { training, .. } => {
            learn::train_again(job, studio, machine, *training, true)
        }
        Event::Trained { training, .. } => {
            learn::train_again(job, studio, machine, *training, false)
        }
        Event::Fused { .. } => {
            let (joined, control) = learn::join_all(job, studio, machine)?;
            let objects = [
                Some(joined.merged),
                joined.reduced,
                control.map(|control| control.merged),
            ];
            Ok(objects.into_iter().flatten().map(Bytes::from).collect())
        }
        _ => Ok(Vec::new()),
    }
}

/// The prompt that a held-out image is drawn from.
fn held_out_prompt(job: &Job<'_>, before: &Machine, arm: Arm, item: u32) -> Result<String, Halt> {
    let desk = job.desk;
    let prompt = evaluate::held_out_prompt(&job.tools.held_out, item);
    if arm != Arm::Rewriting {
        return Ok(prompt.to_owned());
    }
    // The members of a batch came after each other, so the state before the first does not know the others.
    let recorded = desk.look(|now| {
        now.evaluated_item(arm, item)
            .map(|known| known.prompt.clone())
    });
    if let Some(recorded) = recorded {
        return Ok(recorded);
    }
    let Some(base) = before.evaluated_item(Arm::Base, item) else {
        return Err(desk.fail(format!("the held-out item {item} has no base image")));
    };
    let advised = job.advise(&desk.image(base.image)?, prompt)?;
    Ok(evaluate::rewritten(prompt, &advised))
}

/// Images as they are stored.
fn draw(
    job: &Job<'_>,
    studio: &mut Studio<'_>,
    lora: Option<Digest>,
    orders: &[Order],
) -> Result<Vec<Bytes>, Halt> {
    studio.open(lora)?;
    let (drawn, _) = studio.draw(orders)?;
    drawn
        .images
        .iter()
        .map(|image| {
            let png = image.to_png().map_err(|error| job.desk.fail(error))?;
            Ok(png.into())
        })
        .collect()
}
