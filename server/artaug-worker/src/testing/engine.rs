//! An engine without a model: what it gives is a hash of its arguments with a little order in it.
//!
//! As with a real one, every image depends on which others are in its batch, and what is trained on every image and on what is open.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    thread,
};

use bytes::Bytes;
use concord_artaug::{
    engine::{
        Drawn, Engine, EngineError, Fit, Fitted, Go, Joined, Lesson, Order, Samples, Saved, Watch,
    },
    image::Image,
    machine::Training,
};
use concord_common::{
    Digest,
    job::artaug::{ArtaugSpec, LoraMode},
    seed::Seed,
};
use concord_proto::v1::WorkerCommand;

use super::{FakeServer, FakeWorkshop, Outage, Overlap};

/// Side of its images.
const SIDE: u32 = 8;
/// Longest text that it reads whole, in bytes: some with advice in them are longer.
pub(crate) const WINDOW: usize = 19;

/// What the engines of a workshop were told to do.
#[derive(Debug, Clone, Default)]
pub(crate) struct Told {
    pub(crate) drawings: Vec<Drawing>,
    pub(crate) fits: Vec<Fitting>,
    /// Where files were put together.
    pub(crate) folders: Vec<PathBuf>,
}

/// A batch, with the joined adapter that was open (nothing for the base alone) and what came out.
#[derive(Debug, Clone)]
pub(crate) struct Drawing {
    pub(crate) opened: Vec<u8>,
    pub(crate) orders: Vec<Order>,
    pub(crate) images: Vec<Image>,
}

/// A training, with the joined adapter that was open.
#[derive(Debug, Clone)]
pub(crate) struct Fitting {
    pub(crate) opened: Vec<u8>,
    pub(crate) training: Training,
    pub(crate) below: Option<Vec<u8>>,
    pub(crate) lessons: Vec<Lesson>,
    pub(crate) seed: Seed,
}

#[derive(Debug)]
pub(crate) struct FakeEngine {
    first_steps: u64,
    second_steps: u64,
    every: u64,
    reduced: bool,
    per_pair: bool,
    fault: Option<&'static str>,
    outage: Arc<Outage>,
    overlap: Option<Arc<Overlap>>,
    told: Arc<Mutex<Told>>,
    pause_at: Option<(u64, Arc<FakeServer>)>,
    opened: Option<Vec<u8>>,
}

impl FakeEngine {
    pub(crate) fn new(spec: &ArtaugSpec, workshop: &FakeWorkshop) -> Self {
        Self {
            first_steps: u64::from(spec.lora.first_steps),
            second_steps: u64::from(spec.lora.second_steps),
            every: u64::from(spec.lora.checkpoint_every),
            reduced: spec.lora.reduced_rank.is_some(),
            per_pair: spec.lora.mode == LoraMode::PerPair,
            fault: workshop.fault,
            outage: Arc::clone(&workshop.outage),
            overlap: workshop.overlap.clone(),
            told: Arc::clone(&workshop.told),
            pause_at: workshop.pause_at.clone(),
            opened: None,
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, at: &str) -> Result<(), EngineError> {
        match (self.fault, at) {
            (Some("panic"), "fit") => panic!("out of cheese"),
            (Some("no room for exports"), "export") | (Some("no room for all"), "fused") => {
                Err(local(io::ErrorKind::StorageFull.into()))
            }
            (Some("away"), "open again") => {
                Err(local(io::ErrorKind::StaleNetworkFileHandle.into()))
            }
            (Some(fault), at) if fault == at => Err(EngineError::Failed(format!("{at} is broken"))),
            _ => Ok(()),
        }
    }

    /// Another machine trains otherwise.
    fn machine(&self) -> &'static str {
        if self.fault == Some("otherwise") {
            "another machine"
        } else {
            ""
        }
    }

    /// Has the job paused at a step, and waits until its worker has heard of that and will wait no longer.
    fn pause(&self, step: u64, watch: &mut dyn Watch) {
        if let Some((at, server)) = &self.pause_at
            && *at == step
        {
            server.state().command = WorkerCommand::Pause;
            while watch.within_step() == Go::On {
                thread::yield_now();
            }
        }
    }

