//! The engine on a tiny model with weights from a seed: what it gives depends on its arguments alone.

mod fit;
mod settings;

use std::fs;

use concord_artaug::{
    advisor::RegionPrompt,
    engine::{Kept, Lesson, Saved},
    machine::Training,
    region::Area,
};
use concord_common::seed::Seed;
use concord_learning::diffusion::lora::Lora;
use tempfile::TempDir;

use super::*;

const SEED: Seed = Seed(11);

/// A model folder: the configurations and tokenizer of a fixture of `concord-learning`, and weights that follow from a seed.
fn folder() -> TempDir {
    let fixture =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../common/learning/fixtures/diffusion/sd2");
    let folder = TempDir::new().unwrap();
    let model = TextToImage::fresh(&fixture, Seed(1), Compute::CPU).unwrap();
    model.save(&folder.path().join("model")).unwrap();
    folder
}

fn settings(folder: &TempDir) -> Settings {
    Settings {
        folder: folder.path().join("model"),
        precision: Precision::F32,
        sampler: SamplerSpec {
            steps: 2,
            guidance: 3.0,
            size: Some([24, 16]),
            ..SamplerSpec::default()
        },
        lora: LoraSpec {
            rank: 2,
            first_steps: 5,
            second_steps: 4,
            learning_rate: 5e-3,
            batch: 2,
            accumulation: 2,
            checkpoint_every: 2,
            ..LoraSpec::default()
        },
        threads: 1,
        gpu: None,
    }
}

fn opened(settings: &Settings) -> TorchEngine {
    let mut engine = TorchEngine::new(settings.clone()).unwrap();
    engine.open(None).unwrap();
    engine
}

fn order(prompt: &str, seed: u64, regions: usize) -> Order {
    let region = Advised {
        area: Area::new(0.0, 0.25, 0.5, 1.0).unwrap(),
        prompt: RegionPrompt::new("a bright fox").unwrap(),
        confidence: 1.0,
    };
    Order {
        prompt: prompt.to_owned(),
        seed: Seed(seed),
        regions: vec![region; regions],
    }
}

fn draw(engine: &mut TorchEngine, orders: &[Order]) -> Drawn {
    engine.draw(orders, &mut || Go::On).unwrap()
}

fn lessons(shift: u8) -> Vec<Lesson> {
    [(3, "a red fox"), (7, "the snow")]
        .map(|(item, prompt)| {
            let pixels = (0..24 * 16 * 3_u32)
                .map(|place| ((place * (item + 1)) % 200) as u8 + shift)
                .collect();
            Lesson {
                item,
                prompt: prompt.to_owned(),
                image: Image::new(24, 16, pixels).unwrap(),
            }
        })
        .to_vec()
}

/// Keeps all states, and stops after a number of steps.
#[derive(Default)]
struct Keeper {
    saved: Vec<Saved>,
    losses: Vec<(u64, f64)>,
    stop_after: Option<u64>,
    /// How often the fit asked within a step, and when it is told to stop there.
    asked: usize,
    stop_within: Option<usize>,
    /// Whether it wants the state that it is stopped at.
    wants_state: bool,
    /// Samples by step.
    samples: Vec<(u64, Drawn)>,
}

impl Watch for Keeper {
    fn stepped(&mut self, step: u64, loss: f64) -> Go {
        self.losses.push((step, loss));
        if self.stop_after == Some(step) {
            Go::Stop
        } else {
            Go::On
        }
    }

    fn within_step(&mut self) -> Go {
        self.asked += 1;
        if self.stop_within == Some(self.asked) {
            Go::Stop
        } else {
            Go::On
        }
    }

    fn wants_samples(&mut self, _step: u64) -> bool {
        true
    }

    fn sampled(&mut self, step: u64, drawn: Drawn) -> Result<Go, EngineError> {
        self.samples.push((step, drawn));
        Ok(Go::On)
    }

