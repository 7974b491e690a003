//! From a specification and the worker's settings to the parts of a job that need no engine.

mod clean;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

pub use self::clean::{Clean, CleanError};
use concord_common::{
    job::artaug::{
        AdvisorSpec, ArtaugSpec, Boxes, EvaluationScorer, FilterScorer, Guard, LoraMode,
        PromptsSpec,
    },
    seed::Seed,
};
use serde::Deserialize;
use tokio::runtime::Handle;

use crate::{
    advisor::{
        Advisor, BoxConvention, RuleAdvisor, RuleSettings,
        chat::{Chat, ChatAdvisor, ChatSettings},
    },
    endpoint::{Endpoint, EndpointError, EndpointSettings, Until},
    filter::FilterRules,
    machine::{Plan, StopRules},
    photometry::CleanLooks,
    prompts::{PathError, check_apart, read_prompts, resolve},
    scorer::{
        ExternalScorer, FaultScorer, ForEvaluation, ForFilter, Panel, Scorer, StatisticsScorer,
    },
    stats::Bootstrap,
};

/// Name of the guard's score among those of the evaluation.
pub const GUARD: &str = "alignment";

/// What a worker allows jobs to use.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Allowed {
    /// Folders below which models may stand.
    pub model_folders: Vec<PathBuf>,
    /// Folders below which files of prompts may stand.
    pub prompt_folders: Vec<PathBuf>,
    /// Endpoints by the name that jobs use.
    pub endpoints: BTreeMap<String, EndpointSettings>,
}

/// Scorers that need trained models; the worker brings them.
pub trait TrainedScorers {
    /// Image-text alignment for the filter.
    ///
    /// # Errors
    /// If its model cannot be loaded.
    fn alignment_filter(&self) -> Result<Box<dyn Scorer<Use = ForFilter>>, SetupError>;
    /// Image-text alignment as the guard, named [`GUARD`].
    ///
    /// # Errors
    /// If its model cannot be loaded.
    fn alignment_guard(&self) -> Result<Box<dyn Scorer<Use = ForEvaluation>>, SetupError>;
    /// BRISQUE for the filter.
    ///
    /// # Errors
    /// If its model cannot be loaded.
    fn brisque_filter(&self) -> Result<Box<dyn Scorer<Use = ForFilter>>, SetupError>;
    /// BRISQUE for the evaluation.
    ///
    /// # Errors
    /// If its model cannot be loaded.
    fn brisque_evaluation(&self) -> Result<Box<dyn Scorer<Use = ForEvaluation>>, SetupError>;
}

/// Why a job cannot be set up on this worker.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A file or folder.
    #[error(transparent)]
    Path(#[from] PathError),
    /// An endpoint that the settings do not have.
    #[error("this worker has no endpoint `{0}`; add [allowed.endpoints.{0}] to its settings")]
    NoEndpoint(String),
    /// An endpoint whose settings are wrong.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// A trained model that is missing or wrong.
    #[error("the scorer {scorer} cannot be used: {what}")]
    Scorer {
        /// Which.
        scorer: &'static str,
        /// Why, and what to do.
        what: String,
    },
    /// A trained model that the advice needs and the worker has not.
    #[error("the advisor cannot be used: {0}")]
    Advisor(String),
}

/// The state machine's plan of a specification.
pub fn plan(spec: &ArtaugSpec) -> Plan {
    let (counts, evaluation, limits) = (&spec.counts, &spec.evaluation, &spec.limits);
    let least_gain = spec
        .scorers
        .filter
        .iter()
        .map(|scorer| (scorer.name().to_owned(), scorer.least_gain()))
        .collect();
    Plan {
        iterations: counts.iterations,
        pairs: counts.pairs,
        held_out: counts.held_out,
        batch: spec.sampler.batch,
        first_steps: spec.lora.first_steps,
        second_steps: spec.lora.second_steps,
        per_pair: spec.lora.mode == LoraMode::PerPair,
        review: spec.review,
        control: evaluation.control,
        filter: FilterRules {
            least_gain,
            most_kept: counts.kept as usize,
        },
        stop: StopRules {
            judge: spec.scorers.judge().to_owned(),
            tie: evaluation.tie,
            alignment: (spec.scorers.guard == Guard::Alignment).then(|| GUARD.to_owned()),
            alignment_loss: limits.alignment_loss,
            least_diversity: limits.least_diversity,
            least_kept: counts.least_kept,
        },
        bootstrap: Bootstrap {
            confidence: evaluation.confidence,
            resamples: evaluation.resamples,
            seed: Seed(spec.seed).derive("artaug bootstrap"),
        },
    }
}

