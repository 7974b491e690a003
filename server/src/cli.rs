//! The operator's command line: jobs, rounds and silos of a server, over mutual TLS with an operator's certificate.
//!
//! People get tables; `--json` gives programs the same as JSON, with field names that stay. The exit code says what became
//! of the command ([`Exit`]).

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};
use concord_common::{
    ErrorCode,
    code::Refusal,
    tls::{ConnectError, TlsError, explain_tls_error},
};
use tonic::{Code, Status};

use self::pairs::Pairs;

mod artaug;
mod commands;
mod connect;
mod fetch;
mod images;
mod names;
mod output;
mod pairs;
mod table;
#[cfg(test)]
mod tests;
mod watch;

/// Jobs, rounds and silos of a Concord server.
#[derive(Debug, Parser)]
#[command(name = "concord", version, max_term_width = 100, after_help = exit_codes())]
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
#[command(next_help_heading = "Connection")]
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
    /// Queues, shows, watches, pauses and cancels jobs.
    #[command(subcommand)]
    Job(JobCommand),
    /// Shows rounds of a job.
    #[command(subcommand)]
    Round(RoundCommand),
    /// Reviews the pairs of an ArtAug job, shows its last images, fetches and deletes its results.
    #[command(subcommand)]
    Artaug(ArtaugCommand),
    /// Shows silos, and says which may take part.
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
    /// Lets a job that a worker runs rest: the worker saves and gives it back.
    Pause {
        /// The job's id.
        job: String,
    },
    /// Lets a paused job go on.
    Resume {
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
enum ArtaugCommand {
    /// Lists the pairs that wait for your word, or says it.
    ///
    /// PAIRS are numbers and ranges as 1,2,5-9; a range means those of it that wait. Pairs that are not named go on waiting.
    Review {
        /// The job's id.
        job: String,
        /// Pairs to train on.
        #[arg(long, value_name = "PAIRS")]
        accept: Option<Pairs>,
        /// Pairs to leave out.
        #[arg(long, value_name = "PAIRS")]
        reject: Option<Pairs>,
        /// Trains on all other pairs that wait.
        #[arg(long, conflicts_with = "reject_rest")]
        accept_rest: bool,
        /// Leaves out all other pairs that wait.
        #[arg(long)]
        reject_rest: bool,
        /// Writes the page that shows the pairs into this folder, as review-ITERATION.html.
        #[arg(long, value_name = "DIR")]
        gallery: Option<PathBuf>,
    },
    /// Lists what a job has produced so far.
    Artefacts {
        /// The job's id.
        job: String,
    },
    /// Writes what a job has produced into a folder; repeated, it brings what is missing, with --replace what has changed too.
    Fetch {
        /// The job's id.
        job: String,
        /// The folder; made if it is missing.
        folder: PathBuf,
        /// Only artefacts of this name; `*` stands for any characters, `?` for one. May be repeated.
        #[arg(long, value_name = "PATTERN")]
        name: Vec<String>,
        /// Puts artefacts in the place of files that have their names and other content, such as those of an earlier iteration.
        #[arg(long)]
        replace: bool,
    },
    /// Writes the last images that a job has made into a folder, as DIGEST.png; repeated, it brings the new ones.
    Images {
        /// The job's id.
        job: String,
        /// The folder; made if it is missing.
        folder: PathBuf,
    },
    /// Deletes all that the server keeps for a job that has ended: artefacts, images, checkpoints, journal. The job stays listed.
    Delete {
        /// The job's id.
        job: String,
        /// Deletes it; without this, the command only says what would be deleted.
        #[arg(long)]
        yes: bool,
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
    /// Lets a silo take part that waits for approval or was suspended.
    Approve {
        /// The silo's name.
        silo: String,
    },
    /// Shuts a silo out until it is approved again.
    Suspend {
        /// The silo's name.
        silo: String,
    },
    /// Shuts a silo out for ever; there is no way back.
    Revoke {
        /// The silo's name.
        silo: String,
    },
}

/// What became of a command: its exit code. `docs/operations.md` lists them; they stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done; a watched job succeeded.
    Done = 0,
    /// The server refused, or a watched job failed.
    Refused = 1,
    /// The command line, a file, the settings or the certificates cannot be used.
    Usage = 2,
    /// The server cannot be reached, or one side refuses the other's certificate.
    Unreachable = 3,
    /// There is no such job, round, silo or artefact.
    NotFound = 4,
    /// A watched job was cancelled.
    Cancelled = 5,
    /// The server is busy or stopping; the same command may succeed later.
    Busy = 6,
    /// Bytes or names came from the server that cannot be right.
    Untrusted = 7,
    /// Ctrl-C; as shells say it, 128 and the signal's number.
    Interrupted = 130,
}

impl Exit {
    /// Every exit code.
    pub const ALL: [Self; 9] = [
        Self::Done,
        Self::Refused,
        Self::Usage,
        Self::Unreachable,
        Self::NotFound,
        Self::Cancelled,
        Self::Busy,
        Self::Untrusted,
        Self::Interrupted,
    ];

    /// What it means, in a few words.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Done => "done; a watched job succeeded",
            Self::Refused => "the server refused, or a watched job failed",
            Self::Usage => {
                "the command line, a file, the settings or the certificates cannot be used"
            }
            Self::Unreachable => {
                "the server cannot be reached, or one side refuses the other's certificate"
            }
            Self::NotFound => "there is no such job, round, silo or artefact",
            Self::Cancelled => "a watched job was cancelled",
            Self::Busy => "the server is busy or stopping; try again",
            Self::Untrusted => {
                "the server sent names or bytes that cannot be right; nothing of them was kept"
            }
            Self::Interrupted => "interrupted with Ctrl-C; what the server was asked to do goes on",
        }
    }
}

