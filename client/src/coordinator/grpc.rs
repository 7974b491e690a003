//! The coordinator over gRPC and mutual TLS.

use std::{future::Future, time::Duration};

use concord_common::{
    JobId, RoundNumber,
    adapter::AdapterVersion,
    code::Refusal,
    error_text,
    tls::{ConnectError, explain_tls_error},
    wire::SignedReceipt,
};
use concord_proto::v1::{self, federation_service_client::FederationServiceClient};
use futures::StreamExt as _;
use tokio::time::timeout;
use tonic::{Code, Status, Streaming, transport::Channel};

use super::{
    Begun, CallError, Chunks, Claim, Coordinator, Notice, Notices, ServerInfo, begin_request,
};
use crate::egress::{Cleared, ClearedDecline, ClearedReport, Departure};

/// A slower upload than this is given up: bytes a second.
const SLOWEST_UPLOAD: u64 = 16 * 1024;

/// How long a transfer may wait for its turn on the server, besides the time of any call: the default of the server's
/// `limits.transfer_wait`. Who gives up earlier loses its place and begins at the end of the queue.
const TRANSFER_WAIT: Duration = Duration::from_mins(2);

/// A channel and the time that a call may take.
#[derive(Debug, Clone)]
pub struct GrpcCoordinator {
    client: FederationServiceClient<Channel>,
    timeout: Duration,
}

impl GrpcCoordinator {
    /// Calls over `channel` (see [`concord_common::tls::connect_channel`]) that fail after `timeout` without an answer; transfers, which
    /// may wait for their turn, two minutes later.
    pub fn new(channel: Channel, timeout: Duration) -> Self {
        Self {
            client: FederationServiceClient::new(channel),
            timeout,
        }
    }

    /// A clone: tonic's clients want `&mut self` and are made to be cloned.
    fn client(&self) -> FederationServiceClient<Channel> {
        self.client.clone()
    }

    async fn unary<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, Status>> + Send,
    ) -> Result<T, CallError> {
        answer(self.timeout, call).await
    }
}

async fn answer<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>> + Send,
) -> Result<T, CallError> {
    match timeout(limit, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(call_error(&status)),
        Err(_) => Err(too_slow(limit)),
    }
}

fn too_slow(limit: Duration) -> CallError {
    CallError::Unavailable {
        reason: format!("no answer within {}", humantime::format_duration(limit)),
        retry_after: None,
    }
}

/// What a status means for the silo.
pub(crate) fn call_error(status: &Status) -> CallError {
    if let Some(refusal) = Refusal::from_status(status) {
        return CallError::from_refusal(refusal);
    }
    if let Some(reason) = explain_tls_error(status) {
        return CallError::Unavailable {
            reason,
            retry_after: None,
        };
    }
    let code = status.code();
    match code {
        Code::Unavailable
        | Code::Unknown
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Internal
        | Code::Aborted
        | Code::ResourceExhausted
        | Code::DataLoss => CallError::Unavailable {
            reason: innermost(status),
            retry_after: None,
        },
        _ => CallError::Protocol(format!("{code:?}: {}", status.message())),
    }
}

