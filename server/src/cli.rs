//! The operator's command line: jobs, rounds and silos of a server, over mutual TLS with an operator's certificate.
//!
//! People get tables; `--json` gives programs the same as JSON, with field names that stay. The exit code says what became
//! of the command ([`Exit`]).

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};
use concord_common::{
    ErrorCode,
    code::Refusal,
    tls::{TlsError, explain_tls_error},
};
use tonic::{Code, Status};

mod commands;
mod connect;
mod output;
mod table;
#[cfg(test)]
mod tests;
mod watch;

/// Jobs, rounds and silos of a Concord server.
///
/// Exit codes: 0 done; 1 the server refused, or the watched job failed; 2 wrong usage or settings; 3 the server cannot be
/// reached; 4 there is no such thing; 5 the watched job was cancelled; 6 the server is busy, try again.
#[derive(Debug, Parser)]
#[command(name = "concord", version, max_term_width = 100)]
pub struct Arguments {
    #[command(flatten)]
    connection: ConnectionArguments,
    /// Prints JSON instead of tables.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// How to reach the server.
#[derive(Debug, Clone, Default, Args)]
pub struct ConnectionArguments {
    /// The server's host and port [env: CONCORD_SERVER]
    #[arg(long, global = true, value_name = "HOST:PORT")]
    server: Option<String>,
    /// The operator's certificate, PEM [env: CONCORD_CERTIFICATE]
    #[arg(long, global = true, alias = "cert", value_name = "FILE")]
    certificate: Option<PathBuf>,
    /// The certificate's key, PEM [env: CONCORD_KEY]
    #[arg(long, global = true, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The federation's CA, PEM [env: CONCORD_CA]
    #[arg(long, global = true, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// A TOML file with `server`, `certificate`, `key` and `ca`; options and variables go before it [env: CONCORD_CONFIG]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Queues, shows, watches and cancels jobs.
    #[command(subcommand)]
    Job(JobCommand),
    /// Shows rounds of a job.
    #[command(subcommand)]
    Round(RoundCommand),
    /// Shows silos.
    #[command(subcommand)]
    Silo(SiloCommand),
}

#[derive(Debug, Subcommand)]
enum JobCommand {
    /// Queues a job.
    Submit {
        /// The specification, TOML; `-` is standard input.
        file: PathBuf,
        /// Makes a repeated command safe: the same id gives the same job [default: a new one]
        #[arg(long, value_name = "ID")]
        request_id: Option<String>,
        /// Watches the job until it has ended.
        #[arg(long)]
        wait: bool,
    },
    /// Lists jobs, newest first.
    List {
        /// At most this many.
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Shows one job with its silos and metrics.
    Show {
        /// The job's id.
        job: String,
    },
    /// Watches a job until it has ended; the exit code says how.
    Watch {
        /// The job's id.
        job: String,
    },
    /// Ends a job.
    Cancel {
        /// The job's id.
        job: String,
    },
}

#[derive(Debug, Subcommand)]
enum RoundCommand {
    /// Lists the rounds of a job.
    List {
        /// The job's id.
        job: String,
    },
    /// Shows one round with what each silo did.
    Show {
        /// The job's id.
        job: String,
        /// The round's number, counted from 1.
        round: u32,
    },
}

#[derive(Debug, Subcommand)]
enum SiloCommand {
    /// Lists the silos that the server knows.
    List,
}

/// What became of a command: its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done; a watched job succeeded.
    Done = 0,
    /// The server refused, or a watched job failed.
    Refused = 1,
    /// The command line, a file or the settings cannot be used.
    Usage = 2,
    /// The server cannot be reached.
    Unreachable = 3,
    /// There is no such job, round or silo.
    NotFound = 4,
    /// A watched job was cancelled.
    Cancelled = 5,
    /// The server is busy or stopping; the same command may succeed later.
    Busy = 6,
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// The command line, a file or the settings cannot be used.
    #[error("{0}")]
    Usage(String),
    /// Certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The server's answer, or what came instead of one.
    #[error("{}", describe(.0))]
    Status(Box<Status>),
    /// Nothing can be printed.
    #[error("cannot write the output: {0}")]
    Output(#[from] std::io::Error),
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl CliError {
    fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) | Self::Tls(_) => Exit::Usage,
            Self::Output(_) => Exit::Refused,
            Self::Status(status) => exit_of(status),
        }
    }
}

fn exit_of(status: &Status) -> Exit {
    match Refusal::from_status(status).map(|refusal| refusal.code) {
        Some(ErrorCode::UnknownJob | ErrorCode::UnknownRound | ErrorCode::UnknownVersion) => {
            Exit::NotFound
        }
        Some(ErrorCode::Busy | ErrorCode::ShuttingDown) => Exit::Busy,
        None if is_unreachable(status) => Exit::Unreachable,
        Some(_) | None => Exit::Refused,
    }
}

/// True if no Concord server answered.
fn is_unreachable(status: &Status) -> bool {
    Refusal::from_status(status).is_none()
        && (matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded)
            || std::error::Error::source(status).is_some())
}

/// One sentence for people.
fn describe(status: &Status) -> String {
    if let Some(refusal) = Refusal::from_status(status) {
        return match refusal.retry_after {
            Some(time) => format!(
                "{} ({}; try again after {})",
                refusal.message,
                refusal.code,
                humantime::format_duration(time)
            ),
            None => format!("{} ({})", refusal.message, refusal.code),
        };
    }
    if let Some(sentence) = explain_tls_error(status) {
        return format!("the server cannot be reached securely: {sentence}");
    }
    let mut innermost: &dyn std::error::Error = status;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    if is_unreachable(status) {
        return format!("the server cannot be reached: {innermost}");
    }
    format!(
        "the server answered {}: {}",
        status.code(),
        status.message()
    )
}

/// Runs the command of this process and gives its exit code.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(commands::run(&arguments, &mut std::io::stdout())),
        Err(error) => Err(error.into()),
    };
    let exit = result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        error.exit()
    });
    ExitCode::from(exit as u8)
}