/// The prompts trained on and those held out.
///
/// # Errors
/// If a file is missing, outside the allowed folders or wrong, or a prompt is on both sides.
pub fn prompts(
    spec: &ArtaugSpec,
    allowed: &Allowed,
) -> Result<(Vec<String>, Vec<String>), SetupError> {
    let list = |prompts: &PromptsSpec| match &prompts.file {
        Some(file) => read_prompts(&resolve(file, &allowed.prompt_folders)?),
        None => Ok(prompts.texts.clone()),
    };
    let (trained, held_out) = (list(&spec.prompts)?, list(&spec.held_out)?);
    check_apart(&trained, &held_out)?;
    Ok((trained, held_out))
}

/// Opens endpoints by name, each once.
#[derive(Debug)]
pub struct Endpoints<'a> {
    allowed: &'a Allowed,
    open: BTreeMap<String, Arc<Endpoint>>,
    runtime: Handle,
    until: Until,
}

impl<'a> Endpoints<'a> {
    /// The endpoints that are allowed; calls block on `runtime`, and go on `until` a time.
    pub fn new(allowed: &'a Allowed, runtime: Handle, until: Until) -> Self {
        Self {
            allowed,
            open: BTreeMap::new(),
            runtime,
            until,
        }
    }

    fn chat(&mut self, name: &str, settings: ChatSettings) -> Result<Chat, SetupError> {
        if !self.open.contains_key(name) {
            let endpoint = self
                .allowed
                .endpoints
                .get(name)
                .ok_or_else(|| SetupError::NoEndpoint(name.to_owned()))?;
            let opened = Arc::new(Endpoint::open(endpoint.clone(), self.until.clone())?);
            self.open.insert(name.to_owned(), opened);
        }
        Ok(Chat::new(
            Arc::clone(&self.open[name]),
            settings,
            self.runtime.clone(),
        ))
    }

    /// The understanding model of a specification. The looks come from clean images, measured with the tail that
    /// [`rule_tail`] gives.
    ///
    /// # Errors
    /// If an endpoint is missing or its settings are wrong.
    pub fn advisor(
        &mut self,
        spec: &AdvisorSpec,
        clean: &CleanLooks,
    ) -> Result<Box<dyn Advisor>, SetupError> {
        match spec {
            AdvisorSpec::Rules { least_excess, .. } => {
                let settings = RuleSettings {
                    least_excess: *least_excess,
                    ..RuleSettings::default()
                };
                Ok(Box::new(RuleAdvisor::new(clean.clone(), settings)))
            }
            AdvisorSpec::Chat {
                endpoint,
                model,
                boxes,
                max_regions: _,
                tries,
                temperature,
                max_tokens,
                schema,
                least_side,
            } => {
                let settings = ChatSettings {
                    model: model.clone(),
                    tries: *tries,
                    temperature: *temperature,
                    max_tokens: *max_tokens,
                    send_schema: *schema,
                    least_side: *least_side,
                };
                let convention = match boxes {
                    Boxes::Fraction => BoxConvention::Fraction,
                    Boxes::Pixel => BoxConvention::Pixel,
                    Boxes::Thousand => BoxConvention::Thousand,
                };
                Ok(Box::new(ChatAdvisor::new(
                    self.chat(endpoint, settings)?,
                    convention,
                )))
            }
        }
    }

