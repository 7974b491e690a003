//! The server over gRPC and mutual TLS.

#[cfg(test)]
mod tests;

use std::{
    fs::File,
    future::Future,
    io::{self, Read as _},
    path::Path,
    time::Duration,
};

use bytes::Bytes;
use concord_common::{
    Digest,
    chunk::{DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, StreamDigest, chunks},
    code::Refusal,
    error_text,
    tls::explain_tls_error,
};
use concord_proto::v1::{
    self, put_object_request::Part, worker_service_client::WorkerServiceClient,
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};

use super::{CallError, Claim, Payload, Renewed, Server};

/// A slower transfer than this is given up: bytes a second.
const SLOWEST: u64 = 16 * 1024;
/// How long a claim may stay unanswered beside the time of any call: the server answers without a job after a while.
const CLAIM_WAIT: Duration = Duration::from_mins(2);
/// When to ask again if the server does not say.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Largest message that is read: some lines of a journal.
const MAX_MESSAGE: usize = 8 << 20;
/// Largest object that is fetched, as the worker's own store has it.
const MAX_OBJECT: usize = 8 << 30;
/// Longest journal that is read, as long as the server takes one: enough for tens of thousands of pairs with all that an advisor said.
const MAX_JOURNAL: usize = 512 << 20;
/// Kinds of jobs that this worker runs.
const KIND: &str = "artaug";
/// Messages of an upload that are ready before they are sent.
const AHEAD: usize = 4;

/// A channel, and the runtime on which its calls wait.
#[derive(Debug)]
pub struct GrpcServer {
    client: WorkerServiceClient<Channel>,
    runtime: Handle,
    timeout: Duration,
    stopped: watch::Receiver<bool>,
}

impl GrpcServer {
    /// Calls over `channel` (see [`concord_common::tls::connect_channel`]) that fail after `timeout` without an answer. A claim ends
    /// as soon as `stopped` says so.
    pub fn new(
        channel: Channel,
        runtime: Handle,
        timeout: Duration,
        stopped: watch::Receiver<bool>,
    ) -> Self {
        Self {
            client: WorkerServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
            runtime,
            timeout,
            stopped,
        }
    }

    /// A clone: tonic's clients want `&mut self` and are made to be cloned.
    fn client(&self) -> WorkerServiceClient<Channel> {
        self.client.clone()
    }

    fn unary<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, CallError> {
        self.runtime.block_on(answer(self.timeout, call))
    }
}

async fn answer<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, CallError> {
    match timeout(limit, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(call_error(&status)),
        Err(_) => Err(too_slow(limit)),
    }
}

async fn next<T>(
    limit: Duration,
    stream: &mut tonic::Streaming<T>,
) -> Result<Option<T>, CallError> {
    match timeout(limit, stream.message()).await {
        Ok(Ok(message)) => Ok(message),
        Ok(Err(status)) => Err(call_error(&status)),
        Err(_) => Err(too_slow(limit)),
    }
}

fn too_slow(limit: Duration) -> CallError {
    CallError::Unavailable {
        reason: format!("no answer within {} s", limit.as_secs()),
        retry_after: None,
        is_fault: false,
    }
}

/// What a status means for the worker.
fn call_error(status: &Status) -> CallError {
    if let Some(refusal) = Refusal::from_status(status) {
        return CallError::from_refusal(refusal);
    }
    // Whatever stands in between may have made this up, also an INTERNAL; the server itself says more.
    let unavailable = |reason| CallError::Unavailable {
        reason,
        retry_after: None,
        is_fault: false,
    };
    if let Some(reason) = explain_tls_error(status) {
        return unavailable(reason);
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
        | Code::DataLoss => unavailable(error_text(status)),
        _ => CallError::Protocol(format!("{code:?}: {}", status.message())),
    }
}

fn digest_of(bytes: &[u8]) -> Result<Digest, CallError> {
    Digest::try_from(bytes).map_err(|error| CallError::Protocol(error.to_string()))
}

fn duration_of(duration: Option<prost_types::Duration>) -> Option<Duration> {
    Duration::try_from(duration?).ok()
}

fn to_wire(digests: &[Digest]) -> Vec<Vec<u8>> {
    digests.iter().map(|digest| digest.to_vec()).collect()
}

