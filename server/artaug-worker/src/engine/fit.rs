//! Fits of adapters whose state can be put away at any step.

mod progress;

use std::{collections::BTreeMap, ops::Range};

use bytes::Bytes;
use concord_artaug::{
    engine::{Drawn, EngineError, Fit, Fitted, Go, Lesson, Order, Samples, Saved, Watch},
    machine::Training,
};
use concord_common::{
    Digest,
    job::artaug::{LoraMode, LoraSpec, LoraTargets},
    seed::Seed,
};
use concord_learning::{
    diffusion::{
        denoiser::Denoiser,
        draw::Picture,
        lora::{self, Lora, Placement},
        params::Compute,
        train::{Example, Recipe, Trainer, lora_leaves},
    },
    optimiser::AdamWSettings,
};

use self::progress::Progress;
use super::{
    adapters::{self, ALL},
    container::{What, pack},
    failed, unusable,
};

/// Names of adapters while a fit runs: what it trains, and what lies frozen below.
const NEW: &str = "new";
const BELOW: &str = "below";

/// Draws on the model as it is, for samples.
pub(super) type Draw<'a> =
    dyn FnMut(&dyn Denoiser, &[Order], &mut dyn FnMut() -> Go) -> Result<Drawn, EngineError> + 'a;

/// Trains on a model as it is opened; its adapters are off again at the end, whatever the end is.
pub(super) fn run(
    model: &mut dyn Denoiser,
    spec: &LoraSpec,
    fit: &Fit<'_>,
    watch: &mut dyn Watch,
    draw: &mut Draw<'_>,
) -> Result<Fitted, EngineError> {
    model.set_checkpointing(spec.recompute);
    let result =
        Course::new(model, spec, fit, watch).and_then(|course| course.run(model, watch, draw));
    for adapter in [NEW, BELOW] {
        // An error says that it is not there.
        let _ = lora::detach(model.sites(), adapter);
    }
    model.set_checkpointing(false);
    result
}

/// Examples that share an adapter: all of them, or one pair's.
#[derive(Debug)]
struct Group {
    name: String,
    examples: Range<usize>,
}

/// A fit, from wherever its saved state left it.
#[derive(Debug)]
struct Course<'a> {
    spec: &'a LoraSpec,
    seed: Seed,
    /// Steps of each group.
    steps: u64,
    examples: Vec<Example>,
    groups: Vec<Group>,
    /// What lies below each group, by its name.
    below: BTreeMap<String, Lora>,
    samples: Option<Samples<'a>>,
    /// What the fit's numbers depend on, in words.
    fingerprint: String,
    progress: Progress,
}

