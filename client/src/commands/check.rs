//! `concord-client check-config`: everything that `run` would use, read without connecting.

use std::{
    fmt::Display,
    io::{self, Write},
    path::Path,
};

use concord_common::{Clock as _, Role, SiloId, SystemClock, config::environment, fsutil};
use concord_learning::{
    LearningError,
    backbone::{BackboneConfig, BackboneFiles},
};

use super::CommandError;
use crate::{config::ClientConfig, data::load_splits};

/// Reads the configuration, the certificates, each backbone's configuration and each task's rows, and looks at the folders of state and cache.
///
/// # Errors
/// The first thing that cannot be used, with its key.
pub fn check_config(path: &Path, out: &mut dyn Write) -> Result<(), CommandError> {
    let mut say = |line: String| writeln!(out, "{line}").map_err(CommandError::Output);
    let config = ClientConfig::load(path, environment())?;
    concord_common::telemetry::parse_filter(&config.log.filter)?;
    let (identity, roots) = config.tls.load()?;
    identity.require_role(&[Role::Silo])?;
    identity.check(&roots, SystemClock.now())?;
    let id = identity.id();
    id.name
        .parse::<SiloId>()
        .map_err(|error| unfit("tls.certificate", "its name", error))?;
    say(format!(
        "certificate  {id}, valid until {}",
        identity.not_after()
    ))?;
    say(format!("server       {}", config.server_url()))?;
    check_state(&config.state.folder)?;
    config.cache.check_folder()?;
    for backbone in &config.backbones {
        let sizes = BackboneFiles::find(&backbone.path)
            .and_then(|files| BackboneConfig::read(&files.config))
            .map_err(|error: LearningError| {
                unfit(
                    "backbone.path",
                    &format!("of backbone `{}`", backbone.name),
                    error,
                )
            })?;
        say(format!(
            "backbone     {}: {}, {} layers of width {}",
            backbone.name, sizes.family, sizes.layers, sizes.hidden
        ))?;
    }
    for task in &config.tasks {
        let loaded = load_splits(task)
            .map_err(|error| unfit("task", &format!("`{}`", task.name), error.in_full()))?;
        let (data, skipped) = (&loaded.data, loaded.skipped);
        say(format!(
            "task         {}: {} training, {} validation, {} test rows; {} classes; {skipped} bad rows skipped",
            task.name,
            data.train.len(),
            data.validation.len(),
            data.test.len(),
            data.problem.outputs(),
        ))?;
        for row in &loaded.first_skipped {
            say(format!("             skipped {row}"))?;
        }
    }
    say("the configuration is acceptable".to_owned())
}

/// What `run` would say of a state folder that is there; it makes one that is not.
fn check_state(folder: &Path) -> Result<(), CommandError> {
    let fault = match fsutil::mode(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => error.to_string(),
        Ok(_) if !folder.is_dir() => "it is no folder".to_owned(),
        Ok(mode) if mode & 0o077 != 0 => {
            format!("it is open to others (mode {mode:03o}); run chmod 700 on it")
        }
        Ok(_) => return Ok(()),
    };
    Err(unfit("state.folder", &folder.display().to_string(), fault))
}

/// A key whose value names something that cannot be used.
fn unfit(key: &str, of: &str, error: impl Display) -> CommandError {
    CommandError::Unfit(format!(
        "the configuration is not acceptable: `{key}` {of}: {error}"
    ))
}
