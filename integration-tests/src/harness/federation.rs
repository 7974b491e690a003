//! A federation in a temporary folder: a CA and certificates made by `concord-server pki`, a server, and what it needs.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use concord_common::{Role, config::TlsSection};
use tempfile::TempDir;

use super::{PATIENCE, Program, program::run};

/// What a test may choose about its server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// `power` or `process`.
    pub durability: String,
    /// Further lines of `server.toml`, after the ones that the harness writes. Sections that it writes too (`listen`, `ops`,
    /// `tls`, `log`) are extended by variables instead: see `environment`.
    pub extra: String,
    /// Variables of the server's environment.
    pub environment: BTreeMap<String, String>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            durability: "process".to_owned(),
            extra: String::new(),
            environment: BTreeMap::new(),
        }
    }
}

/// The text of a `server.toml` for the federation in `folder`.
pub fn server_config(
    federation: &str,
    folder: &Path,
    tls: &TlsSection,
    options: &ServerOptions,
) -> String {
    format!(
        r#"federation = "{federation}"
state_dir = "{state}"
durability = "{durability}"
stop_timeout = "10s"
{extra}

[listen]
address = "127.0.0.1:0"

[ops]
address = "127.0.0.1:0"

[tls]
certificate = "{certificate}"
key = "{key}"
ca = "{ca}"

[log]
format = "json"
filter = "info"
"#,
        state = folder.join("server").display(),
        durability = options.durability,
        extra = options.extra,
        certificate = tls.certificate.display(),
        key = tls.key.display(),
        ca = tls.ca.display(),
    )
}

/// A CA, certificates and a server. Everything ends and disappears with it.
#[derive(Debug)]
pub struct Federation {
    // Before the folder, so that the program is gone when its folder is deleted.
    server: Option<Program>,
    addresses: Addresses,
    name: String,
    folder: TempDir,
    environment: BTreeMap<String, String>,
}

/// Where a server listens.
#[derive(Debug, Clone, Copy, Default)]
struct Addresses {
    grpc: Option<SocketAddr>,
    ops: Option<SocketAddr>,
}

impl Federation {
    /// Makes the CA, the server's certificate and its configuration. The server is not started yet.
    ///
    /// # Errors
    /// If a program fails.
    pub fn new(options: &ServerOptions) -> anyhow::Result<Self> {
        let mut federation = Self {
            server: None,
            addresses: Addresses::default(),
            name: "test-federation".to_owned(),
            folder: TempDir::with_prefix("concord-test-")?,
            environment: options.environment.clone(),
        };
        federation.pki(&["init", "--federation", &federation.name, "--folder", "pki"])?;
        let tls = federation.issue(Role::Server, "main")?;
        let text = server_config(&federation.name, federation.path(), &tls, options);
        fs::write(federation.path().join("server.toml"), text)?;
        federation.addresses = Addresses::default();
        Ok(federation)
    }

    /// The folder that everything is in.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The federation's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder of the CA and the certificates.
    pub fn pki_folder(&self) -> PathBuf {
        self.path().join("pki")
    }

    /// Sets a variable of the environment of servers that are started from now on.
    pub fn set_variable(&mut self, name: &str, value: &str) {
        self.environment.insert(name.to_owned(), value.to_owned());
    }

    fn pki(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let all: Vec<&str> = std::iter::once("pki")
            .chain(arguments.iter().copied())
            .collect();
        run("concord-server", self.path(), &all)?
            .success()
            .with_context(|| format!("concord-server {}", all.join(" ")))
    }

    /// A certificate for `name` in `role`, made by the real command when it is first asked for.
    ///
    /// # Errors
    /// If the command fails.
    pub fn issue(&self, role: Role, name: &str) -> anyhow::Result<TlsSection> {
        let stem = self.pki_folder().join(format!("{role}-{name}"));
        let files = TlsSection {
            certificate: stem.with_extension("crt"),
            key: stem.with_extension("key"),
            ca: self.pki_folder().join("ca.crt"),
        };
        if !files.certificate.is_file() {
            let (role, folder) = (role.as_str(), "pki");
            self.pki(&["issue", "--role", role, "--name", name, "--folder", folder])?;
        }
        ensure!(
            files.certificate.is_file(),
            "{} was not made",
            files.certificate.display()
        );
        Ok(files)
    }

    /// Starts the server and waits until it is ready. After the first time it takes the same ports again, so that clients
    /// find it after a restart.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn start_server(&mut self) -> anyhow::Result<()> {
        let mut environment = self.environment.clone();
        if let Some(grpc) = self.addresses.grpc {
            environment.insert("CONCORD__LISTEN__ADDRESS".to_owned(), grpc.to_string());
        }
        if let Some(ops) = self.addresses.ops {
            environment.insert("CONCORD__OPS__ADDRESS".to_owned(), ops.to_string());
        }
        let variables: Vec<(&str, &str)> = environment
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let mut server = Program::start(
            "concord-server",
            "server",
            self.path(),
            &["run", "--config", "server.toml"],
            &variables,
        )?;
        self.addresses = server.wait_for_log("ready server", PATIENCE, ready)?;
        self.server = Some(server);
        Ok(())
    }

    /// The running server.
    ///
    /// # Errors
    /// If it was not started.
    pub fn server(&mut self) -> anyhow::Result<&mut Program> {
        self.server.as_mut().context("the server was not started")
    }

    /// Ends the server with SIGTERM and sees that it ends well.
    ///
    /// # Errors
    /// If it does not, or was not started.
    pub fn stop_server(&mut self) -> anyhow::Result<()> {
        let mut server = self.server.take().context("the server was not started")?;
        let status = server.terminate(PATIENCE)?;
        ensure!(
            status.success(),
            "the server ended with {status}:\n{}",
            server.log()
        );
        Ok(())
    }

    /// Ends the server with SIGKILL.
    ///
    /// # Errors
    /// If it was not started.
    pub fn kill_server(&mut self) -> anyhow::Result<()> {
        let mut server = self.server.take().context("the server was not started")?;
        server.kill()
    }

    /// Where silos and operators connect.
    ///
    /// # Panics
    /// If the server was never started.
    pub fn url(&self) -> String {
        format!("https://{}", self.grpc_address())
    }

    /// Address and port for silos and operators.
    ///
    /// # Panics
    /// If the server was never started.
    pub fn grpc_address(&self) -> SocketAddr {
        self.addresses
            .grpc
            .expect("the harness starts the server before it asks for its address")
    }

    /// Address and port of metrics and probes.
    ///
    /// # Panics
    /// If the server was never started.
    pub fn ops_address(&self) -> SocketAddr {
        self.addresses
            .ops
            .expect("the harness starts the server before it asks for its address")
    }
}

/// The addresses out of a server's log, once it says that it is ready.
fn ready(log: &str) -> Option<Addresses> {
    let events: Vec<serde_json::Value> = log
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let find = |message: &str| events.iter().find(|event| event["message"] == message);
    let address = |message: &str| find(message)?["address"].as_str()?.parse().ok();
    find("ready").map(|_| Addresses {
        grpc: address("listening"),
        ops: address("serving metrics and probes"),
    })
}
