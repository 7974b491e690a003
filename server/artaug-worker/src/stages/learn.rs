//! Training of the adapters, and joining them.

use std::time::Duration;

use bytes::Bytes;
use concord_artaug::{
    engine::{Drawn, EngineError, Fit, Go, Joined, Kept, Lesson, Order, Samples, Saved, Watch},
    folder::JobFolder,
    image::Image,
    losses,
    machine::{Checkpoint, Event, Fused, Machine, Sampled, Stage, Trained, Training},
    prompts::held_out_seed,
};
use concord_common::{Digest, seed::Seed};

use super::{Job, Studio, evaluate::held_out_prompt};
use crate::{brake::Halt, desk::Done};

/// Held-out prompts that a training draws on its way.
const SAMPLES: u32 = 4;

/// Trains one adapter of the iteration under way, from its checkpoint if there is one.
pub(super) fn train(
    job: &Job<'_>,
    studio: &mut Studio<'_>,
    training: Training,
    from: Option<&Checkpoint>,
) -> Result<(), Halt> {
    let desk = job.desk;
    let machine = desk.look(Machine::clone);
    let given = Given::of(job, &machine, training)?;
    let iteration = machine.iteration();
    // A state that is lost or cannot be used costs the steps behind it: from the beginning they end in the same bytes.
    let found = match from {
        Some(checkpoint) => find(job, checkpoint)?,
        None => None,
    };
    if let (Some(checkpoint), None) = (from, &found) {
        tracing::warn!(
            step = checkpoint.step,
            "the checkpoint is lost; the training begins anew"
        );
    }
    studio.open(given.on)?;
    let mut watcher = Watcher {
        job,
        iteration,
        training,
        recorded: from.map_or(0, |checkpoint| checkpoint.step),
        named: from.map_or_else(Vec::new, |checkpoint| checkpoint.finished.clone()),
        finished: match (from, &found) {
            (Some(checkpoint), Some(_)) => checkpoint.finished.clone(),
            _ => Vec::new(),
        },
        sampled: machine.sampled(training),
        before: from.map_or(0.0, |checkpoint| checkpoint.seconds),
        start: desk.look_at_folder(JobFolder::worked),
        begun: false,
        ended: None,
    };
    let from = found
        .as_ref()
        .map(|(state, finished)| Kept { state, finished });
    let mut fitted = studio.fit(&given.fit(from), &mut watcher);
    if let (Some(_), Err(EngineError::Unusable(reason))) = (from, &fitted)
        && watcher.may_begin_anew()
    {
        tracing::warn!(
            step = watcher.recorded,
            reason,
            "the checkpoint cannot be used; the training begins anew"
        );
        watcher.finished.clear();
        fitted = studio.fit(&given.fit(None), &mut watcher);
    }
    let fitted = match (fitted, &watcher.ended) {
        (Ok(fitted), _) => fitted,
        // The state is kept; what to do about the time is decided by the caller's loop.
        (Err(_), Some(Ended::Time)) => return Ok(()),
        (Err(_), Some(Ended::Halt(halt) | Ended::Unkept(halt))) => return Err(halt.clone()),
        (Err(error), None) => return Err(studio.halt(error)),
    };
    let lora = Digest::of(&fitted.lora);
    let packed = losses::pack(&fitted.losses);
    let event = Event::Trained {
        iteration,
        training,
        result: Trained {
            lora,
            losses: Digest::of(&packed),
            steps: machine.steps_of(training),
            final_loss: losses::final_mean(&fitted.losses),
            seconds: watcher.seconds(),
        },
    };
    let done = Done {
        event,
        objects: vec![fitted.lora.into(), packed.into()],
    };
    desk.brake().save_first(|| desk.record(vec![done]))
}

/// A checkpoint's state with what it has finished; none if something of it is lost.
fn find(job: &Job<'_>, checkpoint: &Checkpoint) -> Result<Option<(Bytes, Vec<Bytes>)>, Halt> {
    let mut objects = Vec::new();
    for digest in checkpoint.objects() {
        match job.desk.find(digest)? {
            Some(bytes) => objects.push(bytes),
            None => return Ok(None),
        }
    }
    let finished = objects.split_off(1);
    Ok(objects.pop().map(|state| (state, finished)))
}

