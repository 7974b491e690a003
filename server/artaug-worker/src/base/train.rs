//! The run of a training: steps, checkpoints, lines for the log.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use concord_common::{digest::Digest, seed::Seed};
use concord_learning::diffusion::{params::Compute, pipeline::TextToImage, pretrain::Pretrainer};

use super::{
    BaseError,
    corpus::Corpus,
    recipe::Recipe,
    state::{RunFolder, model_folder},
    vocabulary::Vocabulary,
};

/// Steps between two checkpoints.
pub const SAVE_EVERY: u64 = 200;
/// A slow machine saves more often than that.
const SAVE_AFTER: Duration = Duration::from_mins(5);
/// Steps between two lines of the log.
const LOG_EVERY: u64 = 100;

/// What to train, and how far.
#[derive(Debug, Clone)]
pub struct Order {
    /// Folder of the run.
    pub folder: PathBuf,
    /// Steps in all.
    pub steps: u64,
    /// Threads of one operation: part of the fingerprint, as sums depend on them.
    pub threads: usize,
    /// Seed of everything random.
    pub seed: Seed,
    /// Steps between two checkpoints.
    pub save_every: u64,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ended {
    /// Steps done in all.
    pub step: u64,
    /// Seconds that all runs took.
    pub seconds: f64,
}

/// A flag that SIGTERM and Ctrl-C set.
///
/// # Errors
/// If the system gives no thread or no handler.
pub fn stop_on_signals() -> Result<Arc<AtomicBool>, BaseError> {
    let failed = |error| BaseError::io("signals", error);
    let flag = Arc::new(AtomicBool::new(false));
    let shared = Arc::clone(&flag);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    let mut terminate = {
        let _inside = runtime.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(failed)?
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = terminate.recv() => {}
                    // Without a handler for Ctrl-C the process ends by itself.
                    _ = tokio::signal::ctrl_c() => {}
                }
            });
            shared.store(true, Ordering::Relaxed);
        })
        .map_err(failed)?;
    Ok(flag)
}

/// Trains until all steps are done or `stop` is set, from the newest checkpoint of the folder. Leaves a checkpoint in any case.
///
/// # Errors
/// If the folder is of another run, or a file cannot be written, or a number is not finite.
pub fn train(
    recipe: &Recipe,
    corpus: &Corpus,
    order: &Order,
    stop: &AtomicBool,
    say: &mut dyn FnMut(&str),
) -> Result<Ended, BaseError> {
    let mut names: Vec<&str> = corpus
        .drawings()
        .iter()
        .map(|(icon, _)| icon.name.as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    let words = Vocabulary::of_captions(names.iter().copied());
    let mut folder = RunFolder::open(&order.folder)?;
    folder.prepare(recipe, &words)?;
    let model = TextToImage::fresh(
        &model_folder(&order.folder),
        order.seed.derive("artaug base weights"),
        Compute::CPU,
    )?;
    let mut fingerprint = recipe.fingerprint(order.seed.0, order.threads, corpus.digests());
    fingerprint.insert(
        "subjects".to_owned(),
        Digest::of(names.join("\n").as_bytes()).to_string(),
    );
    let mut trainer = Pretrainer::new(&model, recipe.course(), fingerprint)?;
    folder.restore(&mut trainer)?;
    say(&format!(
        "{} weights, {} drawings of {} subjects, {} tokens; step {} of {}, {:.0} s so far",
        trainer.size(),
        corpus.drawings().len(),
        names.len(),
        words.len(),
        trainer.step(),
        order.steps,
        trainer.seconds(),
    ));

    let (begin, before) = (Instant::now(), trainer.seconds());
    let total = || before + begin.elapsed().as_secs_f64();
    let (mut saved, mut saved_at) = (None, Instant::now());
    let (mut losses, mut logged_at) = (Vec::new(), Instant::now());
    while trainer.step() < order.steps && !stop.load(Ordering::Relaxed) {
        let batch = corpus.batch(order.seed, trainer.step(), recipe.batch, recipe.empty)?;
        losses.push(trainer.train(&model, &batch)?);
        let step = trainer.step();
        if step.is_multiple_of(LOG_EVERY) || step == 10 || step == 50 {
            let count = losses.len() as f64;
            say(&format!(
                "step {step} loss {:.5} {:.0} ms/step {:.0} s in all, {} samples",
                losses.iter().sum::<f64>() / count,
                logged_at.elapsed().as_secs_f64() * 1000.0 / count,
                total(),
                step * recipe.batch as u64,
            ));
            losses.clear();
            logged_at = Instant::now();
        }
        if step.is_multiple_of(order.save_every) || saved_at.elapsed() > SAVE_AFTER {
            folder.save(&trainer.save(total())?)?;
            (saved, saved_at) = (Some(step), Instant::now());
        }
    }
    if saved != Some(trainer.step()) {
        folder.save(&trainer.save(total())?)?;
    }
    let ended = Ended {
        step: trainer.step(),
        seconds: total(),
    };
    say(&format!(
        "stopped at step {}, {:.0} s in all; the same command goes on",
        ended.step, ended.seconds
    ));
    Ok(ended)
}

#[cfg(test)]
mod tests;
