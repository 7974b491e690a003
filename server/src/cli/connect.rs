//! From options, variables and a file to a channel.

use std::path::{Path, PathBuf};

use concord_common::{
    Role,
    tls::{ChannelOptions, TlsFiles, client_config, connect_channel},
};
use concord_proto::v1::operator_service_client::OperatorServiceClient;
use serde::Deserialize;
use tonic::transport::Channel;

use super::{CliError, ConnectionArguments};

pub(super) type Client = OperatorServiceClient<Channel>;

/// Answers can hold a job's whole history of metrics.
const MAX_ANSWER: usize = 256 << 20;

/// The file that `--config` names.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    server: Option<String>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
}

/// Everything that a connection needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Connection {
    pub(super) url: String,
    pub(super) files: TlsFiles,
}

impl Connection {
    /// Options go before variables, variables before the file. Paths in the file are relative to its folder.
    pub(super) fn resolve(
        arguments: &ConnectionArguments,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, CliError> {
        let path = arguments
            .config
            .clone()
            .or_else(|| variable("CONCORD_CONFIG").map(PathBuf::from));
        let file = match &path {
            Some(path) => read(path)?,
            None => File::default(),
        };
        let folder = path
            .as_deref()
            .and_then(Path::parent)
            .unwrap_or(Path::new(""));
        let pick = |option: &Option<PathBuf>, name: &str, key: &str, in_file: Option<PathBuf>| {
            option
                .clone()
                .or_else(|| variable(name).map(PathBuf::from))
                .or_else(|| in_file.map(|path| folder.join(path)))
                .ok_or_else(|| missing(key, name))
        };
        let server = arguments
            .server
            .clone()
            .or_else(|| variable("CONCORD_SERVER"))
            .or(file.server)
            .ok_or_else(|| missing("server", "CONCORD_SERVER"))?;
        Ok(Self {
            url: if server.contains("://") {
                server
            } else {
                format!("https://{server}")
            },
            files: TlsFiles {
                certificate: pick(
                    &arguments.certificate,
                    "CONCORD_CERTIFICATE",
                    "certificate",
                    file.certificate,
                )?,
                key: pick(&arguments.key, "CONCORD_KEY", "key", file.key)?,
                ca: pick(&arguments.ca, "CONCORD_CA", "ca", file.ca)?,
            },
        })
    }

    /// A client; nothing is connected before its first call.
    pub(super) fn client(&self) -> Result<Client, CliError> {
        let (identity, roots) = self.files.load()?;
        identity.require_role(&[Role::Operator])?;
        let federation = identity.id().federation.clone();
        let tls = client_config(&identity, &roots, &federation)?;
        let channel = connect_channel(&self.url, tls, ChannelOptions::default())?;
        Ok(OperatorServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER))
    }
}

fn read(path: &Path) -> Result<File, CliError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| CliError::Usage(format!("cannot read {}: {error}", path.display())))?;
    toml::from_str(&text)
        .map_err(|error| CliError::Usage(format!("{} cannot be used: {error}", path.display())))
}

fn missing(key: &str, variable: &str) -> CliError {
    CliError::Usage(format!(
        "say --{key}, set {variable}, or name a file with `{key}` by --config"
    ))
}
