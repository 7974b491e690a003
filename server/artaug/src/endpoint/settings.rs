//! An endpoint's settings.

use std::{
    io::Read as _,
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use concord_common::config::ByteSize;
use http::{HeaderValue, Uri};
use serde::Deserialize;

use super::EndpointError;

/// What stands before the key in the header.
pub(super) const SCHEME: &str = "Bearer ";
/// Longest key file.
const MAX_KEY_BYTES: u64 = 4096;

/// Where a model is served, in the worker's configuration. A job names the endpoint; it carries neither address nor key.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSettings {
    /// Base URL, such as `http://127.0.0.1:8000/v1`.
    pub url: String,
    /// File with the key; readable by its owner only.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    /// PEM file of the certificate authorities to trust; the system's if absent.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Longest time from the call to the end of the answer.
    #[serde(default = "default_timeout", with = "humantime_serde")]
    pub timeout: Duration,
    /// Tries of one call, the first included.
    #[serde(default = "default_attempts")]
    pub attempts: u32,
    /// Wait before the second try; doubled before each further one.
    #[serde(default = "default_backoff", with = "humantime_serde")]
    pub backoff: Duration,
    /// Most calls a minute; no limit if absent.
    #[serde(default)]
    pub requests_per_minute: Option<u32>,
    /// Longest answer that is read.
    #[serde(default = "default_max_answer")]
    pub max_answer: ByteSize,
}

fn default_timeout() -> Duration {
    Duration::from_mins(2)
}
fn default_attempts() -> u32 {
    4
}
fn default_backoff() -> Duration {
    Duration::from_secs(1)
}
fn default_max_answer() -> ByteSize {
    ByteSize(1 << 20)
}

impl EndpointSettings {
    /// Settings with the defaults for a base URL.
    pub fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            key_file: None,
            ca_file: None,
            timeout: default_timeout(),
            attempts: default_attempts(),
            backoff: default_backoff(),
            requests_per_minute: None,
            max_answer: default_max_answer(),
        }
    }

    pub(super) fn check(&self) -> Result<Uri, EndpointError> {
        let refuse = |key, what: &str| {
            Err(EndpointError::Setting {
                key,
                what: what.to_owned(),
            })
        };
        let Ok(base) = self.url.parse::<Uri>() else {
            return refuse(
                "url",
                "is no URL; write one such as `http://127.0.0.1:8000/v1`",
            );
        };
        if !matches!(base.scheme_str(), Some("http" | "https")) {
            return refuse("url", "must begin with http:// or https://");
        }
        let authority = base.authority().map_or("", http::uri::Authority::as_str);
        if authority.contains('@')
            || base.query().is_some()
            || base.host().is_none_or(str::is_empty)
        {
            return refuse(
                "url",
                "must be a host and a path, without a user or a query",
            );
        }
        if self.timeout.is_zero() || self.timeout > Duration::from_hours(1) {
            return refuse("timeout", "must be above 0 and at most 1h");
        }
        if !(1..=20).contains(&self.attempts) {
            return refuse("attempts", "must be from 1 to 20");
        }
        if self.backoff > Duration::from_mins(1) {
            return refuse("backoff", "must be at most 1m");
        }
        if self.requests_per_minute == Some(0) {
            return refuse(
                "requests_per_minute",
                "must be at least 1; leave it out for no limit",
            );
        }
        if !(1 << 10..=64 << 20).contains(&self.max_answer.bytes()) {
            return refuse("max_answer", "must be from 1 KiB to 64 MiB");
        }
        Ok(base)
    }

    /// The `authorization` header from the key file.
    pub(super) fn read_key(&self, base: &Uri) -> Result<Option<HeaderValue>, EndpointError> {
        let Some(path) = &self.key_file else {
            return Ok(None);
        };
        let refuse = |what: String| EndpointError::Setting {
            key: "key_file",
            what: format!("{}: {what}", path.display()),
        };
        if base.scheme_str() != Some("https") && !is_this_machine(base) {
            return Err(refuse(
                "a key is sent over https or to this machine only; change `url`".to_owned(),
            ));
        }
        let text = read_private(path).map_err(refuse)?;
        let key = text.trim();
        let mut header = HeaderValue::from_str(&format!("{SCHEME}{key}"))
            .ok()
            .filter(|_| !key.is_empty() && key.chars().all(|c| c.is_ascii_graphic()))
            .ok_or_else(|| refuse("must hold one line of visible characters".to_owned()))?;
        header.set_sensitive(true);
        Ok(Some(header))
    }
}

fn read_private(path: &Path) -> Result<String, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mode = file
        .metadata()
        .map_err(|error| error.to_string())?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        return Err(format!(
            "others may read it (mode {:o}); run chmod 600 on it",
            mode & 0o777
        ));
    }
    let mut text = String::new();
    file.take(MAX_KEY_BYTES)
        .read_to_string(&mut text)
        .map_err(|error| error.to_string())?;
    Ok(text)
}

/// Host name without the brackets of an IPv6 address.
pub(super) fn host_of(base: &Uri) -> &str {
    base.host()
        .unwrap_or_default()
        .trim_start_matches('[')
        .trim_end_matches(']')
}

fn is_this_machine(base: &Uri) -> bool {
    let host = host_of(base);
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}