    fn wants_state(&mut self, step: u64) -> bool {
        let newest = self.saved.last().map_or(0, |saved| saved.step);
        self.wants_state && step > newest
    }

    fn save(&mut self, saved: Saved) -> Result<Go, EngineError> {
        self.saved.push(saved);
        Ok(Go::On)
    }
}

fn first(lessons: &[Lesson]) -> Fit<'_> {
    Fit {
        training: Training::First,
        lessons,
        below: None,
        seed: SEED,
        from: None,
        samples: None,
    }
}

#[test]
fn a_batch_is_drawn_again_to_the_byte_by_another_engine() {
    let folder = folder();
    let settings = settings(&folder);
    let orders = [order("a red fox", 1, 0), order("the snow", 2, 2)];
    let mut one = opened(&settings);
    let drawn = draw(&mut one, &orders);
    assert_eq!(drawn, draw(&mut one, &orders));
    assert_eq!(drawn, draw(&mut opened(&settings), &orders));
    assert_eq!(drawn.forwards, 2 * (2 + 2 + 2));
    let image = &drawn.images[0];
    assert_eq!((image.width(), image.height()), (24, 16));
    assert_eq!(one.size().unwrap(), [24, 16]);
}

#[test]
fn drawing_again_without_boxes_gives_the_bytes_of_the_first_drawing() {
    let folder = folder();
    let mut engine = opened(&settings(&folder));
    let plain = [order("a red fox", 1, 0), order("the snow", 2, 0)];
    let drawn = draw(&mut engine, &plain);
    let advised = [order("a red fox", 1, 0), order("the snow", 2, 1)];
    assert_ne!(draw(&mut engine, &advised).images[1], drawn.images[1]);
    assert_eq!(draw(&mut engine, &plain), drawn);
}

#[test]
fn a_drawing_can_be_stopped_between_steps() {
    let folder = folder();
    let mut engine = opened(&settings(&folder));
    let mut asked = 0;
    let stopped = engine.draw(&[order("a fox", 1, 0)], &mut || {
        asked += 1;
        Go::Stop
    });
    assert!(matches!(stopped, Err(EngineError::Stopped)));
    assert_eq!(asked, 1);
}

/// Two iterations: the third's model follows from the joined bytes, whatever the engine did before.
#[test]
fn the_model_of_an_iteration_is_the_same_after_an_interruption() {
    let folder = folder();
    let mut settings = settings(&folder);
    settings.lora.reduced_rank = Some(3);
    let orders = [order("a red fox", 1, 0)];
    let mut one = opened(&settings);
    let base = one.digest().unwrap();
    let mut joined: Option<Joined> = None;
    for iteration in 0..2 {
        let lessons = lessons(iteration * 20);
        one.open(joined.as_ref().map(|joined| joined.merged.as_slice()))
            .unwrap();
        let fitted = one.fit(&first(&lessons), &mut Keeper::default()).unwrap();
        let before = joined.as_ref().map(|joined| joined.merged.as_slice());
        let next = one.join(before, &fitted.lora).unwrap();
        assert_eq!(next, one.join(before, &fitted.lora).unwrap());
        joined = Some(next);
    }
    let joined = joined.unwrap();
    one.open(Some(&joined.merged)).unwrap();
    let mut other = TorchEngine::new(settings).unwrap();
    other.open(Some(&joined.merged)).unwrap();
    assert_eq!(one.digest().unwrap(), other.digest().unwrap());
    assert_ne!(one.digest().unwrap(), base);
    assert_eq!(draw(&mut one, &orders), draw(&mut other, &orders));
    let merged = adapters::read_joined(&joined.merged).unwrap();
    let reduced = adapters::read_joined(&joined.reduced.unwrap()).unwrap();
    assert_eq!((merged.rank(), reduced.rank()), (4, 3));
    // The base comes back as it was.
    one.open(None).unwrap();
    assert_eq!(one.digest().unwrap(), base);
}