    /// The scorers that choose training pairs.
    ///
    /// # Errors
    /// If an endpoint is missing or a trained model cannot be used.
    pub fn filter_panel(
        &mut self,
        spec: &ArtaugSpec,
        clean: &Clean,
        trained: &dyn TrainedScorers,
    ) -> Result<Panel<ForFilter>, SetupError> {
        spec.scorers
            .filter
            .iter()
            .map(
                |scorer| -> Result<Box<dyn Scorer<Use = ForFilter>>, SetupError> {
                    Ok(match scorer {
                        FilterScorer::Photometry { .. } => {
                            Box::new(FaultScorer::photometry(clean.looks.clone()))
                        }
                        FilterScorer::Colour { .. } => {
                            Box::new(FaultScorer::colour(clean.looks.clone()))
                        }
                        FilterScorer::Alignment { .. } => trained.alignment_filter()?,
                        FilterScorer::Brisque { .. } => trained.brisque_filter()?,
                        FilterScorer::Chat {
                            name,
                            endpoint,
                            model,
                            criterion,
                            tries,
                            max_tokens,
                            schema,
                            least_side,
                            least_gain: _,
                        } => {
                            let counts = [*tries, *max_tokens, *least_side];
                            let chat = self.chat(endpoint, asked(model, counts, *schema))?;
                            Box::new(ExternalScorer::<ForFilter>::new(name, criterion, chat))
                        }
                    })
                },
            )
            .collect()
    }

    /// The scorers that judge the result, with the guard as the last if there is one.
    ///
    /// # Errors
    /// If an endpoint is missing or a trained model cannot be used.
    pub fn evaluation_panel(
        &mut self,
        spec: &ArtaugSpec,
        clean: &Clean,
        trained: &dyn TrainedScorers,
    ) -> Result<Panel<ForEvaluation>, SetupError> {
        let mut panel: Panel<ForEvaluation> = Vec::new();
        for scorer in &spec.scorers.evaluation {
            panel.push(match scorer {
                EvaluationScorer::Statistics {} => {
                    Box::new(StatisticsScorer::new(clean.statistics.clone()))
                }
                EvaluationScorer::Brisque {} => trained.brisque_evaluation()?,
                EvaluationScorer::Chat {
                    name,
                    endpoint,
                    model,
                    criterion,
                    tries,
                    max_tokens,
                    schema,
                    least_side,
                } => {
                    let counts = [*tries, *max_tokens, *least_side];
                    let chat = self.chat(endpoint, asked(model, counts, *schema))?;
                    Box::new(ExternalScorer::<ForEvaluation>::new(name, criterion, chat))
                }
            });
        }
        if spec.scorers.guard == Guard::Alignment {
            panel.push(trained.alignment_guard()?);
        }
        Ok(panel)
    }
}

/// How a scorer's model is asked: as usual but for what the specification says.
fn asked(
    model: &str,
    [tries, max_tokens, least_side]: [Option<u32>; 3],
    schema: Option<bool>,
) -> ChatSettings {
    let usual = ChatSettings::new(model);
    ChatSettings {
        tries: tries.unwrap_or(usual.tries),
        max_tokens: max_tokens.unwrap_or(usual.max_tokens),
        send_schema: schema.unwrap_or(usual.send_schema),
        least_side: least_side.unwrap_or(usual.least_side),
        ..usual
    }
}

/// Most regions that the advisor is asked for.
pub fn max_regions(spec: &AdvisorSpec) -> usize {
    match spec {
        AdvisorSpec::Rules { max_regions, .. } | AdvisorSpec::Chat { max_regions, .. } => {
            *max_regions as usize
        }
    }
}

/// The quantile beyond which a measure of a clean image counts as a fault.
pub fn rule_tail(spec: &AdvisorSpec) -> f64 {
    match spec {
        AdvisorSpec::Rules { tail, .. } => *tail,
        AdvisorSpec::Chat { .. } => 0.02,
    }
}
