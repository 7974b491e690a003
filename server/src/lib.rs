//! Concord's server: takes jobs from operators, runs their rounds with the silos, keeps adapters and receipts.
//!
//! [`Server::start`] is the whole of it in one call; the binary `concord-server` adds a command line, signals and the service
//! manager, and the binary `concord` ([`cli`]) is the operator's end.
//!
//! From the outside in: [`listener`] and [`ops`] bind and serve, [`service`] validates and answers, [`decide`] is what happens
//! inside transactions, [`driver`] carries out what follows, [`datastore`], [`blobs`], [`spool`] and [`objects`] keep it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use concord_common::{
    Clock,
    lifecycle::{Shutdown, StopOutcome},
    tls::{PeerIdentity, TlsError, TlsReload},
};
use tokio_rustls::rustls;

pub mod blobs;
pub mod cli;
pub mod config;
pub mod context;
pub mod datastore;
pub mod decide;
pub mod digests;
pub mod driver;
pub mod error;
pub mod hub;
pub mod ids;
pub mod listener;
mod metrics;
pub mod objects;
pub mod ops;
pub mod presence;
pub mod service;
pub mod specs;
pub mod spool;
#[cfg(test)]
mod tests;
mod writeback;

use config::ServerConfig;
use context::Context;
use ids::{Ids, RandomIds};

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting cannot be used.
    #[error(transparent)]
    Config(#[from] config::InvalidConfig),
    /// An address cannot be listened on, or certificates cannot be used.
    #[error(transparent)]
    Listen(#[from] listener::ListenError),
    /// The state folder cannot be used.
    #[error(transparent)]
    State(#[from] error::Failure),
}

impl StartError {
    /// True if only a change of settings or certificates can help: starting again as it is cannot.
    pub fn is_configuration(&self) -> bool {
        matches!(
            self,
            Self::Config(_) | Self::Listen(listener::ListenError::Tls(_))
        )
    }
}

impl From<TlsError> for StartError {
    fn from(error: TlsError) -> Self {
        Self::Listen(error.into())
    }
}

/// The server, not running.
#[derive(Debug)]
pub struct Server;

/// The server, running in the tokio runtime that started it.
#[derive(Debug)]
pub struct RunningServer {
    /// Where silos and operators connect.
    pub addr: SocketAddr,
    /// Where metrics and probes are, unless switched off.
    pub ops_addr: Option<SocketAddr>,
    context: Arc<Context>,
    shutdown: Shutdown,
    tls: TlsReload<rustls::ServerConfig>,
}

impl Server {
    /// Starts the server: everything is checked before a port is bound, and when this returns it takes calls.
    ///
    /// # Errors
    /// If settings, certificates, state folder or addresses cannot be used.
    pub async fn start(
        config: ServerConfig,
        clock: Arc<dyn Clock>,
    ) -> Result<RunningServer, StartError> {
        Self::start_with(config, clock, Arc::new(RandomIds)).await
    }

    /// The same with a given source of ids.
    ///
    /// # Errors
    /// As for [`Server::start`].
    pub async fn start_with(
        config: ServerConfig,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn Ids>,
    ) -> Result<RunningServer, StartError> {
        config.check()?;
        // First of all, so that nothing is counted before there is a recorder.
        let recorder = config.ops.enabled.then(ops::recorder).flatten();
        let tls = TlsReload::server(config.tls.clone(), &config.federation, clock.now())?;
        let context = Arc::new(Context::open(config, clock, ids).await?);
        driver::spare(&context).await?;
        driver::workers::spare(&context).await?;
        driver::finish_deletions(&context).await?;
        let shutdown = context.shutdown.clone();
        let address = context.config.listen.address;
        let bound = listener::bind(address).await?;
        let addr = bound
            .local_addr()
            .map_err(|source| listener::ListenError::Bind { address, source })?;
        let ops_addr = ops::serve(&context, recorder, &shutdown).await?;
        listener::serve(&context, bound, tls.subscribe(), &shutdown).await?;
        shutdown.spawn_critical("database", durability(Arc::clone(&context)));
        shutdown.spawn_critical("driver", driver::run(Arc::clone(&context)));
        shutdown.spawn_critical("sweep", driver::sweep(Arc::clone(&context)));
        let (leases, supervisor) = (Arc::clone(&context), Arc::clone(&context));
        shutdown.spawn_critical("leases of workers", driver::workers::leases(leases));
        shutdown.spawn_critical(
            "supervisor of workers",
            driver::workers::supervise(supervisor),
        );
        tracing::info!(address = %addr, federation = %context.config.federation, "listening");
        if let Some(address) = ops_addr {
            tracing::info!(%address, "serving metrics and probes");
        }
        Ok(RunningServer {
            addr,
            ops_addr,
            context,
            shutdown,
            tls,
        })
    }
}

/// Fails when the disk has: a server that can promise nothing any more must not go on as if it were well.
async fn durability(context: Arc<Context>) -> Result<(), datastore::DatastoreError> {
    tokio::select! {
        () = context.shutdown.token().cancelled_owned() => Ok(()),
        error = context.datastore.lost() => Err(error),
    }
}

impl RunningServer {
    /// The server's tasks, for `main` to wait on.
    pub fn shutdown(&self) -> &Shutdown {
        &self.shutdown
    }

    /// What the server is made of, for tests and embedding.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Reads the certificate files anew; connections from now on see the new ones.
    ///
    /// # Errors
    /// If they cannot be used; the old ones then stay.
    pub fn reload_tls(&self) -> Result<PeerIdentity, TlsError> {
        self.tls.reload(self.context.now())
    }

    /// Stops: takes no new calls, ends streams, lets transfers finish until `deadline`, closes the database.
    pub async fn stop(self, deadline: Duration) -> StopOutcome {
        let outcome = self.shutdown.stop(deadline, std::future::pending()).await;
        self.context.datastore.close().await;
        outcome
    }
}