    /// Whether what a fit is given can be used.
    fn look_at(&self, fit: &Fit<'_>) -> Result<(), EngineError> {
        self.outage.fits.fetch_add(1, Ordering::SeqCst);
        match (self.fault, fit.from) {
            (Some("lessons"), _) => Err(unusable("the pairs are spoilt")),
            (Some("states"), Some(_)) => Err(unusable("a state of another version")),
            _ => Ok(()),
        }
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the shape that `map_err` wants"
)]
fn local(error: io::Error) -> EngineError {
    EngineError::Local(format!("a file: {error}"))
}

fn ended(go: Go) -> Result<(), EngineError> {
    match go {
        Go::On => Ok(()),
        Go::Stop => Err(EngineError::Stopped),
    }
}

fn unusable(what: &str) -> EngineError {
    EngineError::Unusable(what.to_owned())
}

fn hash(parts: &[&[u8]]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// How much brighter a joined adapter makes images: the sum of the numbers after each `+`.
fn gain(lora: &[u8]) -> u32 {
    let text = std::str::from_utf8(lora).expect("adapters here are text");
    text.split('+')
        .skip(1)
        .map(|part| part.split(' ').next().unwrap().parse::<u32>().unwrap())
        .sum()
}

fn draw(order: &Order, opened: &[u8], all: &Digest) -> Image {
    let place = hash(&[order.prompt.as_bytes(), &order.seed.0.to_le_bytes()]);
    let own = hash(&[place.as_bytes(), opened, all.as_bytes()]);
    let mut pixels = Vec::new();
    for cell in 0..SIDE * SIDE {
        // The pattern is the item's own, the light is what is to be learned, and the last bits depend on the company.
        let pattern = u32::from(place.as_bytes()[(cell % 32) as usize]) / 4;
        let enhanced = if order.regions.is_empty() { 0 } else { 30 };
        let company = u32::from(own.as_bytes()[(cell % 32) as usize]) % 3;
        let light = 60 + pattern + gain(opened) + enhanced + company;
        pixels.extend([light.min(255) as u8; 3]);
    }
    Image::new(SIDE, SIDE, pixels).unwrap()
}

/// With what a fit has trained after so many steps.
fn draw_samples(orders: &[Order], done: u64, own: &Digest) -> Drawn {
    let trained = format!("+{done} {own}");
    let images = orders
        .iter()
        .map(|order| draw(order, trained.as_bytes(), own));
    Drawn {
        images: images.collect(),
        cut: orders.iter().map(cut).collect(),
        forwards: 4 * orders.len() as u64,
    }
}

/// How many of an order's texts are longer than [`WINDOW`].
fn cut(order: &Order) -> usize {
    let regions = order.regions.iter().map(|region| region.prompt.as_str());
    let texts = regions.chain([order.prompt.as_str()]);
    texts.filter(|text| text.len() > WINDOW).count()
}

impl Engine for FakeEngine {
    fn open(&mut self, joined: Option<&[u8]>) -> Result<(), EngineError> {
        self.fail("open")?;
        if joined.is_some() {
            self.fail("open again")?;
        }
        self.opened = Some(joined.unwrap_or_default().to_vec());
        Ok(())
    }

    fn draw(&mut self, orders: &[Order], go: &mut dyn FnMut() -> Go) -> Result<Drawn, EngineError> {
        self.fail("draw")?;
        if go() == Go::Stop {
            return Err(EngineError::Stopped);
        }
        if let Some(overlap) = &self.overlap {
            overlap.drawing(orders);
        }
        let opened = self.opened.as_deref().expect("nothing is open");
        let all = hash(&[format!("{orders:?}").as_bytes()]);
        let images: Vec<Image> = orders
            .iter()
            .map(|order| draw(order, opened, &all))
            .collect();
        self.told().drawings.push(Drawing {
            opened: opened.to_vec(),
            orders: orders.to_vec(),
            images: images.clone(),
        });
        Ok(Drawn {
            images,
            cut: orders.iter().map(cut).collect(),
            forwards: 10 * orders.len() as u64 + 1,
        })
    }

    fn fit(&mut self, fit: &Fit<'_>, watch: &mut dyn Watch) -> Result<Fitted, EngineError> {
        self.fail("fit")?;
        self.look_at(fit)?;
        let opened = self.opened.as_deref().expect("nothing is open");
        assert_eq!(fit.below.is_some(), fit.training == Training::Second);
        self.told().fits.push(Fitting {
            opened: opened.to_vec(),
            training: fit.training,
            below: fit.below.map(<[u8]>::to_vec),
            lessons: fit.lessons.to_vec(),
            seed: fit.seed,
        });
        let lessons = format!("{:?}", fit.lessons);
        let machine = self.machine();
        let own = hash(&[
            format!("{:?} {:?}{machine}", fit.training, fit.seed).as_bytes(),
            opened,
            fit.below.unwrap_or_default(),
            lessons.as_bytes(),
        ]);
        let steps = if fit.training == Training::First {
            self.first_steps
        } else {
            self.second_steps
        };
        let pairs = if self.per_pair {
            fit.lessons.len() as u64
        } else {
            1
        };
        // As the real one, which finishes a pair when it goes on to the next.
        let finished = |step: u64| -> Vec<Bytes> {
            (0..(step - 1) / steps)
                .map(|pair| format!("finished {pair} {own}").into())
                .collect()
        };
        let all = steps * pairs;
        let mut done = 0;
        if let Some(kept) = fit.from {
            let text = String::from_utf8(kept.state.to_vec()).unwrap();
            let (step, of) = text.split_once(' ').unwrap();
            if of != own.to_string() {
                return Err(unusable("a state of another fit"));
            }
            done = step.parse().unwrap();
            assert_eq!(kept.finished, finished(done));
        }
        let loss = |step: u64| 1.0 / (step + 1) as f64;
        let sample = |done: u64, watch: &mut dyn Watch| -> Result<(), EngineError> {
            let is_due = |samples: &Samples<'_>| done > 0 && done.is_multiple_of(samples.every);
            match fit.samples.filter(is_due) {
                Some(samples) if watch.wants_samples(done) => {
                    let drawn = draw_samples(samples.orders, done, &own);
                    ended(watch.sampled(done, drawn)?)
                }
                _ => Ok(()),
            }
        };
        let saved = |done: u64| Saved {
            step: done,
            state: format!("{done} {own}").into_bytes(),
            finished: finished(done),
            loss: loss(done),
        };
        // As the real one, which may have been stopped before the samples of the step that it goes on from.
        sample(done, watch)?;
        while done < all {
            done += 1;
            self.pause(done, watch);
            if watch.stepped(done, loss(done)) == Go::Stop {
                if watch.wants_state(done) {
                    watch.save(saved(done))?;
                }
                return Err(EngineError::Stopped);
            }
            if self.fault == Some("steps") {
                return Err(unusable("no number"));
            }
            sample(done, watch)?;
            if done.is_multiple_of(self.every) && done < all {
                ended(watch.save(saved(done))?)?;
            }
        }
        let gain = match fit.training {
            Training::First => 0,
            Training::Second => 12,
            Training::Control => 3,
        };
        let ballast = if self.fault == Some("large") {
            "x".repeat(2 << 20)
        } else {
            String::new()
        };
        Ok(Fitted {
            lora: format!("+{gain} {own}{ballast}\n").into_bytes(),
            losses: (1..=all).map(loss).collect(),
        })
    }

    fn join(&mut self, before: Option<&[u8]>, fitted: &[u8]) -> Result<Joined, EngineError> {
        self.fail("join")?;
        let merged = [before.unwrap_or_default(), fitted].concat();
        Ok(Joined {
            reduced: self
                .reduced
                .then(|| format!("reduced {}\n", Digest::of(&merged)).into_bytes()),
            merged,
        })
    }

    fn export(
        &mut self,
        joined: &[u8],
        facts: &[(String, String)],
        folder: &Path,
    ) -> Result<Vec<(String, Vec<u8>)>, EngineError> {
        self.told().folders.push(folder.to_owned());
        fs::create_dir(folder).map_err(local)?;
        self.fail("export")?;
        fs::remove_dir(folder).map_err(local)?;
        let file = |layout: &str| {
            let bytes = format!("{layout} {facts:?}\n").into_bytes();
            (
                format!("lora.{layout}.safetensors"),
                [bytes.as_slice(), joined].concat(),
            )
        };
        Ok(vec![file("diffusers"), file("kohya")])
    }

    fn export_fused(&mut self, joined: &[u8], folder: &Path) -> Result<(), EngineError> {
        self.told().folders.push(folder.to_owned());
        fs::create_dir(folder).map_err(local)?;
        fs::create_dir(folder.join("unet")).map_err(local)?;
        fs::write(folder.join("model_index.json"), b"{}").map_err(local)?;
        self.fail("fused")?;
        let ballast = vec![
            0;
            if self.fault == Some("heavy") {
                3 << 20
            } else {
                0
            }
        ];
        fs::write(folder.join("unet/weights"), [joined, &ballast].concat()).map_err(local)
    }
}
