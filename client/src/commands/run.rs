//! `concord-client run`: the daemon.

use std::{
    fs::{self, File},
    path::Path,
    sync::Arc,
    time::Duration,
};

use concord_common::{
    Clock, Role, SiloId, SystemClock,
    config::environment,
    lifecycle::{Notifier, Shutdown, reload_signals},
    telemetry::init_logging,
    tls::{ChannelOptions, TlsReload, connect_channel},
};
use futures::StreamExt as _;
use rustls::ClientConfig as TlsConfig;
use tokio_util::sync::CancellationToken;

use super::CommandError;
use crate::{
    bench::Workbench,
    config::ClientConfig,
    coordinator::grpc::GrpcCoordinator,
    daemon::Daemon,
    egress::EgressGate,
    patience::Pace,
    profile::Profile,
    session::Session,
    status::StatusBoard,
    transfer::Downloads,
    vault::{Vault, private_folder},
};

/// How long a stop waits for the training step or evaluation in progress.
const STOP_WITHIN: Duration = Duration::from_mins(1);
/// The first wait after a failed call.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// If the configuration, the certificates or the state folder cannot be used. A server that cannot be reached is no error.
pub async fn run(path: &Path) -> Result<(), CommandError> {
    let config = ClientConfig::load(path, environment())?;
    init_logging(&config.log)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let (tls, silo, federation) = identity(&config, clock.as_ref())?;
    private_folder(&config.state.folder)?;
    let _alone = lock(&config.state.folder)?;
    let notifier =
        Notifier::from_process().map_err(|error| CommandError::io("NOTIFY_SOCKET", error))?;
    let notifier = Arc::new(notifier);
    let shutdown = Shutdown::new();
    let bench = Workbench::start(config.torch.threads)?;
    let session = session(
        &config,
        &tls,
        &silo,
        &clock,
        &notifier,
        bench,
        shutdown.token(),
    )?;

    shutdown.spawn(Daemon::new(session, federation.clone(), config.server.poll_interval).run());
    shutdown.spawn(reload(tls, Arc::clone(&clock), shutdown.token())?);
    let watched = Arc::clone(&notifier);
    let stopped = shutdown.token();
    shutdown.spawn(async move { watched.watchdog(|| true, stopped).await });
    notifier.ready();
    tracing::info!(silo.id = %silo, federation, server = %config.server.address, version = env!("CARGO_PKG_VERSION"), "running");
    shutdown
        .run_until_stopped(STOP_WITHIN, &notifier)
        .await
        .map_err(|error| CommandError::io("signals", error))?;
    Ok(())
}

/// The certificates, and who they say this silo is.
fn identity(
    config: &ClientConfig,
    clock: &dyn Clock,
) -> Result<(TlsReload<TlsConfig>, SiloId, String), CommandError> {
    let (identity, _) = config.tls.load()?;
    identity.require_role(&[Role::Silo])?;
    let id = identity.id().clone();
    let silo = id
        .name
        .parse()
        .map_err(|error| CommandError::Unfit(format!("the certificate's name: {error}")))?;
    let tls = TlsReload::client(config.tls.clone(), &id.federation, clock.now())?;
    Ok((tls, silo, id.federation))
}

/// Two daemons with one state folder would tear it apart.
fn lock(state_folder: &Path) -> Result<File, CommandError> {
    let path = state_folder.join("lock");
    let file = File::create(&path).map_err(|error| CommandError::io(&path, error))?;
    file.try_lock().map_err(|error| match error {
        fs::TryLockError::WouldBlock => CommandError::Unfit(format!(
            "another daemon uses the state folder {}",
            state_folder.display()
        )),
        fs::TryLockError::Error(source) => CommandError::io(&path, source),
    })?;
    Ok(file)
}

fn session(
    config: &ClientConfig,
    tls: &TlsReload<TlsConfig>,
    silo: &SiloId,
    clock: &Arc<dyn Clock>,
    notifier: &Arc<Notifier>,
    bench: Workbench,
    stop: CancellationToken,
) -> Result<Session<GrpcCoordinator>, CommandError> {
    let folder = &config.state.folder;
    let url = config.server_url();
    let channel = connect_channel(&url, tls.subscribe(), ChannelOptions::default())?;
    let gate = EgressGate::open(
        folder,
        silo.clone(),
        url.clone(),
        config.egress.limits(),
        Arc::clone(clock),
    )?;
    Ok(Session {
        coordinator: Arc::new(GrpcCoordinator::new(channel, config.server.request_timeout)),
        // The daemon asks for it when it first reaches the server.
        receipt_key: Vec::new(),
        silo: silo.clone(),
        profile: Arc::new(Profile::of(config)),
        bench,
        vault: Vault::open(folder)?,
        gate: Arc::new(gate),
        downloads: Downloads::open(folder).map_err(|error| CommandError::io(folder, error))?,
        board: Arc::new(StatusBoard::new(
            folder,
            silo.clone(),
            url,
            Arc::clone(clock),
            Some(Arc::clone(notifier)),
        )),
        pace: Pace {
            first: FIRST_BACKOFF.min(config.server.max_backoff),
            longest: config.server.max_backoff,
        },
        clock: Arc::clone(clock),
        stop,
    })
}

/// Reads the certificates anew on each SIGHUP. Connections that are open stay; new ones use the new material.
fn reload(
    tls: TlsReload<TlsConfig>,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) -> Result<impl Future<Output = ()> + Send, CommandError> {
    let mut signals = reload_signals().map_err(|error| CommandError::io("SIGHUP", error))?;
    Ok(async move {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(()) = signals.next() => match tls.reload(clock.now()) {
                    Ok(peer) => tracing::info!(serial = %peer.serial, not_after = %peer.not_after, "certificates read anew"),
                    Err(error) => tracing::error!(%error, "the new certificates cannot be used; the old ones stay"),
                },
            }
        }
    })
}
