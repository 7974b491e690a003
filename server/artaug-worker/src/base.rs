//! The embedded base model: a small text-to-image model that is trained from nothing, in this engine, on captioned icons.
//!
//! `train-base` trains it and can be stopped and taken up again at any step, `export-base` writes the averaged weights as a model folder with its card,
//! `sample-base` draws pictures to look at, `evaluate-base` measures whether its subjects can be told apart, `base-prompts` lists its prompts.

mod card;
pub mod corpus;
pub mod evaluate;
pub mod export;
pub mod recipe;
pub mod sample;
mod state;
pub mod train;
pub mod vocabulary;

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use concord_artaug::{
    data::{DataError, PromptSide, plain_prompts},
    image::ImageError,
};
use concord_common::seed::Seed;
use concord_learning::{
    LearningError,
    diffusion::{params::Compute, pipeline::TextToImage},
    torch::{TorchSettings, TorchThread},
};

use self::{
    corpus::Corpus,
    evaluate::Evaluation,
    recipe::Recipe,
    sample::{Drawing, contact_sheet, draw},
};

/// Why the base model cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// A file or folder.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The icons are not those that are needed.
    #[error("icons: {0}; fetch them with deploy/artaug/fetch.py")]
    Corpus(String),
    /// An icon set or an icon.
    #[error(transparent)]
    Data(#[from] DataError),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The engine.
    #[error(transparent)]
    Learning(#[from] LearningError),
    /// The folder of a run.
    #[error("training folder {}: {what}", .folder.display())]
    Folder {
        /// Which.
        folder: PathBuf,
        /// What is wrong, and what to do.
        what: String,
    },
    /// An order that cannot be carried out.
    #[error("{0}")]
    Order(String),
}

impl BaseError {
    pub(crate) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    pub(crate) fn folder(folder: &Path, what: impl Into<String>) -> Self {
        Self::Folder {
            folder: folder.to_path_buf(),
            what: what.into(),
        }
    }
}

/// Commands about the base model.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Trains the base model, or goes on with it; stops at a checkpoint on SIGTERM or Ctrl-C.
    TrainBase(TrainArgs),
    /// Writes the averaged weights of a training folder as a model folder with its card.
    ExportBase(ExportArgs),
    /// Draws prompts as one PNG.
    SampleBase(SampleArgs),
    /// Draws plain prompts and counts how many subjects are recognised among all of them.
    EvaluateBase(EvaluateArgs),
    /// Lists the plain prompts of one side.
    BasePrompts(PromptsArgs),
}

/// Of `train-base`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Folder with the icon sets that deploy/artaug/fetch.py fetches.
    #[arg(long, value_name = "DIR")]
    icons: PathBuf,
    /// Folder of the run; an earlier run in it is taken up.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Steps in all, those of earlier runs included.
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    steps: u64,
    /// Threads of one operation. A run must be taken up with the same number.
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// Seed of weights, images and noise.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Of `export-base`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Folder of the run; it may still be going on.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Model folder to be made.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Of `sample-base`.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// Model folder.
    model: PathBuf,
    /// A prompt; may be given several times.
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// A file with a prompt on each line.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// PNG to be written.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    drawing: DrawingArgs,
    /// Pictures in a row of the PNG.
    #[arg(long, value_name = "N", default_value_t = 8)]
    columns: u32,
    /// How many times a pixel is enlarged.
    #[arg(long, value_name = "N", default_value_t = 4)]
    enlarge: u32,
}

/// How pictures are drawn.
#[derive(Debug, Clone, Copy, Args)]
pub struct DrawingArgs {
    /// Steps of the sampler.
    #[arg(long, value_name = "N", default_value_t = 12)]
    steps: usize,
    /// Classifier-free guidance.
    #[arg(long, value_name = "X", default_value_t = 2.0)]
    guidance: f64,
    /// Seed of the noise.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Threads of one operation.
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
}

impl DrawingArgs {
    fn drawing(self) -> Drawing {
        Drawing {
            steps: self.steps,
            guidance: self.guidance,
            seed: Seed(self.seed),
        }
    }
}

