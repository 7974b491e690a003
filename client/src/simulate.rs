//! Many silos in one process: the session, the trainer, the round machine and the aggregator of a real federation, one silo after
//! the other over one shared backbone, with [`crate::coordinator::memory`] in place of the network.
//!
//! The same job, silos, rows and number of libtorch threads give the same adapter bytes as daemons over TLS.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use concord_common::{
    Clock, JobId, SiloId, SystemClock,
    clock::MockClock,
    code::Refusal,
    job::{JobSpec, TrainingSpec},
    telemetry::peak_rss_bytes,
};
use concord_learning::{LearningError, cache::CacheSettings};
use tokio_util::sync::CancellationToken;

use crate::{
    bench::Workbench,
    config::{BackboneEntry, PolicySection, SettingsError, TaskConfig},
    coordinator::{
        CallError, Coordinator as _,
        memory::{Federation, FederationError, MemoryCoordinator},
    },
    data::DataError,
    egress::{EgressError, EgressGate, GateLimits, Outlet},
    patience::Pace,
    profile::Profile,
    receipts::Receipts,
    session::{Session, SessionError},
    status::StatusBoard,
    transfer::Downloads,
    vault::{Vault, VaultError},
};

mod plan;
mod report;
mod silos;
#[cfg(test)]
mod tests;

pub use self::{
    plan::Plan,
    report::{MetricEntry, SiloReport, SimulationReport},
    silos::{SilosError, SimulatedSilos},
};

/// A simulation that could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// The specification is refused.
    #[error(transparent)]
    Spec(#[from] Refusal),
    /// The federation cannot be set up.
    #[error(transparent)]
    Federation(#[from] FederationError),
    /// The silos' settings cannot be used.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A silo's data cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// libtorch cannot be started.
    #[error(transparent)]
    Learning(#[from] LearningError),
    /// A silo failed.
    #[error("silo {silo}: {source}")]
    Silo {
        /// Which.
        silo: SiloId,
        /// Why.
        source: SessionError,
    },
    /// It was told to stop.
    #[error("stopped before the end of the job")]
    Stopped,
    /// The federation refused a silo.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A silo's state cannot be kept.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// A silo's gate cannot be opened.
    #[error(transparent)]
    Egress(#[from] EgressError),
    /// The state folder cannot be used.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// There is no silo at all.
    #[error("there is no silo to simulate")]
    NoSilos,
    /// The job names silos that have no data here.
    #[error(
        "the job names silos that are not here: {}; there are {}; give data for them, or take them out of the job's `silos`",
        listed(.absent),
        listed(.present)
    )]
    AbsentSilos {
        /// Silos of the job without data.
        absent: Vec<SiloId>,
        /// Silos with data.
        present: Vec<SiloId>,
    },
    /// The job waits for something that does not come.
    #[error("the job does not go on: {0}")]
    Stalled(String),
}

/// Silos, their torch thread and the folder that their state is kept in.
#[derive(Debug)]
pub struct Simulator {
    silos: SimulatedSilos,
    bench: Workbench,
    folder: PathBuf,
    stop: CancellationToken,
}

/// What a running simulation tells.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// Silo that has just ended a round.
    pub silo: SiloId,
    /// The round.
    pub round: u32,
    /// Rounds of the job.
    pub rounds: u32,
}

impl Simulator {
    /// Starts the torch thread. Each job gets a folder of its own inside `folder`.
    ///
    /// # Errors
    /// If there are no silos, or libtorch cannot be started.
    pub fn start(
        silos: SimulatedSilos,
        folder: &Path,
        stop: CancellationToken,
    ) -> Result<Self, SimulateError> {
        Ok(Self {
            bench: Workbench::start(silos.threads)?,
            silos,
            folder: folder.to_path_buf(),
            stop,
        })
    }

