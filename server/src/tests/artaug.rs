//! Jobs that workers run, with workers that make nothing.

use concord_common::{Digest, ErrorCode, Role, Timestamp, chunk};
use concord_proto::v1::{
    self, JobRelease, put_object_request::Part, worker_service_client::WorkerServiceClient,
};
use futures::stream;
use tonic::{Request, Status, transport::Channel};

use super::harness::{World, code};
use crate::service::worker::is_work_waiting;

mod beside;
mod deletion;
mod journal;
mod leases;
mod objects;
mod operators;
mod queue;
mod reviews;
mod supervisor;

/// A specification that keeps at most 1 MiB.
fn artaug() -> String {
    r#"kind = "artaug"
name = "icons"
[model]
folder = "icons-64"
[prompts]
texts = ["red apple", "blue car"]
[held_out]
texts = ["green tree"]
[advisor]
kind = "rules"
[scorers]
filter = [{ kind = "photometry" }]
evaluation = [{ kind = "statistics" }]
[counts]
iterations = 3
pairs = 288
kept = 48
held_out = 200
[limits]
disk = "1 MiB"
"#
    .to_owned()
}

/// A worker that calls what a worker calls.
#[derive(Clone)]
struct FakeWorker {
    client: WorkerServiceClient<Channel>,
}

/// A job in its hands.
#[derive(Clone)]
struct Held {
    client: WorkerServiceClient<Channel>,
    lease: v1::WorkerLease,
}

impl FakeWorker {
    fn of(world: &World, name: &str) -> Self {
        let channel = world.channel(Role::Worker, name);
        Self {
            client: WorkerServiceClient::new(channel),
        }
    }

    /// Claims and waits for a job for as long as the server does.
    async fn try_claim(&mut self) -> Result<v1::ClaimJobResponse, Status> {
        let request = v1::ClaimJobRequest {
            kinds: vec!["artaug".to_owned()],
            version: "1".to_owned(),
        };
        Ok(self.client.claim_job(request).await?.into_inner())
    }

    async fn claim(&mut self) -> Held {
        let lease = self.try_claim().await.unwrap().lease.expect("a job");
        Held {
            client: self.client.clone(),
            lease,
        }
    }
}

impl Held {
    fn grip(&self) -> v1::JobGrip {
        v1::JobGrip {
            job_id: self.lease.job_id.clone(),
            token: self.lease.token.clone(),
        }
    }

    async fn renew(
        &mut self,
        progress: Option<v1::ArtaugProgress>,
    ) -> Result<v1::RenewJobLeaseResponse, Status> {
        let request = v1::RenewJobLeaseRequest {
            grip: Some(self.grip()),
            progress,
        };
        Ok(self.client.renew_job_lease(request).await?.into_inner())
    }

    async fn append(&mut self, first: u64, lines: &[&str]) -> Result<u64, Status> {
        let request = v1::AppendJournalRequest {
            grip: Some(self.grip()),
            first,
            lines: lines.iter().map(|line| line.as_bytes().to_vec()).collect(),
        };
        Ok(self.client.append_journal(request).await?.into_inner().next)
    }

    /// All lines from `first` on, as text.
    async fn journal(&mut self, first: u64) -> Result<Vec<String>, Status> {
        let request = v1::ReadJournalRequest {
            grip: Some(self.grip()),
            first,
        };
        let mut stream = self.client.read_journal(request).await?.into_inner();
        let mut lines = Vec::new();
        while let Some(page) = stream.message().await? {
            assert_eq!(page.first, first + lines.len() as u64);
            let texts = page.lines.into_iter().map(String::from_utf8);
            lines.extend(texts.map(Result::unwrap));
        }
        Ok(lines)
    }

    /// Sends an object as announced, in chunks of a few bytes; gives the bytes that are kept.
    async fn put_as(
        &mut self,
        digest: Digest,
        announced: u64,
        bytes: &[u8],
    ) -> Result<u64, Status> {
        let header = Part::Header(v1::PutObjectHeader {
            grip: Some(self.grip()),
            digest: digest.to_vec(),
            bytes: announced,
        });
        let payload = bytes::Bytes::copy_from_slice(bytes);
        let chunks = chunk::chunks(&payload, 0, bytes.len().div_ceil(3).max(1)).map(Part::Chunk);
        self.put_parts([header].into_iter().chain(chunks).collect())
            .await
    }

    async fn put_parts(&mut self, parts: Vec<Part>) -> Result<u64, Status> {
        let messages = parts
            .into_iter()
            .map(|part| v1::PutObjectRequest { part: Some(part) });
        let messages: Vec<_> = messages.collect();
        let request = Request::new(stream::iter(messages));
        let answer = self.client.put_object(request).await?;
        Ok(answer.into_inner().bytes_kept)
    }