/// The end of the help text.
fn exit_codes() -> String {
    let lines = Exit::ALL.map(|exit| format!("  {:<5}{}", exit as u8, exit.meaning()));
    format!("Exit codes:\n{}", lines.join("\n"))
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
    /// What the command is about is not there (any more).
    #[error("{0}")]
    Refused(String),
    /// No artefact is meant.
    #[error("{0}")]
    NotFound(String),
    /// The server sent what cannot be right.
    #[error("{0}")]
    Untrusted(String),
    /// Nothing can be printed.
    #[error("cannot write the output: {0}")]
    Output(#[from] std::io::Error),
    /// The user pressed Ctrl-C.
    #[error("interrupted; what the server was asked to do goes on")]
    Interrupted,
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl CliError {
    fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == std::io::ErrorKind::BrokenPipe)
    }

    fn exit(&self) -> Exit {
        match self {
            // Whoever read the output had seen enough, as `head` does.
            Self::Output(_) if self.is_closed_pipe() => Exit::Done,
            Self::Usage(_) | Self::Tls(_) | Self::Output(_) => Exit::Usage,
            Self::Refused(_) => Exit::Refused,
            Self::NotFound(_) => Exit::NotFound,
            Self::Untrusted(_) => Exit::Untrusted,
            Self::Interrupted => Exit::Interrupted,
            Self::Status(status) => exit_of(status),
        }
    }
}

fn exit_of(status: &Status) -> Exit {
    match Refusal::from_status(status).map(|refusal| refusal.code) {
        Some(
            ErrorCode::UnknownJob
            | ErrorCode::UnknownRound
            | ErrorCode::UnknownVersion
            | ErrorCode::UnknownSilo
            | ErrorCode::UnknownObject,
        ) => Exit::NotFound,
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
    let mut innermost: &(dyn std::error::Error + 'static) = status;
    loop {
        match innermost.downcast_ref() {
            Some(ConnectError::Unreachable { address, source }) => {
                return format!("the server cannot be reached at {address}: {source}");
            }
            Some(ConnectError::Refused { address, reason }) => {
                return format!("the server at {address} cannot be reached securely: {reason}");
            }
            Some(other) => return format!("the server cannot be reached: {other}"),
            None => {}
        }
        match innermost.source() {
            Some(source) => innermost = source,
            None => break,
        }
    }
    if let Some(sentence) = explain_tls_error(status) {
        return format!("the server cannot be reached securely: {sentence}");
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
        Ok(runtime) => runtime.block_on(run(&arguments)),
        Err(error) => Err(error.into()),
    };
    let exit = result.unwrap_or_else(|error| {
        if !error.is_closed_pipe() {
            eprintln!("error: {error}");
        }
        error.exit()
    });
    ExitCode::from(exit as u8)
}

/// Runs a command until it ends or the user has enough.
async fn run(arguments: &Arguments) -> Result<Exit, CliError> {
    let interrupted = async {
        if tokio::signal::ctrl_c().await.is_err() {
            // Then the signal still ends the process by itself.
            std::future::pending::<()>().await;
        }
    };
    let mut out = std::io::stdout();
    tokio::select! {
        // First, so that Ctrl-C keeps its usual effect while a specification is read from the terminal.
        biased;
        done = commands::run(arguments, &mut out) => done,
        () = interrupted => Err(CliError::Interrupted),
    }
}
