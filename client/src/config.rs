//! The daemon's settings: a TOML file, overridden by `CONCORD__SECTION__KEY` environment variables.
//!
//! Unknown keys are errors that name the key; `concord-client check-config` reads everything without connecting. Relative
//! paths are taken from the configuration file's folder. `deploy/config/client.toml` shows every setting.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use concord_common::{
    config::{self, ByteSize, ConfigError, LogSection, TlsSection},
    tls::check_endpoint,
};
use concord_learning::cache::{CacheMode, CacheSettings, DiskBudget};
use serde::Deserialize;

use crate::egress::GateLimits;

mod task;
#[cfg(test)]
mod tests;

pub use self::task::{Files, ProblemKind, TaskConfig};

/// All settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientConfig {
    /// The server to work for.
    pub server: ServerSection,
    /// Who this silo is.
    pub tls: TlsSection,
    /// Where state is kept.
    pub state: StateSection,
    /// How libtorch uses the machine.
    #[serde(default)]
    pub torch: TorchSection,
    /// The frozen prefix cache.
    #[serde(default)]
    pub cache: CacheSection,
    /// Bounds on what may leave.
    #[serde(default)]
    pub egress: EgressSection,
    /// Jobs this silo takes.
    #[serde(default)]
    pub policy: PolicySection,
    /// Log lines.
    #[serde(default)]
    pub log: LogSection,
    /// Frozen models on this machine.
    #[serde(default, rename = "backbone")]
    pub backbones: Vec<BackboneEntry>,
    /// Tasks that jobs may name.
    #[serde(default, rename = "task")]
    pub tasks: Vec<TaskConfig>,
}

/// The server.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerSection {
    /// `host:port`. Who answers there is known by its certificate's SPIFFE id, not by the host's name.
    pub address: String,
    /// How often to ask for rounds besides watching for them.
    #[serde(default = "default_poll_interval", with = "humantime_serde")]
    pub poll_interval: Duration,
    /// A call without an answer for this long has failed.
    #[serde(default = "default_request_timeout", with = "humantime_serde")]
    pub request_timeout: Duration,
    /// Longest wait between two attempts to reach the server.
    #[serde(default = "default_max_backoff", with = "humantime_serde")]
    pub max_backoff: Duration,
}

/// State on disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateSection {
    /// Folder for the vault, the egress log, unfinished transfers and the status; 0700.
    pub folder: PathBuf,
}

/// libtorch.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TorchSection {
    /// Threads for one operation. Results are repeatable for the same number.
    pub threads: usize,
}

impl Default for TorchSection {
    fn default() -> Self {
        Self { threads: 1 }
    }
}

impl TorchSection {
    pub(crate) fn check(self) -> Result<(), SettingsError> {
        if self.threads == 0 {
            return refuse("torch.threads", "must be at least 1");
        }
        Ok(())
    }
}

/// The frozen prefix cache: what lies below the first adapter is computed once per example.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheSection {
    /// Whether anything is kept.
    pub enabled: bool,
    /// Memory for it: a row takes 2 · tokens · width elements.
    pub memory: ByteSize,
    /// Existing folder for what does not fit in memory; what fits in neither is computed each time.
    pub folder: Option<PathBuf>,
    /// Most bytes in that folder.
    pub folder_size: ByteSize,
}

impl Default for CacheSection {
    fn default() -> Self {
        Self {
            enabled: true,
            memory: ByteSize::mebibytes(64),
            folder: None,
            folder_size: ByteSize::mebibytes(4096),
        }
    }
}

impl CacheSection {
    /// Whether a file can be made in the folder; one of a cache that is off is not looked at. Asked before the daemon's work begins:
    /// a folder that fails later costs time and no round.
    ///
    /// # Errors
    /// [`SettingsError`] naming the key.
    pub(crate) fn check_folder(&self) -> Result<(), SettingsError> {
        let Some(folder) = self.folder.as_ref().filter(|_| self.enabled) else {
            return Ok(());
        };
        match tempfile::tempfile_in(folder) {
            Ok(_) => Ok(()),
            Err(error) => refuse(
                "cache.folder",
                format!(
                    "no file can be made in {}: {error}; name an existing folder that the daemon may write to",
                    folder.display()
                ),
            ),
        }
    }

    /// As the learning crate takes it.
    pub fn settings(&self) -> CacheSettings {
        CacheSettings {
            mode: if self.enabled {
                CacheMode::On
            } else {
                CacheMode::Off
            },
            memory_bytes: self.memory.bytes(),
            disk: self.folder.clone().map(|folder| DiskBudget {
                folder,
                bytes: self.folder_size.bytes(),
            }),
        }
    }
}

/// Bounds of the egress gate, besides the job's own.
#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EgressSection {
    /// Most bytes that may leave for one job, updates and reports of all rounds together. When an update is sent again, what
    /// the server says it has not got of the attempt before counts no more.
    pub max_bytes_per_job: ByteSize,
    /// Largest L2 norm of an update; absent means the job's bound alone.
    pub max_update_norm: Option<f64>,
    /// Whether metrics are reported to the server.
    pub metrics: bool,
}