    async fn put(&mut self, bytes: &[u8]) -> Result<u64, Status> {
        self.put_as(Digest::of(bytes), bytes.len() as u64, bytes)
            .await
    }

    async fn get(&mut self, digest: Digest, offset: u64) -> Result<Vec<u8>, Status> {
        let request = v1::GetObjectRequest {
            grip: Some(self.grip()),
            digest: digest.to_vec(),
            offset,
        };
        let mut stream = self.client.get_object(request).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(message) = stream.message().await? {
            let chunk = message.chunk.unwrap();
            assert_eq!(chunk.offset, offset + bytes.len() as u64);
            bytes.extend_from_slice(&chunk.data);
            assert_eq!(chunk.digest, Digest::of(&bytes).to_vec());
        }
        Ok(bytes)
    }

    async fn missing(&mut self, digests: &[Digest]) -> Result<Vec<Vec<u8>>, Status> {
        let request = v1::FindMissingObjectsRequest {
            grip: Some(self.grip()),
            digests: digests.iter().map(|digest| digest.to_vec()).collect(),
        };
        let answer = self.client.find_missing_objects(request).await?;
        Ok(answer.into_inner().missing)
    }

    async fn remove(&mut self, digests: &[Digest]) -> Result<u64, Status> {
        let request = v1::RemoveObjectsRequest {
            grip: Some(self.grip()),
            digests: digests.iter().map(|digest| digest.to_vec()).collect(),
        };
        let answer = self.client.remove_objects(request).await?;
        Ok(answer.into_inner().bytes_kept)
    }

    async fn name(&mut self, name: &str, digest: Digest) -> Result<(), Status> {
        let request = v1::PutArtefactRequest {
            grip: Some(self.grip()),
            name: name.to_owned(),
            digest: digest.to_vec(),
        };
        self.client.put_artefact(request).await?;
        Ok(())
    }

    async fn reviews(&mut self, after: u64) -> Result<Vec<v1::PairReview>, Status> {
        let request = v1::ReadReviewsRequest {
            grip: Some(self.grip()),
            after,
        };
        let answer = self.client.read_reviews(request).await?;
        Ok(answer.into_inner().reviews)
    }

    fn letting_go(&self, release: JobRelease) -> v1::ReleaseJobRequest {
        v1::ReleaseJobRequest {
            grip: Some(self.grip()),
            release: release as i32,
            reason: String::new(),
            reviews: 0,
            progress: None,
            waiting: Vec::new(),
        }
    }

    async fn release(&mut self, release: JobRelease) -> Result<(), Status> {
        let request = self.letting_go(release);
        self.release_as(request).await
    }

    async fn release_as(&mut self, request: v1::ReleaseJobRequest) -> Result<(), Status> {
        self.client.release_job(request).await?;
        Ok(())
    }

    /// Gives the job back to wait for words on these pairs, having acted on the first `reviews`.
    async fn wait_for_words(
        &mut self,
        iteration: u32,
        waiting: &[u32],
        reviews: u64,
    ) -> Result<(), Status> {
        let request = v1::ReleaseJobRequest {
            waiting: waiting.to_vec(),
            reviews,
            progress: Some(at(iteration, "review")),
            ..self.letting_go(JobRelease::WaitsForReview)
        };
        self.release_as(request).await
    }
}

fn at(iteration: u32, stage: &str) -> v1::ArtaugProgress {
    v1::ArtaugProgress {
        iteration,
        iterations: 3,
        stage: stage.to_owned(),
        ..v1::ArtaugProgress::default()
    }
}

/// Whether claiming would give a job now.
async fn is_waiting(world: &World) -> bool {
    is_work_waiting(world.server().context()).await.unwrap()
}

/// Moves the clock, and has leases looked at.
fn advance(world: &World, by: std::time::Duration) {
    world.advance(by);
    world.server().context().hub.workers_changed();
}

/// Everything that a worker can call on a job is refused for the lack of a lease.
async fn expect_all_refused(held: &mut Held) {
    let lost = ErrorCode::LeaseLost;
    let digest = Digest::of(b"picture");
    assert_eq!(code(held.renew(None).await), lost);
    assert_eq!(code(held.journal(0).await), lost);
    assert_eq!(code(held.append(0, &["{}"]).await), lost);
    assert_eq!(code(held.missing(&[digest]).await), lost);
    assert_eq!(code(held.put(b"picture").await), lost);
    assert_eq!(code(held.get(digest, 0).await), lost);
    assert_eq!(code(held.remove(&[digest]).await), lost);
    assert_eq!(code(held.reviews(0).await), lost);
    assert_eq!(code(held.name("a.png", digest).await), lost);
    assert_eq!(code(held.release(JobRelease::Succeeded).await), lost);
}

/// The moment of the test's clock.
fn now(world: &World) -> Timestamp {
    world.server().context().now()
}
