//! Metrics and probes over plain HTTP, on a listener of their own: `/metrics`, `/livez`, `/readyz`.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use concord_common::{
    lifecycle::Shutdown,
    telemetry::{describe_all, record_process_metrics},
};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;

use crate::{context::Context, listener::ListenError};

/// Bounds of the buckets of every histogram, in seconds.
const BUCKETS: &[f64] = &[
    0.005, 0.02, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0,
];
/// How often histograms are folded, so that they do not grow between two scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// The process's metrics; the recorder is installed at the first call. None if another one was installed before.
pub(crate) fn recorder() -> Option<PrometheusHandle> {
    static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let handle = PrometheusBuilder::new()
                .set_buckets(BUCKETS)
                .and_then(PrometheusBuilder::install_recorder);
            match handle {
                Ok(handle) => {
                    describe_all();
                    Some(handle)
                }
                Err(error) => {
                    tracing::error!(%error, "metrics are not recorded");
                    None
                }
            }
        })
        .clone()
}

#[derive(Clone)]
struct Ops {
    context: Arc<Context>,
    shutdown: Shutdown,
    metrics: Option<PrometheusHandle>,
}

/// Serves until `shutdown`; gives the bound address, or none if it is switched off.
///
/// # Errors
/// If the address cannot be bound.
pub(crate) async fn serve(
    context: &Arc<Context>,
    metrics: Option<PrometheusHandle>,
    shutdown: &Shutdown,
) -> Result<Option<SocketAddr>, ListenError> {
    let section = &context.config.ops;
    if !section.enabled {
        return Ok(None);
    }
    let bound = |source| ListenError::Bind {
        address: section.address,
        source,
    };
    let listener = TcpListener::bind(section.address).await.map_err(bound)?;
    let address = listener.local_addr().map_err(bound)?;
    if let Some(handle) = metrics.clone() {
        let stop = shutdown.token();
        shutdown.spawn(async move {
            while tokio::time::timeout(UPKEEP, stop.cancelled())
                .await
                .is_err()
            {
                handle.run_upkeep();
            }
        });
    }
    let ops = Ops {
        context: Arc::clone(context),
        shutdown: shutdown.clone(),
        metrics,
    };
    let router = Router::new()
        .route("/metrics", get(scrape))
        .route("/livez", get(alive))
        .route("/readyz", get(ready))
        .with_state(ops);
    let (soft, hard) = (shutdown.token(), shutdown.hard_token());
    shutdown.spawn_critical("listener of metrics and probes", async move {
        let serving = axum::serve(listener, router).with_graceful_shutdown(soft.cancelled_owned());
        tokio::select! {
            served = async { serving.await } => served,
            () = hard.cancelled() => Ok(()),
        }
    });
    Ok(Some(address))
}

async fn scrape(State(ops): State<Ops>) -> Result<String, StatusCode> {
    record_process_metrics();
    let metrics = ops.metrics.ok_or(StatusCode::SERVICE_UNAVAILABLE)?;
    Ok(metrics.render())
}

/// Whether starting the process anew is not called for.
async fn alive(State(ops): State<Ops>) -> (StatusCode, String) {
    match lifeless(&ops.shutdown) {
        None => (StatusCode::OK, "alive\n".to_owned()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason),
    }
}

/// Whether calls are taken and lead to something.
async fn ready(State(ops): State<Ops>) -> (StatusCode, String) {
    let reason = if let Some(reason) = lifeless(&ops.shutdown) {
        reason
    } else if ops.shutdown.is_stopping() {
        "stopping\n".to_owned()
    } else if let Err(error) = ops.context.datastore.ping().await {
        tracing::warn!(%error, "the database gives no sign of life");
        "the database gives no sign of life\n".to_owned()
    } else {
        return (StatusCode::OK, "ready\n".to_owned());
    };
    (StatusCode::SERVICE_UNAVAILABLE, reason)
}

/// A part that the server cannot do without and that does nothing any more.
fn lifeless(shutdown: &Shutdown) -> Option<String> {
    let ended = shutdown
        .failed_task()
        .map(|name| format!("the {name} has ended\n"));
    ended.or_else(|| Some(format!("the {} is stuck\n", shutdown.stuck()?)))
}
