//! What a job works with, made from its specification, the worker's settings and the files that they name.

mod card;
#[cfg(test)]
mod tests;

use concord_artaug::{
    advisor::Advisor,
    data::{Icon, Raster, rasterise, read_icons},
    engine::{Engine as _, EngineError},
    prompts::resolve,
    scorer::{ForEvaluation, ForFilter, Scorer},
    setup::{Clean, Endpoints, SetupError, TrainedScorers, prompts as prompts_of, rule_tail},
};
use concord_common::{
    job::artaug::{AdvisorSpec, ArtaugSpec, EvaluationScorer, FilterScorer},
    seed::Seed,
};
use tokio::runtime::Handle;

use crate::{
    base::corpus::Corpus,
    config::{DataSection, WorkerConfig},
    engine::{Settings, TorchEngine},
    imagetext::{ImageTextScorers, SubjectAdvisor},
    run::{PartsError, Workshop},
    stages::{Opened, Parts, Tools},
};

/// Largest side at which clean drawings are measured.
const MOST_SIDE: u32 = 256;
/// Seed of the renderings from which the statistics scorer learns: the same in every job, so that scores of jobs compare.
const CLEAN_SEED: Seed = Seed(0);
/// Threads of the image-text model: its scores choose pairs, so they must not depend on the machine.
const SCORING_THREADS: usize = 1;

/// The workshop with libtorch.
#[derive(Debug)]
pub struct TorchWorkshop {
    config: WorkerConfig,
    runtime: Handle,
}

impl TorchWorkshop {
    /// A workshop of these settings. Advisors and scorers elsewhere are asked on `runtime`.
    pub fn new(config: WorkerConfig, runtime: Handle) -> Self {
        Self { config, runtime }
    }
}

impl Workshop for TorchWorkshop {
    fn parts(&self, spec: &ArtaugSpec) -> Result<Parts, PartsError> {
        let (allowed, data) = (&self.config.allowed, &self.config.data);
        let folder =
            resolve(&spec.model.folder, &allowed.model_folders).map_err(SetupError::from)?;
        let (prompts, held_out) = prompts_of(spec, allowed)?;
        let most = self.config.limits.threads;
        let threads = spec.limits.threads.map_or(most, |own| own.min(most)) as usize;
        let mut engine = TorchEngine::new(Settings {
            folder: folder.clone(),
            precision: spec.model.precision,
            sampler: spec.sampler.clone(),
            lora: spec.lora.clone(),
            threads,
            gpu: self.config.limits.gpu,
        })
        .map_err(refused("model"))?;
        // A model or a sampler that does not fit is told before anything is drawn.
        engine.open(None).map_err(refused("model.folder"))?;
        let [width, height] = engine.size().map_err(refused("model.folder"))?;
        let clean = clean(spec, data, width.max(height).min(MOST_SIDE))?;
        let trained = Trained::new(data);
        let mut endpoints = Endpoints::new(allowed, self.runtime.clone());
        let advisor = endpoints.advisor(&spec.advisor, &clean.looks)?;
        let advisor: Box<dyn Advisor> = match (&spec.advisor, &trained.models) {
            (AdvisorSpec::Rules { .. }, Some(models)) => {
                Box::new(SubjectAdvisor::new(advisor, models.model()?))
            }
            _ => advisor,
        };
        let filter = endpoints.filter_panel(spec, &clean, &trained)?;
        let evaluation = endpoints.evaluation_panel(spec, &clean, &trained)?;
        let card = card::facts(spec, &folder, threads, advisor.as_ref(), &trained)?;
        Ok(Parts {
            engine: Box::new(engine),
            opened: Opened::Model(None),
            tools: Tools {
                advisor,
                filter,
                evaluation,
                prompts,
                held_out,
                card,
            },
        })
    }
}

fn refused(key: &'static str) -> impl Fn(EngineError) -> PartsError {
    move |error| PartsError::Model {
        key,
        what: error.to_string(),
    }
}

