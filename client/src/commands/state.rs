//! `concord-client status`: what the daemon last wrote about itself.

use std::{io::Write, path::Path};

use concord_common::config::environment;

use super::CommandError;
use crate::{
    config::ClientConfig,
    status::{self, Seen, Status},
};

/// Exit code when no daemon runs.
pub(super) const EXIT_NOT_RUNNING: u8 = 3;

/// Shows the daemon's state; the exit code tells whether it runs.
///
/// # Errors
/// If the configuration or the status file cannot be read.
pub fn status(path: &Path, json: bool, out: &mut dyn Write) -> Result<u8, CommandError> {
    let config = ClientConfig::load(path, environment())?;
    let folder = config.state.folder;
    let seen = status::read(&folder).map_err(|error| CommandError::io(&folder, error))?;
    let (running, found) = match &seen {
        Seen::Never => (false, None),
        Seen::Stopped(status) => (false, Some(status)),
        Seen::Running(status) => (true, Some(status)),
    };
    let text = if json {
        let object = serde_json::json!({ "running": running, "status": found });
        format!("{object:#}\n")
    } else {
        found.map_or_else(
            || "not running, and has never run with this state folder\n".to_owned(),
            |status| describe(running, status),
        )
    };
    out.write_all(text.as_bytes())
        .map_err(CommandError::Output)?;
    Ok(if running { 0 } else { EXIT_NOT_RUNNING })
}

fn describe(running: bool, status: &Status) -> String {
    let mut lines = vec![
        ("silo", status.silo.to_string()),
        ("server", status.server.clone()),
        (
            "daemon",
            if running {
                format!("running since {} (pid {})", status.started_at, status.pid)
            } else {
                format!("not running; last seen {}", status.updated_at)
            },
        ),
    ];
    if running {
        lines.push(("state", status.line()));
    }
    if let Some(receipt) = &status.last_receipt {
        let reason = receipt
            .outcome
            .reason()
            .map(|code| format!(" ({code})"))
            .unwrap_or_default();
        lines.push((
            "last receipt",
            format!(
                "job {} round {}: {}{reason} at {}",
                receipt.job,
                receipt.round,
                receipt.outcome.as_str(),
                receipt.at
            ),
        ));
    }
    if let Some(error) = &status.last_error {
        lines.push(("last error", format!("{} ({})", error.message, error.at)));
    }
    lines.iter().fold(String::new(), |text, (name, value)| {
        text + &format!("{name:<13} {value}\n")
    })
}