    /// Runs one job to its end. Jobs that follow each other share prepared rows and their prefix cache where they can.
    ///
    /// # Errors
    /// [`SimulateError`]. A job that ends as failed is no error but a report that says so.
    ///
    /// # Panics
    /// Never: the job's id is made of characters that an id may have.
    pub async fn run(
        &self,
        plan: &Plan,
        number: usize,
        mut tell: impl FnMut(&Told),
    ) -> Result<SimulationReport, SimulateError> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let started = clock.now();
        let spec_toml = plan.spec()?;
        let JobSpec::FederatedTraining(spec) = JobSpec::parse(&spec_toml)?;
        let job: JobId = format!("simulation-{number}")
            .parse()
            .expect("lowercase letters, a dash and digits are a job id");
        let (chosen, left_out) = self.chosen(&spec)?;
        // Time stands still for the rounds: a slow machine must not close one.
        let still = Arc::new(MockClock::new(started));
        let rounds_clock = Arc::clone(&still) as Arc<dyn Clock>;
        let federation = Federation::new(job.clone(), &spec_toml, chosen.clone(), rounds_clock)?;
        let sessions = chosen
            .iter()
            .map(|silo| {
                Ok((
                    silo.clone(),
                    self.session(&job, silo, &spec.task, &federation, &clock)?,
                ))
            })
            .collect::<Result<BTreeMap<_, _>, SimulateError>>()?;

