//! `concord-artaug run`.

use std::{
    fs::{File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Args;
use concord_common::{
    Clock, Role, SystemClock,
    config::environment,
    lifecycle::{Notifier, StopSignals, reload_signals},
    telemetry::init_logging,
    tls::{ChannelOptions, TlsReload, connect_channel},
};
use tokio::{runtime::Runtime, sync::watch, task::JoinSet};
use tokio_stream::StreamExt as _;

use super::{Ended, Habits, Worker};
use crate::{
    brake::Stop,
    config::{SettingsError, WorkerConfig},
    limits::{MemoryLimit, step_back},
    remote::{Pace, grpc::GrpcServer},
    workshop::TorchWorkshop,
};

/// Takes ArtAug jobs from the server and runs them, until it is told to stop.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// End when no job has come for so long, such as `30s`.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    exit_when_idle: Option<Duration>,
}

impl RunArgs {
    /// Works until SIGTERM, SIGINT or the end of the patience.
    ///
    /// # Errors
    /// If the configuration, the certificates or the state folder cannot be used. A server that cannot be reached is no error.
    pub fn run(&self) -> anyhow::Result<()> {
        let config = WorkerConfig::load(&self.config, environment())?;
        init_logging(&config.log)?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let (identity, _) = config.tls.load()?;
        identity.require_role(&[Role::Worker])?;
        let id = identity.id().clone();
        if let Some(federation) = &config.federation
            && *federation != id.federation
        {
            let reason = format!("is {federation}, and the certificate is for {id}");
            let key = "federation";
            return Err(SettingsError::Value { key, reason }.into());
        }
        private_folder(&config.state_dir)?;
        let _alone = lock(&config.state_dir)?;
        step_back(config.limits.nice);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("the async runtime cannot be started")?;
        let tls = TlsReload::client(config.tls.clone(), &id.federation, clock.now())?;
        let url = config.server_url();
        let channel = {
            // The channel's own task is started here.
            let _guard = runtime.enter();
            connect_channel(&url, tls.subscribe(), ChannelOptions::default())?
        };
        let notifier = Notifier::from_process().context("NOTIFY_SOCKET")?;
        let stop = Arc::new(Stop::default());
        let (tell_stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        signals(
            &runtime,
            &mut tasks,
            Arc::clone(&stop),
            tell_stop,
            tls,
            Arc::clone(&clock),
        )?;
        let server = GrpcServer::new(
            channel,
            runtime.handle().clone(),
            config.server.request_timeout,
            stopped,
        );
        let worker = Worker {
            server: Arc::new(server),
            habits: self.habits(&config),
            workshop: Box::new(TorchWorkshop::new(config, runtime.handle().clone())),
            clock,
            stop,
        };
        notifier.ready();
        tracing::info!(worker = %id, server = url, version = env!("CARGO_PKG_VERSION"), "running");
        let ended = worker.run();
        notifier.stopping();
        drop(worker);
        tasks.abort_all();
        runtime.shutdown_timeout(Duration::from_secs(1));
        if ended == Ended::Heavy {
            bail!(
                "the process holds more memory than `limits.memory` also after its job was given back; it ends, and a new one begins without it"
            );
        }
        tracing::info!("stopped");
        Ok(())
    }

    fn habits(&self, config: &WorkerConfig) -> Habits {
        Habits {
            jobs: config.state_dir.join("jobs"),
            disk: config.limits.disk.bytes(),
            memory: MemoryLimit(config.limits.memory.bytes()),
            helpers: config.limits.helpers as usize,
            stop_within: config.limits.stop_within,
            pace: Pace {
                first: Pace::default().first.min(config.server.max_backoff),
                longest: config.server.max_backoff,
            },
            exit_when_idle: self.exit_when_idle,
        }
    }
}

/// Makes a folder that nobody else may look into.
fn private_folder(folder: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};

    let make = || -> io::Result<()> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))
    };
    make().with_context(|| format!("`state_dir` {}", folder.display()))
}

/// Takes the state folder for this process: another worker would make room by removing this one's copies.
fn lock(folder: &Path) -> anyhow::Result<File> {
    let path = folder.join("lock");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "`state_dir` {}: another worker uses it; give each its own, or stop that one",
            folder.display()
        ),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// SIGTERM and SIGINT stop the worker, a second one ends the process; SIGHUP reads the certificates anew.
fn signals(
    runtime: &Runtime,
    tasks: &mut JoinSet<()>,
    stop: Arc<Stop>,
    tell_stop: watch::Sender<bool>,
    tls: TlsReload<rustls::ClientConfig>,
    clock: Arc<dyn Clock>,
) -> anyhow::Result<()> {
    let _guard = runtime.enter();
    let mut stops = StopSignals::new().context("signals")?;
    tasks.spawn_on(
        async move {
            let name = stops.next().await;
            tracing::info!(signal = name, "stopping: what is under way is saved first");
            tell_stop.send_replace(true);
            stop.tell();
            let name = stops.next().await;
            tracing::warn!(signal = name, "stopping at once on a second signal");
            std::process::exit(1);
        },
        runtime.handle(),
    );
    let mut reloads = reload_signals().context("SIGHUP")?;
    tasks.spawn_on(
        async move {
            while reloads.next().await.is_some() {
                match tls.reload(clock.now()) {
                    Ok(peer) => tracing::info!(serial = %peer.serial, not_after = %peer.not_after, "certificates read anew"),
                    Err(error) => tracing::error!(%error, "the new certificates cannot be used; the old ones stay"),
                }
            }
        },
        runtime.handle(),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_folder_serves_one_worker_and_nobody_else_looks_into_it() {
        use std::os::unix::fs::PermissionsExt as _;

        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        private_folder(&state).unwrap();
        let mode = std::fs::metadata(&state).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let first = lock(&state).unwrap();
        let refused = lock(&state).unwrap_err();
        assert!(refused.to_string().contains("another worker"), "{refused}");
        drop(first);
        lock(&state).unwrap();
    }
}
