//! What an operator types for an ArtAug job, against a real server, with a worker that draws nothing.

use std::{fs, path::Path};

use bytes::Bytes;
use concord_common::{Digest, Role, chunk};
use concord_integration_tests::{
    harness::{Federation, Output, PATIENCE, ServerOptions, run, wait_for},
    silo::channel,
};
use concord_proto::v1::{
    self, put_object_request::Part, worker_service_client::WorkerServiceClient,
};
use serde_json::Value;
use tokio_stream::iter;
use tonic::transport::Channel;

use super::{cli::concord, runtime};

/// A worker without an engine, with a certificate of its own.
struct Worker {
    client: WorkerServiceClient<Channel>,
    grip: v1::JobGrip,
}

impl Worker {
    /// Takes the job that waits.
    fn claim(federation: &Federation) -> Self {
        let files = federation.issue(Role::Worker, "gpu-1").unwrap();
        let _inside = runtime().enter();
        let channel = channel(&files, federation.name(), &federation.url()).unwrap();
        let mut client = WorkerServiceClient::new(channel);
        let lease = wait_for("a job for the worker", PATIENCE, || {
            let request = v1::ClaimJobRequest {
                kinds: vec!["artaug".to_owned()],
                version: "test".to_owned(),
            };
            let answer = runtime().block_on(client.claim_job(request))?;
            Ok(answer.into_inner().lease)
        })
        .unwrap();
        let grip = v1::JobGrip {
            job_id: lease.job_id,
            token: lease.token,
        };
        Self { client, grip }
    }

    fn put(&mut self, name: &str, content: &Bytes) {
        let digest = Digest::of(content).to_vec();
        let header = v1::PutObjectHeader {
            grip: Some(self.grip.clone()),
            digest: digest.clone(),
            bytes: content.len() as u64,
        };
        let chunks = chunk::chunks(content, 0, 1 << 20).map(Part::Chunk);
        let parts: Vec<_> = std::iter::once(Part::Header(header))
            .chain(chunks)
            .map(|part| v1::PutObjectRequest { part: Some(part) })
            .collect();
        runtime()
            .block_on(self.client.put_object(iter(parts)))
            .unwrap();
        let request = v1::PutArtefactRequest {
            grip: Some(self.grip.clone()),
            name: name.to_owned(),
            digest,
        };
        runtime()
            .block_on(self.client.put_artefact(request))
            .unwrap();
    }

    fn release(mut self, release: v1::JobRelease, waiting: &[u32], reviews: u64) {
        let mut request = v1::ReleaseJobRequest {
            grip: Some(self.grip.clone()),
            progress: Some(v1::ArtaugProgress {
                iteration: 1,
                iterations: 3,
                stage: "review".to_owned(),
                total: waiting.len() as u64,
                ..v1::ArtaugProgress::default()
            }),
            waiting: waiting.to_vec(),
            reviews,
            ..v1::ReleaseJobRequest::default()
        };
        request.set_release(release);
        runtime()
            .block_on(self.client.release_job(request))
            .unwrap();
    }
}

/// Queues the sample of a job with a review; gives its id.
fn submitted(federation: &Federation) -> String {
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/artaug/job.toml");
    let text = fs::read_to_string(sample)
        .unwrap()
        .replace("review = false", "review = true");
    fs::write(federation.path().join("artaug.toml"), text).unwrap();
    let submitted = concord(federation, &["job", "submit", "artaug.toml", "--json"]);
    // This server starts no worker.
    assert!(
        submitted.stderr.contains("warning: no worker asks"),
        "{submitted:?}"
    );
    let answer = json(submitted);
    assert_eq!(answer["job"]["kind"], "artaug");
    answer["job"]["job_id"].as_str().unwrap().to_owned()
}

fn json(output: Output) -> Value {
    serde_json::from_str(&output.success().unwrap()).unwrap()
}

