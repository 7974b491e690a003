//! `concord-client`: a silo's daemon, and the tools around what it has trained.

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use concord_client::commands::{
    self, CommandError, EvaluateArgs, ExportArgs, PredictArgs, SimulateArgs,
};
use concord_common::error_text;

/// Trains this silo's adapters at home and sends only the global one.
///
/// Exit codes: 0 done; 1 failed; 2 wrong usage; 3 no daemon runs (status); 75 failed for now, as the state folder is in use;
/// 78 the configuration is not acceptable.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the daemon until it is told to stop.
    Run {
        /// The configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Shows what the daemon is doing; exits with 3 if none runs.
    Status {
        /// The daemon's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Reads the configuration, the certificates, the sizes of the backbones and all rows, without connecting.
    CheckConfig {
        /// The configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Predicts with a finished job's model: JSON lines with label and probabilities.
    Predict(PredictArgs),
    /// Evaluates a finished job's model on a labelled file.
    Evaluate(EvaluateArgs),
    /// Writes a finished job's model for other programs.
    Export(ExportArgs),
    /// Runs a job over many silos in this process, without a server.
    Simulate(Box<SimulateArgs>),
}

fn main() -> ExitCode {
    match execute(Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let failed = error.downcast_ref::<CommandError>();
            if failed.is_some_and(CommandError::is_closed_output) {
                return ExitCode::SUCCESS;
            }
            // The reader of a pipe may have gone; there is nobody to tell that.
            let text = error_text(error.as_ref());
            let _ = writeln!(io::stderr(), "concord-client: {text}");
            ExitCode::from(failed.map_or(1, CommandError::exit_code))
        }
    }
}

fn execute(cli: Cli) -> anyhow::Result<u8> {
    let mut out = io::stdout().lock();
    match cli.command {
        Command::Status { config, json } => return Ok(commands::status(&config, json, &mut out)?),
        Command::CheckConfig { config } => commands::check_config(&config, &mut out)?,
        Command::Export(args) => commands::export(&args, &mut out)?,
        Command::Run { config } => {
            drop(out);
            runtime()?.block_on(commands::run(&config))?;
        }
        Command::Predict(args) => {
            drop(out);
            runtime()?.block_on(commands::predict(&args, &mut io::stdout()))?;
        }
        Command::Evaluate(args) => {
            drop(out);
            runtime()?.block_on(commands::evaluate(&args, &mut io::stdout()))?;
        }
        Command::Simulate(args) => {
            drop(out);
            runtime()?.block_on(commands::simulate(&args, &mut io::stdout()))?;
        }
    }
    Ok(0)
}

/// Two threads serve the network; torch has its own.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the async runtime cannot be started")
}