/// Does a training of a machine's iteration once more, from its beginning to the same bytes: the `LoRA`, the losses and, if they are wanted, the
/// samples, as they are stored.
pub(super) fn train_again(
    job: &Job<'_>,
    studio: &mut Studio<'_>,
    machine: &Machine,
    training: Training,
    with_samples: bool,
) -> Result<Vec<Bytes>, Halt> {
    let given = Given::of(job, machine, training)?;
    studio.open(given.on)?;
    let mut watcher = Again {
        job,
        with_samples,
        samples: Vec::new(),
        halt: None,
    };
    match (studio.fit(&given.fit(None), &mut watcher), watcher.halt) {
        (Ok(fitted), _) => {
            let mut made = watcher.samples;
            made.extend([fitted.lora, losses::pack(&fitted.losses)].map(Bytes::from));
            Ok(made)
        }
        (Err(_), Some(halt)) => Err(halt),
        (Err(error), None) => Err(studio.halt(error)),
    }
}

/// What a training is given.
struct Given {
    training: Training,
    /// The joined `LoRA` of the model that is trained on.
    on: Option<Digest>,
    below: Option<Bytes>,
    lessons: Vec<Lesson>,
    seed: Seed,
    /// Steps from samples to samples, 0 for none, and what is drawn.
    every: u64,
    samples: Vec<Order>,
}

impl Given {
    fn of(job: &Job<'_>, machine: &Machine, training: Training) -> Result<Self, Halt> {
        let first = machine.trained(Training::First).map(|first| first.lora);
        let (on, below) = match training {
            Training::First => (machine.current(), None),
            Training::Second => (machine.current(), first),
            Training::Control => (machine.control(), None),
        };
        let stage = Stage::from(training).name();
        let iteration = machine.iteration();
        Ok(Self {
            training,
            on,
            below: below.map(|digest| job.desk.object(digest)).transpose()?,
            lessons: lessons(job, machine, training)?,
            every: job.spec.lora.sample_every.into(),
            samples: (0..machine.plan().held_out.min(SAMPLES))
                .map(|item| Order {
                    prompt: held_out_prompt(&job.tools.held_out, item).to_owned(),
                    seed: held_out_seed(job.seed(), item),
                    regions: Vec::new(),
                })
                .collect(),
            seed: job.seed().derive(&format!("artaug {stage} {iteration}")),
        })
    }

    fn fit<'a>(&'a self, from: Option<Kept<'a>>) -> Fit<'a> {
        Fit {
            training: self.training,
            lessons: &self.lessons,
            below: self.below.as_deref(),
            seed: self.seed,
            from,
            samples: (self.every > 0).then_some(Samples {
                every: self.every,
                orders: &self.samples,
            }),
        }
    }
}

/// The kept pairs, X or X'.
fn lessons(job: &Job<'_>, machine: &Machine, training: Training) -> Result<Vec<Lesson>, Halt> {
    let of = |item: u32| {
        let base = machine.generated(item)?;
        let image = match training {
            Training::First => base.image,
            Training::Second | Training::Control => machine.regenerated(item)?.image,
        };
        Some((item, base.prompt.clone(), image))
    };
    let kept = machine
        .kept()
        .into_iter()
        .map(of)
        .collect::<Option<Vec<_>>>();
    let kept = kept.ok_or_else(|| job.desk.fail("a kept pair lacks an image"))?;
    kept.into_iter()
        .map(|(item, prompt, image)| {
            // They stay in memory, and may be many.
            job.desk.check()?;
            Ok(Lesson {
                item,
                prompt,
                image: job.desk.image(image)?,
            })
        })
        .collect()
}

