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

/// Name of the program that runs jobs of kind `artaug`.
const WORKER_PROGRAM: &str = "concord-artaug";
/// Name of its configuration beside the server's own.
const WORKER_CONFIG: &str = "artaug-worker.toml";

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

/// The section `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Uploads and downloads at once; more wait.
    pub max_transfers: usize,
    /// Uploads and downloads of one silo at once; more of it wait.
    pub max_transfers_per_silo: usize,
    /// Transfers that may wait; one more is refused as busy.
    pub max_waiting_transfers: usize,
    /// How long a transfer waits for its turn before it is refused as busy.
    #[serde(with = "humantime_serde")]
    pub transfer_wait: Duration,
    /// A transfer in which nothing moves for this long is cut.
    #[serde(with = "humantime_serde")]
    pub transfer_idle: Duration,
    /// A transfer that moves fewer bytes a second, from its turn to its end, is cut.
    pub min_transfer_rate: ByteSize,
    /// Size of the chunks that the server sends.
    pub chunk_size: ByteSize,
    /// Bytes that a peer may send ahead on one stream.
    pub stream_window: ByteSize,
    /// Bytes that a peer may send ahead on all streams of a connection together.
    pub connection_window: ByteSize,
    /// Calls at once on one connection.
    pub max_streams: u32,
    /// Largest message that is read.
    pub max_message: ByteSize,
    /// How long the message of a call may take to come in, from the call's headers on; not for those that take a stream of them.
    #[serde(with = "humantime_serde")]
    pub message_time: Duration,
    /// Largest header list that is read.
    pub max_headers: ByteSize,
    /// A connection older than this is to be made anew, with the certificates of then.
    #[serde(with = "humantime_serde")]
    pub max_connection_age: Duration,
}

impl Default for LimitsSection {
    fn default() -> Self {
        Self {
            max_transfers: 8,
            max_transfers_per_silo: 2,
            max_waiting_transfers: 1024,
            transfer_wait: Duration::from_mins(2),
            transfer_idle: Duration::from_secs(30),
            min_transfer_rate: ByteSize(16 << 10),
            chunk_size: ByteSize(256 << 10),
            stream_window: ByteSize(256 << 10),
            connection_window: ByteSize(512 << 10),
            max_streams: 16,
            max_message: ByteSize::mebibytes(2),
            message_time: Duration::from_secs(70),
            max_headers: ByteSize(16 << 10),
            max_connection_age: Duration::from_hours(1),
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
    fn look_beside(&mut self, own: &Path) {
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

    fn check(&self) -> Result<(), InvalidConfig> {
        let value = |key, what| Err(InvalidConfig::Value { key, what });
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
            if !(low..=high).contains(&number) {
                return value(key, format!("must be from {low} to {high}, is {number}"));
            }
        }
        let Some(command) = self.command() else {
            return Ok(());
        };
        for (key, path) in [
            ("workers.config", &command.config),
            ("workers.program", &command.program),
        ] {
            if !path.is_file() {
                return value(key, format!("must name a file; {} is none", path.display()));
            }
        }
        Ok(())
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
        let limits = &self.limits;
        for (key, number, low, high) in [
            ("limits.max_transfers", limits.max_transfers as u64, 1, 1024),
            (
                "limits.max_transfers_per_silo",
                limits.max_transfers_per_silo as u64,
                1,
                1024,
            ),
            (
                "limits.min_transfer_rate",
                limits.min_transfer_rate.bytes(),
                1,
                1 << 30,
            ),
            (
                "limits.max_waiting_transfers",
                limits.max_waiting_transfers as u64,
                0,
                1 << 20,
            ),
            (
                "limits.chunk_size",
                limits.chunk_size.bytes(),
                16 << 10,
                1 << 20,
            ),
            (
                "limits.stream_window",
                limits.stream_window.bytes(),
                64 << 10,
                64 << 20,
            ),
            (
                "limits.connection_window",
                limits.connection_window.bytes(),
                64 << 10,
                256 << 20,
            ),
            ("limits.max_streams", u64::from(limits.max_streams), 4, 1024),
            // A chunk of 1 MiB with its frame must pass.
            (
                "limits.max_message",
                limits.max_message.bytes(),
                (1 << 20) + 1024,
                64 << 20,
            ),
            (
                "limits.max_headers",
                limits.max_headers.bytes(),
                4 << 10,
                1 << 20,
            ),
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
        ] {
            if number < low || number > high {
                return value(key, format!("must be from {low} to {high}, is {number}"));
            }
        }
        for (key, time) in [
            ("limits.transfer_wait", limits.transfer_wait),
            ("limits.transfer_idle", limits.transfer_idle),
            ("limits.message_time", limits.message_time),
            ("limits.max_connection_age", limits.max_connection_age),
            ("spool.expiry", self.spool.expiry),
            ("jobs.lease", self.jobs.lease),
            ("workers.lease", self.workers.lease),
        ] {
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

#[cfg(test)]
mod tests;