#[test]
fn an_exported_adapter_and_checkpoint_are_what_the_engine_draws_with() {
    let folder = folder();
    let settings = settings(&folder);
    let mut engine = opened(&settings);
    let lessons = lessons(0);
    let fitted = engine
        .fit(&first(&lessons), &mut Keeper::default())
        .unwrap();
    let joined = engine.join(None, &fitted.lora).unwrap().merged;
    let facts = [("concord.job".to_owned(), "7".to_owned())];
    let under_way = folder.path().join("exports");
    let files = TorchEngine::new(settings.clone())
        .unwrap()
        .export(&joined, &facts, &under_way)
        .unwrap();
    assert!(!under_way.exists());
    assert_eq!(files, engine.export(&joined, &facts, &under_way).unwrap());
    let layers = lora::layers(engine.at_work().unwrap().model.sites());
    let known = adapters::read_joined(&joined).unwrap();
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        ["lora.diffusers.safetensors", "lora.kohya.safetensors"]
    );
    for (name, bytes) in &files {
        let file = folder.path().join(name);
        fs::write(&file, bytes).unwrap();
        let read = Lora::read(&file, &layers).unwrap();
        assert_eq!(read.to_bytes().unwrap(), known.to_bytes().unwrap());
        let text = String::from_utf8_lossy(bytes);
        assert!(text.contains(r#""concord.job":"7""#));
        assert_eq!(text.contains("ss_network_dim"), name.contains("kohya"));
    }
    let fused = folder.path().join("fused");
    engine.export_fused(&joined, &fused).unwrap();
    // Two models would not fit into memory everywhere.
    let closed = engine.size().unwrap_err().to_string();
    assert!(closed.contains("no model is open"), "{closed}");
    engine.open(Some(&joined)).unwrap();
    let orders = [order("a red fox", 1, 1)];
    let drawn = draw(&mut engine, &orders);
    let other = Settings {
        folder: fused.clone(),
        ..settings
    };
    assert_eq!(draw(&mut opened(&other), &orders), drawn);
    assert!(matches!(
        engine.export_fused(&joined, &fused),
        Err(EngineError::Local(_))
    ));
}

#[test]
fn what_this_machine_cannot_read_or_write_is_told_apart_from_what_no_machine_could_use() {
    let folder = folder();
    let settings = settings(&folder);
    let mut engine = opened(&settings);
    let fitted = engine.fit(&first(&lessons(0)), &mut Keeper::default());
    let joined = engine.join(None, &fitted.unwrap().lora).unwrap().merged;
    let is_local = |done: Result<(), EngineError>, path: &Path| {
        let error = done.unwrap_err();
        assert!(matches!(error, EngineError::Local(_)), "{error:?}");
        let path = path.display().to_string();
        assert!(error.to_string().contains(&path), "{error}");
    };
    // No folder can be made in a file.
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let nowhere = file.join("below");
    is_local(engine.export(&joined, &[], &nowhere).map(drop), &nowhere);
    is_local(engine.export_fused(&joined, &nowhere), &nowhere);
    // The base is away for a while.
    let (model, away) = (settings.folder.clone(), folder.path().join("away"));
    fs::rename(&model, &away).unwrap();
    is_local(engine.open(None), &model);
    let fused = folder.path().join("fused");
    is_local(engine.export_fused(&joined, &fused), &model);
    fs::rename(&away, &model).unwrap();
    engine.open(None).unwrap();
    // It is there, and is no model.
    let weights = model.join("unet/diffusion_pytorch_model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    let error = engine.open(None).unwrap_err();
    assert!(matches!(error, EngineError::Unusable(_)), "{error:?}");
}

/// A checkpoint is in f32: base and change are not rounded to what the job computes in, and a job in bf16 that begins from it computes what it did.
#[test]
fn the_checkpoint_of_a_job_in_bf16_is_not_rounded() {
    let folder = folder();
    let single = settings(&folder);
    let half = Settings {
        precision: Precision::Bf16,
        ..single.clone()
    };
    let mut engine = opened(&half);
    let lessons = lessons(0);
    let fitted = engine
        .fit(&first(&lessons), &mut Keeper::default())
        .unwrap();
    let joined = engine.join(None, &fitted.lora).unwrap().merged;
    let fused = folder.path().join("fused");
    engine.export_fused(&joined, &fused).unwrap();
    engine.open(Some(&joined)).unwrap();
    let mut exact = TorchEngine::new(single.clone()).unwrap();
    exact.open(Some(&joined)).unwrap();
    let of_fused = |settings: Settings| {
        let fused = Settings {
            folder: fused.clone(),
            ..settings
        };
        opened(&fused).digest().unwrap()
    };
    assert_eq!(of_fused(single), exact.digest().unwrap());
    assert_eq!(of_fused(half), engine.digest().unwrap());
    assert_ne!(exact.digest().unwrap(), engine.digest().unwrap());
}

#[test]
fn what_cannot_be_done_is_refused_in_words() {
    let folder = folder();
    let settings = settings(&folder);
    let half = Settings {
        precision: Precision::F16,
        ..settings.clone()
    };
    let refusal = TorchEngine::new(half).unwrap_err().to_string();
    assert!(refusal.contains("bf16"), "{refusal}");
    let mut closed = TorchEngine::new(settings.clone()).unwrap();
    assert!(
        closed
            .draw(&[order("a fox", 1, 0)], &mut || Go::On)
            .is_err()
    );
    let missing = Settings {
        folder: folder.path().join("nowhere"),
        ..settings.clone()
    };
    let refusal = TorchEngine::new(missing).unwrap().open(None).unwrap_err();
    assert!(matches!(refusal, EngineError::Local(_)));
    assert!(refusal.to_string().contains("nowhere"), "{refusal}");

    let mut engine = opened(&settings);
    let good = lessons(0);
    let mut keeper = Keeper::default();
    let fitted = engine.fit(&first(&good), &mut keeper).unwrap();
    let saved = keeper.saved[0].kept();
    let turned: Vec<Lesson> = good.iter().rev().cloned().collect();
    let others = lessons(1);
    let wrong_size = vec![Lesson {
        image: Image::filled(23, 16, [0; 3]).unwrap(),
        ..good[0].clone()
    }];
    let one_pair = first(&good[..1]);
    for (fit, named) in [
        (first(&[]), "no pair"),
        (first(&turned), "in order"),
        (first(&wrong_size), "the pair 3"),
        (
            Fit {
                training: Training::Second,
                ..first(&good)
            },
            "LoRA_1",
        ),
        (
            Fit {
                below: Some(&fitted.lora),
                ..first(&good)
            },
            "LoRA_1",
        ),
        (
            Fit {
                from: Some(saved),
                ..first(&others)
            },
            "another fit",
        ),
        (
            Fit {
                from: Some(saved),
                seed: Seed(12),
                ..first(&good)
            },
            "another fit",
        ),
        (
            Fit {
                from: Some(Kept {
                    state: &fitted.lora,
                    ..saved
                }),
                ..one_pair
            },
            "artaug lora 1",
        ),
        (
            Fit {
                from: Some(Kept {
                    state: &saved.state[..saved.state.len() / 2],
                    ..saved
                }),
                ..first(&good)
            },
            "artaug fit 2",
        ),
    ] {
        let refusal = engine.fit(&fit, &mut Keeper::default()).unwrap_err();
        assert!(matches!(refusal, EngineError::Unusable(_)), "{refusal}");
        assert!(refusal.to_string().contains(named), "{named}: {refusal}");
    }
    assert!(engine.fit(&first(&good), &mut Keeper::default()).is_ok());
}