/// Puts checkpoints down and listens to the brake.
struct Watcher<'a> {
    job: &'a Job<'a>,
    iteration: u32,
    training: Training,
    /// Step of the newest checkpoint that is recorded, and the finished pairs that it names.
    recorded: u64,
    named: Vec<Digest>,
    /// Finished pairs whose bytes are kept.
    finished: Vec<Digest>,
    /// Step of the newest samples that are recorded.
    sampled: u64,
    /// Seconds spent before this resumption.
    before: f64,
    /// Time worked on the job at the start: waiting for the server counts neither there nor here.
    start: Duration,
    /// Whether a step was done here.
    begun: bool,
    /// Why the fit was ended from here.
    ended: Option<Ended>,
}

enum Ended {
    Halt(Halt),
    /// Something could not be put down, because of that.
    Unkept(Halt),
    Time,
}

impl Watcher<'_> {
    /// Seconds spent on the training, over all resumptions.
    fn seconds(&self) -> f64 {
        let now = self.job.desk.look_at_folder(JobFolder::worked);
        self.before + now.saturating_sub(self.start).as_secs_f64()
    }

    /// Whether a fit that ended with [`EngineError::Unusable`] can have done so for the state that it was given: that is read before the first
    /// step.
    fn may_begin_anew(&self) -> bool {
        !self.begun && self.ended.is_none()
    }

    /// Puts down what is done. A pause or a stop waits for it, or the steps behind it would be lost.
    fn put_down(&mut self, done: Done) -> Result<(), EngineError> {
        let desk = self.job.desk;
        let put = desk.brake().save_first(|| desk.record(vec![done]));
        put.map_err(|halt| {
            self.ended = Some(Ended::Unkept(halt));
            EngineError::Stopped
        })
    }
}

impl Watch for Watcher<'_> {
    fn stepped(&mut self, step: u64, loss: f64) -> Go {
        let desk = self.job.desk;
        self.begun = true;
        tracing::trace!(step, loss, "trained");
        desk.stepped(step);
        // A pause or a stop need not wait for the next checkpoint: the state after any step can be kept.
        if let Err(halt) = desk.check() {
            self.ended = Some(Ended::Halt(halt));
            return Go::Stop;
        }
        if desk.is_out_of_time() {
            self.ended = Some(Ended::Time);
            return Go::Stop;
        }
        Go::On
    }

    fn within_step(&mut self) -> Go {
        if let Err(halt) = self.job.desk.brake().check_now() {
            self.ended = Some(Ended::Halt(halt));
            return Go::Stop;
        }
        Go::On
    }

    fn wants_samples(&mut self, step: u64) -> bool {
        step > self.sampled
    }

    fn sampled(&mut self, step: u64, drawn: Drawn) -> Result<Go, EngineError> {
        let objects = stored(&drawn)?;
        let event = Event::Sampled {
            iteration: self.iteration,
            training: self.training,
            result: Sampled {
                step,
                images: objects.iter().map(|png| Digest::of(png)).collect(),
                forwards: drawn.forwards,
            },
        };
        self.put_down(Done { event, objects })?;
        self.sampled = step;
        Ok(Go::On)
    }

    fn wants_state(&mut self, step: u64) -> bool {
        let is_gentle = matches!(&self.ended, Some(Ended::Halt(halt)) if halt.is_gentle());
        is_gentle && step > self.recorded
    }

    fn save(&mut self, saved: Saved) -> Result<Go, EngineError> {
        let desk = self.job.desk;
        // Of a training that began anew the first states are known.
        if saved.step > self.recorded {
            let fresh = saved.finished.get(self.finished.len()..);
            let fresh = fresh.unwrap_or_default().to_vec();
            self.finished
                .extend(fresh.iter().map(|bytes| Digest::of(bytes)));
            let pairs = self.finished.iter().zip(&self.named);
            let before = pairs.take_while(|(one, named)| one == named).count();
            let event = Event::Checkpointed {
                iteration: self.iteration,
                training: self.training,
                result: Checkpoint {
                    step: saved.step,
                    state: Digest::of(&saved.state),
                    before,
                    finished: self.finished[before..].to_vec(),
                    loss: saved.loss,
                    seconds: self.seconds(),
                },
            };
            self.put_down(Done {
                event,
                objects: fresh.into_iter().chain([saved.state.into()]).collect(),
            })?;
            self.recorded = saved.step;
            self.named.clone_from(&self.finished);
        }
        self.ended = match desk.check() {
            Err(halt) => Some(Ended::Halt(halt)),
            Ok(()) if desk.is_out_of_time() => Some(Ended::Time),
            Ok(()) => return Ok(Go::On),
        };
        Ok(Go::Stop)
    }
}

