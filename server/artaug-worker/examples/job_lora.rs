//! What an ArtAug job leaves behind, for comparison with Python's `diffusers`; `deploy/interop/diffusion.py` runs it.
//!
//! ```text
//! job_lora joint|per-pair <model folder> <width> <height> <work folder>
//!     two iterations of differential training by the engine of jobs: writes the joined LoRA as a job exports it, whole and reduced, in both layouts,
//!     the fused model, and an image of the model that jobs go on with, with its noise
//! ```

use std::{
    collections::BTreeMap,
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use concord_artaug::{
    advisor::{Region, RegionPrompt},
    engine::{Engine, EngineError, Fit, Go, Joined, Lesson, Order, Saved, Watch},
    machine::Training,
    region::Area,
};
use concord_artaug_worker::engine::{Settings, TorchEngine};
use concord_common::{
    job::artaug::{LoraMode, LoraSpec, LoraTargets, Precision, SamplerSpec},
    seed::Seed,
};
use concord_learning::{
    diffusion::{denoiser::Denoiser, params::Compute, pipeline::TextToImage, seeds},
    named::{self, HostTensor},
};

const PROMPT: &str = "a red fox in the snow";
/// Seed of the image that is compared.
const SHOWN: Seed = Seed(77);
/// Rank of a training's LoRA, and number of pairs.
const RANK: u32 = 2;
const PAIRS: u32 = 2;
const ITERATIONS: u32 = 2;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        [mode, model, width, height, work] => leave(mode, model, [width, height], Path::new(work)),
        _ => Err("usage: job_lora joint|per-pair <model> <width> <height> <work>".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn leave(
    mode: &str,
    model: &str,
    [width, height]: [&str; 2],
    work: &Path,
) -> Result<(), Box<dyn Error>> {
    let (mode, whole) = match mode {
        "joint" => (LoraMode::Joint, RANK * ITERATIONS),
        "per-pair" => (LoraMode::PerPair, RANK * ITERATIONS * PAIRS),
        other => return Err(format!("{other} is no mode").into()),
    };
    let folder = PathBuf::from(model);
    let size = [width.parse()?, height.parse()?];
    let mut engine = TorchEngine::new(Settings {
        folder: folder.clone(),
        precision: Precision::F32,
        sampler: SamplerSpec {
            steps: 10,
            size: Some(size),
            ..SamplerSpec::default()
        },
        lora: LoraSpec {
            rank: RANK,
            targets: LoraTargets::AllLinear,
            mode,
            first_steps: 4,
            second_steps: 4,
            learning_rate: 1e-2,
            batch: 2,
            // All that was learned, in the form that a cut gives it.
            reduced_rank: Some(whole),
            ..LoraSpec::default()
        },
        threads: 1,
        gpu: None,
    })?;
    let joined = learned(&mut engine)?;
    let facts = [
        ("concord.job", "interop"),
        ("concord.license", "none: \"quoted\", caf\u{e9}"),
    ]
    .map(|(key, text)| (key.to_owned(), text.to_owned()));
    let reduced = joined.reduced.ok_or("there is no reduced LoRA")?;
    for (object, prefix) in [(&joined.merged, ""), (&reduced, "reduced.")] {
        for (name, bytes) in engine.export(object, &facts, &work.join("exports"))? {
            fs::write(work.join(format!("{prefix}{name}")), bytes)?;
        }
    }
    engine.export_fused(&joined.merged, &work.join("fused"))?;
    engine.open(Some(&joined.merged))?;
    let order = Order {
        prompt: PROMPT.to_owned(),
        seed: SHOWN,
        regions: Vec::new(),
    };
    let drawn = engine.draw(&[order], &mut || Go::On)?;
    let image = drawn.images.first().ok_or("nothing was drawn")?;
    let pixels = HostTensor {
        shape: vec![image.height() as usize, image.width() as usize, 3],
        values: image.pixels().iter().copied().map(f32::from).collect(),
    };
    let model = TextToImage::load(&folder, Compute::CPU)?;
    let [channels, ..] = model.native_size();
    let factor = model.codec().factor();
    let latent = [
        channels,
        i64::from(size[1]) / factor,
        i64::from(size[0]) / factor,
    ];
    let noise = seeds::noise(&[SHOWN], latent, Compute::CPU)?;
    let results = BTreeMap::from([
        ("noise".to_owned(), HostTensor::from_tensor(&noise)?),
        ("pixels".to_owned(), pixels),
    ]);
    fs::write(
        work.join("ours.safetensors"),
        named::to_safetensors(&results, "{}")?,
    )?;
    Ok(())
}

/// Iterations as a job has them: X, X' with one region, LoRA_1 on X, LoRA_2 on X' above it, which is kept and joined.
fn learned(engine: &mut TorchEngine) -> Result<Joined, Box<dyn Error>> {
    let region = Region {
        area: Area::new(0.0, 0.25, 0.5, 1.0)?,
        prompt: RegionPrompt::new("a bright fox")?,
        confidence: 1.0,
    };
    let mut joined: Option<Joined> = None;
    for iteration in 1..=ITERATIONS {
        let before = joined.as_ref().map(|joined| joined.merged.as_slice());
        engine.open(before)?;
        let lessons = |engine: &mut TorchEngine, regions: &[Region]| {
            let orders: Vec<Order> = (0..PAIRS)
                .map(|item| Order {
                    prompt: PROMPT.to_owned(),
                    seed: Seed(u64::from(iteration * PAIRS + item)),
                    regions: regions.to_vec(),
                })
                .collect();
            let drawn = engine.draw(&orders, &mut || Go::On)?;
            let lessons = (0..).zip(drawn.images).map(|(item, image)| Lesson {
                item,
                prompt: PROMPT.to_owned(),
                image,
            });
            Ok::<Vec<Lesson>, EngineError>(lessons.collect())
        };
        let (generated, regenerated) = (
            lessons(engine, &[])?,
            lessons(engine, std::slice::from_ref(&region))?,
        );
        let first = Fit {
            training: Training::First,
            lessons: &generated,
            below: None,
            seed: Seed(u64::from(iteration)),
            from: None,
            samples: None,
        };
        let below = engine.fit(&first, &mut Unwatched)?.lora;
        let second = Fit {
            training: Training::Second,
            lessons: &regenerated,
            below: Some(&below),
            ..first
        };
        let fitted = engine.fit(&second, &mut Unwatched)?.lora;
        joined = Some(engine.join(before, &fitted)?);
    }
    Ok(joined.ok_or("there was no iteration")?)
}

/// Lets a training run to its end and keeps nothing of it.
struct Unwatched;

impl Watch for Unwatched {
    fn stepped(&mut self, _step: u64, _loss: f64) -> Go {
        Go::On
    }

    fn save(&mut self, _saved: Saved) -> Result<Go, EngineError> {
        Ok(Go::On)
    }
}
