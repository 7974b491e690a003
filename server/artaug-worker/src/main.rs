//! `concord-artaug`: the worker for ArtAug jobs, and the recipe of the embedded base model.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use concord_artaug_worker::{base, config::SettingsError, imagetext, run::RunArgs};
use concord_common::{error_text, telemetry::TelemetryError, tls::TlsError};

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
            ExitCode::from(exit_code(&error))
        }
    }
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let is_configuration = error.is::<SettingsError>()
        || error.is::<TlsError>()
        // `RUST_LOG`, which goes before `log.filter`.
        || error.is::<TelemetryError>();
    if is_configuration { EXIT_CONFIG } else { 1 }
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

#[cfg(test)]
mod tests {
    use concord_common::telemetry::parse_filter;

    use super::*;

    const SETTINGS: &str = "state_dir = \"s\"\nserver.address = \"localhost:1\"\ntls = { certificate = \"a\", key = \"b\", ca = \"c\" }\n";

    #[test]
    fn settings_that_cannot_be_used_end_with_78() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("worker.toml");
        let file = file.to_str().unwrap();
        let ended = || {
            let cli = Cli::try_parse_from(["concord-artaug", "run", "--config", file]).unwrap();
            let error = execute(cli).unwrap_err();
            (exit_code(&error), error_text(error.as_ref()))
        };
        let (code, text) = ended();
        assert_eq!(code, EXIT_CONFIG, "{text}");
        for (wrong, part) in [
            ("limits.threads = 0", "limits.threads"),
            ("log.filter = \"=,=\"", "log.filter"),
        ] {
            std::fs::write(file, format!("{SETTINGS}{wrong}")).unwrap();
            let (code, text) = ended();
            assert_eq!(code, EXIT_CONFIG, "{text}");
            assert!(text.contains(part), "{text}");
        }
        // As from `RUST_LOG`.
        assert_eq!(
            exit_code(&parse_filter("=,=").unwrap_err().into()),
            EXIT_CONFIG
        );
        assert_eq!(exit_code(&anyhow::anyhow!("the disk is full")), 1);
    }
}
