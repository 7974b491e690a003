//! The worker's settings: a TOML file, overridden by `CONCORD__SECTION__KEY` environment variables.
//!
//! Unknown keys are errors that name the key. Relative paths are taken from the configuration file's folder.
//! `deploy/config/artaug-worker.toml` shows every setting.

#[cfg(test)]
mod sample;
#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use concord_artaug::setup::Allowed;
use concord_common::{
    config::{self, ByteSize, ConfigError, LogSection, TlsSection},
    telemetry::parse_filter,
    tls::check_endpoint,
};
use serde::Deserialize;

use crate::imagetext::ImageTextFiles;

/// All settings.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerConfig {
    /// The federation that the certificate must be of; any if absent.
    #[serde(default)]
    pub federation: Option<String>,
    /// Folder for copies of jobs; 0700. Nothing in it is needed after the worker's end: the server keeps everything.
    pub state_dir: PathBuf,
    /// The server to work for.
    pub server: ServerSection,
    /// Who this worker is.
    pub tls: TlsSection,
    /// What jobs may use.
    #[serde(default)]
    pub allowed: Allowed,
    /// What the embedded advisor and scorers measure by.
    #[serde(default)]
    pub data: DataSection,
    /// What jobs may take of the machine.
    #[serde(default)]
    pub limits: LimitsSection,
    /// Log lines.
    #[serde(default)]
    pub log: LogSection,
}

/// The server.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerSection {
    /// `host:port`. Who answers there is known by its certificate's SPIFFE id, not by the host's name.
    pub address: String,
    /// A call without an answer for this long has failed.
    #[serde(default = "default_request_timeout", with = "humantime_serde")]
    pub request_timeout: Duration,
    /// Longest wait between two attempts to reach the server.
    #[serde(default = "default_max_backoff", with = "humantime_serde")]
    pub max_backoff: Duration,
}

/// What the embedded advisor and scorers need. What is absent is missed only by jobs that ask for it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataSection {
    /// Folder of the icon sets, whose clean drawings say what is well lit, sharp and so on: `<set>/icons.json`.
    pub icons: Option<PathBuf>,
    /// The small image-text model.
    pub image_text: Option<ImageTextFiles>,
    /// Table of the BRISQUE scorer.
    pub brisque: Option<PathBuf>,
}

/// What jobs may take of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Most threads of the engine. A job's files are the same to the byte only with the same number, so a job that wants more is given back, for
    /// another worker, and a job that says nothing goes on only with workers that have the number that it began with.
    pub threads: u32,
    /// Threads that advise, score, encode and send beside the engine.
    pub helpers: u32,
    /// A job that makes the process hold more memory than this is given back, for another worker.
    pub memory: ByteSize,
    /// How far the process steps back behind others on the machine, 0 to 19.
    pub nice: i32,
    /// What all jobs together may keep in `state_dir`.
    pub disk: ByteSize,
    /// How long a stop or a pause waits for the batch or checkpoint under way, and for answers of endpoints.
    #[serde(with = "humantime_serde")]
    pub stop_within: Duration,
    /// Number of the GPU to work on; the CPU if absent.
    pub gpu: Option<usize>,
}

impl Default for LimitsSection {
    fn default() -> Self {
        Self {
            threads: 1,
            helpers: 2,
            memory: ByteSize::mebibytes(4096),
            nice: 10,
            disk: ByteSize::mebibytes(20 << 10),
            stop_within: Duration::from_mins(1),
            gpu: None,
        }
    }
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
    /// A value is out of its range.
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

impl WorkerConfig {
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
        for path in self.paths_mut() {
            if path.is_relative() {
                *path = folder.join(&*path);
            }
        }
        if let Err(error) = check_endpoint(&self.server_url()) {
            return refuse(
                "server.address",
                format!("write it as host:port, such as concord.example.org:7443; {error}"),
            );
        }
        for (key, time) in [
            ("server.request_timeout", self.server.request_timeout),
            ("server.max_backoff", self.server.max_backoff),
        ] {
            if time < Duration::from_millis(100) {
                return refuse(key, "must be at least 100ms");
            }
        }
        if let Err(error) = parse_filter(&self.log.filter) {
            return refuse("log.filter", format!("cannot be used: {error}"));
        }
        self.limits.check()?;
        Ok(self)
    }

    fn paths_mut(&mut self) -> Vec<&mut PathBuf> {
        let mut paths = vec![
            &mut self.state_dir,
            &mut self.tls.certificate,
            &mut self.tls.key,
            &mut self.tls.ca,
        ];
        paths.extend(&mut self.allowed.model_folders);
        paths.extend(&mut self.allowed.prompt_folders);
        for endpoint in self.allowed.endpoints.values_mut() {
            paths.extend(&mut endpoint.key_file);
            paths.extend(&mut endpoint.ca_file);
        }
        paths.extend(&mut self.data.icons);
        paths.extend(&mut self.data.brisque);
        if let Some(files) = &mut self.data.image_text {
            paths.extend([&mut files.vision, &mut files.text, &mut files.projections]);
        }
        paths
    }
}

impl LimitsSection {
    fn check(self) -> Result<(), SettingsError> {
        if !(1..=1024).contains(&self.threads) {
            return refuse("limits.threads", "must be from 1 to 1024");
        }
        if !(1..=64).contains(&self.helpers) {
            return refuse("limits.helpers", "must be from 1 to 64");
        }
        if self.memory < ByteSize::mebibytes(64) {
            return refuse("limits.memory", "must be at least 64 MiB");
        }
        if !(0..=19).contains(&self.nice) {
            return refuse("limits.nice", "must be from 0 to 19");
        }
        if self.disk < ByteSize::mebibytes(1) {
            return refuse("limits.disk", "must be at least 1 MiB");
        }
        if self.stop_within > Duration::from_hours(1) {
            return refuse("limits.stop_within", "must be at most 1h");
        }
        Ok(())
    }
}