#[test]
fn an_operator_reviews_pairs_and_fetches_results() {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    federation.start_server().unwrap();
    let job = submitted(&federation);
    let page = Bytes::from_static(b"<!doctype html>pairs");
    let lora: Bytes = (0..3_000_000_u32)
        .map(|number| (number % 251) as u8)
        .collect::<Vec<u8>>()
        .into();
    let mut worker = Worker::claim(&federation);
    let shown = json(concord(&federation, &["job", "show", &job, "--json"]));
    assert_eq!(shown["job"]["worker"], "gpu-1");
    worker.put("review/iteration-1.html", &page);
    worker.put("lora/merged.safetensors", &lora);
    worker.release(v1::JobRelease::WaitsForReview, &[0, 2, 3, 8], 0);

    let listed = concord(&federation, &["job", "list"]).success().unwrap();
    assert!(listed.contains("waits for review"), "{listed}");
    let waits = json(concord(
        &federation,
        &["artaug", "review", &job, "--gallery", "pages", "--json"],
    ));
    assert_eq!(waits["iteration"], 1);
    assert_eq!(waits["waiting"], serde_json::json!([0, 2, 3, 8]));
    assert_eq!(
        fs::read(federation.path().join("pages/review-1.html")).unwrap(),
        page
    );
    let said = |words: &[&str]| {
        let command = [&["artaug", "review", job.as_str()][..], words].concat();
        concord(&federation, &command)
    };
    let unknown = said(&["--accept", "0,1"]);
    assert_eq!(unknown.code(), 1, "{unknown:?}");
    assert_eq!(said(&["--accept", "4-7"]).code(), 2);
    let some = said(&["--accept", "0,2-5"]).success().unwrap();
    assert!(
        some.contains("3 accepted, 0 rejected, 1 still wait"),
        "{some}"
    );
    let rest = json(said(&["--reject-rest", "--json"]));
    assert_eq!(rest["rejected"], serde_json::json!([8]));
    assert_eq!(said(&["--reject-rest"]).code(), 0);

    // The worker goes on with the words that were said, and ends the job.
    let mut worker = Worker::claim(&federation);
    let request = v1::ReadReviewsRequest {
        grip: Some(worker.grip.clone()),
        after: 0,
    };
    let words = runtime()
        .block_on(worker.client.read_reviews(request))
        .unwrap()
        .into_inner()
        .reviews;
    let accepted: Vec<(u32, bool)> = words
        .iter()
        .map(|word| (word.item, word.accepted))
        .collect();
    assert_eq!(accepted, [(0, true), (2, true), (3, true), (8, false)]);
    worker.release(v1::JobRelease::Succeeded, &[], 4);
    let watched = concord(&federation, &["job", "watch", &job]);
    assert_eq!(watched.code(), 0, "{watched:?}");

    // A part of an earlier, interrupted command is taken up, across a restart of the server.
    let parts = federation.path().join("results/.concord-parts");
    fs::create_dir_all(&parts).unwrap();
    fs::write(
        parts.join(Digest::of(&lora).to_string()),
        &lora[..1_234_567],
    )
    .unwrap();
    federation.stop_server().unwrap();
    let away = concord(&federation, &["artaug", "fetch", &job, "results"]);
    assert_eq!(away.code(), 3, "{away:?}");
    federation.start_server().unwrap();
    let fetch = ["artaug", "fetch", &job, "results", "--json"];
    let fetched = json(concord(&federation, &fetch));
    assert_eq!(fetched["files"].as_array().unwrap().len(), 2);
    let file = federation.path().join("results/lora/merged.safetensors");
    assert_eq!(fs::read(&file).unwrap(), lora);
    assert!(!parts.exists());
    let again = json(concord(&federation, &fetch));
    assert_eq!(again["files"][0]["written"], false);
    fs::write(&file, "mine").unwrap();
    let refused = concord(&federation, &fetch);
    assert_eq!(refused.code(), 2, "{refused:?}");
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    deletes_what_is_left(&mut federation, &job);
}

/// The end of what an ended job has left on the server's disk.
fn deletes_what_is_left(federation: &mut Federation, job: &str) {
    let delete = ["artaug", "delete", job, "--yes", "--json"];
    let asked = concord(federation, &delete[..3]);
    assert_eq!(asked.code(), 2, "{asked:?}");
    assert!(asked.stderr.contains("2 artefacts"), "{asked:?}");
    let deleted = json(concord(federation, &delete));
    assert!(
        deleted["bytes_freed"].as_u64().unwrap() > 3_000_000,
        "{deleted}"
    );
    assert_eq!(deleted["job"]["state"], "succeeded");
    federation.stop_server().unwrap();
    federation.start_server().unwrap();
    assert_eq!(json(concord(federation, &delete))["bytes_freed"], 0);
    let fetched = concord(federation, &["artaug", "fetch", job, "again"]);
    assert_eq!(fetched.code(), 4, "{fetched:?}");
    let listed = concord(federation, &["job", "list"]).success().unwrap();
    assert!(listed.contains("succeeded, files deleted"), "{listed}");
}

#[test]
fn a_worker_whose_settings_or_certificate_cannot_be_used_ends_with_78() {
    let federation = Federation::new(&ServerOptions::default()).unwrap();
    let start = || {
        let arguments = ["run", "--config", "artaug-worker.toml"];
        run("concord-artaug", federation.path(), &arguments).unwrap()
    };
    assert_eq!(start().code(), 78, "the file is missing");
    let silo = federation.issue(Role::Silo, "clinic-a").unwrap();
    let settings = |rest: &str| {
        format!(
            "state_dir = \"worker\"\n{rest}\nserver.address = \"{}\"\ntls = {{ certificate = \"{}\", key = \"{}\", ca = \"{}\" }}\n",
            "127.0.0.1:1",
            silo.certificate.display(),
            silo.key.display(),
            silo.ca.display()
        )
    };
    let file = federation.path().join("artaug-worker.toml");
    for (rest, part) in [
        ("limits.cores = 2", "cores"),
        ("limits.threads = 0", "limits.threads"),
        ("log.filter = \"=,=\"", "log.filter"),
        ("", "worker"),
    ] {
        fs::write(&file, settings(rest)).unwrap();
        let ended = start();
        assert_eq!(ended.code(), 78, "{ended:?}");
        assert!(ended.stderr.contains(part), "{part}: {ended:?}");
    }
}

#[test]
fn a_job_is_paused_resumed_and_cancelled_by_name() {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    federation.start_server().unwrap();
    let job = submitted(&federation);
    let paused = json(concord(&federation, &["job", "pause", &job, "--json"]));
    assert_eq!(paused["job"]["paused"], true);
    let resumed = json(concord(&federation, &["job", "resume", &job, "--json"]));
    assert_eq!(resumed["job"]["paused"], false);
    concord(&federation, &["job", "cancel", &job])
        .success()
        .unwrap();
    assert_eq!(concord(&federation, &["job", "watch", &job]).code(), 5);
    assert_eq!(concord(&federation, &["job", "pause", "nothing"]).code(), 4);
    assert_eq!(
        concord(&federation, &["artaug", "fetch", "nothing", "x"]).code(),
        4
    );
}