/// The text of the cause that says most: the one that names the server's address, or else the deepest ("connection
/// refused" says more than "transport error").
fn innermost(status: &Status) -> String {
    let mut cause: &(dyn std::error::Error + 'static) = status;
    while !cause.is::<ConnectError>()
        && let Some(deeper) = cause.source()
    {
        cause = deeper;
    }
    let text = error_text(cause);
    if text.is_empty() {
        status.to_string()
    } else {
        text
    }
}

impl Coordinator for GrpcCoordinator {
    async fn info(&self) -> Result<ServerInfo, CallError> {
        let mut client = self.client();
        let answer = self
            .unary(client.get_server_info(v1::GetServerInfoRequest {}))
            .await?;
        ServerInfo::from_proto(answer)
    }

    async fn watch(&self) -> Result<Notices, CallError> {
        let mut client = self.client();
        let stream = self
            .unary(client.watch_rounds(v1::WatchRoundsRequest {}))
            .await?;
        let notices = stream.map(|message| match message {
            Ok(message) => notices(&message.notices),
            Err(status) => Err(call_error(&status)),
        });
        Ok(Box::pin(notices))
    }

    async fn poll(&self) -> Result<Vec<Notice>, CallError> {
        let mut client = self.client();
        let answer = self
            .unary(client.poll_rounds(v1::PollRoundsRequest {}))
            .await?;
        notices(&answer.notices)
    }

    async fn claim(&self, job: &JobId, round: RoundNumber) -> Result<Claim, CallError> {
        let mut client = self.client();
        let answer = self
            .unary(client.claim_lease(v1::ClaimLeaseRequest {
                job_id: job.to_string(),
                round: round.0,
            }))
            .await?;
        Claim::from_proto(answer)
    }

    async fn decline(&self, decline: &ClearedDecline) -> Result<(), CallError> {
        let mut client = self.client();
        self.unary(client.decline_job(v1::DeclineJobRequest {
            job_id: decline.job().to_string(),
            reason: decline.code().as_str().to_owned(),
            message: decline.sentence().to_owned(),
        }))
        .await?;
        Ok(())
    }

    async fn download(
        &self,
        job: &JobId,
        version: AdapterVersion,
        offset: u64,
    ) -> Result<Chunks, CallError> {
        let mut client = self.client();
        let request = v1::DownloadAdapterRequest {
            job_id: job.to_string(),
            version: version.0.to_vec(),
            offset,
        };
        let stream = answer(
            self.timeout + TRANSFER_WAIT,
            client.download_adapter(request),
        )
        .await?;
        let limit = self.timeout;
        Ok(Box::pin(futures::stream::unfold(
            Some(stream),
            move |state| async move {
                let mut stream = state?;
                match next_chunk(&mut stream, limit).await {
                    Ok(Some(chunk)) => Some((Ok(chunk), Some(stream))),
                    Ok(None) => None,
                    Err(error) => Some((Err(error), None)),
                }
            },
        )))
    }

    async fn begin(&self, cleared: &Cleared, token: &[u8]) -> Result<Begun, CallError> {
        let mut client = self.client();
        let answer = self
            .unary(client.begin_contribution(begin_request(cleared, token)))
            .await?;
        Begun::from_proto(answer)
    }

    async fn upload(
        &self,
        departure: &Departure,
        upload_id: &[u8],
    ) -> Result<SignedReceipt, CallError> {
        let payload = departure.cleared().payload();
        let id = upload_id.to_vec();
        let chunks = departure.cleared().cut().chunks(departure.offset());
        let messages = chunks.map(move |chunk| v1::UploadContributionRequest {
            upload_id: id.clone(),
            chunk: Some(chunk),
        });
        // All bytes may be there already and only the receipt be missing: the stream then names the upload and ends.
        let empty = departure.offset() >= payload.len() as u64;
        let name_only = empty.then(|| v1::UploadContributionRequest {
            upload_id: upload_id.to_vec(),
            chunk: None,
        });
        let messages = futures::stream::iter(name_only.into_iter().chain(messages));
        let moving = Duration::from_secs(payload.len() as u64 / SLOWEST_UPLOAD);
        let allowed = self.timeout + TRANSFER_WAIT + moving;
        let mut client = self.client();
        // The state of a payload's hashes is in it: too large for a caller's stack.
        let sent = Box::pin(client.upload_contribution(messages));
        let reply = answer(allowed, sent).await?;
        let receipt = reply
            .receipt
            .ok_or_else(|| CallError::Protocol("`receipt` is missing".to_owned()))?;
        SignedReceipt::from_proto(&receipt).map_err(|refusal| CallError::protocol(&refusal))
    }

    async fn report(&self, report: &ClearedReport) -> Result<(), CallError> {
        let mut client = self.client();
        self.unary(client.report_metrics(v1::ReportMetricsRequest {
            report: Some(report.report().to_proto()),
        }))
        .await?;
        Ok(())
    }
}

fn notices(proto: &[v1::RoundNotice]) -> Result<Vec<Notice>, CallError> {
    proto.iter().map(Notice::from_proto).collect()
}

async fn next_chunk(
    stream: &mut Streaming<v1::DownloadAdapterResponse>,
    limit: Duration,
) -> Result<Option<v1::Chunk>, CallError> {
    match timeout(limit, stream.message()).await {
        Ok(Ok(Some(message))) => message
            .chunk
            .map(Some)
            .ok_or_else(|| CallError::Protocol("`chunk` is missing".to_owned())),
        Ok(Ok(None)) => Ok(None),
        Ok(Err(status)) => Err(call_error(&status)),
        Err(_) => Err(too_slow(limit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_does_not_answer_is_named() {
        let error = ConnectError::TooSlow {
            address: "hub.example.org:7600".to_owned(),
            after: Duration::from_secs(5),
        };
        let status = Status::from_error(Box::new(error));
        let text = innermost(&status);
        assert!(text.contains("hub.example.org:7600"), "{text}");
    }

    /// Time for a call to a server that accepts connections and says nothing.
    #[tokio::test(start_paused = true)]
    async fn a_download_waits_for_its_turn_longer_than_a_call_for_its_answer() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let channel = Channel::from_shared(url).unwrap().connect_lazy();
        let limit = Duration::from_mins(1);
        let coordinator = GrpcCoordinator::new(channel, limit);
        let start = tokio::time::Instant::now();
        coordinator.info().await.unwrap_err();
        assert_eq!(start.elapsed().as_secs(), limit.as_secs());

        let start = tokio::time::Instant::now();
        let job = "job-1".parse().unwrap();
        let version = AdapterVersion::of(b"any");
        let Err(error) = coordinator.download(&job, version, 0).await else {
            panic!("nobody answers");
        };
        assert!(error.is_transient(), "{error}");
        let waited = start.elapsed().as_secs();
        assert_eq!(waited, (limit + TRANSFER_WAIT).as_secs());
    }

    #[test]
    fn without_a_known_cause_the_status_speaks() {
        let text = innermost(&Status::unavailable("going away"));
        assert!(text.contains("going away"), "{text}");
    }
}
