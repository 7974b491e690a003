//! Whole jobs over a connection: the made-up server behind the real protocol.

use std::{pin::Pin, sync::Arc};

use concord_common::code::ErrorCode;
use concord_proto::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::{Stream, StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Streaming, transport::Server as Transport};

use super::*;
use crate::{
    run::Worker,
    testing::{FakeServer, Loss, SPEC, worker},
};

struct Bridge(Arc<FakeServer>);

fn status(error: CallError) -> Status {
    match error {
        CallError::LeaseLost(message) => Refusal::new(ErrorCode::LeaseLost, message).into(),
        CallError::Unavailable { reason, .. } => Refusal::new(ErrorCode::Busy, reason).into(),
        error => Refusal::new(ErrorCode::InvalidRequest, error.to_string()).into(),
    }
}

fn digests(digests: &[Vec<u8>]) -> Vec<Digest> {
    digests
        .iter()
        .map(|bytes| digest_of(bytes).unwrap())
        .collect()
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn answers<T: Send + 'static>(messages: Vec<T>) -> Response<Answers<T>> {
    Response::new(Box::pin(tokio_stream::iter(messages.into_iter().map(Ok))))
}

#[tonic::async_trait]
impl WorkerService for Bridge {
    type ReadJournalStream = Answers<v1::ReadJournalResponse>;
    type GetObjectStream = Answers<v1::GetObjectResponse>;

    async fn claim_job(
        &self,
        _: Request<v1::ClaimJobRequest>,
    ) -> Result<Response<v1::ClaimJobResponse>, Status> {
        let lease = match self.0.claim().map_err(status)? {
            Claim::Job(lease) => Some(lease),
            Claim::Nothing(_) => None,
        };
        Ok(Response::new(v1::ClaimJobResponse {
            lease,
            retry_after: None,
        }))
    }

    async fn renew_job_lease(
        &self,
        request: Request<v1::RenewJobLeaseRequest>,
    ) -> Result<Response<v1::RenewJobLeaseResponse>, Status> {
        let request = request.into_inner();
        let renewed = self
            .0
            .renew(&request.grip.unwrap(), &request.progress.unwrap())
            .map_err(status)?;
        Ok(Response::new(v1::RenewJobLeaseResponse {
            command: renewed.command as i32,
            reviews: renewed.reviews,
        }))
    }

    async fn read_journal(
        &self,
        request: Request<v1::ReadJournalRequest>,
    ) -> Result<Response<Self::ReadJournalStream>, Status> {
        let request = request.into_inner();
        let lines = self
            .0
            .read_journal(&request.grip.unwrap(), request.first)
            .map_err(status)?;
        // A few lines in each message.
        let messages = lines.chunks(7).scan(request.first, |first, lines| {
            let message = v1::ReadJournalResponse {
                first: *first,
                lines: lines.to_vec(),
            };
            *first += lines.len() as u64;
            Some(message)
        });
        Ok(answers(messages.collect()))
    }

    async fn append_journal(
        &self,
        request: Request<v1::AppendJournalRequest>,
    ) -> Result<Response<v1::AppendJournalResponse>, Status> {
        let request = request.into_inner();
        let next = self
            .0
            .append(&request.grip.unwrap(), request.first, &request.lines)
            .map_err(status)?;
        Ok(Response::new(v1::AppendJournalResponse { next }))
    }

    async fn find_missing_objects(
        &self,
        request: Request<v1::FindMissingObjectsRequest>,
    ) -> Result<Response<v1::FindMissingObjectsResponse>, Status> {
        let request = request.into_inner();
        let missing = self
            .0
            .find_missing(&request.grip.unwrap(), &digests(&request.digests))
            .map_err(status)?;
        Ok(Response::new(v1::FindMissingObjectsResponse {
            missing: to_wire(&missing),
        }))
    }

    async fn put_object(
        &self,
        request: Request<Streaming<v1::PutObjectRequest>>,
    ) -> Result<Response<v1::PutObjectResponse>, Status> {
        let mut stream = request.into_inner();
        let Some(Part::Header(header)) = stream.next().await.unwrap()?.part else {
            return Err(Status::invalid_argument("no header"));
        };
        let mut bytes = Vec::new();
        while let Some(message) = stream.next().await {
            let Some(Part::Chunk(chunk)) = message?.part else {
                return Err(Status::invalid_argument("no chunk"));
            };
            assert_eq!(chunk.offset, bytes.len() as u64);
            bytes.extend_from_slice(&chunk.data);
            assert_eq!(chunk.digest, Digest::of(&bytes).to_vec());
        }
        if bytes.len() as u64 != header.bytes {
            return Err(Status::invalid_argument("another size"));
        }
        let bytes_kept = self
            .0
            .put_object(
                &header.grip.unwrap(),
                digest_of(&header.digest).unwrap(),
                &Payload::Bytes(bytes.into()),
            )
            .map_err(status)?;
        Ok(Response::new(v1::PutObjectResponse { bytes_kept }))
    }

    async fn get_object(
        &self,
        request: Request<v1::GetObjectRequest>,
    ) -> Result<Response<Self::GetObjectStream>, Status> {
        let request = request.into_inner();
        let bytes = self
            .0
            .get_object(&request.grip.unwrap(), digest_of(&request.digest).unwrap())
            .map_err(status)?;
        let pieces = chunks(&bytes.into(), request.offset, 100);
        let messages = pieces.map(|chunk| v1::GetObjectResponse { chunk: Some(chunk) });
        Ok(answers(messages.collect()))
    }

