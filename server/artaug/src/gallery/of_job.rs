//! The gallery of a job, put together from its folder.

use std::collections::BTreeMap;

use concord_common::Digest;

use super::{AdviceCounts, Curve, Gallery, HeldOutView, PairView, ReviewPage, Totals};
use crate::{
    card::FILTER_SEES_GUARD,
    filter::Verdict,
    folder::{FolderError, JobFolder},
    gallery::{InvalidJob, arm_name},
    image::Image,
    losses,
    machine::{Arm, Evaluated, Machine, ManifestLine, Sampled, Scored, Training, Work},
};

/// How much of a job is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Kept pairs of each iteration.
    pub kept: usize,
    /// Rejected pairs of each iteration for each reason.
    pub rejected: usize,
    /// Held-out prompts.
    pub held_out: usize,
    /// Bytes of all pairs' pixels, about as much as their part of the page: each iteration has an equal share.
    pub pixels: usize,
    /// Pictures that trainings drew on their way, those of the newest trainings first.
    pub samples: usize,
}

/// Longest side of a picture on a page; larger ones are shrunk.
const SIDE: u32 = 512;
/// Longest side of a sample, and how often a training's samples are shown at most.
const SAMPLE_SIDE: u32 = 128;
const SAMPLED: usize = 6;
/// Most pairs on a page for review.
const REVIEWED: usize = 1000;

impl Default for Extent {
    fn default() -> Self {
        Self {
            kept: 24,
            rejected: 4,
            held_out: 24,
            pixels: 128 << 20,
            samples: 600,
        }
    }
}

/// Gives a stored object's bytes; none if it cannot be had, and then what needs it is left out of the page.
pub type Fetch<'a> = dyn FnMut(Digest) -> Option<Vec<u8>> + 'a;

impl Gallery {
    /// The gallery of a job's finished iterations, with costs. `notes` come first on the page.
    ///
    /// # Errors
    /// If a manifest of the folder cannot be read.
    pub fn of_job(
        job: &JobFolder,
        title: &str,
        mut notes: Vec<String>,
        extent: Extent,
        fetch: &mut Fetch<'_>,
    ) -> Result<Self, FolderError> {
        let machine = job.machine();
        let (mut pairs, mut advice) = (Vec::new(), AdviceCounts::default());
        let mut totals = Totals {
            held_out: machine.evaluated(Arm::Base).count(),
            ..Totals::default()
        };
        let share = extent.pixels / machine.history().len().max(1);
        for summary in machine.history() {
            let lines = job.manifest(summary.iteration)?;
            advice.add(&lines);
            totals.kept += summary.kept;
            totals.rejected += summary.rejected.values().sum::<usize>();
            let mut views = chosen(&lines, extent).filter_map(|line| view(line, fetch));
            pairs.extend(that_fit(&mut views, share));
        }
        if machine.plan().filter_sees_guard() {
            notes.push(FILTER_SEES_GUARD.to_owned());
        }
        Ok(Self {
            title: title.to_owned(),
            notes,
            iterations: machine.history().to_vec(),
            advice,
            pairs,
            held_out: held_out(machine, extent.held_out, fetch),
            totals,
            curves: curves(machine, extent.samples, fetch),
            costs: job.ledger().lines(job.peak_memory(), job.worked()),
        })
    }
}

impl ReviewPage {
    /// The page for the pairs that wait for a word now: the first of them, as many as fit. `id` is the job's id at the server.
    ///
    /// # Errors
    /// [`InvalidJob`] if the id is none.
    pub fn of_job(
        job: &JobFolder,
        id: &str,
        extent: Extent,
        fetch: &mut Fetch<'_>,
    ) -> Result<Self, InvalidJob> {
        let machine = job.machine();
        let waiting = match machine.work() {
            Work::Review(waiting) => waiting,
            _ => Vec::new(),
        };
        let mut views = machine
            .manifest()
            .filter(|line| waiting.binary_search(&line.item).is_ok())
            .filter_map(|line| view(&line, fetch))
            .take(REVIEWED);
        let pairs = that_fit(&mut views, extent.pixels);
        Ok(Self::new(id, machine.iteration(), pairs)?.of(waiting.len()))
    }
}

/// The first pairs whose pictures together have no more than so many bytes of pixels, the base counted twice as it is shown; one at least.
fn that_fit(views: &mut dyn Iterator<Item = PairView>, mut pixels: usize) -> Vec<PairView> {
    let mut shown = Vec::new();
    for view in views {
        let enhanced = view.enhanced.as_ref();
        let taken = 2 * view.base.pixels().len() + enhanced.map_or(0, |image| image.pixels().len());
        if taken > pixels && !shown.is_empty() {
            break;
        }
        pixels = pixels.saturating_sub(taken);
        shown.push(view);
    }
    shown
}

/// The first kept pairs and the first rejected ones of each reason.
fn chosen(lines: &[ManifestLine], extent: Extent) -> impl Iterator<Item = &ManifestLine> {
    let mut shown: BTreeMap<&str, usize> = BTreeMap::new();
    lines.iter().filter(move |line| {
        let (code, most) = match &line.verdict {
            Some(Verdict::Kept { .. }) => ("kept", extent.kept),
            Some(Verdict::Rejected { reason }) => (reason.code(), extent.rejected),
            None => return false,
        };
        let count = shown.entry(code).or_default();
        *count += 1;
        *count <= most
    })
}

