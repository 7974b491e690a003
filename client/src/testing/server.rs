//! The federation in memory behind gRPC on loopback, without TLS: for the client's side of the protocol.

use std::{net::SocketAddr, sync::Arc};

use concord_common::{
    JobId, RoundNumber, SiloId,
    adapter::AdapterVersion,
    chunk::{DEFAULT_CHUNK_BYTES, chunks},
    code::Refusal,
    wire,
};
use concord_proto::v1::{
    self,
    federation_service_server::{FederationService, FederationServiceServer},
};
use futures::{Stream, StreamExt as _};
use std::pin::Pin;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming, transport::Server};

use crate::coordinator::memory::Federation;

type Answer<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A listening server. It ends when it is dropped, connections included.
pub(crate) struct FakeServer {
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl FakeServer {
    /// Serves `federation` to one silo at this address; port 0 lets the system choose.
    pub(crate) async fn start(
        federation: Arc<Federation>,
        silo: SiloId,
        address: SocketAddr,
    ) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = FederationServiceServer::new(Service { federation, silo });
        let serving = Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        let task = TaskTracker::new().spawn(async move { serving.await.unwrap() });
        Self { address, task }
    }

    /// Stops and waits for the port to be free.
    pub(crate) async fn stop(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Service {
    federation: Arc<Federation>,
    silo: SiloId,
}

fn job(text: &str) -> Result<JobId, Status> {
    Ok(wire::job_id(text)?)
}

#[tonic::async_trait]
impl FederationService for Service {
    type WatchRoundsStream = Answers<v1::WatchRoundsResponse>;
    type DownloadAdapterStream = Answers<v1::DownloadAdapterResponse>;

    async fn get_server_info(
        &self,
        _: Request<v1::GetServerInfoRequest>,
    ) -> Answer<v1::GetServerInfoResponse> {
        Ok(Response::new(self.federation.info_message()))
    }

    async fn watch_rounds(
        &self,
        _: Request<v1::WatchRoundsRequest>,
    ) -> Answer<Self::WatchRoundsStream> {
        let (federation, silo) = (Arc::clone(&self.federation), self.silo.clone());
        let messages = self.federation.changes().map(move |()| {
            Ok(v1::WatchRoundsResponse {
                notices: federation.notice_messages(&silo),
            })
        });
        Ok(Response::new(Box::pin(messages)))
    }

    async fn poll_rounds(
        &self,
        _: Request<v1::PollRoundsRequest>,
    ) -> Answer<v1::PollRoundsResponse> {
        Ok(Response::new(v1::PollRoundsResponse {
            notices: self.federation.notice_messages(&self.silo),
        }))
    }

    async fn claim_lease(
        &self,
        request: Request<v1::ClaimLeaseRequest>,
    ) -> Answer<v1::ClaimLeaseResponse> {
        let message = request.into_inner();
        let claim = self.federation.claim_message(
            &self.silo,
            &job(&message.job_id)?,
            RoundNumber(message.round),
        )?;
        Ok(Response::new(claim))
    }

    async fn decline_job(
        &self,
        request: Request<v1::DeclineJobRequest>,
    ) -> Answer<v1::DeclineJobResponse> {
        let message = request.into_inner();
        let code = message
            .reason
            .parse()
            .map_err(|_| Status::invalid_argument("reason"))?;
        self.federation
            .decline(&self.silo, &job(&message.job_id)?, code)?;
        Ok(Response::new(v1::DeclineJobResponse {}))
    }

    async fn download_adapter(
        &self,
        request: Request<v1::DownloadAdapterRequest>,
    ) -> Answer<Self::DownloadAdapterStream> {
        let message = request.into_inner();
        let version: AdapterVersion = wire::adapter_version("version", &message.version)?;
        let payload = self.federation.payload(&job(&message.job_id)?, version)?;
        let pieces = chunks(&payload, message.offset, DEFAULT_CHUNK_BYTES)
            .map(|chunk| Ok(v1::DownloadAdapterResponse { chunk: Some(chunk) }));
        Ok(Response::new(Box::pin(futures::stream::iter(pieces))))
    }

    async fn begin_contribution(
        &self,
        request: Request<v1::BeginContributionRequest>,
    ) -> Answer<v1::BeginContributionResponse> {
        let begun = self
            .federation
            .begin_message(&self.silo, &request.into_inner())?;
        Ok(Response::new(begun))
    }

    async fn upload_contribution(
        &self,
        request: Request<Streaming<v1::UploadContributionRequest>>,
    ) -> Answer<v1::UploadContributionResponse> {
        let mut messages = request.into_inner();
        let mut id = Vec::new();
        while let Some(message) = messages.message().await? {
            if id.is_empty() {
                id = message.upload_id;
            }
            if let Some(chunk) = message.chunk {
                self.federation.take_chunk(&id, &chunk)?;
            }
        }
        let receipt = self.federation.close_upload(&id)?;
        Ok(Response::new(v1::UploadContributionResponse {
            receipt: Some(receipt.to_proto()),
        }))
    }

    async fn report_metrics(
        &self,
        request: Request<v1::ReportMetricsRequest>,
    ) -> Answer<v1::ReportMetricsResponse> {
        let message = request.into_inner();
        let report = message.report.ok_or_else(|| {
            Status::from(Refusal::new(
                concord_common::ErrorCode::InvalidRequest,
                "report",
            ))
        })?;
        self.federation.report_message(&self.silo, &report)?;
        Ok(Response::new(v1::ReportMetricsResponse {}))
    }
}
