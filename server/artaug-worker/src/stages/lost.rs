//! Objects that are lost, here and on the server: what made them is done again.

use std::collections::BTreeSet;

use bytes::Bytes;
use concord_artaug::{
    engine::Order,
    folder::JobFolder,
    machine::{Arm, Event, Machine},
    prompts::held_out_seed,
};
use concord_common::Digest;

use super::{Job, Studio, evaluate, items, learn};
use crate::brake::Halt;

/// Makes again what is lost of the objects that the journal names, in its order: whatever an object was made from comes before it. What
/// only one side has lost is brought there. A lost checkpoint costs its steps and is not made again.
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
    while let Some((machine, event)) = retrace.next_of(&lost).map_err(|error| desk.unkept(error))? {
        desk.check()?;
        for bytes in made_by(job, studio, machine, event)? {
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

/// The objects that neither the server nor the folder has whole; those that only the server lacks are brought to it.
fn lost(job: &Job<'_>) -> Result<BTreeSet<Digest>, Halt> {
    let desk = job.desk;
    let lasting = desk.look_at_folder(|folder| folder.lasting().collect::<Vec<_>>());
    let mut lost = BTreeSet::new();
    for digest in desk.lease().missing(&lasting)? {
        match desk.find_here(digest)? {
            Some(bytes) => desk.keep(vec![bytes])?,
            None => {
                lost.insert(digest);
            }
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
