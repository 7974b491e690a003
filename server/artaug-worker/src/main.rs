//! `concord-artaug`: the worker for ArtAug jobs, and the recipe of the embedded base model.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use concord_artaug_worker::base;
use concord_common::error_text;

/// Runs ArtAug jobs for a Concord server, and makes the models that the embedded set-up needs.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    #[command(flatten)]
    Base(base::Command),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_target(false)
        .init();
    match execute(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The reader of a pipe may have gone; there is nobody to tell that.
            let text = error_text(error.as_ref());
            let _ = writeln!(io::stderr(), "concord-artaug: {text}");
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Base(command) => base::run(command)?,
    }
    Ok(())
}