/// Whether anything in a job measures by clean drawings.
fn measures(spec: &ArtaugSpec) -> bool {
    matches!(spec.advisor, AdvisorSpec::Rules { .. })
        || spec.scorers.filter.iter().any(|scorer| {
            matches!(
                scorer,
                FilterScorer::Photometry { .. } | FilterScorer::Colour { .. }
            )
        })
        || spec
            .scorers
            .evaluation
            .iter()
            .any(|scorer| matches!(scorer, EvaluationScorer::Statistics {}))
}

/// What good images look like.
fn clean(spec: &ArtaugSpec, data: &DataSection, side: u32) -> Result<Clean, SetupError> {
    let refuse = |what: String| SetupError::Scorer {
        scorer: "statistics",
        what,
    };
    let tail = rule_tail(&spec.advisor);
    if !measures(spec) {
        // The panels want some although nobody looks at them.
        return Clean::measure(&discs(), 24, tail, CLEAN_SEED)
            .map_err(|error| refuse(error.to_string()));
    }
    let Some(folder) = &data.icons else {
        return Err(refuse(
            "the advisor \"rules\" and the scorers photometry, colour and statistics measure by clean drawings, and this worker has none; set `data.icons` \
             in its settings"
                .to_owned(),
        ));
    };
    let corpus = Corpus::read(folder, side).map_err(|error| refuse(error.to_string()))?;
    Clean::measure(corpus.drawings(), side, tail, CLEAN_SEED)
        .map_err(|error| refuse(error.to_string()))
}

/// Discs of several sizes and shades.
fn discs() -> Vec<(Icon, Raster)> {
    let icons: Vec<String> = (0..64)
        .map(|number| {
            let (radius, shade) = (6 + number % 8, 40 + 3 * number);
            format!("\"disc-{number}\":{{\"body\":\"<circle cx='16' cy='16' r='{radius}' fill='rgb({shade},60,200)'/>\"}}")
        })
        .collect();
    let json = format!(
        "{{\"width\":32,\"height\":32,\"icons\":{{{}}}}}",
        icons.join(",")
    );
    read_icons("discs", json.as_bytes())
        .unwrap_or_default()
        .into_iter()
        .filter_map(|icon| rasterise(&icon, 24).ok().map(|raster| (icon, raster)))
        .collect()
}

/// The trained models that this worker has.
#[derive(Debug)]
struct Trained {
    models: Option<ImageTextScorers>,
    has_brisque: bool,
}

impl Trained {
    fn new(data: &DataSection) -> Self {
        let brisque = data.brisque.clone();
        Self {
            has_brisque: brisque.is_some(),
            models: data.image_text.clone().map(|files| {
                ImageTextScorers::new(files, brisque.unwrap_or_default(), SCORING_THREADS)
            }),
        }
    }

    fn alignment(&self) -> Result<&ImageTextScorers, SetupError> {
        self.models.as_ref().ok_or_else(|| SetupError::Scorer {
            scorer: "alignment",
            what: "this worker has no image-text model; set `data.image_text` in its settings, or say `guard = \"none\"` and take `alignment` out of \
                   the filter"
                .to_owned(),
        })
    }

    fn brisque(&self) -> Result<&ImageTextScorers, SetupError> {
        let refuse = |what: &str| SetupError::Scorer {
            scorer: "brisque",
            what: what.to_owned(),
        };
        if !self.has_brisque {
            return Err(refuse(
                "this worker has no table for it; set `data.brisque` in its settings",
            ));
        }
        self.models
            .as_ref()
            .ok_or_else(|| refuse("it comes with the image-text model; set `data.image_text` too"))
    }
}

impl TrainedScorers for Trained {
    fn alignment_filter(&self) -> Result<Box<dyn Scorer<Use = ForFilter>>, SetupError> {
        self.alignment()?.alignment_filter()
    }

    fn alignment_guard(&self) -> Result<Box<dyn Scorer<Use = ForEvaluation>>, SetupError> {
        self.alignment()?.alignment_guard()
    }

    fn brisque_filter(&self) -> Result<Box<dyn Scorer<Use = ForFilter>>, SetupError> {
        self.brisque()?.brisque_filter()
    }

    fn brisque_evaluation(&self) -> Result<Box<dyn Scorer<Use = ForEvaluation>>, SetupError> {
        self.brisque()?.brisque_evaluation()
    }
}