        let time_is_up = || {
            still.advance(spec.rounds.max_time);
            federation.tick()
        };
        self.run_rounds(&job, &federation, &sessions, time_is_up, |silo, round| {
            tell(&Told {
                silo: silo.clone(),
                round,
                rounds: spec.rounds.count,
            });
        })
        .await?;
        let mut silos = Vec::new();
        for (silo, session) in &sessions {
            silos.push(self.finish(silo, session).await?);
        }
        let (state, reason) = federation.outcome();
        Ok(SimulationReport {
            job: spec.name.clone(),
            algorithm: spec.algorithm.name(),
            seed: spec.seed,
            rounds: spec.rounds.count,
            state,
            reason,
            versions: federation
                .versions()
                .iter()
                .map(ToString::to_string)
                .collect(),
            payload_bytes: federation.payload_bytes(),
            silos,
            left_out,
            metrics: federation
                .reports()
                .into_iter()
                .map(|report| MetricEntry {
                    silo_id: report.silo,
                    round: report.round.0,
                    point: report.point.as_str(),
                    metrics: report.metrics,
                })
                .collect(),
            seconds: clock.now().since(started).as_secs_f64(),
            peak_rss_bytes: peak_rss_bytes(),
        })
    }

    /// The silos that take part in a job, and those that do not.
    fn chosen(
        &self,
        spec: &TrainingSpec,
    ) -> Result<(BTreeSet<SiloId>, Vec<SiloId>), SimulateError> {
        let tasks = &self.silos.tasks;
        if tasks.is_empty() {
            return Err(SimulateError::NoSilos);
        }
        let named: BTreeSet<&SiloId> = spec.silos.iter().collect();
        let absent: Vec<SiloId> = named
            .iter()
            .filter(|silo| !tasks.contains_key(**silo))
            .map(|silo| (*silo).clone())
            .collect();
        if !absent.is_empty() {
            return Err(SimulateError::AbsentSilos {
                absent,
                present: tasks.keys().cloned().collect(),
            });
        }
        let (chosen, left_out): (BTreeSet<SiloId>, BTreeSet<SiloId>) = tasks
            .keys()
            .cloned()
            .partition(|silo| named.is_empty() || named.contains(silo));
        if !left_out.is_empty() {
            let left_out: Vec<&str> = left_out.iter().map(SiloId::as_str).collect();
            tracing::warn!(
                ?left_out,
                "the job does not name these silos; they take no part"
            );
        }
        Ok((chosen, left_out.into_iter().collect()))
    }

    /// Lets every silo work in turn until the job has ended. When none has anything to do, the round waits for a silo that is not
    /// here: `time_is_up` then closes it, as time would.
    async fn run_rounds(
        &self,
        job: &JobId,
        federation: &Arc<Federation>,
        sessions: &BTreeMap<SiloId, Session<Outlet<MemoryCoordinator>>>,
        time_is_up: impl Fn() -> Result<(), Refusal>,
        mut done: impl FnMut(&SiloId, u32),
    ) -> Result<(), SimulateError> {
        while !federation.outcome().0.is_over() {
            let mut worked = false;
            for (silo, session) in sessions {
                let notices = session.coordinator.poll().await?;
                let Some(round) = notices
                    .iter()
                    .find(|notice| notice.wants_work())
                    .and_then(|notice| notice.round)
                else {
                    continue;
                };
                worked = true;
                session
                    .round(job, round)
                    .await
                    .map_err(|source| failed(silo, source))?;
                done(silo, round.0);
            }
            if !worked {
                let before = federation.versions().len();
                time_is_up()?;
                if federation.versions().len() == before && !federation.outcome().0.is_over() {
                    return Err(SimulateError::Stalled(
                        "no silo has anything to do".to_owned(),
                    ));
                }
            }
        }
        Ok(())
    }

    async fn finish(
        &self,
        silo: &SiloId,
        session: &Session<Outlet<MemoryCoordinator>>,
    ) -> Result<SiloReport, SimulateError> {
        let notices = session.coordinator.poll().await?;
        let finished = match notices.first() {
            Some(notice) => session
                .finish(notice)
                .await
                .map_err(|source| failed(silo, source))?,
            None => None,
        };
        Ok(match finished {
            Some(finished) => SiloReport {
                silo_id: silo.clone(),
                examples: finished.examples,
                majority: finished.majority,
                best_round: Some(finished.best.round),
                best_validation: finished.best.validation.metrics,
                best_test: finished.best.test.metrics,
                last_test: finished
                    .last_test
                    .map(|test| test.metrics)
                    .unwrap_or_default(),
            },
            None => SiloReport {
                silo_id: silo.clone(),
                examples: 0,
                majority: None,
                best_round: None,
                best_validation: BTreeMap::new(),
                best_test: BTreeMap::new(),
                last_test: BTreeMap::new(),
            },
        })
    }

    fn session(
        &self,
        job: &JobId,
        silo: &SiloId,
        task: &str,
        federation: &Arc<Federation>,
        clock: &Arc<dyn Clock>,
    ) -> Result<Session<Outlet<MemoryCoordinator>>, SimulateError> {
        let folder = self.folder.join(job.as_str()).join(silo.as_str());
        crate::vault::private_folder(&folder)?;
        let named = TaskConfig {
            name: task.to_owned(),
            ..self.silos.tasks[silo].clone()
        };
        let server = "memory".to_owned();
        let limits = GateLimits {
            bytes_per_job: u64::MAX,
            max_update_norm: None,
        };
        let gate = Arc::new(EgressGate::open(
            &folder,
            silo.clone(),
            server.clone(),
            limits,
            Arc::clone(clock),
        )?);
        Ok(Session {
            coordinator: Arc::new(Outlet::new(
                federation.coordinator(silo.clone()),
                Arc::clone(&gate),
            )),
            receipt_key: federation.receipt_key().to_vec(),
            silo: silo.clone(),
            profile: Arc::new(Profile {
                backbones: self.silos.backbones.clone(),
                tasks: vec![named],
                policy: PolicySection {
                    max_rounds: u32::MAX,
                    ..PolicySection::default()
                },
                cache: self.silos.cache_of_one(),
                reports_metrics: true,
                takes_local: true,
                shares_rows: true,
            }),
            bench: self.bench.clone(),
            vault: Vault::open(&folder)?,
            gate,
            downloads: Downloads::open(&folder).map_err(|source| SimulateError::Io {
                path: folder.clone(),
                source,
            })?,
            receipts: Arc::new(Receipts::open(&folder).map_err(|source| SimulateError::Io {
                path: folder.clone(),
                source,
            })?),
            board: Arc::new(StatusBoard::new(
                &folder,
                silo.clone(),
                server,
                Arc::clone(clock),
                None,
            )),
            pace: Pace::default(),
            clock: Arc::clone(clock),
            stop: self.stop.clone(),
        })
    }
}

impl SimulatedSilos {
    /// Each silo's share of the memory for prefixes.
    fn cache_of_one(&self) -> CacheSettings {
        let silos = self.tasks.len().max(1) as u64;
        CacheSettings {
            memory_bytes: self.cache.memory_bytes / silos,
            ..self.cache.clone()
        }
    }

    /// A backbone by name, for callers that name it on the command line.
    pub fn add_backbone(&mut self, name: &str, path: &Path) {
        self.backbones.retain(|backbone| backbone.name != name);
        self.backbones.push(BackboneEntry {
            name: name.to_owned(),
            path: path.to_path_buf(),
        });
    }
}

fn listed(silos: &[SiloId]) -> String {
    let names: Vec<&str> = silos.iter().map(SiloId::as_str).collect();
    names.join(", ")
}

fn failed(silo: &SiloId, source: SessionError) -> SimulateError {
    match source {
        SessionError::Stopped => SimulateError::Stopped,
        source => SimulateError::Silo {
            silo: silo.clone(),
            source,
        },
    }
}