/// Images as they are stored.
fn stored(drawn: &Drawn) -> Result<Vec<Bytes>, EngineError> {
    let png = |image: &Image| {
        let png = image.to_png();
        png.map(Bytes::from)
            .map_err(|error| EngineError::Failed(error.to_string()))
    };
    drawn.images.iter().map(png).collect()
}

/// Listens to the brake while a training is done once more; its checkpoints and its time are known.
struct Again<'a> {
    job: &'a Job<'a>,
    with_samples: bool,
    samples: Vec<Bytes>,
    halt: Option<Halt>,
}

impl Watch for Again<'_> {
    fn stepped(&mut self, _step: u64, _loss: f64) -> Go {
        let desk = self.job.desk;
        desk.check_memory();
        self.halt = desk.brake().check_now().err();
        if self.halt.is_some() {
            Go::Stop
        } else {
            Go::On
        }
    }

    fn within_step(&mut self) -> Go {
        self.halt = self.job.desk.brake().check_now().err();
        if self.halt.is_some() {
            Go::Stop
        } else {
            Go::On
        }
    }

    fn wants_samples(&mut self, _step: u64) -> bool {
        self.with_samples
    }

    fn sampled(&mut self, _step: u64, drawn: Drawn) -> Result<Go, EngineError> {
        self.samples.extend(stored(&drawn)?);
        Ok(Go::On)
    }

    fn save(&mut self, _saved: Saved) -> Result<Go, EngineError> {
        self.halt = self.job.desk.check().err();
        Ok(if self.halt.is_some() {
            Go::Stop
        } else {
            Go::On
        })
    }
}

/// Joins what was learned in this iteration to what was learned before.
pub(super) fn fuse(job: &Job<'_>, studio: &mut Studio<'_>) -> Result<(), Halt> {
    let desk = job.desk;
    let machine = desk.look(Machine::clone);
    let (joined, control) = join_all(job, studio, &machine)?;
    let result = Fused {
        merged: Digest::of(&joined.merged),
        reduced: joined.reduced.as_deref().map(Digest::of),
        control: control.as_ref().map(|control| Digest::of(&control.merged)),
    };
    let event = Event::Fused {
        iteration: machine.iteration(),
        result,
    };
    let objects = [
        Some(joined.merged),
        joined.reduced,
        control.map(|control| control.merged),
    ];
    desk.record(vec![Done {
        event,
        objects: objects.into_iter().flatten().map(Into::into).collect(),
    }])
}

/// What a machine's iteration learned, joined to what was learned before: the adapter itself, and the control's if there is one.
pub(super) fn join_all(
    job: &Job<'_>,
    studio: &mut Studio<'_>,
    machine: &Machine,
) -> Result<(Joined, Option<Joined>), Halt> {
    let lora = |training| machine.trained(training).map(|trained| trained.lora);
    let Some(second) = lora(Training::Second) else {
        return Err(job.desk.fail("there is no trained LoRA to join"));
    };
    let joined = join(job, studio, machine.current(), second)?;
    let control = lora(Training::Control)
        .map(|control| join(job, studio, machine.control(), control))
        .transpose()?;
    Ok((joined, control))
}

fn join(
    job: &Job<'_>,
    studio: &mut Studio<'_>,
    before: Option<Digest>,
    fitted: Digest,
) -> Result<Joined, Halt> {
    let before = before.map(|digest| job.desk.object(digest)).transpose()?;
    let fitted = job.desk.object(fitted)?;
    studio.join(before.as_deref(), &fitted)
}
