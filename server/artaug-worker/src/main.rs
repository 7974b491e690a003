//! `concord-artaug`: the worker for ArtAug jobs, and the recipe of the embedded base model.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use concord_artaug_worker::{base, config::SettingsError, imagetext, run::RunArgs};
use concord_common::{error_text, tls::TlsError};

/// `EX_CONFIG`: what is wrong stays wrong until someone corrects it, so that a service manager does not try again.
const EXIT_CONFIG: u8 = 78;

/// Runs ArtAug jobs for a Concord server, and makes the models that the embedded set-up needs.
#[derive(Parser)]
#[command(name = "concord-artaug", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(RunArgs),
    #[command(flatten)]
    Base(base::Command),
    /// Trains the image-text model's projections on renderings of the icon sets.
    TrainImageText(imagetext::TrainImageText),
    /// Says how well what a base model draws is recognised.
    JudgeBase(imagetext::JudgeBase),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // `run` logs as its configuration says.
    if !matches!(cli.command, Command::Run(_)) {
        tracing_subscriber::fmt()
            .with_writer(io::stderr)
            .with_target(false)
            .init();
    }
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The reader of a pipe may have gone; there is nobody to tell that.
            let text = error_text(error.as_ref());
            let _ = writeln!(io::stderr(), "concord-artaug: {text}");
            if error.is::<SettingsError>() || error.is::<TlsError>() {
                ExitCode::from(EXIT_CONFIG)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn execute(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Run(args) => args.run()?,
        Command::Base(command) => base::run(command)?,
        Command::TrainImageText(command) => command.run(&mut say)?,
        Command::JudgeBase(command) => command.run(&mut say)?,
    }
    Ok(())
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the commands hand their lines over"
)]
fn say(line: String) {
    // The reader of a pipe may have gone; the work goes on.
    let _ = writeln!(io::stdout(), "{line}");
}
