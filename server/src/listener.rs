//! The gRPC server on the TLS acceptor.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use concord_common::{
    ErrorCode,
    code::Refusal,
    lifecycle::Shutdown,
    tls::{Acceptor, TlsError},
};
use concord_proto::v1::{
    federation_service_server::FederationServiceServer,
    operator_service_server::OperatorServiceServer, worker_service_server::WorkerServiceServer,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_rustls::rustls::ServerConfig;
use tonic::{Code, Status, body::Body, service::Routes, transport::Server};
use tonic_health::server::HealthReporter;
use tower::util::{MapRequestLayer, MapResponseLayer};

use crate::{
    context::Context,
    metrics,
    service::{federation::Federation, operator::Operator, worker::Workers},
};

mod message;

/// A ping goes out after this long without traffic, and a connection that does not answer it is given up.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// What calls still get after a connection has come to its greatest age; then they are cut off.
const CONNECTION_GRACE: Duration = Duration::from_mins(10);

/// Largest HTTP/2 frame that a peer may send, in bytes: fewer and larger ones cost less to take apart.
const FRAME: u32 = 128 << 10;

/// A worker's message that must pass: lines of 1 MiB together, with what stands around each.
const WORKER_MESSAGE: usize = (1 << 20) + (64 << 10);

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Certificate, key or CA cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The reflection service cannot be built.
    #[error("cannot describe the protocol: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Binds the address of the section `[listen]`.
///
/// # Errors
/// [`ListenError::Bind`].
pub(crate) async fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ListenError::Bind { address, source })
}

/// Starts to serve on a bound listener, until `shutdown`.
///
/// # Errors
/// If the services cannot be built.
pub(crate) async fn serve(
    context: &Arc<Context>,
    listener: TcpListener,
    tls: watch::Receiver<Arc<ServerConfig>>,
    shutdown: &Shutdown,
) -> Result<(), ListenError> {
    let config = &context.config;
    let (health, routes) = routes(context, shutdown).await?;
    let acceptor = Acceptor::new(listener, tls, config.listen.limits());
    let limits = &config.limits;
    let message_time = limits.message_time;
    let mut server = Server::builder()
        .layer(MapResponseLayer::new(explain_limit))
        .layer(MapRequestLayer::new(move |request| {
            message::in_time(request, message_time)
        }))
        .initial_stream_window_size(limits.stream_window.bytes() as u32)
        .initial_connection_window_size(limits.connection_window.bytes() as u32)
        .max_concurrent_streams(limits.max_streams)
        .max_frame_size(FRAME)
        .http2_max_header_list_size(limits.max_headers.bytes() as u32)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .max_connection_age(limits.max_connection_age)
        .max_connection_age_grace(CONNECTION_GRACE);
    let (soft, hard) = (shutdown.token(), shutdown.hard_token());
    let workers_ended = context.workers_ended.clone();
    shutdown.spawn_critical("listener of silos and operators", async move {
        let stop = async {
            soft.cancelled().await;
            // Those who ask before they send more are told in time.
            health
                .set_not_serving::<FederationServiceServer<Federation>>()
                .await;
            health
                .set_not_serving::<OperatorServiceServer<Operator>>()
                .await;
            health
                .set_not_serving::<WorkerServiceServer<Workers>>()
                .await;
            health
                .set_service_status("", tonic_health::ServingStatus::NotServing)
                .await;
            // A worker of this machine is stopping too, and has to bring what it has made.
            workers_ended.cancelled().await;
        };
        let serving = server
            .add_routes(routes)
            .serve_with_incoming_shutdown(acceptor.into_stream(), stop);
        tokio::select! {
            served = serving => served,
            () = hard.cancelled() => Ok(()),
        }
    });
    Ok(())
}

/// Gives tonic's answer to a message beyond its bound the form of every other refusal.
fn explain_limit(response: http::Response<Body>) -> http::Response<Body> {
    let status = Status::from_header_map(response.headers());
    match status {
        Some(status) if status.code() == Code::OutOfRange && status.details().is_empty() => {
            let refusal = Refusal::new(
                ErrorCode::InvalidRequest,
                format!("the message is too large: {}", status.message()),
            );
            metrics::refusal(refusal.code);
            Status::from(refusal).into_http()
        }
        _ => response,
    }
}

async fn routes(
    context: &Arc<Context>,
    shutdown: &Shutdown,
) -> Result<(HealthReporter, Routes), ListenError> {
    let most = context.config.limits.max_message.bytes() as usize;
    let federation =
        FederationServiceServer::new(Federation::new(Arc::clone(context), shutdown.clone()))
            .max_decoding_message_size(most)
            .max_encoding_message_size(usize::MAX);
    let operator = OperatorServiceServer::new(Operator::new(Arc::clone(context), shutdown.clone()))
        .max_decoding_message_size(most)
        .max_encoding_message_size(usize::MAX);
    let worker = WorkerServiceServer::new(Workers::new(Arc::clone(context), shutdown.clone()))
        .max_decoding_message_size(most.max(WORKER_MESSAGE))
        .max_encoding_message_size(usize::MAX);
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_serving::<FederationServiceServer<Federation>>()
        .await;
    health
        .set_serving::<OperatorServiceServer<Operator>>()
        .await;
    health.set_serving::<WorkerServiceServer<Workers>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(concord_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let routes = Routes::new(federation)
        .add_service(operator)
        .add_service(worker)
        .add_service(health_service)
        .add_service(reflection);
    Ok((health, routes))
}

#[cfg(test)]
mod tests {
    use ::metrics::with_local_recorder;
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    #[test]
    fn a_message_beyond_its_bound_is_refused_in_the_usual_form_and_counted() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let answer = with_local_recorder(&recorder, || {
            explain_limit(Status::out_of_range("5 bytes, at most 4").into_http())
        });
        let status = Status::from_header_map(answer.headers()).unwrap();
        let refusal = Refusal::from_status(&status).unwrap();
        assert_eq!(refusal.code, ErrorCode::InvalidRequest);
        assert!(refusal.message.contains("at most 4"), "{refusal}");
        let counted = recorder.handle().render();
        assert!(counted.contains("INVALID_REQUEST"), "{counted}");

        // A refusal that has its form already was counted where it was made.
        let refused = Status::from(Refusal::new(ErrorCode::Busy, "later"));
        let recorder = PrometheusBuilder::new().build_recorder();
        with_local_recorder(&recorder, || explain_limit(refused.into_http()));
        assert_eq!(recorder.handle().render(), "");
    }
}