impl<'a> Course<'a> {
    fn new(
        model: &dyn Denoiser,
        spec: &'a LoraSpec,
        fit: &Fit<'a>,
        watch: &mut dyn Watch,
    ) -> Result<Self, EngineError> {
        let groups = groups(spec.mode, fit.lessons)?;
        let below = match (fit.training, fit.below) {
            (Training::Second, Some(object)) => adapters::read(object)?,
            (Training::First | Training::Control, None) => BTreeMap::new(),
            (Training::Second, None) => {
                return Err(EngineError::Unusable(
                    "LoRA_2 is trained on top of LoRA_1, which is not given".to_owned(),
                ));
            }
            (training, Some(_)) => {
                return Err(EngineError::Unusable(format!(
                    "LoRA_1 lies below LoRA_2 alone, not below {training:?}"
                )));
            }
        };
        let names = |groups: &[Group]| groups.iter().map(|group| group.name.clone()).collect();
        let expected: Vec<String> = names(&groups);
        if !below.is_empty() && !below.keys().eq(&expected) {
            return Err(EngineError::Unusable(
                "LoRA_1 was trained on other pairs, or in the other mode".to_owned(),
            ));
        }
        let steps = match fit.training {
            Training::First => spec.first_steps,
            Training::Second | Training::Control => spec.second_steps,
        };
        let fingerprint = fingerprint(model, spec, fit)?;
        let progress = match fit.from {
            None => Progress::default(),
            Some(kept) => Progress::read(kept, &fingerprint, groups.len())?,
        };
        let examples = fit
            .lessons
            .iter()
            .map(|lesson| {
                go_on(watch)?;
                let picture = Picture {
                    width: lesson.image.width(),
                    height: lesson.image.height(),
                    pixels: lesson.image.pixels().to_vec(),
                };
                let example = Example::of(model, &lesson.prompt, &picture);
                example.map_err(|error| match unusable(error) {
                    EngineError::Unusable(what) => {
                        EngineError::Unusable(format!("the pair {}: {what}", lesson.item))
                    }
                    other => other,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            spec,
            seed: fit.seed,
            steps: u64::from(steps),
            examples,
            groups,
            below,
            samples: fit.samples,
            fingerprint,
            progress,
        })
    }

    fn run(
        mut self,
        model: &mut dyn Denoiser,
        watch: &mut dyn Watch,
        draw: &mut Draw<'_>,
    ) -> Result<Fitted, EngineError> {
        for place in self.progress.finished.files.len()..self.groups.len() {
            let bytes = self.train(place, model, watch, draw)?;
            self.progress.finished.push(bytes.into());
        }
        let names = self.groups.into_iter().map(|group| group.name);
        let loras: BTreeMap<String, Bytes> = names.zip(self.progress.finished.files).collect();
        Ok(Fitted {
            lora: pack(What::Lora, &loras)?,
            losses: self.progress.losses,
        })
    }

    /// Trains one group's adapter and gives its bytes.
    fn train(
        &mut self,
        place: usize,
        model: &mut dyn Denoiser,
        watch: &mut dyn Watch,
        draw: &mut Draw<'_>,
    ) -> Result<Vec<u8>, EngineError> {
        let name = &self.groups[place].name;
        let seed = self.seed.derive(&format!("group {name}"));
        let compute: Compute = model.compute();
        if let Some(below) = self.below.get(name) {
            lora::attach(model.sites(), BELOW, below, 1.0, compute).map_err(unusable)?;
        }
        lora::attach_fresh(
            model.sites(),
            NEW,
            placement(self.spec.targets),
            i64::from(self.spec.rank),
            seed.derive("weights"),
            compute,
        )
        .map_err(unusable)?;
        let leaves = lora_leaves(model.sites(), NEW);
        let mut trainer = Trainer::new(leaves, self.recipe())
            .map_err(unusable)?
            .told(self.fingerprint.clone());
        let begun = place as u64 * self.steps;
        if let Some(state) = self.progress.trainer.take() {
            trainer.restore(&state).map_err(unusable)?;
        }
        let so_far = self.step();
        if trainer.step() > self.steps || begun + trainer.step() != so_far {
            return Err(EngineError::Unusable(format!(
                "a saved state has {so_far} losses for {begun} and {} steps of {}",
                trainer.step(),
                self.steps
            )));
        }
        let done = self.advance(place, &mut trainer, model, watch, draw);
        if matches!(done, Err(EngineError::Stopped)) && watch.wants_state(self.step()) {
            trainer.back_to_step();
            self.save(&trainer, watch)?;
        }
        done?;
        let lora = lora::extract(model.sites(), NEW).map_err(failed)?;
        lora::detach(model.sites(), NEW).map_err(failed)?;
        if !self.below.is_empty() {
            lora::detach(model.sites(), BELOW).map_err(failed)?;
        }
        lora.to_bytes().map_err(failed)
    }

    /// Does the steps of a group that are left.
    fn advance(
        &mut self,
        place: usize,
        trainer: &mut Trainer,
        model: &mut dyn Denoiser,
        watch: &mut dyn Watch,
        draw: &mut Draw<'_>,
    ) -> Result<(), EngineError> {
        let seed = self
            .seed
            .derive(&format!("group {}", self.groups[place].name));
        let all = self.groups.len() as u64 * self.steps;
        if trainer.step() > 0 {
            // The fit may have been stopped between a step and its samples.
            self.sample(place, model, watch, draw)?;
        }
        while !trainer.done() {
            let examples = &self.examples[self.groups[place].examples.clone()];
            let mut sum = 0.0;
            for pass in 0..self.spec.accumulation {
                if pass > 0 {
                    go_on(watch)?;
                }
                sum += trainer
                    .pass(model, examples, seed.derive("batches"))
                    .map_err(unusable)?;
            }
            let loss = sum / f64::from(self.spec.accumulation);
            self.progress.losses.push(loss);
            ended(watch.stepped(self.step(), loss))?;
            self.sample(place, model, watch, draw)?;
            let every = u64::from(self.spec.checkpoint_every.max(1));
            if self.step().is_multiple_of(every) && self.step() < all {
                ended(self.save(trainer, watch)?)?;
            }
        }
        Ok(())
    }

    /// Steps done, over all groups.
    fn step(&self) -> u64 {
        self.progress.losses.len() as u64
    }

    /// Draws the samples of the step that was done last, if it has some that are wanted.
    fn sample(
        &self,
        place: usize,
        model: &mut dyn Denoiser,
        watch: &mut dyn Watch,
        draw: &mut Draw<'_>,
    ) -> Result<(), EngineError> {
        let step = self.step();
        let due = |samples: &Samples<'_>| step.is_multiple_of(samples.every.max(1));
        let Some(samples) = self.samples.filter(due) else {
            return Ok(());
        };
        if !watch.wants_samples(step) {
            return Ok(());
        }
        let below = self.below.get(&self.groups[place].name);
        let drawn = sample(model, below, samples.orders, watch, draw)?;
        ended(watch.sampled(step, drawn)?)
    }

    /// Gives the state after the step that was done last to be kept.
    fn save(&mut self, trainer: &Trainer, watch: &mut dyn Watch) -> Result<Go, EngineError> {
        let state = trainer.save().map_err(failed)?;
        let saved = Saved {
            step: self.step(),
            state: self.progress.write(&self.fingerprint, state)?,
            finished: self.progress.finished.files.clone(),
            loss: self.progress.unreported(),
        };
        let go = watch.save(saved)?;
        self.progress.report();
        Ok(go)
    }

    fn recipe(&self) -> Recipe {
        Recipe {
            learning_rate: self.spec.learning_rate,
            adamw: AdamWSettings {
                weight_decay: self.spec.weight_decay,
                warmup_steps: 0,
                clip_norm: self.spec.clip_norm,
            },
            batch: self.spec.batch as usize,
            accumulation: self.spec.accumulation,
            steps: self.steps,
        }
    }
}

/// Draws with what is trained so far and without what lies below it. Nothing that the training goes on from is changed: what lies below
/// is multiplied by zero meanwhile, and all noise follows from seeds.
fn sample(
    model: &mut dyn Denoiser,
    below: Option<&Lora>,
    orders: &[Order],
    watch: &mut dyn Watch,
    draw: &mut Draw<'_>,
) -> Result<Drawn, EngineError> {
    scale_below(model, |_| 0.0);
    let drawn = draw(model, orders, &mut || watch.within_step());
    if let Some(below) = below {
        scale_below(model, |name| below.pairs[name].scale);
    }
    drawn
}

fn scale_below(model: &mut dyn Denoiser, scale: impl Fn(&str) -> f64) {
    for (name, linear) in model.sites() {
        for pair in linear.pairs_mut() {
            if pair.adapter == BELOW {
                pair.scale = scale(&name);
            }
        }
    }
}

/// Asks in the middle of something.
fn go_on(watch: &mut dyn Watch) -> Result<(), EngineError> {
    ended(watch.within_step())
}

fn ended(go: Go) -> Result<(), EngineError> {
    match go {
        Go::On => Ok(()),
        Go::Stop => Err(EngineError::Stopped),
    }
}

fn placement(targets: LoraTargets) -> Placement {
    match targets {
        LoraTargets::Attention => Placement::Attention,
        LoraTargets::AllLinear => Placement::All,
    }
}

/// Who shares an adapter. Names sort as items do.
fn groups(mode: LoraMode, lessons: &[Lesson]) -> Result<Vec<Group>, EngineError> {
    if lessons.is_empty() {
        return Err(EngineError::Unusable(
            "there is no pair to train on".to_owned(),
        ));
    }
    let sides = |lesson: &Lesson| (lesson.image.width(), lesson.image.height());
    if lessons
        .iter()
        .any(|lesson| sides(lesson) != sides(&lessons[0]))
    {
        return Err(EngineError::Unusable(
            "pairs to train on must have images of one size".to_owned(),
        ));
    }
    if !lessons.is_sorted_by(|one, next| one.item < next.item) {
        return Err(EngineError::Unusable(
            "pairs to train on must stand in order, each once".to_owned(),
        ));
    }
    Ok(match mode {
        LoraMode::Joint => vec![Group {
            name: ALL.to_owned(),
            examples: 0..lessons.len(),
        }],
        LoraMode::PerPair => lessons
            .iter()
            .enumerate()
            .map(|(place, lesson)| Group {
                name: format!("pair {:010}", lesson.item),
                examples: place..place + 1,
            })
            .collect(),
    })
}

/// What a fit's numbers depend on beside the recipe, in words that say what differs.
fn fingerprint(
    model: &dyn Denoiser,
    spec: &LoraSpec,
    fit: &Fit<'_>,
) -> Result<String, EngineError> {
    let mut hasher = blake3::Hasher::new_derive_key("concord.v1 artaug lessons");
    for lesson in fit.lessons {
        hasher.update(&lesson.item.to_le_bytes());
        hasher.update(&(lesson.prompt.len() as u64).to_le_bytes());
        hasher.update(lesson.prompt.as_bytes());
        hasher.update(lesson.image.digest().as_bytes());
    }
    let lessons: Digest = hasher.finalize().into();
    let below = fit.below.map_or_else(
        || "nothing".to_owned(),
        |below| Digest::of(below).to_string(),
    );
    let LoraSpec {
        rank,
        targets,
        mode,
        first_steps,
        second_steps,
        recompute,
        ..
    } = spec;
    Ok(format!(
        "{:?}, {mode:?}, rank {rank} on {targets:?}, steps {first_steps} and {second_steps}, recompute {recompute}, seed {}, model {}, below {below}, \
         lessons {lessons}",
        fit.training,
        fit.seed.0,
        model.digest().map_err(failed)?,
    ))
}