fn image(digest: Digest, fetch: &mut Fetch<'_>) -> Option<Image> {
    Some(Image::from_png(&fetch(digest)?).ok()?.shrunk(SIDE))
}

fn view(line: &ManifestLine, fetch: &mut Fetch<'_>) -> Option<PairView> {
    let base = line.base.as_ref()?;
    let advice = line.advice.as_ref().map(|advised| &advised.advice);
    let (kept, verdict) = match &line.verdict {
        Some(Verdict::Kept { gain }) => (true, format!("gain {gain:.2} spreads")),
        Some(Verdict::Rejected { reason }) => (false, reason.to_string()),
        None => (false, "not judged".to_owned()),
    };
    Some(PairView {
        iteration: line.iteration,
        item: line.item,
        prompt: base.prompt.clone(),
        base: image(base.image, fetch)?,
        enhanced: line
            .enhanced
            .as_ref()
            .and_then(|enhanced| image(enhanced.image, fetch)),
        regions: advice
            .map(|advice| advice.regions.clone())
            .unwrap_or_default(),
        rejected_replies: advice
            .map(|advice| advice.rejected_replies.clone())
            .unwrap_or_default(),
        scores: line.scores.as_ref().map(both).unwrap_or_default(),
        kept,
        verdict,
    })
}

fn both(scored: &Scored) -> Vec<(String, f64, f64)> {
    scored
        .base
        .iter()
        .filter_map(|(name, before)| Some((name.to_owned(), before, scored.enhanced.get(name)?)))
        .collect()
}

fn held_out(machine: &Machine, most: usize, fetch: &mut Fetch<'_>) -> Vec<HeldOutView> {
    let judge = &machine.plan().stop.judge;
    let result: BTreeMap<u32, &Evaluated> = machine.evaluated_result().collect();
    let kept = machine.newest_kept();
    machine
        .evaluated(Arm::Base)
        .take(most)
        .map(|(item, base)| {
            let mut images = Vec::new();
            let mut add = |name: String, made: Option<&Evaluated>| {
                let shown = made.and_then(|made| {
                    let score = made.scores.get(judge).unwrap_or(f64::NAN);
                    Some((name, image(made.image, fetch)?, score))
                });
                images.extend(shown);
            };
            add(arm_name(Arm::Base).to_owned(), Some(base));
            if kept > 0 {
                add(
                    format!("after iteration {kept}"),
                    result.get(&item).copied(),
                );
            }
            if kept != machine.iteration() {
                // Rolled back, or not over: the newest model is worth a look all the same.
                add(
                    format!("iteration {}", machine.iteration()),
                    machine.evaluated_item(Arm::Enhanced, item),
                );
            }
            for arm in [Arm::PlainLora, Arm::Rewriting] {
                add(arm_name(arm).to_owned(), machine.evaluated_item(arm, item));
            }
            HeldOutView {
                prompt: base.prompt.clone(),
                number: item,
                images,
            }
        })
        .filter(|view| !view.images.is_empty())
        .collect()
}

/// The losses of all trainings with what they drew, at most so many pictures. Where those do not suffice, the newest are worth most.
fn curves(machine: &Machine, mut pictures: usize, fetch: &mut Fetch<'_>) -> Vec<Curve> {
    let mut curves = Vec::new();
    for (number, made) in machine.made().iter().enumerate().rev() {
        for (training, trained) in made.trained.iter().rev() {
            let losses = fetch(trained.losses).and_then(|bytes| losses::unpack(&bytes));
            if let Some(losses) = losses {
                let name = match training {
                    Training::First => "LoRA_1 on X",
                    Training::Second => "LoRA_2 on X'",
                    Training::Control => "control on X'",
                };
                let sampled = made.samples.get(training).map_or(&[][..], Vec::as_slice);
                let samples = samples(sampled, pictures, fetch);
                let taken: usize = samples.iter().map(|(_, images)| images.len()).sum();
                pictures = pictures.saturating_sub(taken);
                curves.push(Curve {
                    name: format!("{name}, iteration {}", number + 1),
                    losses,
                    samples,
                    sampled: sampled.len(),
                });
            }
        }
    }
    curves.reverse();
    curves
}

/// The samples of some steps, evenly chosen with the last among them, at most so many pictures.
fn samples(sampled: &[Sampled], pictures: usize, fetch: &mut Fetch<'_>) -> Vec<(u64, Vec<Image>)> {
    let most_of_a_step = sampled.iter().map(|sampled| sampled.images.len()).max();
    let steps = pictures / most_of_a_step.unwrap_or(0).max(1);
    let shown = sampled.len().min(SAMPLED).min(steps);
    (1..=shown)
        .map(|number| &sampled[number * sampled.len() / shown - 1])
        .map(|Sampled { step, images, .. }| {
            let images = images.iter().filter_map(|digest| {
                let image = Image::from_png(&fetch(*digest)?).ok()?;
                Some(image.shrunk(SAMPLE_SIDE))
            });
            (*step, images.collect::<Vec<_>>())
        })
        .filter(|(_, images)| !images.is_empty())
        .collect()
}
