//! The server's settings: `concord-server run --config server.toml`. The sample `deploy/config/server.toml` shows every one.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use concord_common::{
    ErrorCode, SpiffeId,
    adapter::MAX_ELEMENTS,
    code::Refusal,
    config::{ByteSize, ConfigError, ListenSection, LogSection, TlsSection, load},
    id::Role,
    job::{TrainingSpec, artaug::ArtaugSpec},
    telemetry::parse_filter,
};
use serde::Deserialize;

use crate::datastore;

mod limits;
#[cfg(test)]
mod tests;
mod workers;

pub use limits::LimitsSection;
pub use workers::{WorkerCommand, WorkersSection};

/// All settings. Unknown keys are errors.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// The federation, as in every certificate.
    pub federation: String,
    /// Folder of the database, the adapters, the uploads and the receipt key.
    pub state_dir: PathBuf,
    /// What an acknowledgement survives.
    #[serde(default)]
    pub durability: Durability,
    /// Which silos may take part.
    #[serde(default)]
    pub enrollment: EnrollmentPolicy,
    /// How long a stop waits for work in progress.
    #[serde(default = "default_stop_timeout", with = "humantime_serde")]
    pub stop_timeout: Duration,
    /// Where silos and operators connect.
    pub listen: ListenSection,
    /// Certificate, key and CA.
    pub tls: TlsSection,
    /// Bounds on calls and transfers.
    #[serde(default)]
    pub limits: LimitsSection,
    /// Uploads in progress.
    #[serde(default)]
    pub spool: SpoolSection,
    /// How jobs are run.
    #[serde(default)]
    pub jobs: JobsSection,
    /// Jobs that workers run.
    #[serde(default)]
    pub workers: WorkersSection,
    /// What is kept of them.
    #[serde(default)]
    pub retention: RetentionSection,
    /// Metrics and probes.
    #[serde(default)]
    pub ops: OpsSection,
    /// Logs.
    #[serde(default)]
    pub log: LogSection,
}

/// What an acknowledgement survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// A power failure: files and database are synced to the disk first.
    #[default]
    Power,
    /// The end of the process, but not of the machine: nothing waits for the disk.
    Process,
}

/// Which silos may take part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EnrollmentPolicy {
    /// Every silo with a certificate of the federation's CA, from its first call on.
    #[default]
    Auto,
    /// A new silo waits until an operator approves it.
    Manual,
}

impl EnrollmentPolicy {
    /// What a silo is at its first call.
    pub fn first(self) -> datastore::Enrollment {
        match self {
            Self::Auto => datastore::Enrollment::Active,
            Self::Manual => datastore::Enrollment::Pending,
        }
    }
}

/// The section `[spool]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpoolSection {
    /// Uploads in progress, over all jobs; one more is refused as busy.
    pub max_uploads: u64,
    /// Bytes of uploads in progress, over all jobs; more are refused as busy.
    pub max_bytes: ByteSize,
    /// An upload that nobody goes on with is thrown away after this time.
    #[serde(with = "humantime_serde")]
    pub expiry: Duration,
}

impl Default for SpoolSection {
    fn default() -> Self {
        Self {
            max_uploads: 1024,
            max_bytes: ByteSize(64 << 30),
            expiry: Duration::from_hours(1),
        }
    }
}

/// The section `[jobs]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobsSection {
    /// Jobs that run at once; more wait in order of submission.
    pub max_running: usize,
    /// Jobs that may wait; one more is refused as busy.
    pub max_queued: usize,
    /// Largest payload of a job's global adapter.
    pub max_adapter: ByteSize,
    /// How long a silo's lease on its part of a round lasts.
    #[serde(with = "humantime_serde")]
    pub lease: Duration,
    /// How long silos are told of a job that has ended.
    #[serde(with = "humantime_serde")]
    pub announce_ended: Duration,
}

impl Default for JobsSection {
    fn default() -> Self {
        Self {
            max_running: 2,
            max_queued: 1000,
            max_adapter: ByteSize(1 << 30),
            lease: Duration::from_mins(2),
            announce_ended: Duration::from_hours(7 * 24),
        }
    }
}

/// The section `[retention]`. The last adapter of every job is kept in any case.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionSection {
    /// Adapter versions of a job that are kept, the newest ones.
    pub versions: u32,
    /// How long a job that has ended keeps more than its last adapter.
    #[serde(with = "humantime_serde")]
    pub ended_jobs: Duration,
}

impl Default for RetentionSection {
    fn default() -> Self {
        Self {
            versions: 10,
            ended_jobs: Duration::from_hours(30 * 24),
        }
    }
}

