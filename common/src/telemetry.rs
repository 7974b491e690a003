//! Logs and metrics: how they are switched on, and the one list of metric names.

pub mod names;
mod process;

use std::io::{self, IsTerminal as _};

use tracing::Dispatch;
use tracing_subscriber::{
    EnvFilter, filter::ParseError, fmt::MakeWriter, util::SubscriberInitExt as _,
};

pub use self::{
    names::describe_all,
    process::{peak_rss_bytes, record_process_metrics, rss_bytes},
};
use crate::config::{LogFormat, LogSection};

/// Why logging cannot be switched on.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not in the form of `RUST_LOG`.
    #[error(
        "`{filter}` is no log filter (write, for example, `info,concord_server=debug`): {source}"
    )]
    Filter {
        /// As it was written.
        filter: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// Logging was switched on before.
    #[error("logging is already switched on in this process")]
    Twice,
}

/// Checks a log filter without switching anything on.
///
/// # Errors
/// [`TelemetryError::Filter`].
pub fn parse_filter(filter: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(filter).map_err(|source| TelemetryError::Filter {
        filter: filter.to_owned(),
        source,
    })
}

/// Switches logging on for the process: lines on standard error, as text or one JSON object each. The environment variable
/// `RUST_LOG`, if set, goes before the section's filter.
///
/// # Errors
/// If the filter cannot be parsed, or logging is on already.
pub fn init_logging(section: &LogSection) -> Result<(), TelemetryError> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(filter) if !filter.is_empty() => parse_filter(&filter)?,
        _ => parse_filter(&section.filter)?,
    };
    subscriber(
        section.format,
        filter,
        io::stderr,
        io::stderr().is_terminal(),
    )
    .try_init()
    .map_err(|_| TelemetryError::Twice)
}

fn subscriber<W>(format: LogFormat, filter: EnvFilter, writer: W, colours: bool) -> Dispatch
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(colours);
    match format {
        LogFormat::Text => builder.finish().into(),
        LogFormat::Json => builder.json().flatten_event(true).finish().into(),
    }
}

#[cfg(test)]
mod tests;
