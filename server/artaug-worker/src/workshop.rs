//! What a job works with, made from its specification, the worker's settings and the files that they name.

mod card;
mod files;
#[cfg(test)]
mod tests;

use std::{
    fmt::Display,
    fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use concord_artaug::{
    advisor::Advisor,
    card::CardFacts,
    data::{Icon, Raster, rasterise, read_icons},
    engine::{Engine as _, EngineError},
    prompts::resolve,
    setup::{Clean, Endpoints, SetupError, prompts as prompts_of, rule_tail},
};
use concord_common::{
    Digest,
    config::ByteSize,
    job::artaug::{
        AdvisorSpec, ArtaugSpec, EvaluationScorer, FilterScorer, Guard, Precision, batch_fits,
    },
    seed::Seed,
};
use concord_learning::diffusion::pipeline::TextToImage;
use tokio::runtime::Handle;

use crate::{
    base::corpus::Corpus,
    brake::{Brake, Halt},
    config::{DataSection, LimitsSection, WorkerConfig},
    engine::{Settings, TorchEngine},
    imagetext::{ImageText, SubjectAdvisor, TrainedModels},
    run::{PartsError, Workshop},
    stages::{Opened, Parts, Tools},
};

/// Largest side at which clean drawings are measured.
const MOST_SIDE: u32 = 256;
/// Seed of the renderings from which the statistics scorer learns: the same in every job, so that scores of jobs compare.
const CLEAN_SEED: Seed = Seed(0);
/// Prompts of a list that are looked at for being too long: a list may have a million, of which a job draws some.
const MOST_LOOKED_AT: usize = 10_000;
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
    fn parts(&self, spec: &ArtaugSpec, brake: &Brake) -> Result<Parts, PartsError> {
        let (allowed, data) = (&self.config.allowed, &self.config.data);
        let folder =
            resolve(&spec.model.folder, &allowed.model_folders).map_err(SetupError::from)?;
        let files = files::files_of(&folder, &allowed.model_folders)?;
        let (prompts, held_out) = prompts_of(spec, allowed)?;
        let limits = &self.config.limits;
        let threads = threads(spec, limits)?;
        let mut engine = TorchEngine::new(Settings {
            folder: folder.clone(),
            precision: spec.model.precision,
            sampler: spec.sampler.clone(),
            lora: spec.lora.clone(),
            threads,
            gpu: limits.gpu,
        })
        .map_err(refused("model"))?;
        brake.check()?;
        // What is too large is told before it is loaded, and a model or a sampler that does not fit before anything is drawn.
        let weights = TextToImage::count(&folder).map_err(refused("model.folder"))?;
        check_size(spec, limits, weights)?;
        engine.open(None).map_err(|error| match error {
            EngineError::Local(what) => PartsError::Halt(Halt::Trouble(what)),
            error => refused("model.folder")(error),
        })?;
        brake.check()?;
        for (key, texts) in [("prompts", &prompts), ("held_out", &held_out)] {
            warn_of_cut(&engine, key, texts).map_err(refused(key))?;
        }
        let [width, height] = engine.size().map_err(refused("model.folder"))?;
        if !batch_fits(spec.sampler.batch, [width, height]) {
            return Err(PartsError::Model {
                key: "sampler.batch",
                what: format!("this is too many images of {width} x {height} pixels; say fewer"),
            });
        }
        brake.check()?;
        let (clean, mut data_files) = clean(spec, data, width.max(height).min(MOST_SIDE))?;
        brake.check()?;
        let trained = TrainedModels::new(
            data.image_text.clone(),
            data.brisque.clone(),
            SCORING_THREADS,
        );
        let mut endpoints = Endpoints::new(allowed, self.runtime.clone(), brake.until());
        let advisor = endpoints.advisor(&spec.advisor, &clean.looks)?;
        let advisor: Box<dyn Advisor> = match subjects(&trained, spec)? {
            Some((model, low)) => Box::new(SubjectAdvisor::new(advisor, model, low)),
            None => advisor,
        };
        let filter = endpoints.filter_panel(spec, &clean, &trained)?;
        let evaluation = endpoints.evaluation_panel(spec, &clean, &trained)?;
        data_files.extend(trained_files(&trained, spec)?);
        let base_files = card::digests_of(&files, &|| brake.check())?;
        if files::files_of(&folder, &allowed.model_folders)? != files {
            return Err(PartsError::Halt(Halt::Trouble(
                "the model's folder changed while it was opened; the job is taken up again by itself".to_owned(),
            )));
        }
        let card = CardFacts {
            data_files,
            base_files,
            ..card::facts(spec, &folder, threads, advisor.as_ref())
        };
        let roots = allowed.model_folders.clone();
        let look = move || files::files_of(&folder, &roots);
        let again = look.clone();
        let stamps = Arc::new(Mutex::new(files));
        let known = Arc::clone(&stamps);
        // A look that does not come about says nothing good.
        let untouched = move || again().is_ok_and(|found| found == *stamped(&known));
        let base = move || {
            let found = look()?;
            let digests = card::digests_of(&found, &|| Ok(()))?;
            // Touched files with the same bytes are read once; other bytes end the lease.
            *stamped(&stamps) = found;
            Ok(digests)
        };
        Ok(Parts {
            engine: Box::new(engine),
            opened: Opened::Model(None),
            tools: Tools {
                advisor,
                filter,
                evaluation,
                prompts,
                held_out,
                // On a GPU no number of them makes the bits the same.
                threads: limits.gpu.is_none().then_some(threads),
                card,
                base: Box::new(base),
                untouched: Box::new(untouched),
            },
        })
    }
}