/// The section `[ops]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OpsSection {
    /// Whether `/metrics`, `/livez` and `/readyz` are served.
    pub enabled: bool,
    /// Where, over plain HTTP: keep it on loopback or behind a proxy of your own.
    pub address: SocketAddr,
}

impl Default for OpsSection {
    fn default() -> Self {
        Self {
            enabled: true,
            address: SocketAddr::from(([127, 0, 0, 1], 9464)),
        }
    }
}

fn default_stop_timeout() -> Duration {
    Duration::from_secs(20)
}

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InvalidConfig {
    /// The file or the environment cannot be read into settings.
    #[error(transparent)]
    Load(#[from] ConfigError),
    /// A value is out of range.
    #[error("`{key}` {what}")]
    Value {
        /// Key.
        key: &'static str,
        /// What is wrong and what to write.
        what: String,
    },
}

/// Checks that a number is one of `low` to `high`.
fn in_range(key: &'static str, number: u64, low: u64, high: u64) -> Result<(), InvalidConfig> {
    if (low..=high).contains(&number) {
        return Ok(());
    }
    let what = format!("must be from {low} to {high}, is {number}");
    Err(InvalidConfig::Value { key, what })
}

impl ServerConfig {
    /// Reads and checks the settings: the file, then `CONCORD__SECTION__KEY` from `environment` over it.
    ///
    /// # Errors
    /// Naming the key that is unknown, missing or out of range.
    pub fn load(
        path: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, InvalidConfig> {
        let mut config: Self = load(path, environment)?;
        if let Some(own) = path {
            config.workers.look_beside(own);
        }
        config.check()?;
        Ok(config)
    }

    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// Naming the first key that is out of range.
    pub fn check(&self) -> Result<(), InvalidConfig> {
        let value = |key, what: String| Err(InvalidConfig::Value { key, what });
        if let Err(error) = SpiffeId::new(&self.federation, Role::Server, "server") {
            return value("federation", format!("cannot be used: {error}"));
        }
        if let Err(error) = parse_filter(&self.log.filter) {
            return value("log.filter", format!("cannot be used: {error}"));
        }
        let numbers = [
            ("spool.max_uploads", self.spool.max_uploads, 1, 1 << 20),
            (
                "spool.max_bytes",
                self.spool.max_bytes.bytes(),
                1 << 20,
                i64::MAX as u64,
            ),
            ("jobs.max_running", self.jobs.max_running as u64, 1, 1000),
            ("jobs.max_queued", self.jobs.max_queued as u64, 1, 1 << 20),
            // A silo may still be fetching the one before the newest.
            (
                "retention.versions",
                u64::from(self.retention.versions),
                2,
                1 << 20,
            ),
            (
                "jobs.max_adapter",
                self.jobs.max_adapter.bytes(),
                1 << 10,
                MAX_ELEMENTS * 4,
            ),
        ];
        for (key, number, low, high) in self.limits.numbers().into_iter().chain(numbers) {
            in_range(key, number, low, high)?;
        }
        let times = [
            ("spool.expiry", self.spool.expiry),
            ("jobs.lease", self.jobs.lease),
            ("workers.lease", self.workers.lease),
        ];
        for (key, time) in self.limits.times().into_iter().chain(times) {
            if time < Duration::from_millis(100) {
                return value(key, "must be at least 100ms".to_owned());
            }
        }
        self.workers.check()
    }

    /// Checks that a worker's job keeps no more than this server lets it.
    ///
    /// # Errors
    /// `INVALID_JOB_SPEC` with both sizes and what to change.
    pub fn check_disk(&self, spec: &ArtaugSpec) -> Result<(), Refusal> {
        let (disk, most) = (spec.limits.disk, self.workers.max_disk);
        if disk <= most {
            return Ok(());
        }
        Err(Refusal::new(
            ErrorCode::InvalidJobSpec,
            format!(
                "`limits.disk`: the job wants to keep {disk}, and this server lets it keep at most {most}; lower it, or have the \
                 server's `workers.max_disk` raised"
            ),
        ))
    }

    /// Checks that a job's global adapter is no larger than this server takes.
    ///
    /// # Errors
    /// `INVALID_JOB_SPEC` with both sizes and what to change.
    pub fn check_adapter(&self, spec: &TrainingSpec) -> Result<(), Refusal> {
        let bytes = spec.adapter_shape().layout()?.payload_bytes();
        let most = self.jobs.max_adapter;
        if bytes <= most.bytes() {
            return Ok(());
        }
        Err(Refusal::new(
            ErrorCode::InvalidJobSpec,
            format!(
                "the global adapter would have {bytes} bytes, and this server takes at most {most}; lower `adapter.bottleneck` \
                 or name fewer `adapter.layers`, or have the server's `jobs.max_adapter` raised"
            ),
        ))
    }
}
