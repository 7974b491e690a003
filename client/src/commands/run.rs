//! `concord-client run`: the daemon.

use std::{fs, future::pending, io, path::Path, sync::Arc, time::Duration};

use concord_common::{
    Clock, Role, SiloId, SystemClock,
    config::environment,
    fsutil::sweep_unfinished,
    lifecycle::{Notifier, Shutdown, StopOutcome, reload_signals},
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
    egress::{EgressGate, Outlet},
    patience::Pace,
    profile::Profile,
    receipts::Receipts,
    session::Session,
    status::{DaemonLock, StatusBoard},
    transfer::Downloads,
    vault::{Vault, private_folder},
};

/// How long a stop waits for the training step or evaluation in progress.
const STOP_WITHIN: Duration = Duration::from_mins(1);
/// The first wait after a failed call.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
/// How long the main loop may go without a beat; it beats every second while all is well.
const BEAT_ALLOWANCE: Duration = Duration::from_secs(30);
/// `concord-client status` holds the lock for a moment when it looks at it.
const LOCK_ATTEMPTS: u32 = 5;
/// Between two of them.
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// If the configuration, the certificates, the state folder or the cache's cannot be used, or the daemon's main task ends by itself. A server
/// that cannot be reached is no error.
pub async fn run(path: &Path) -> Result<(), CommandError> {
    let config = ClientConfig::load(path, environment())?;
    config.cache.check_folder()?;
    init_logging(&config.log)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let (tls, silo, federation) = identity(&config, clock.as_ref())?;
    private_folder(&config.state.folder)?;
    let _alone = lock(&config.state.folder).await?;
    sweep(&config.state.folder).map_err(|error| CommandError::io(&config.state.folder, error))?;
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

    let daemon = Daemon::new(session, federation.clone(), config.server.poll_interval);
    let heart = shutdown.heartbeat("daemon", BEAT_ALLOWANCE);
    let reload = reload(tls, Arc::clone(&clock), shutdown.token())?;
    shutdown.spawn_critical("daemon", daemon.run_with(heart));
    shutdown.spawn_critical("reload", reload);
    notifier.ready();
    tracing::info!(silo.id = %silo, federation, server = %config.server.address, version = env!("CARGO_PKG_VERSION"), "running");
    let watched = async {
        shutdown.watchdog(&notifier).await;
        pending().await
    };
    let outcome = tokio::select! {
        outcome = shutdown.run_until_stopped(STOP_WITHIN, &notifier) => outcome,
        outcome = watched => outcome,
    };
    ending(outcome.map_err(|error| CommandError::io("signals", error))?)
}

