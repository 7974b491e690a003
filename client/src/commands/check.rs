//! `concord-client check-config`: everything that `run` would use, read without connecting.

use std::{io::Write, path::Path};

use concord_common::{Role, config::environment};
use concord_learning::backbone::{BackboneConfig, BackboneFiles};

use super::CommandError;
use crate::{config::ClientConfig, data::load_splits};

/// Reads the configuration, the certificates, each backbone's configuration and each task's rows.
///
/// # Errors
/// The first thing that cannot be used.
pub fn check_config(path: &Path, out: &mut dyn Write) -> Result<(), CommandError> {
    let mut say = |line: String| {
        writeln!(out, "{line}").map_err(|error| CommandError::io("standard output", error))
    };
    let config = ClientConfig::load(path, environment())?;
    concord_common::telemetry::parse_filter(&config.log.filter)?;
    let (identity, _) = config.tls.load()?;
    identity.require_role(&[Role::Silo])?;
    say(format!(
        "certificate  {}, valid until {}",
        identity.id(),
        identity.not_after()
    ))?;
    say(format!("server       {}", config.server_url()))?;
    for backbone in &config.backbones {
        let files = BackboneFiles::find(&backbone.path)?;
        let sizes = BackboneConfig::read(&files.config)?;
        say(format!(
            "backbone     {}: {}, {} layers of width {}",
            backbone.name, sizes.family, sizes.layers, sizes.hidden
        ))?;
    }
    for task in &config.tasks {
        let loaded = load_splits(task)?;
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