    async fn remove_objects(
        &self,
        request: Request<v1::RemoveObjectsRequest>,
    ) -> Result<Response<v1::RemoveObjectsResponse>, Status> {
        let request = request.into_inner();
        let bytes_kept = self
            .0
            .remove_objects(&request.grip.unwrap(), &digests(&request.digests))
            .map_err(status)?;
        Ok(Response::new(v1::RemoveObjectsResponse { bytes_kept }))
    }

    async fn read_reviews(
        &self,
        request: Request<v1::ReadReviewsRequest>,
    ) -> Result<Response<v1::ReadReviewsResponse>, Status> {
        let request = request.into_inner();
        let reviews = self
            .0
            .reviews(&request.grip.unwrap(), request.after)
            .map_err(status)?;
        Ok(Response::new(v1::ReadReviewsResponse { reviews }))
    }

    async fn put_artefact(
        &self,
        request: Request<v1::PutArtefactRequest>,
    ) -> Result<Response<v1::PutArtefactResponse>, Status> {
        let request = request.into_inner();
        let digest = digest_of(&request.digest).unwrap();
        self.0
            .put_artefact(&request.grip.unwrap(), &request.name, digest)
            .map_err(status)?;
        Ok(Response::new(v1::PutArtefactResponse {}))
    }

    async fn release_job(
        &self,
        request: Request<v1::ReleaseJobRequest>,
    ) -> Result<Response<v1::ReleaseJobResponse>, Status> {
        self.0.release(&request.into_inner()).map_err(status)?;
        Ok(Response::new(v1::ReleaseJobResponse {}))
    }
}

/// A runtime that serves the made-up server, and calls to it.
fn served(server: &Arc<FakeServer>, stopped: watch::Receiver<bool>) -> (Runtime, GrpcServer) {
    let runtime = Runtime::new().unwrap();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let bridge = WorkerServiceServer::new(Bridge(Arc::clone(server)));
    runtime.handle().spawn(
        Transport::builder()
            .add_service(bridge)
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let channel = {
        let _guard = runtime.enter();
        Channel::from_shared(url).unwrap().connect_lazy()
    };
    let calls = GrpcServer::new(
        channel,
        runtime.handle().clone(),
        Duration::from_secs(30),
        stopped,
    );
    (runtime, calls)
}

#[test]
fn a_job_over_a_connection_ends_in_the_same_bytes_as_without_one() {
    let folder = tempfile::tempdir().unwrap();
    let direct = Arc::new(FakeServer::new(SPEC));
    worker(&direct, folder.path()).run();

    let server = Arc::new(FakeServer::new(SPEC));
    server.state().loss = Loss::After(40);
    let (_tell, stopped) = watch::channel(false);
    let (_runtime, calls) = served(&server, stopped);
    let elsewhere = Worker {
        server: Arc::new(calls),
        ..worker(&server, folder.path())
    };
    elsewhere.run();
    assert_eq!(server.released().0, v1::JobRelease::Succeeded);
    assert_eq!(server.lasting_results(), direct.lasting_results());
}

#[test]
fn large_objects_go_there_from_a_file_and_come_back() {
    let server = Arc::new(FakeServer::new(SPEC));
    let (_tell, stopped) = watch::channel(false);
    let (_runtime, calls) = served(&server, stopped);
    let Claim::Job(lease) = calls.claim().unwrap() else {
        panic!("there is a job")
    };
    let grip = v1::JobGrip {
        job_id: lease.job_id,
        token: lease.token,
    };
    let bytes: Vec<u8> = (0..3 * DEFAULT_CHUNK_BYTES + 17).map(|n| n as u8).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large");
    std::fs::write(&path, &bytes).unwrap();
    let digest = Digest::of(&bytes);
    let payload = Payload::File(path.clone(), bytes.len() as u64);
    calls.put_object(&grip, digest, &payload).unwrap();
    assert_eq!(calls.get_object(&grip, digest).unwrap(), bytes);
    let empty = Digest::of(b"");
    calls
        .put_object(&grip, empty, &Payload::Bytes(Bytes::new()))
        .unwrap();
    assert!(calls.get_object(&grip, empty).unwrap().is_empty());

    let lost = Payload::File(folder.path().join("lost"), 5);
    let error = calls.put_object(&grip, digest, &lost).unwrap_err();
    assert!(matches!(error, CallError::File { .. }), "{error}");
    let stranger = v1::JobGrip {
        token: vec![9; 16],
        ..grip
    };
    let error = calls.find_missing(&stranger, &[digest]).unwrap_err();
    assert!(matches!(error, CallError::LeaseLost(_)), "{error}");
}

#[test]
fn a_server_that_is_not_there_is_told_as_such_and_a_stop_ends_a_claim() {
    let runtime = Runtime::new().unwrap();
    // Nobody listens there.
    let channel = {
        let _guard = runtime.enter();
        Channel::from_static("http://127.0.0.1:1").connect_lazy()
    };
    let (_tell, stopped) = watch::channel(false);
    let calls = GrpcServer::new(
        channel,
        runtime.handle().clone(),
        Duration::from_secs(5),
        stopped,
    );
    assert!(matches!(calls.claim(), Err(CallError::Unavailable { .. })));

    let silent = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let channel = {
        let _guard = runtime.enter();
        Channel::from_shared(url).unwrap().connect_lazy()
    };
    let (tell, stopped) = watch::channel(false);
    let calls = GrpcServer::new(
        channel,
        runtime.handle().clone(),
        Duration::from_hours(1),
        stopped,
    );
    tell.send_replace(true);
    assert_eq!(calls.claim().unwrap(), Claim::Nothing(ASK_AGAIN));
}
