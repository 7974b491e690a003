//! Text-to-image for comparison with Python's `diffusers`; `deploy/interop/diffusion.py` runs it.
//!
//! ```text
//! diffusion adapter attention|transformers|all <model folder> <work folder>
//!     trains a small LoRA on those layers, writes it in both layouts, also at the rank that several of it joined are cut to, with an image that it
//!     gives, and the fused model
//! diffusion bench <model folder> <threads> pass|sample
//!     milliseconds, by the clock and of the processor, of one forward and backward pass of the UNet, or of 20 guided steps of DDIM;
//!     then the program's peak memory in MB
//! ```

use std::{collections::BTreeMap, env, path::Path, process::ExitCode, time::Instant};

use concord_common::seed::Seed;
use concord_learning::{
    LearningError,
    diffusion::{
        denoiser::Denoiser,
        lora::{self, Layout, Lora, Placement},
        params::Compute,
        pipeline::{TextToImage, to_bytes},
        region::{Order, Texts, generate},
        schedule::Sampler,
        seeds,
        train::{Example, Recipe, Trainer, lora_leaves},
    },
    named::{self, HostTensor},
    optimiser::AdamWSettings,
    weights::WeightsFile,
};
use tch::{Kind, Tensor};

const PROMPT: &str = "a red fox in the snow";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["adapter", placement, model, work] => {
            adapter(placement, Path::new(model), Path::new(work))
        }
        ["bench", model, threads, what] => bench(Path::new(model), threads, what),
        _ => {
            eprintln!(
                "usage: diffusion adapter attention|transformers|all <model> <work> | diffusion bench <model> <threads> pass|sample"
            );
            return ExitCode::FAILURE;
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn texts(model: &TextToImage) -> Result<Texts, LearningError> {
    Ok(Texts {
        positive: model.condition(&[PROMPT])?,
        negative: model.condition(&[""])?,
        guidance: 7.5,
    })
}

fn adapter(placement: &str, folder: &Path, work: &Path) -> Result<(), LearningError> {
    let placement = match placement {
        "attention" => Placement::Attention,
        "transformers" => Placement::Transformers,
        "all" => Placement::All,
        other => return Err(LearningError::Config(format!("{other} is no placement"))),
    };
    tch::set_num_threads(1);
    let mut model = TextToImage::load(folder, Compute::CPU)?;
    let compute = model.compute();
    lora::attach_fresh(model.sites(), "trained", placement, 3, Seed(1), compute)?;
    let recipe = Recipe {
        learning_rate: 1e-2,
        adamw: AdamWSettings {
            weight_decay: 0.0,
            warmup_steps: 0,
            clip_norm: 0.0,
        },
        batch: 2,
        accumulation: 1,
        steps: 5,
    };
    let noise = WeightsFile::open(&work.join("noise.safetensors"))?.tensor("noise")?;
    let example = Example {
        latent: noise.f_mul_scalar(0.3)?,
        condition: model.condition(&[PROMPT])?,
    };
    let mut trainer = Trainer::new(lora_leaves(model.sites(), "trained"), recipe)?;
    while !trainer.done() {
        trainer.pass(&model, std::slice::from_ref(&example), Seed(2))?;
    }
    let layers = lora::layers(model.sites());
    let trained = lora::extract(model.sites(), "trained")?;
    let notes = [("concord", "interop")];
    let reduced = reduced(&trained)?;
    for (lora, layout, name) in [
        (&trained, Layout::Diffusers, "lora"),
        (&trained, Layout::Kohya, "kohya"),
        (&reduced, Layout::Diffusers, "reduced"),
        (&reduced, Layout::Kohya, "reduced-kohya"),
    ] {
        let file = work.join(format!("{name}.safetensors"));
        lora.write(&file, layout, &layers, &notes)?;
    }

    let plan = model.objective().plan(Sampler::Ddim, 10)?;
    let order = Order {
        prompt: 0,
        advice: None,
    };
    let texts = texts(&model)?;
    let latents = generate(&model, &plan, &noise, &[order], &texts, &mut |_| Ok(()))?;
    let images = model.codec().decode(&latents)?;
    let (_, _, height, width) = images.size4()?;
    let pixels = HostTensor {
        shape: vec![height as usize, width as usize, 3],
        values: to_bytes(&images)?.into_iter().map(f32::from).collect(),
    };
    let results = BTreeMap::from([
        ("latents".to_owned(), HostTensor::from_tensor(&latents)?),
        ("pixels".to_owned(), pixels),
    ]);
    let file = work.join("ours.safetensors");
    std::fs::write(&file, named::to_safetensors(&results, "{}")?)
        .map_err(|source| LearningError::io(&file, source))?;

    lora::merge(model.sites(), "trained")?;
    model.save(&work.join("fused"))
}

/// The mean of many copies, cut to a rank that the smallest layers do not have: the same change as before.
fn reduced(trained: &Lora) -> Result<Lora, LearningError> {
    let least = trained
        .pairs
        .values()
        .flat_map(|pair| [pair.down.size()[1], pair.up.size()[0]])
        .min()
        .unwrap_or(1);
    let rank = least + 4;
    let copies = rank / trained.rank() + 1;
    let parts: Vec<(&Lora, f64)> = (0..copies)
        .map(|_| (trained, 1.0 / copies as f64))
        .collect();
    let (reduced, _lost) = Lora::sum(&parts)?.truncated(rank)?;
    Ok(reduced)
}

fn bench(folder: &Path, threads: &str, what: &str) -> Result<(), LearningError> {
    let threads = threads
        .parse()
        .map_err(|_| LearningError::Config(format!("{threads} is no number of threads")))?;
    tch::set_num_threads(threads);
    let model = TextToImage::load(folder, Compute::CPU)?;
    let times = match what {
        "pass" => pass(&model)?,
        "sample" => sample(&model)?,
        other => return Err(LearningError::Config(format!("{other} is no benchmark"))),
    };
    let peak = concord_common::telemetry::peak_rss_bytes();
    println!(
        "{times} {:.3}",
        peak.map_or(f64::NAN, |bytes| bytes as f64 / 1e6)
    );
    Ok(())
}

/// The times of a forward and backward pass of the UNet.
fn pass(model: &TextToImage) -> Result<String, LearningError> {
    let sample = seeds::noise(&[Seed(1), Seed(2)], model.native_size(), model.compute())?;
    let times = Tensor::f_from_slice(&[900.0_f64, 100.0])?;
    let condition = model.condition(&[PROMPT, ""])?;
    let leaves: Vec<Tensor> = model
        .unet()
        .tensors()
        .values()
        .map(|tensor| tensor.set_requires_grad(true))
        .collect();
    measured(7, 3, || {
        let output = model.predict(&sample, &times, &condition)?;
        let loss = output.f_square()?.f_mean(Kind::Float)?;
        let _gradients = Tensor::f_run_backward(&[loss], &leaves, false, false)?;
        Ok(())
    })
}

/// The times of 20 guided steps.
fn sample(model: &TextToImage) -> Result<String, LearningError> {
    let noise = seeds::noise(&[Seed(3)], model.native_size(), model.compute())?;
    let plan = model.objective().plan(Sampler::Ddim, 20)?;
    measured(3, 1, || {
        let order = Order {
            prompt: 0,
            advice: None,
        };
        let _latents = generate(model, &plan, &noise, &[order], &texts(model)?, &mut |_| {
            Ok(())
        })?;
        Ok(())
    })
}

/// The middle of `count` times and the mean of the processor's, in milliseconds, after some to warm up.
fn measured(
    count: usize,
    warm: usize,
    run: impl Fn() -> Result<(), LearningError>,
) -> Result<String, LearningError> {
    for _ in 0..warm {
        run()?;
    }
    let mut times = Vec::new();
    let busy = processor()?;
    for _ in 0..count {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let busy = (processor()? - busy) / count as f64;
    times.sort_by(f64::total_cmp);
    Ok(format!("{:.3} {busy:.3}", times[times.len() / 2]))
}

/// What the processor has worked for this program, in milliseconds: user and system time in Linux's hundredths of a second.
fn processor() -> Result<f64, LearningError> {
    let file = "/proc/self/stat";
    let text = std::fs::read_to_string(file).map_err(|source| LearningError::io(file, source))?;
    // The second field is the program's name in brackets, which may hold anything.
    let ticks: f64 = text
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|ticks| ticks.parse::<f64>().ok())
        .sum();
    Ok(ticks * 10.0)
}
