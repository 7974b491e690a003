//! Configuration: one TOML file, overridden by environment variables, checked whole before anything is bound or opened.
//!
//! `CONCORD__TLS__CERTIFICATE=/run/x.crt` overrides `certificate` in the section `[tls]`. A value that begins with `[` or `{`
//! is read as a TOML array or table; any other, and `[::1]:7443`, is taken as it stands. Unknown keys are errors, in the file as in the
//! environment, as long as the types read carry `#[serde(deny_unknown_fields)]`.

mod size;

use std::{
    io,
    net::{SocketAddr, SocketAddrV6},
    path::{Path, PathBuf},
    time::Duration,
};

use config::{Config, File, FileFormat, Map, Source, Value, ValueKind};
use serde::{Deserialize, de::DeserializeOwned};

pub use self::size::{ByteSize, InvalidByteSize};
use crate::tls::AcceptorLimits;
/// The section `[tls]`: where the PEM files are.
pub use crate::tls::TlsFiles as TlsSection;

/// Prefix of the environment variables, and what stands between the parts of a key.
pub const ENVIRONMENT_PREFIX: &str = "CONCORD__";
const SEPARATOR: &str = "__";

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is no TOML.
    #[error("the configuration {path} is not in TOML form: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        message: String,
    },
    /// An environment variable cannot be read as a key or a value.
    #[error("the environment variable {name} cannot be used: {reason}")]
    Variable {
        /// Its name.
        name: String,
        /// What to change.
        reason: String,
    },
    /// A key is unknown or missing, or its value is not acceptable.
    #[error("the configuration is not acceptable: {message} (read from {origin})")]
    Content {
        /// The key and what is wrong with it.
        message: String,
        /// The file and the variables that were read.
        origin: String,
    },
}

/// The variables of this process that override the configuration. Variables that are no text are left out.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name.starts_with(ENVIRONMENT_PREFIX))
}

/// Reads a `T` from the file at `path`, if there is one, with the variables of `environment` on top.
///
/// # Errors
/// If the file cannot be read or parsed, or a key is unknown, missing or wrong; the error names the key and where it was read.
pub fn load<T: DeserializeOwned>(
    path: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<T, ConfigError> {
    let text = match path {
        Some(path) => Some(
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
                path: path.to_owned(),
                source,
            })?,
        ),
        None => None,
    };
    load_text(path.zip(text.as_deref()), environment)
}

/// The same for text that is already at hand, with the path to name in errors; for samples and tests.
///
/// # Errors
/// As for [`load`].
pub fn load_text<T: DeserializeOwned>(
    file: Option<(&Path, &str)>,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<T, ConfigError> {
    let overrides = Overrides::new(environment)?;
    let mut origins: Vec<String> = Vec::new();
    let mut builder = Config::builder();
    if let Some((path, text)) = file {
        toml::from_str::<toml::Table>(text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        origins.push(path.display().to_string());
        builder = builder.add_source(File::from_str(text, FileFormat::Toml));
    }
    origins.extend(
        overrides
            .variables
            .iter()
            .map(|variable| variable.name.clone()),
    );
    let origin = match origins.len() {
        0 => "nothing: no file was given".to_owned(),
        _ => origins.join(", "),
    };
    builder
        .add_source(overrides)
        .build()
        .and_then(Config::try_deserialize)
        .map_err(|error| ConfigError::Content {
            message: error.to_string(),
            origin,
        })
}

/// The environment as a source for the `config` crate.
#[derive(Debug, Clone)]
struct Overrides {
    variables: Vec<Override>,
}

#[derive(Debug, Clone)]
struct Override {
    name: String,
    key: String,
    value: ValueKind,
}

impl Overrides {
    fn new(environment: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let mut variables = environment
            .into_iter()
            .filter_map(|(name, value)| {
                let key = name.strip_prefix(ENVIRONMENT_PREFIX)?.to_lowercase();
                Some(Override::new(name, &key, value))
            })
            .collect::<Result<Vec<_>, _>>()?;
        variables.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { variables })
    }
}

impl Override {
    fn new(name: String, key: &str, value: String) -> Result<Self, ConfigError> {
        let parts: Vec<&str> = key.split(SEPARATOR).collect();
        let proper = |part: &&str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        if !parts.iter().all(proper) {
            return Err(ConfigError::Variable {
                name,
                reason: "write it as CONCORD__SECTION__KEY".to_owned(),
            });
        }
        // `[::1]:7443` is an address, not an array.
        let is_address = value.parse::<SocketAddrV6>().is_ok();
        let value = if value.starts_with(['[', '{']) && !is_address {
            parse_toml_value(&value).map_err(|reason| ConfigError::Variable {
                name: name.clone(),
                reason,
            })?
        } else {
            ValueKind::String(value)
        };
        Ok(Self {
            key: parts.join("."),
            name,
            value,
        })
    }
}

fn parse_toml_value(text: &str) -> Result<ValueKind, String> {
    let parsed = Config::builder()
        .add_source(File::from_str(&format!("value = {text}"), FileFormat::Toml))
        .build()
        .and_then(|config| config.get::<Value>("value"))
        .map_err(|error| format!("its value is no TOML array or table: {error}"))?;
    Ok(parsed.kind)
}

impl Source for Overrides {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, config::ConfigError> {
        Ok(self
            .variables
            .iter()
            .map(|variable| {
                let origin = format!("the environment variable {}", variable.name);
                let value = Value::new(Some(&origin), variable.value.clone());
                (variable.key.clone(), value)
            })
            .collect())
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The section `[log]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSection {
    /// `text` or `json`.
    pub format: LogFormat,
    /// What is logged, in the form of `RUST_LOG`, which goes before it.
    pub filter: String,
}

impl Default for LogSection {
    fn default() -> Self {
        Self {
            format: LogFormat::Text,
            filter: "info".to_owned(),
        }
    }
}

/// The section `[listen]` of a service that takes connections over mutual TLS.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenSection {
    /// Address and port; port 0 lets the system choose.
    pub address: SocketAddr,
    /// Connections at once.
    #[serde(default = "default_max_connections")]
    pub max_connections: usize,
    /// Connections of one certificate's identity at once.
    #[serde(default = "default_max_connections_per_peer")]
    pub max_connections_per_peer: usize,
    /// TLS handshakes at once.
    #[serde(default = "default_max_handshakes")]
    pub max_handshakes: usize,
    /// A handshake that takes longer is cut off.
    #[serde(default = "default_handshake_timeout", with = "humantime_serde")]
    pub handshake_timeout: Duration,
}

fn default_max_connections() -> usize {
    AcceptorLimits::default().max_connections
}

fn default_max_connections_per_peer() -> usize {
    AcceptorLimits::default().max_connections_per_peer
}

fn default_max_handshakes() -> usize {
    AcceptorLimits::default().max_handshakes
}

fn default_handshake_timeout() -> Duration {
    AcceptorLimits::default().handshake_timeout
}

impl ListenSection {
    /// The bounds for an [`Acceptor`](crate::tls::Acceptor).
    pub fn limits(&self) -> AcceptorLimits {
        AcceptorLimits {
            max_connections: self.max_connections,
            max_connections_per_peer: self.max_connections_per_peer,
            max_handshakes: self.max_handshakes,
            handshake_timeout: self.handshake_timeout,
        }
    }
}

#[cfg(test)]
mod tests;
