//! Calls to an HTTP endpoint that serves a model: one POST of JSON, one bounded JSON answer.
//!
//! The endpoint's owner is not trusted: answers are bounded in time, header and body size, redirects are not followed, and the
//! key is sent over TLS or to this machine only.

mod connection;
mod settings;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod until;

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use http::{HeaderValue, StatusCode, Uri};
use serde_json::Value;
use tokio::time::Instant;

use self::{connection::Tls, settings::SCHEME};
pub use self::{settings::EndpointSettings, until::Until};

/// Longest wait that an endpoint may ask for between two tries.
const MAX_WAIT: Duration = Duration::from_mins(1);
/// Characters of an error answer that are kept for the log.
const KEPT_ERROR_TEXT: usize = 300;

/// Why an endpoint gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// A setting is not acceptable.
    #[error("endpoint setting `{key}`: {what}")]
    Setting {
        /// Its key.
        key: &'static str,
        /// What is wrong and what to do.
        what: String,
    },
    /// No connection, or it broke.
    #[error("{url}: {what}")]
    Connection {
        /// Where to.
        url: String,
        /// What happened.
        what: String,
    },
    /// No whole answer in time.
    #[error("{url}: no whole answer within {timeout:?}")]
    Timeout {
        /// Where to.
        url: String,
        /// The `timeout` of the settings.
        timeout: Duration,
    },
    /// Broken off, because the work that wants the answer stops. It says nothing of the endpoint.
    #[error("{url}: the call was broken off, because the work that it is for stops")]
    Stopped {
        /// Where to.
        url: String,
    },
    /// An answer other than success.
    #[error("{url}: the endpoint answered {status}: {text}")]
    Status {
        /// Where to.
        url: String,
        /// The HTTP status.
        status: StatusCode,
        /// The beginning of what it said.
        text: String,
        /// How long it asked to wait.
        retry_after: Option<Duration>,
    },
    /// An answer that is too long.
    #[error("{url}: the answer is longer than {limit} bytes")]
    Large {
        /// Where to.
        url: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// A success that is no JSON.
    #[error("{url}: the answer is no JSON: {what}")]
    NoJson {
        /// Where to.
        url: String,
        /// Where and why.
        what: String,
    },
}

impl EndpointError {
    /// Whether the same call may succeed a little later.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Connection { .. } | Self::Timeout { .. } | Self::Stopped { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error()
                    || *status == StatusCode::TOO_MANY_REQUESTS
                    || *status == StatusCode::REQUEST_TIMEOUT
            }
            Self::Setting { .. } | Self::Large { .. } | Self::NoJson { .. } => false,
        }
    }

    /// Whether it says something of this one request (its image, its answer), so that others may well succeed.
    pub fn is_about_the_request(&self) -> bool {
        match self {
            Self::Large { .. } | Self::NoJson { .. } => true,
            Self::Status { status, .. } => matches!(
                *status,
                StatusCode::BAD_REQUEST
                    | StatusCode::PAYLOAD_TOO_LARGE
                    | StatusCode::UNPROCESSABLE_ENTITY
            ),
            _ => false,
        }
    }

    /// Short name, for counting.
    pub fn code(&self) -> String {
        match self {
            Self::Setting { .. } => "setting".to_owned(),
            Self::Connection { .. } => "connection".to_owned(),
            Self::Timeout { .. } => "timeout".to_owned(),
            Self::Stopped { .. } => "stopped".to_owned(),
            Self::Status { status, .. } => format!("http-{}", status.as_u16()),
            Self::Large { .. } => "large".to_owned(),
            Self::NoJson { .. } => "no-json-body".to_owned(),
        }
    }
}

/// An endpoint ready to be called; several tasks may share it.
pub struct Endpoint {
    settings: EndpointSettings,
    base: Uri,
    key: Option<HeaderValue>,
    tls: Option<Tls>,
    /// When calls are broken off.
    until: Until,
    /// When the next call may be sent.
    next_call: Mutex<Option<Instant>>,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Endpoint({})", self.base)
    }
}

impl Endpoint {
    /// Checks the settings and reads the key and the trusted certificates. Calls go on `until` a time.
    ///
    /// # Errors
    /// [`EndpointError::Setting`] with the key and what to change.
    pub fn open(settings: EndpointSettings, until: Until) -> Result<Self, EndpointError> {
        let base = settings.check()?;
        let key = settings.read_key(&base)?;
        let tls = (base.scheme_str() == Some("https"))
            .then(|| Tls::new(settings.ca_file.as_deref()))
            .transpose()?;
        Ok(Self {
            settings,
            base,
            key,
            tls,
            until,
            next_call: Mutex::new(None),
        })
    }

    fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.base.to_string().trim_end_matches('/'))
    }

    /// A text of the endpoint's without the key, which some repeat when they refuse.
    pub(crate) fn without_key(&self, text: &str) -> String {
        let header = self.key.as_ref().and_then(|header| header.to_str().ok());
        match header.and_then(|header| header.strip_prefix(SCHEME)) {
            Some(key) => text.replace(key, "…"),
            None => text.to_owned(),
        }
    }

    /// Sends `body` to the path below the base URL, and again after passing failures, as often as the settings say; gives the JSON of a
    /// good answer. Every call sent, failed ones included, is added to `calls`, whatever comes of it.
    ///
    /// # Errors
    /// The last failure; [`EndpointError::Stopped`] if the endpoint's time ends first, be it in a call or in a wait before one.
    pub async fn post(
        &self,
        path: &str,
        body: &Value,
        calls: &mut u64,
    ) -> Result<Value, EndpointError> {
        tokio::select! {
            // First, so that no call is begun after that time.
            biased;
            () = self.until.come() => Err(EndpointError::Stopped { url: self.url(path) }),
            answer = self.persist(path, body, calls) => answer,
        }
    }

    /// The same without an end from outside.
    async fn persist(
        &self,
        path: &str,
        body: &Value,
        calls: &mut u64,
    ) -> Result<Value, EndpointError> {
        let packed = bytes::Bytes::from(body.to_string());
        let mut attempt = 0;
        loop {
            attempt += 1;
            self.wait_for_turn().await;
            *calls += 1;
            let error = match self.post_once(path, packed.clone()).await {
                Ok(body) => return Ok(body),
                Err(error) => error,
            };
            if !error.is_passing() || attempt >= u64::from(self.settings.attempts) {
                return Err(error);
            }
            let wait = self.wait_after(&error, attempt);
            tracing::warn!(error.message = %error, attempt, wait_ms = wait.as_millis() as u64, "endpoint call failed, trying again");
            tokio::time::sleep(wait).await;
        }
    }

    /// The wait after a failed call: doubled each time, at least what the endpoint asked for, at most [`MAX_WAIT`].
    fn wait_after(&self, error: &EndpointError, calls: u64) -> Duration {
        let factor = 1_u32 << (calls - 1).min(16);
        let asked = match error {
            EndpointError::Status { retry_after, .. } => retry_after.unwrap_or_default(),
            _ => Duration::ZERO,
        };
        (self.settings.backoff * factor).max(asked).min(MAX_WAIT)
    }

    async fn post_once(&self, path: &str, body: bytes::Bytes) -> Result<Value, EndpointError> {
        let timeout = self.settings.timeout;
        let url = self.url(path);
        let exchange = connection::exchange(self, &url, body);
        let (status, retry_after, answer) = tokio::time::timeout(timeout, exchange)
            .await
            .map_err(|_| EndpointError::Timeout {
                url: url.clone(),
                timeout,
            })??;
        if !status.is_success() {
            return Err(EndpointError::Status {
                url,
                status,
                text: readable(&self.without_key(&String::from_utf8_lossy(&answer))),
                retry_after,
            });
        }
        serde_json::from_slice(&answer).map_err(|error| EndpointError::NoJson {
            url,
            what: error.to_string(),
        })
    }

    /// Waits until the rate limit allows a call. Turns are given in the order of asking.
    async fn wait_for_turn(&self) {
        let Some(rate) = self.settings.requests_per_minute else {
            return;
        };
        let turn = {
            let mut next = self
                .next_call
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let turn = next.map_or(now, |next| next.max(now));
            *next = Some(turn + Duration::from_mins(1) / rate.max(1));
            turn
        };
        tokio::time::sleep_until(turn).await;
    }
}

/// The beginning of an error answer on one line, without anything that could upset a terminal.
fn readable(answer: &str) -> String {
    answer
        .chars()
        .take(KEPT_ERROR_TEXT)
        .map(|character| {
            if character.is_control() {
                ' '
            } else {
                character
            }
        })
        .collect()
}