/// What the process tells about its end: exit code 0 for a stop that it was told, 1 for all else.
fn ending(outcome: StopOutcome) -> Result<(), CommandError> {
    let failed = |what: &str| Err(CommandError::io("daemon", io::Error::other(what)));
    match outcome {
        StopOutcome::Clean | StopOutcome::DeadlinePassed => Ok(()),
        StopOutcome::Forced => failed("stopped at once on a second signal"),
        StopOutcome::TaskFailed => {
            failed("a task that it cannot do without has ended; the log says why")
        }
    }
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

/// Takes the state folder for this process.
async fn lock(state_folder: &Path) -> Result<DaemonLock, CommandError> {
    for attempt in 1..=LOCK_ATTEMPTS {
        let taken = DaemonLock::take(state_folder)
            .map_err(|error| CommandError::io(state_folder.join("lock"), error))?;
        match taken {
            Some(lock) => return Ok(lock),
            None if attempt < LOCK_ATTEMPTS => tokio::time::sleep(LOCK_PAUSE).await,
            None => {}
        }
    }
    Err(CommandError::Busy(state_folder.to_path_buf()))
}

/// Deletes what a kill in the middle of a write has left, private bytes among it. Nobody else writes here while the lock is held.
fn sweep(state_folder: &Path) -> io::Result<()> {
    let mut swept = sweep_unfinished(state_folder)?;
    let mut folders = vec![state_folder.join("outbox")];
    let vault = state_folder.join("vault");
    if vault.is_dir() {
        for entry in fs::read_dir(vault)? {
            folders.push(entry?.path());
        }
    }
    for folder in folders.iter().filter(|folder| folder.is_dir()) {
        swept += sweep_unfinished(folder)?;
    }
    if swept > 0 {
        tracing::info!(files = swept, "swept files that a kill had left unfinished");
    }
    Ok(())
}

fn session(
    config: &ClientConfig,
    tls: &TlsReload<TlsConfig>,
    silo: &SiloId,
    clock: &Arc<dyn Clock>,
    notifier: &Arc<Notifier>,
    bench: Workbench,
    stop: CancellationToken,
) -> Result<Session<Outlet<GrpcCoordinator>>, CommandError> {
    let folder = &config.state.folder;
    let url = config.server_url();
    let channel = connect_channel(&url, tls.subscribe(), ChannelOptions::default())?;
    let gate = Arc::new(EgressGate::open(
        folder,
        silo.clone(),
        url.clone(),
        config.egress.limits(),
        Arc::clone(clock),
    )?);
    let receipts = Receipts::open(folder)
        .map_err(|error| CommandError::io(folder.join("receipts.jsonl"), error))?;
    let board = StatusBoard::new(
        folder,
        silo.clone(),
        url,
        Arc::clone(clock),
        Some(Arc::clone(notifier)),
    );
    if let Some(kept) = receipts.last() {
        board.receipt(&kept.receipt());
    }
    Ok(Session {
        coordinator: Arc::new(Outlet::new(
            GrpcCoordinator::new(channel, config.server.request_timeout),
            Arc::clone(&gate),
        )),
        // The daemon asks for it when it first reaches the server.
        receipt_key: Vec::new(),
        silo: silo.clone(),
        profile: Arc::new(Profile::of(config)),
        bench,
        vault: Vault::open(folder)?,
        gate,
        downloads: Downloads::open(folder).map_err(|error| CommandError::io(folder, error))?,
        receipts: Arc::new(receipts),
        board: Arc::new(board),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_whose_main_task_has_ended_exits_with_1_and_a_stopped_one_with_0() {
        for told in [StopOutcome::Clean, StopOutcome::DeadlinePassed] {
            ending(told).unwrap();
        }
        for failed in [StopOutcome::TaskFailed, StopOutcome::Forced] {
            assert_eq!(ending(failed).unwrap_err().exit_code(), 1);
        }
    }

    #[test]
    fn what_a_kill_left_unfinished_is_gone_at_the_next_start_and_the_rest_stays() {
        let state = tempfile::tempdir().unwrap();
        sweep(state.path()).unwrap();
        let folders = ["", "outbox", "vault/job-1"].map(|folder| state.path().join(folder));
        for folder in &folders {
            fs::create_dir_all(folder).unwrap();
            fs::write(folder.join(".concord-unfinished-aB3xY9"), b"private").unwrap();
            fs::write(folder.join("whole"), b"whole").unwrap();
        }
        sweep(state.path()).unwrap();
        for folder in folders {
            let names: Vec<_> = fs::read_dir(&folder)
                .unwrap()
                .map(|entry| entry.unwrap())
                .filter(|entry| entry.file_type().unwrap().is_file())
                .map(|entry| entry.file_name())
                .collect();
            assert_eq!(names, ["whole"]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_state_folder_in_use_is_waited_for_a_moment_and_then_refused() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path()).await.unwrap();
        let error = lock(folder.path()).await.unwrap_err();
        assert!(matches!(error, CommandError::Busy(_)), "{error}");
        // `status` lets go again at once.
        let looked = async {
            tokio::time::sleep(LOCK_PAUSE / 2).await;
            drop(first);
        };
        let (second, ()) = tokio::join!(lock(folder.path()), looked);
        second.unwrap();
    }
}