/// Of `evaluate-base`.
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// Model folder.
    model: PathBuf,
    /// Folder with the icon sets.
    #[arg(long, value_name = "DIR")]
    icons: PathBuf,
    /// Prompts to draw.
    #[arg(long, value_name = "N", default_value_t = 200)]
    count: usize,
    /// Words behind every prompt, such as "well lit, clear, colourful, sharp, centred".
    #[arg(long, value_name = "TEXT", default_value = "")]
    words: String,
    #[command(flatten)]
    drawing: DrawingArgs,
}

/// Of `base-prompts`.
#[derive(Debug, Args)]
pub struct PromptsArgs {
    /// Those that only an evaluation may draw, instead of those from which pairs may be made.
    #[arg(long)]
    held_out: bool,
    /// At most so many.
    #[arg(long, value_name = "N")]
    count: Option<usize>,
    /// Seed of their order.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Carries a command out.
///
/// # Errors
/// What went wrong, with the file or folder.
pub fn run(command: Command) -> Result<(), BaseError> {
    match command {
        Command::TrainBase(args) => train_base(args),
        Command::ExportBase(args) => on_torch(1, move || {
            let facts = export::export(&args.run, &args.out)?;
            say(&format!(
                "{}: {} steps, {:.2} hours",
                args.out.display(),
                facts.step,
                facts.seconds / 3600.0
            ));
            Ok(())
        }),
        Command::SampleBase(args) => on_torch(args.drawing.threads, move || sample_base(&args)),
        Command::EvaluateBase(args) => on_torch(args.drawing.threads, move || evaluate_base(&args)),
        Command::BasePrompts(args) => {
            let side = if args.held_out {
                PromptSide::HeldOut
            } else {
                PromptSide::Training
            };
            let prompts = plain_prompts(side, Seed(args.seed));
            let count = args.count.unwrap_or(prompts.len());
            for prompt in prompts.iter().take(count) {
                say(prompt);
            }
            Ok(())
        }
    }
}

/// Runs a job on the one thread of the engine.
fn on_torch<R: Send + 'static>(
    threads: usize,
    job: impl FnOnce() -> Result<R, BaseError> + Send + 'static,
) -> Result<R, BaseError> {
    let torch = TorchThread::start(TorchSettings {
        intra_op_threads: threads,
    })?;
    let done = torch.run_blocking("base model", move || Ok(job()))?;
    torch.join();
    done
}

/// A line for whoever started the command. A reader that has gone needs none.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn train_base(args: TrainArgs) -> Result<(), BaseError> {
    let recipe = Recipe::icons();
    let corpus = Corpus::read(&args.icons, recipe.side)?;
    let stop = train::stop_on_signals()?;
    let order = train::Order {
        folder: args.out,
        steps: args.steps,
        threads: args.threads,
        seed: Seed(args.seed),
        save_every: train::SAVE_EVERY,
    };
    on_torch(args.threads, move || {
        train::train(&recipe, &corpus, &order, &stop, &mut say).map(drop)
    })
}

fn load(folder: &Path) -> Result<TextToImage, BaseError> {
    Ok(TextToImage::load(folder, Compute::CPU)?)
}

fn sample_base(args: &SampleArgs) -> Result<(), BaseError> {
    let mut prompts = args.prompt.clone();
    if let Some(file) = &args.prompts {
        let text = fs::read_to_string(file).map_err(|error| BaseError::io(file, error))?;
        prompts.extend(
            text.lines()
                .filter(|line| !line.is_empty())
                .map(str::to_owned),
        );
    }
    let images = draw(&load(&args.model)?, &prompts, &args.drawing.drawing())?;
    let sheet = contact_sheet(&images, args.columns, args.enlarge)?;
    fs::write(&args.out, sheet.to_png()?).map_err(|error| BaseError::io(&args.out, error))
}

fn evaluate_base(args: &EvaluateArgs) -> Result<(), BaseError> {
    let model = load(&args.model)?;
    let corpus = Corpus::read(&args.icons, sample::side(&model)?)?;
    let found = Evaluation::run(
        &model,
        &corpus,
        args.count,
        &args.words,
        &args.drawing.drawing(),
    )?;
    say(&found.to_string());
    Ok(())
}