fn refused<E: Display>(key: &'static str) -> impl Fn(E) -> PartsError {
    move |error| PartsError::Model {
        key,
        what: error.to_string(),
    }
}

/// Says in the log which of a job's lists has prompts that the model does not read to their end.
fn warn_of_cut(
    engine: &TorchEngine,
    key: &'static str,
    texts: &[String],
) -> Result<(), EngineError> {
    let looked_at = &texts[..texts.len().min(MOST_LOOKED_AT)];
    let cut = cut_prompts(engine, looked_at)?;
    if let Some(first) = cut.first() {
        tracing::warn!(
            list = key,
            count = cut.len(),
            of = looked_at.len(),
            first = first + 1,
            "prompts are longer than the model's text encoder reads: what stands at their ends has no effect"
        );
    }
    Ok(())
}

/// The places of the prompts that the opened model does not read to their end.
fn cut_prompts(engine: &TorchEngine, texts: &[String]) -> Result<Vec<usize>, EngineError> {
    let mut cut = Vec::new();
    for (place, text) in texts.iter().enumerate() {
        if engine.cuts(text)? {
            cut.push(place);
        }
    }
    Ok(cut)
}

/// Threads of the engine. A job gets the number that it wants or does not begin here: with fewer of them other bytes come out.
fn threads(spec: &ArtaugSpec, limits: &LimitsSection) -> Result<usize, PartsError> {
    match spec.limits.threads {
        Some(own) if own > limits.threads => Err(PartsError::Limit {
            key: "limits.threads",
            what: format!(
                "the job wants {own} threads of the engine, and this worker gives {}; say more in its settings, let a worker that gives as many take the \
                 job, or start it anew with fewer",
                limits.threads
            ),
        }),
        own => Ok(own.unwrap_or(limits.threads) as usize),
    }
}

/// Whether a model of so many weights can be kept as a whole, and held in memory. What no worker could keep is told first.
fn check_size(spec: &ArtaugSpec, limits: &LimitsSection, weights: u64) -> Result<(), PartsError> {
    let fused = if spec.output.fused {
        weights.saturating_mul(4)
    } else {
        0
    };
    let too_large = |disk: ByteSize, what: &str| {
        format!(
            "the fused model, in f32, takes {} MiB, and the {} MiB of `limits.disk` {what}, or do without the fused model",
            fused >> 20,
            disk.bytes() >> 20
        )
    };
    if fused > spec.limits.disk.bytes() {
        return Err(PartsError::Model {
            key: "output.fused",
            what: too_large(spec.limits.disk, "of the job are less; say more"),
        });
    }
    if fused > limits.disk.bytes() {
        return Err(PartsError::Limit {
            key: "limits.disk",
            what: too_large(
                limits.disk,
                "of this worker's settings are less; say more there, let a worker with more take the job",
            ),
        });
    }
    // The fused model is made in f32 on the CPU, wherever the job computes.
    let each = match (spec.output.fused, limits.gpu, spec.model.precision) {
        (true, _, _) | (_, None, Precision::F32) => 4,
        (false, None, _) => 2,
        (false, Some(_), _) => 0,
    };
    let (held, most) = (weights.saturating_mul(each), limits.memory.bytes());
    if held > most {
        return Err(PartsError::Limit {
            key: "limits.memory",
            what: format!(
                "the weights of the model alone take {} MiB of memory, and this worker may hold {} MiB; say more in its settings, or let a worker that may \
                 hold more take the job",
                held >> 20,
                most >> 20
            ),
        });
    }
    Ok(())
}