impl Default for EgressSection {
    fn default() -> Self {
        Self {
            max_bytes_per_job: ByteSize::mebibytes(4096),
            max_update_norm: None,
            metrics: true,
        }
    }
}

impl EgressSection {
    /// As the gate takes it.
    pub fn limits(&self) -> GateLimits {
        GateLimits {
            bytes_per_job: self.max_bytes_per_job.bytes(),
            max_update_norm: self.max_update_norm,
        }
    }
}

/// Which jobs this silo takes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicySection {
    /// Algorithms by name; empty allows all.
    pub algorithms: BTreeSet<String>,
    /// Most rounds of a job.
    pub max_rounds: u32,
    /// Whether a head may travel with the adapter.
    pub shared_head: bool,
}

impl Default for PolicySection {
    fn default() -> Self {
        Self {
            algorithms: BTreeSet::new(),
            max_rounds: 1_000,
            shared_head: true,
        }
    }
}

/// A frozen model.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneEntry {
    /// The name that jobs use.
    pub name: String,
    /// Its Hugging Face folder.
    pub path: PathBuf,
}

fn default_poll_interval() -> Duration {
    Duration::from_secs(15)
}
fn default_request_timeout() -> Duration {
    Duration::from_mins(1)
}
fn default_max_backoff() -> Duration {
    Duration::from_mins(1)
}

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read, or a key is unknown, missing or wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A value is out of its range, or two contradict each other.
    #[error("the configuration is not acceptable: `{key}`: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// What to change.
        reason: String,
    },
}

fn refuse<T>(key: &'static str, reason: impl Into<String>) -> Result<T, SettingsError> {
    Err(SettingsError::Value {
        key,
        reason: reason.into(),
    })
}

impl ClientConfig {
    /// Reads a file with the environment on top, checks all of it, and makes its paths absolute in the file's folder.
    ///
    /// # Errors
    /// [`SettingsError`] naming the key.
    pub fn load(
        path: &Path,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, SettingsError> {
        let config: Self = config::load(Some(path), environment)?;
        config.settled(path.parent().unwrap_or(Path::new("")))
    }

    /// The server as a URL.
    pub fn server_url(&self) -> String {
        format!("https://{}", self.server.address)
    }

    fn settled(mut self, folder: &Path) -> Result<Self, SettingsError> {
        for path in [
            &mut self.tls.certificate,
            &mut self.tls.key,
            &mut self.tls.ca,
            &mut self.state.folder,
        ] {
            anchor(folder, path);
        }
        settle_data(
            folder,
            &mut self.cache,
            &mut self.backbones,
            &mut self.tasks,
        )?;
        if self.tasks.iter().any(|task| task.name.is_empty()) {
            return refuse("task.name", "every task needs the name that jobs use");
        }
        if let Some(twice) = first_twice(self.tasks.iter().map(|task| task.name.as_str())) {
            return refuse("task.name", format!("two tasks are named `{twice}`"));
        }
        self.torch.check()?;
        if let Err(error) = check_endpoint(&self.server_url()) {
            return refuse(
                "server.address",
                format!("write it as host:port, such as concord.example.org:7443; {error}"),
            );
        }
        for (key, time) in [
            ("server.poll_interval", self.server.poll_interval),
            ("server.request_timeout", self.server.request_timeout),
            ("server.max_backoff", self.server.max_backoff),
        ] {
            if time < Duration::from_millis(100) {
                return refuse(key, "must be at least 100ms");
            }
        }
        if self
            .egress
            .max_update_norm
            .is_some_and(|norm| norm.is_nan() || norm <= 0.0)
        {
            return refuse("egress.max_update_norm", "must be above 0");
        }
        Ok(self)
    }
}

/// Paths of backbones, data and cache made absolute, names checked.
pub(crate) fn settle_data<'a>(
    folder: &Path,
    cache: &mut CacheSection,
    backbones: &mut [BackboneEntry],
    tasks: impl IntoIterator<Item = &'a mut TaskConfig>,
) -> Result<(), SettingsError> {
    if let Some(path) = &mut cache.folder {
        anchor(folder, path);
    }
    for backbone in backbones.iter_mut() {
        anchor(folder, &mut backbone.path);
    }
    for task in tasks {
        for path in task.paths_mut() {
            anchor(folder, path);
        }
    }
    if let Some(twice) = first_twice(backbones.iter().map(|backbone| backbone.name.as_str())) {
        return refuse(
            "backbone.name",
            format!("two backbones are named `{twice}`"),
        );
    }
    Ok(())
}

fn first_twice<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut seen = BTreeSet::new();
    names.into_iter().find(|name| !seen.insert(*name))
}

/// Makes a relative path start at `folder`.
fn anchor(folder: &Path, path: &mut PathBuf) {
    if path.is_relative() {
        *path = folder.join(&*path);
    }
}
