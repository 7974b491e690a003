//! `concord-artaug train-image-text` and `concord-artaug judge-base`.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use concord_common::seed::Seed;
use concord_learning::{
    diffusion::{params::Compute, pipeline::TextToImage},
    torch::use_threads,
    vision::{AlignmentSettings, EfficientNetLite0, TextTower},
};

use crate::base::sample::{Drawing, draw};

use super::{Drawings, ImageText, ImageTextError, ImageTextFiles, Judge, Recipe, train};

/// Trains the image-text model's projections on renderings of the icon sets.
#[derive(Debug, clap::Args)]
pub struct TrainImageText {
    /// Folder with fluent, noto and twemoji (deploy/artaug/fetch.py makes it: CACHE/sources/icons).
    #[arg(long)]
    icons: PathBuf,
    /// Where projections.safetensors and figures.json are written.
    #[arg(long)]
    out: PathBuf,
    /// EfficientNet-Lite0's model.safetensors (CACHE/backbones/efficientnet-lite0).
    #[arg(long)]
    vision: PathBuf,
    /// MiniLM's folder (CACHE/backbones/all-minilm-l6-v2).
    #[arg(long)]
    text: PathBuf,
    /// Folder that keeps what the towers saw, for another run on the same data.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// File for the data's description in JSON: subjects, renderings, texts.
    #[arg(long)]
    dataset: Option<PathBuf>,
    /// Threads of libtorch; the committed projections were made with 1.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Only so many subjects, for a trial; 0 for all.
    #[arg(long, default_value_t = 0)]
    most_subjects: usize,
    /// Steps of training.
    #[arg(long)]
    steps: Option<u64>,
    /// Leave out the early layers, which see brightness, colour and edges by place.
    #[arg(long)]
    without_looks: bool,
}

impl TrainImageText {
    /// Runs it; progress goes to `say`.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the training fails.
    pub fn run(&self, say: &mut dyn FnMut(String)) -> Result<(), ImageTextError> {
        use_threads(self.threads);
        let started = Instant::now();
        let drawings = Drawings::read(&self.icons)?;
        let vision = EfficientNetLite0::load(&self.vision)?;
        let text = TextTower::load(&self.text)?;
        let recipe = Recipe {
            most_subjects: self.most_subjects,
            ..Recipe::default()
        };
        let usual = AlignmentSettings::default();
        let settings = AlignmentSettings {
            steps: self.steps.unwrap_or(usual.steps),
            ..usual
        };
        let trained = train(
            &drawings,
            &recipe,
            &settings,
            !self.without_looks,
            (&vision, &text),
            self.keep.as_deref(),
            &mut |line| say(format!("{:6.0} s  {line}", started.elapsed().as_secs_f64())),
        )?;
        std::fs::create_dir_all(&self.out).map_err(ImageTextError::io(&self.out))?;
        write(
            &self.out.join("projections.safetensors"),
            &trained.projections,
        )?;
        let report = serde_json::json!({
            "recipe": recipe,
            "settings": settings,
            "losses": trained.losses,
            "figures": trained.figures,
            "seconds": started.elapsed().as_secs(),
        });
        write(&self.out.join("figures.json"), &pretty(&report)?)?;
        if let Some(file) = &self.dataset {
            write(file, &pretty(&trained.dataset)?)?;
        }
        say(String::from_utf8_lossy(&pretty(&trained.figures)?).into_owned());
        Ok(())
    }
}

/// Says how well what a base model draws is recognised.
#[derive(Debug, clap::Args)]
pub struct JudgeBase {
    /// The model's folder.
    model: PathBuf,
    /// Folder with fluent, noto and twemoji.
    #[arg(long)]
    icons: PathBuf,
    /// EfficientNet-Lite0's model.safetensors.
    #[arg(long)]
    vision: PathBuf,
    /// MiniLM's folder.
    #[arg(long)]
    text: PathBuf,
    /// The image-text model's projections.
    #[arg(long)]
    projections: PathBuf,
    /// Images to draw.
    #[arg(long, default_value_t = 500)]
    samples: usize,
    /// Steps of the sampler.
    #[arg(long, default_value_t = 12)]
    steps: usize,
    /// Classifier-free guidance.
    #[arg(long, default_value_t = 2.0)]
    guidance: f64,
    /// Put the words for good looks after the prompts.
    #[arg(long)]
    good_words: bool,
    /// Threads of libtorch.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Where all draws start.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder that the images are written to, to look at.
    #[arg(long)]
    images: Option<PathBuf>,
}

impl JudgeBase {
    /// Runs it; the figures go to `say` as JSON.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the model cannot draw.
    pub fn run(&self, say: &mut dyn FnMut(String)) -> Result<(), ImageTextError> {
        use_threads(self.threads);
        let drawings = Drawings::read(&self.icons)?;
        let files = ImageTextFiles {
            vision: self.vision.clone(),
            text: self.text.clone(),
            projections: self.projections.clone(),
        };
        let model = ImageText::load(&files, self.threads)?;
        let base = TextToImage::load(&self.model, Compute::CPU)?;
        let drawing = Drawing {
            steps: self.steps,
            guidance: self.guidance,
            seed: Seed(self.seed),
        };
        say(format!("drawing {} images", self.samples));
        let (figures, drawn) = Judge::new(&model, &drawings).base(
            &mut |prompts| Ok(draw(&base, prompts, &drawing)?),
            (self.samples, self.good_words),
            Seed(self.seed),
            say,
        )?;
        if let Some(folder) = &self.images {
            std::fs::create_dir_all(folder).map_err(ImageTextError::io(folder))?;
            for (number, (prompt, image)) in drawn.iter().enumerate() {
                let name: String = prompt
                    .chars()
                    .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
                    .collect();
                write(
                    &folder.join(format!("{number:04}-{name}.png")),
                    &image.to_png()?,
                )?;
            }
        }
        say(String::from_utf8_lossy(&pretty(&figures)?).into_owned());
        Ok(())
    }
}

fn pretty(value: &impl serde::Serialize) -> Result<Vec<u8>, ImageTextError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|error| ImageTextError::Unusable(error.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

fn write(file: &Path, bytes: &[u8]) -> Result<(), ImageTextError> {
    std::fs::write(file, bytes).map_err(ImageTextError::io(file))
}