/// An image-text model, and the alignment below which a subject is asked for if it is not the model's own.
type Subjects = (Arc<ImageText>, Option<f64>);

/// When the embedded advisor asks for an image's subject.
#[derive(Debug, PartialEq)]
enum Subject {
    Never,
    /// For images whose alignment with their prompt is below this.
    Below(f64),
    /// By a threshold of the image-text model's own, where there is one.
    AsTheWorkerCan,
}

fn subject_rule(spec: &ArtaugSpec) -> Subject {
    match spec.advisor {
        AdvisorSpec::Rules { subject_below, .. } => match subject_below {
            None => Subject::AsTheWorkerCan,
            // No cosine is below -1.
            Some(low) if low <= -1.0 => Subject::Never,
            Some(low) => Subject::Below(low),
        },
        AdvisorSpec::Chat { .. } => Subject::Never,
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

/// What good images look like, and the files that say so.
fn clean(
    spec: &ArtaugSpec,
    data: &DataSection,
    side: u32,
) -> Result<(Clean, DataFiles), SetupError> {
    let refuse = |what: String| SetupError::Scorer {
        scorer: "statistics",
        what,
    };
    let tail = rule_tail(&spec.advisor);
    if !measures(spec) {
        // The panels want some although nobody looks at them.
        let clean = Clean::measure(&discs(), 24, tail, CLEAN_SEED);
        return Ok((
            clean.map_err(|error| refuse(error.to_string()))?,
            Vec::new(),
        ));
    }
    let Some(folder) = &data.icons else {
        return Err(refuse(
            "the advisor \"rules\" and the scorers photometry, colour and statistics measure by clean drawings, and this worker has none; set `data.icons` \
             in its settings"
                .to_owned(),
        ));
    };
    let corpus = Corpus::read(folder, side).map_err(|error| refuse(error.to_string()))?;
    let clean = Clean::measure(corpus.drawings(), side, tail, CLEAN_SEED);
    let files = corpus.digests().iter();
    Ok((
        clean.map_err(|error| refuse(error.to_string()))?,
        files
            .map(|(set, digest)| (format!("the icons of {set}"), *digest))
            .collect(),
    ))
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

/// Digests of files by name.
type DataFiles = Vec<(String, Digest)>;

/// The files of the trained models that a job uses.
fn trained_files(models: &TrainedModels, spec: &ArtaugSpec) -> Result<DataFiles, SetupError> {
    let (filter, judges) = (&spec.scorers.filter, &spec.scorers.evaluation);
    let advises = subject_rule(spec) != Subject::Never;
    let is_alignment = |scorer: &FilterScorer| matches!(scorer, FilterScorer::Alignment { .. });
    let is_aligned = spec.scorers.guard == Guard::Alignment || filter.iter().any(is_alignment);
    let is_brisque = |scorer: &FilterScorer| matches!(scorer, FilterScorer::Brisque { .. });
    let judges_brisque = |scorer: &EvaluationScorer| matches!(scorer, EvaluationScorer::Brisque {});
    let mut files = Vec::new();
    // The projections name the towers that they belong to.
    if (advises || is_aligned)
        && let Some(model) = models.image_text()?
    {
        files.push(("the image-text projections".to_owned(), *model.digest()));
    }
    if (filter.iter().any(is_brisque) || judges.iter().any(judges_brisque))
        && let Some(table) = models.brisque()
    {
        let bytes = fs::read(table).map_err(|error| SetupError::Scorer {
            scorer: "brisque",
            what: format!("{}: {error}", table.display()),
        })?;
        files.push(("the table of brisque".to_owned(), Digest::of(&bytes)));
    }
    Ok(files)
}

/// The image-text model by whose alignment a job wants subjects to be asked for, with the threshold.
fn subjects(models: &TrainedModels, spec: &ArtaugSpec) -> Result<Option<Subjects>, SetupError> {
    match subject_rule(spec) {
        Subject::Never => Ok(None),
        Subject::AsTheWorkerCan => Ok(models.image_text()?.map(|model| (model, None))),
        Subject::Below(low) => {
            let model = models.image_text()?.ok_or_else(|| {
                SetupError::Advisor(
                    "this worker has no image-text model; set `data.image_text` in its settings, or leave `advisor.subject_below` out"
                        .to_owned(),
                )
            })?;
            Ok(Some((model, Some(low))))
        }
    }
}

/// What the files of a model's folder were stamped with when they were read last.
fn stamped(files: &Mutex<Vec<files::ModelFile>>) -> MutexGuard<'_, Vec<files::ModelFile>> {
    files.lock().unwrap_or_else(PoisonError::into_inner)
}
