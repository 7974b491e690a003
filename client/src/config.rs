//! The daemon's settings: a TOML file, overridden by `CONCORD__SECTION__KEY` environment variables.
//!
//! Unknown keys are errors that name the key; `concord-client check-config` reads everything without connecting. Relative
//! paths are taken from the configuration file's folder. `deploy/config/client.toml` shows every setting.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use concord_common::config::{self, ByteSize, ConfigError, LogSection, TlsSection};
use concord_learning::{
    cache::{CacheMode, CacheSettings, DiskBudget},
    data::InputKind,
};
use serde::{Deserialize, Serialize};

use crate::{
    data::{Columns, Format, SplitRule},
    egress::GateLimits,
};

#[cfg(test)]
mod tests;

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

/// The frozen prefix cache: what lies below the first adapter is computed once per example.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheSection {
    /// Whether anything is kept.
    pub enabled: bool,
    /// Memory for it.
    pub memory: ByteSize,
    /// Folder for what does not fit; absent means that it is computed again.
    pub folder: Option<PathBuf>,
    /// Most bytes in that folder.
    pub folder_size: ByteSize,
}

impl Default for CacheSection {
    fn default() -> Self {
        Self {
            enabled: true,
            memory: ByteSize::mebibytes(256),
            folder: None,
            folder_size: ByteSize::mebibytes(4096),
        }
    }
}

impl CacheSection {
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
    /// Most bytes that may leave for one job, all rounds and retries together.
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

/// What is learned.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProblemKind {
    /// One of the labels that the training rows have.
    #[default]
    Classification,
    /// A number.
    Regression,
}

/// Where a task's rows are.
#[derive(Clone, PartialEq, Debug)]
pub enum Files {
    /// A file for each split.
    PerSplit {
        /// Rows to train on.
        train: PathBuf,
        /// Rows that choose the best model.
        validation: PathBuf,
        /// Rows for the final test.
        test: PathBuf,
    },
    /// One file, cut by a rule.
    One {
        /// The file.
        file: PathBuf,
        /// The rule.
        split: SplitRule,
    },
}

/// One task: a name that jobs use, and the silo's own data for it.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(try_from = "TaskEntry")]
pub struct TaskConfig {
    /// The name that jobs use.
    pub name: String,
    /// One text a row or two.
    pub kind: InputKind,
    /// What is learned.
    pub problem: ProblemKind,
    /// Format of all files.
    pub format: Format,
    /// What separates CSV fields.
    pub delimiter: char,
    /// Column names.
    pub columns: Columns,
    /// The files.
    pub files: Files,
    /// Bad rows that are skipped; one more stops the job.
    pub max_bad_rows: u64,
}

/// A task as the file has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TaskEntry {
    #[serde(default)]
    name: String,
    #[serde(default = "single")]
    kind: InputKind,
    #[serde(default)]
    problem: ProblemKind,
    format: Format,
    #[serde(default = "comma")]
    delimiter: char,
    #[serde(default)]
    columns: Columns,
    train: Option<PathBuf>,
    validation: Option<PathBuf>,
    test: Option<PathBuf>,
    file: Option<PathBuf>,
    split: Option<SplitRule>,
    #[serde(default)]
    max_bad_rows: u64,
}

fn single() -> InputKind {
    InputKind::Single
}
fn comma() -> char {
    ','
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

impl TryFrom<TaskEntry> for TaskConfig {
    type Error = String;

    fn try_from(entry: TaskEntry) -> Result<Self, String> {
        let refuse = |key: &str, what: &str| Err(format!("task `{}`: `{key}`: {what}", entry.name));
        let files = match (&entry.train, &entry.validation, &entry.test, &entry.file) {
            (Some(train), Some(validation), Some(test), None) => {
                if entry.split.is_some() {
                    return refuse("split", "only goes with `file`, not with a file per split");
                }
                Files::PerSplit {
                    train: train.clone(),
                    validation: validation.clone(),
                    test: test.clone(),
                }
            }
            (None, None, None, Some(file)) => {
                let Some(split) = entry.split else {
                    return refuse(
                        "split",
                        "is needed to cut `file` into training, validation and test rows",
                    );
                };
                if !split.is_valid() {
                    return refuse("split", "both shares must be above 0 and together below 1");
                }
                Files::One {
                    file: file.clone(),
                    split,
                }
            }
            _ => {
                return refuse(
                    "train",
                    "give either `train`, `validation` and `test`, or `file` with `split`",
                );
            }
        };
        match (entry.kind, &entry.columns.text_b) {
            (InputKind::Pair, None) => {
                return refuse(
                    "columns.text_b",
                    "a pair needs the column of its second text",
                );
            }
            (InputKind::Single, Some(_)) => {
                return refuse("columns.text_b", "only goes with kind = \"pair\"");
            }
            _ => {}
        }
        let columns = [
            Some(&entry.columns.text),
            entry.columns.text_b.as_ref(),
            Some(&entry.columns.label),
        ];
        let named: Vec<&String> = columns.into_iter().flatten().collect();
        if named.iter().collect::<BTreeSet<_>>().len() != named.len() {
            return refuse("columns", "each must be a column of its own");
        }
        if !matches!(entry.delimiter, ',' | ';' | '\t' | '|') {
            return refuse("delimiter", "must be a comma, semicolon, tab or bar");
        }
        Ok(Self {
            files,
            name: entry.name,
            kind: entry.kind,
            problem: entry.problem,
            format: entry.format,
            delimiter: entry.delimiter,
            columns: entry.columns,
            max_bad_rows: entry.max_bad_rows,
        })
    }
}

impl TaskConfig {
    /// The task's files with their splits' names.
    pub fn paths_mut(&mut self) -> Vec<&mut PathBuf> {
        match &mut self.files {
            Files::PerSplit {
                train,
                validation,
                test,
            } => vec![train, validation, test],
            Files::One { file, .. } => vec![file],
        }
    }
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
        if self.torch.threads == 0 {
            return refuse("torch.threads", "must be at least 1");
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
