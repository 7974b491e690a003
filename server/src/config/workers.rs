//! Jobs that workers run, and the worker that the server starts for itself.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use concord_common::config::ByteSize;
use serde::Deserialize;

use super::{InvalidConfig, in_range};

/// Name of the program that runs jobs of kind `artaug`.
const WORKER_PROGRAM: &str = "concord-artaug";
/// Name of its configuration beside the server's own.
const WORKER_CONFIG: &str = "artaug-worker.toml";

/// The section `[workers]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkersSection {
    /// The worker's program; `concord-artaug` beside the server's own if absent.
    pub program: Option<PathBuf>,
    /// The worker's configuration; `artaug-worker.toml` beside the server's own if absent, the file is there, and so is the program.
    /// Without one the server starts no worker, and jobs wait for workers elsewhere.
    pub config: Option<PathBuf>,
    /// Jobs that workers hold at once; more wait in order of submission.
    pub max_running: usize,
    /// How long a worker's lease on a job lasts.
    #[serde(with = "humantime_serde")]
    pub lease: Duration,
    /// Largest `limits.disk` of a job: what it may keep in the server's state folder.
    pub max_disk: ByteSize,
    /// What all jobs together may keep there.
    pub max_total_disk: ByteSize,
}

impl Default for WorkersSection {
    fn default() -> Self {
        Self {
            program: None,
            config: None,
            max_running: 1,
            lease: Duration::from_mins(1),
            max_disk: ByteSize(64 << 30),
            max_total_disk: ByteSize(256 << 30),
        }
    }
}

/// How a worker is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerCommand {
    /// Program.
    pub program: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
}

impl WorkersSection {
    /// Takes the worker's configuration beside the server's own, unless another one was named or there is nothing to run with it.
    pub(super) fn look_beside(&mut self, own: &Path) {
        let found = Self {
            config: Some(own.with_file_name(WORKER_CONFIG)),
            ..self.clone()
        };
        let is_complete = found
            .command()
            .is_some_and(|command| command.config.is_file() && command.program.is_file());
        if self.config.is_none() && is_complete {
            *self = found;
        }
    }

    /// How to start a worker on this machine, if the server is to do so.
    pub fn command(&self) -> Option<WorkerCommand> {
        let config = self.config.clone()?;
        let beside = || {
            let own = std::env::current_exe().unwrap_or_default();
            own.with_file_name(WORKER_PROGRAM)
        };
        Some(WorkerCommand {
            program: self.program.clone().unwrap_or_else(beside),
            config,
        })
    }

    pub(super) fn check(&self) -> Result<(), InvalidConfig> {
        for (key, number, low, high) in [
            ("workers.max_running", self.max_running as u64, 1, 1000),
            ("workers.max_disk", self.max_disk.bytes(), 1 << 20, 1 << 50),
            (
                "workers.max_total_disk",
                self.max_total_disk.bytes(),
                1 << 20,
                1 << 50,
            ),
        ] {
            in_range(key, number, low, high)?;
        }
        let Some(command) = self.command() else {
            return Ok(());
        };
        for (key, path) in [
            ("workers.config", &command.config),
            ("workers.program", &command.program),
        ] {
            if !path.is_file() {
                let what = format!("must name a file; {} is none", path.display());
                return Err(InvalidConfig::Value { key, what });
            }
        }
        Ok(())
    }
}