impl Server for GrpcServer {
    fn claim(&self) -> Result<Claim, CallError> {
        let mut client = self.client();
        let mut stopped = self.stopped.clone();
        let request = v1::ClaimJobRequest {
            kinds: vec![KIND.to_owned()],
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let limit = self.timeout + CLAIM_WAIT;
        let answer = self.runtime.block_on(async {
            tokio::select! {
                answer = answer(limit, client.claim_job(request)) => answer,
                // An error says that nobody can stop us any more.
                Ok(_) = stopped.wait_for(|told| *told) => Ok(v1::ClaimJobResponse::default()),
            }
        })?;
        Ok(match answer.lease {
            Some(lease) => Claim::Job(lease),
            None => Claim::Nothing(duration_of(answer.retry_after).unwrap_or(ASK_AGAIN)),
        })
    }

    fn renew(
        &self,
        grip: &v1::JobGrip,
        progress: &v1::ArtaugProgress,
    ) -> Result<Renewed, CallError> {
        let mut client = self.client();
        let answer = self.unary(client.renew_job_lease(v1::RenewJobLeaseRequest {
            grip: Some(grip.clone()),
            progress: Some(progress.clone()),
        }))?;
        Ok(Renewed {
            command: answer.command(),
            reviews: answer.reviews,
        })
    }

    fn read_journal(&self, grip: &v1::JobGrip, first: u64) -> Result<Vec<Vec<u8>>, CallError> {
        let mut client = self.client();
        let request = v1::ReadJournalRequest {
            grip: Some(grip.clone()),
            first,
        };
        self.runtime.block_on(async {
            let mut stream = answer(self.timeout, client.read_journal(request)).await?;
            let (mut lines, mut bytes) = (Vec::new(), 0);
            while let Some(some) = next(self.timeout, &mut stream).await? {
                if some.first != first + lines.len() as u64 {
                    return Err(CallError::Protocol(format!(
                        "line {} of the journal came where {} was next",
                        some.first,
                        first + lines.len() as u64
                    )));
                }
                bytes += some.lines.iter().map(Vec::len).sum::<usize>();
                if bytes > MAX_JOURNAL {
                    return Err(CallError::Protocol(format!(
                        "the journal has more than {MAX_JOURNAL} bytes"
                    )));
                }
                lines.extend(some.lines);
            }
            Ok(lines)
        })
    }

    fn append(&self, grip: &v1::JobGrip, first: u64, lines: &[Vec<u8>]) -> Result<u64, CallError> {
        let mut client = self.client();
        let answer = self.unary(client.append_journal(v1::AppendJournalRequest {
            grip: Some(grip.clone()),
            first,
            lines: lines.to_vec(),
        }))?;
        Ok(answer.next)
    }

    fn find_missing(
        &self,
        grip: &v1::JobGrip,
        digests: &[Digest],
    ) -> Result<Vec<Digest>, CallError> {
        let mut client = self.client();
        let answer = self.unary(client.find_missing_objects(v1::FindMissingObjectsRequest {
            grip: Some(grip.clone()),
            digests: to_wire(digests),
        }))?;
        answer
            .missing
            .iter()
            .map(|bytes| digest_of(bytes))
            .collect()
    }

    fn put_object(
        &self,
        grip: &v1::JobGrip,
        digest: Digest,
        payload: &Payload,
    ) -> Result<u64, CallError> {
        let mut client = self.client();
        let header = v1::PutObjectRequest {
            part: Some(Part::Header(v1::PutObjectHeader {
                grip: Some(grip.clone()),
                digest: digest.to_vec(),
                bytes: payload.len(),
            })),
        };
        let limit = self.timeout + Duration::from_secs(payload.len() / SLOWEST);
        let file = match payload {
            Payload::Bytes(bytes) => {
                let parts = chunks(bytes, 0, DEFAULT_CHUNK_BYTES).map(of_chunk);
                let messages = tokio_stream::iter(std::iter::once(header).chain(parts));
                let call = client.put_object(messages);
                return Ok(self.runtime.block_on(answer(limit, call))?.bytes_kept);
            }
            Payload::File(path, _) => path.clone(),
        };
        let (sender, messages) = mpsc::channel(AHEAD);
        let read = file.clone();
        let reader = self.runtime.spawn_blocking(move || -> io::Result<()> {
            // A receiver that is gone means that the call has ended, and says why.
            if sender.blocking_send(header).is_ok() {
                send_file(&read, &sender)?;
            }
            Ok(())
        });
        let call = client.put_object(ReceiverStream::new(messages));
        let answer = self.runtime.block_on(answer(limit, call));
        let failed = |what: String| CallError::File {
            path: file.clone(),
            what,
        };
        self.runtime
            .block_on(reader)
            .map_err(|error| failed(error.to_string()))?
            .map_err(|error| failed(error.to_string()))?;
        Ok(answer?.bytes_kept)
    }

    fn get_object(&self, grip: &v1::JobGrip, digest: Digest) -> Result<Vec<u8>, CallError> {
        let mut client = self.client();
        let request = v1::GetObjectRequest {
            grip: Some(grip.clone()),
            digest: digest.to_vec(),
            offset: 0,
        };
        self.runtime.block_on(async {
            let mut stream = answer(self.timeout, client.get_object(request)).await?;
            let mut bytes = Vec::new();
            while let Some(message) = next(self.timeout, &mut stream).await? {
                let chunk = message
                    .chunk
                    .ok_or_else(|| CallError::Protocol("`chunk` is missing".to_owned()))?;
                if chunk.offset != bytes.len() as u64 || chunk.data.len() > MAX_CHUNK_BYTES {
                    return Err(CallError::Protocol(format!(
                        "a chunk of {} bytes at byte {} came where byte {} was next",
                        chunk.data.len(),
                        chunk.offset,
                        bytes.len()
                    )));
                }
                bytes.extend_from_slice(&chunk.data);
                if bytes.len() > MAX_OBJECT {
                    return Err(CallError::Protocol(format!(
                        "the object {} is larger than {MAX_OBJECT} bytes",
                        digest.short()
                    )));
                }
            }
            Ok(bytes)
        })
    }

    fn remove_objects(&self, grip: &v1::JobGrip, digests: &[Digest]) -> Result<u64, CallError> {
        let mut client = self.client();
        let answer = self.unary(client.remove_objects(v1::RemoveObjectsRequest {
            grip: Some(grip.clone()),
            digests: to_wire(digests),
        }))?;
        Ok(answer.bytes_kept)
    }

    fn reviews(&self, grip: &v1::JobGrip, after: u64) -> Result<Vec<v1::PairReview>, CallError> {
        let mut client = self.client();
        let answer = self.unary(client.read_reviews(v1::ReadReviewsRequest {
            grip: Some(grip.clone()),
            after,
        }))?;
        Ok(answer.reviews)
    }

    fn put_artefact(
        &self,
        grip: &v1::JobGrip,
        name: &str,
        digest: Digest,
    ) -> Result<(), CallError> {
        let mut client = self.client();
        self.unary(client.put_artefact(v1::PutArtefactRequest {
            grip: Some(grip.clone()),
            name: name.to_owned(),
            digest: digest.to_vec(),
        }))?;
        Ok(())
    }

    fn release(&self, request: &v1::ReleaseJobRequest) -> Result<(), CallError> {
        let mut client = self.client();
        self.unary(client.release_job(request.clone()))?;
        Ok(())
    }
}

fn of_chunk(chunk: v1::Chunk) -> v1::PutObjectRequest {
    v1::PutObjectRequest {
        part: Some(Part::Chunk(chunk)),
    }
}

/// Sends a file chunk by chunk; ends early if nobody listens any more.
fn send_file(path: &Path, sender: &mpsc::Sender<v1::PutObjectRequest>) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut digest = StreamDigest::new();
    let mut offset = 0;
    loop {
        let mut piece = Vec::with_capacity(DEFAULT_CHUNK_BYTES);
        let read = (&mut file)
            .take(DEFAULT_CHUNK_BYTES as u64)
            .read_to_end(&mut piece)?;
        if read == 0 {
            return Ok(());
        }
        let part = of_chunk(digest.chunk(offset, Bytes::from(piece)));
        if sender.blocking_send(part).is_err() {
            return Ok(());
        }
        offset += read as u64;
    }
}
