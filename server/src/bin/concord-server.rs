//! Concord's server: `concord-server run --config server.toml`.

use std::{net::IpAddr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use concord_common::{
    Clock as _, Role, SpiffeId, SystemClock,
    config::environment,
    lifecycle::{Notifier, StopOutcome, reload_signals},
    pki::{CertificateAuthority, DAY},
    telemetry::init_logging,
};
use concord_server::{RunningServer, Server, StartError, config::ServerConfig};
use futures::StreamExt as _;

/// EX_CONFIG of sysexits.h: the service manager does not start a service again that ended so.
const EXIT_CONFIG: u8 = 78;

/// Threads that requests run on; the work on payloads has threads of its own.
const WORKER_THREADS: usize = 2;

/// The coordinating server of a Concord federation.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the server until SIGTERM or SIGINT; SIGHUP reads the certificates anew.
    ///
    /// Exit codes: 0 stopped in good order, 1 failed, 78 the configuration is not acceptable.
    Run(ConfigArguments),
    /// Checks the configuration and the certificates that it names, and does nothing else.
    CheckConfig(ConfigArguments),
    /// Makes certificates.
    #[command(subcommand)]
    Pki(Pki),
}

#[derive(Debug, Args)]
struct ConfigArguments {
    /// The configuration; variables such as CONCORD__LISTEN__ADDRESS go before it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Pki {
    /// Makes a federation's CA: ca.crt and ca.key.
    Init {
        /// The federation's name; it stands in every certificate.
        #[arg(long, value_name = "NAME")]
        federation: String,
        /// Where to put it; made if it is not there.
        #[arg(long, alias = "dir", value_name = "FOLDER", default_value = "pki")]
        folder: PathBuf,
        /// How long it is valid.
        #[arg(long, default_value_t = 3650)]
        days: u32,
        /// Replaces files that are there.
        #[arg(long)]
        force: bool,
    },
    /// Makes a certificate with its key, <role>-<name>.crt and <role>-<name>.key.
    Issue {
        /// What its holder may do: server, silo, operator or worker.
        #[arg(long)]
        role: Role,
        /// Who its holder is; a silo's name is its id.
        #[arg(long)]
        name: String,
        /// Where the CA is.
        #[arg(long, alias = "dir", value_name = "FOLDER", default_value = "pki")]
        folder: PathBuf,
        /// Where to put the certificate; beside the CA unless given.
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
        /// DNS name or IP address to stand in it, for other programs; Concord goes by role and name. May be repeated.
        #[arg(long, value_name = "HOST")]
        host: Vec<String>,
        /// How long it is valid.
        #[arg(long, default_value_t = 90)]
        days: u32,
        /// Replaces files that are there.
        #[arg(long)]
        force: bool,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run(&arguments),
        Command::CheckConfig(arguments) => Ok(check(&arguments)),
        Command::Pki(command) => pki(command).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        match error.downcast_ref::<StartError>() {
            Some(start) if start.is_configuration() => ExitCode::from(EXIT_CONFIG),
            _ => ExitCode::FAILURE,
        }
    })
}

fn load(arguments: &ConfigArguments) -> Result<ServerConfig, ExitCode> {
    ServerConfig::load(arguments.config.as_deref(), environment()).map_err(|error| {
        eprintln!("error: {error}");
        ExitCode::from(EXIT_CONFIG)
    })
}

fn check(arguments: &ConfigArguments) -> ExitCode {
    let config = match load(arguments) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let checked = config.tls.load().and_then(|(identity, roots)| {
        identity.check(&roots, SystemClock.now())?;
        concord_common::tls::server_config(&identity, &roots, &config.federation)
    });
    if let Err(error) = checked {
        eprintln!("error: {error}");
        return ExitCode::from(EXIT_CONFIG);
    }
    println!("the configuration is acceptable");
    ExitCode::SUCCESS
}

fn run(arguments: &ConfigArguments) -> anyhow::Result<ExitCode> {
    let config = match load(arguments) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    init_logging(&config.log)?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        // The allocator keeps memory for each thread; more of them would only wait for the same disk and processors.
        .max_blocking_threads(6)
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(serve(config))
}

async fn serve(config: ServerConfig) -> anyhow::Result<ExitCode> {
    let notifier = Notifier::from_process().context("cannot reach the service manager")?;
    let deadline = config.stop_timeout;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "starting");
    let server = Server::start(config, Arc::new(SystemClock)).await?;
    notifier.ready();
    tracing::info!("ready");
    let shutdown = server.shutdown().clone();
    let outcome = tokio::select! {
        outcome = shutdown.run_until_stopped(deadline, &notifier) => outcome?,
        never = reload(&server, &notifier) => never?,
        () = watch(&server, &notifier) => unreachable!("the watchdog goes on until the server has stopped"),
    };
    server.stop(Duration::ZERO).await;
    Ok(if outcome.is_success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Reads the certificates anew at each SIGHUP.
async fn reload(server: &RunningServer, notifier: &Notifier) -> anyhow::Result<StopOutcome> {
    let mut signals = reload_signals()?;
    while let Some(()) = signals.next().await {
        notifier.reloading();
        match server.reload_tls() {
            Ok(peer) => tracing::info!(not_after = %peer.not_after, "certificates read anew"),
            Err(error) => {
                tracing::error!(%error, "the certificates cannot be used; the old ones stay");
            }
        }
        notifier.ready();
    }
    std::future::pending().await
}

/// Tells the service manager that the server lives, for as long as its main loops turn.
async fn watch(server: &RunningServer, notifier: &Notifier) {
    server.shutdown().watchdog(notifier).await;
    std::future::pending::<()>().await;
}

fn pki(command: Pki) -> anyhow::Result<()> {
    // A little earlier than now, for machines whose clocks are behind.
    let start = SystemClock.now() - Duration::from_hours(1);
    match command {
        Pki::Init {
            federation,
            folder,
            days,
            force,
        } => {
            let ca = CertificateAuthority::create(&federation, start, days)?;
            let written = ca.write(&folder, force)?;
            println!("{}", written.certificate.display());
            println!("{}", written.key.display());
        }
        Pki::Issue {
            role,
            name,
            folder,
            out,
            host,
            days,
            force,
        } => {
            let ca = CertificateAuthority::load(&folder)?;
            let id = SpiffeId::new(ca.federation(), role, &name)?;
            let ips: Vec<IpAddr> = host.iter().filter_map(|host| host.parse().ok()).collect();
            let names: Vec<String> = host
                .into_iter()
                .filter(|host| host.parse::<IpAddr>().is_err())
                .collect();
            let issued = ca.issue(&id, &names, &ips, start, DAY * days)?;
            let written = issued.write(out.as_deref().unwrap_or(&folder), force)?;
            println!("{}", written.certificate.display());
            println!("{}", written.key.display());
        }
    }
    Ok(())
}
