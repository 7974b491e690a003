//! Starting the real programs: where they are, what they wrote, and that none outlives its test.

mod daemon;
mod federation;
mod program;

pub use daemon::{Daemon, Task, tiny_backbone};
pub use federation::{Federation, ServerOptions, server_config};
pub use program::{Output, Program, run, run_with_input};

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

/// How long anything in a test may take before it counts as hanging, on a busy machine.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// The path of one of Concord's programs: beside the running test or program.
///
/// # Errors
/// If it was not built.
pub fn program_path(name: &str) -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe().context("the running program has no path")?;
    // A test runs in `<target>/<profile>/deps`, a program in `<target>/<profile>`.
    let found = here
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    match found {
        Some(path) => Ok(path),
        None => bail!(
            "the program `{name}` is not built beside {}; run `cargo build --workspace --bins` (with the same profile) first",
            here.display()
        ),
    }
}

/// Looks again and again until `probe` gives something.
///
/// # Errors
/// If it gives nothing within `within`; the error names `what`.
pub fn wait_for<T>(
    what: &str,
    within: Duration,
    mut probe: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = probe().with_context(|| format!("while waiting for {what}"))? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("no {what} within {within:?}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}
