//! The subcommands of `concord-client`. Each takes checked arguments and gives an error that says what to do.

use std::{io, path::PathBuf};

use concord_common::{JobId, code::Refusal, telemetry::TelemetryError, tls::TlsError};
use concord_learning::LearningError;

use crate::{
    config::SettingsError,
    data::DataError,
    egress::EgressError,
    export::ExportError,
    simulate::{SilosError, SimulateError},
    vault::VaultError,
};

mod check;
mod inference;
mod run;
mod simulated;
mod state;
#[cfg(test)]
mod tests;

pub use self::{
    check::check_config,
    inference::{EvaluateArgs, ExportArgs, InputFormat, PredictArgs, evaluate, export, predict},
    run::run,
    simulated::{SimulateArgs, simulate},
    state::status,
};

/// A command that failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The configuration is not acceptable.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The list of silos is not acceptable.
    #[error(transparent)]
    Silos(#[from] SilosError),
    /// Certificate, key or CA cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Logging cannot be switched on.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// Something else in the configuration is wrong.
    #[error("{0}")]
    Unfit(String),
    /// The vault cannot be used.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The egress gate cannot be opened.
    #[error(transparent)]
    Egress(#[from] EgressError),
    /// libtorch, a backbone, a model.
    #[error(transparent)]
    Learning(#[from] LearningError),
    /// Rows that cannot be read.
    #[error("{}", .0.in_full())]
    Data(DataError),
    /// A simulation that did not end.
    #[error(transparent)]
    Simulate(#[from] Box<SimulateError>),
    /// A job's specification that is none.
    #[error("{}: {refusal}", .path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        refusal: Refusal,
    },
    /// An export that was not written.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// No job's model to use.
    #[error("{0}")]
    NoModel(String),
    /// Another daemon works with this state folder; it may end.
    #[error("another daemon uses the state folder {}", .0.display())]
    Busy(PathBuf),
    /// Standard output takes nothing.
    #[error("standard output: {0}")]
    Output(#[source] io::Error),
    /// An input or output.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// Exit code of a failure that may pass by itself (`EX_TEMPFAIL`); systemd starts the daemon again.
pub const EXIT_TEMPORARY: u8 = 75;
/// Exit code of a configuration that stays bad until someone corrects it (`EX_CONFIG`); systemd does not start it again.
pub const EXIT_CONFIG: u8 = 78;

impl From<DataError> for CommandError {
    fn from(error: DataError) -> Self {
        Self::Data(error)
    }
}

impl CommandError {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Settings(_)
            | Self::Silos(_)
            | Self::Tls(_)
            | Self::Telemetry(_)
            | Self::Unfit(_) => EXIT_CONFIG,
            Self::Busy(_) => EXIT_TEMPORARY,
            _ => 1,
        }
    }

    /// Whether the reader of standard output has gone, as `head` does when it has seen enough: the end of the work, not a failure.
    pub fn is_closed_output(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    fn no_model(job: Option<&JobId>, there: &[JobId]) -> Self {
        let listed: Vec<&str> = there.iter().map(JobId::as_str).collect();
        Self::NoModel(match (job, there.is_empty()) {
            (_, true) => "there is no finished job's model in the vault".to_owned(),
            (None, false) => format!(
                "name the job with --job; models are there for {}",
                listed.join(", ")
            ),
            (Some(job), false) => format!(
                "there is no model of job {job} in the vault; models are there for {}",
                listed.join(", ")
            ),
        })
    }
}
