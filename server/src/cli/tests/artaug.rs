//! ArtAug jobs as the command line shows them.

use concord_proto::v1;

use super::*;
use crate::cli::output::{Job, JobList, JobState};

mod files;

/// A job in the second of three iterations.
fn job() -> v1::Job {
    let mut job = v1::Job {
        job_id: "icons-1".to_owned(),
        name: "icons".to_owned(),
        kind: "artaug".to_owned(),
        submitted_by: "olga".to_owned(),
        worker: "gpu-1".to_owned(),
        artaug: Some(v1::ArtaugProgress {
            iteration: 2,
            iterations: 3,
            stage: "train-first".to_owned(),
            done: 40,
            total: 120,
            per_second: 1.25,
            remaining: Some(prost_types::Duration {
                seconds: 64,
                nanos: 0,
            }),
            last_images: vec![vec![0xab; 32], vec![0x12; 32]],
            bytes_kept: 12_300_000,
            peak_memory: 2_000_000_000,
        }),
        ..v1::Job::default()
    };
    job.set_state(v1::JobState::Running);
    job
}

fn shown(job: v1::Job) -> String {
    table::job(&JobState::from(v1::GetJobResponse {
        job: Some(job),
        ..v1::GetJobResponse::default()
    }))
}

fn json(job: v1::Job) -> serde_json::Value {
    serde_json::to_value(Job::from(job)).unwrap()
}

#[test]
fn a_list_shows_both_kinds_of_jobs() {
    let mut federated = v1::Job {
        job_id: "tickets-1".to_owned(),
        kind: "federated-training".to_owned(),
        algorithm: "fedmcp".to_owned(),
        round: 2,
        rounds: 5,
        ..v1::Job::default()
    };
    federated.set_state(v1::JobState::Running);
    let mut waits = job();
    (waits.paused, waits.waits_for_review) = (true, true);
    let mut queued = job();
    queued.artaug = None;
    let list = JobList::from(v1::ListJobsResponse {
        jobs: vec![job(), federated, waits, queued],
    });
    let text = table::jobs(&list);
    let lines: Vec<Vec<&str>> = text
        .lines()
        .map(|line| {
            line.split("  ")
                .filter(|cell| !cell.is_empty())
                .map(str::trim)
                .collect()
        })
        .collect();
    assert_eq!(
        lines[1][2..6],
        ["artaug", "-", "running", "2/3 train-first 40/120"]
    );
    assert_eq!(
        lines[2][1..5],
        ["federated-training", "fedmcp", "running", "2/5"]
    );
    assert_eq!(lines[3][4], "running, paused, waits for review");
    assert_eq!(lines[4][5], "-");
}

#[test]
fn one_job_is_shown_with_stage_counts_rate_time_worker_and_images() {
    let text = shown(job());
    for part in [
        "kind       artaug\n",
        "worker     gpu-1\n",
        "iteration  2 of 3\n",
        "stage      train-first\n",
        "done       40 of 120\n",
        "rate       1.2/s\n",
        "stage ends 1m 4s left at this rate\n",
        "kept       12.3 MB\n",
        "memory     2.00 GB at the most\n",
        &"ab".repeat(32),
        &"12".repeat(32),
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("round"), "{text}");
    let mut waits = job();
    waits.waits_for_review = true;
    let text = shown(waits);
    assert!(text.contains("concord artaug review icons-1"), "{text}");
}

#[test]
fn programs_get_the_same_with_null_for_what_is_not_known() {
    let value = json(job());
    assert_eq!(value["worker"], "gpu-1");
    assert_eq!(value["paused"], false);
    let progress = &value["artaug"];
    assert_eq!(progress["total"], 120);
    assert_eq!(progress["remaining_seconds"], 64.0);
    assert_eq!(progress["last_images"][1], "12".repeat(32));

    let mut early = job();
    early.worker = String::new();
    if let Some(progress) = &mut early.artaug {
        (progress.total, progress.per_second, progress.remaining) = (0, f64::NAN, None);
    }
    let value = json(early.clone());
    assert_eq!(value["worker"], serde_json::Value::Null);
    for key in ["total", "per_second", "remaining_seconds"] {
        assert_eq!(value["artaug"][key], serde_json::Value::Null, "{key}");
    }
    let text = shown(early);
    assert!(
        text.contains("done       40\n") && !text.contains("rate"),
        "{text}"
    );
}

#[test]
fn numbers_that_make_no_sense_do_not_stop_the_view() {
    let mut wild = job();
    if let Some(progress) = &mut wild.artaug {
        progress.per_second = f64::INFINITY;
        progress.remaining = Some(prost_types::Duration {
            seconds: i64::MAX,
            nanos: 0,
        });
        progress.stage = "\u{1b}[2Jcleared".to_owned();
        progress.last_images = vec![vec![], vec![1]];
    }
    let text = shown(wild.clone());
    assert!(
        text.contains("days left") || text.contains("years"),
        "{text}"
    );
    assert!(!text.contains('\u{1b}'), "{text:?}");
    if let Some(progress) = &mut wild.artaug {
        progress.remaining = Some(prost_types::Duration {
            seconds: -5,
            nanos: 0,
        });
    }
    assert_eq!(
        json(wild)["artaug"]["remaining_seconds"],
        serde_json::Value::Null
    );
}

#[test]
fn the_words_of_a_review_are_read_from_the_command_line() {
    let parse = |words: &[&str]| {
        Arguments::try_parse_from(["concord", "artaug", "review", "job"].iter().chain(words))
    };
    for words in [
        &[][..],
        &["--accept", "1,2,5-9", "--reject-rest"],
        &["--reject", "3", "--accept-rest"],
        &["--gallery", "pages", "--json"],
    ] {
        assert!(parse(words).is_ok(), "{words:?}");
    }
    for words in [
        &["--accept-rest", "--reject-rest"][..],
        &["--accept", "x"],
        &["--accept", "9-5"],
        &["--accept", "1", "--accept", "2"],
    ] {
        let error = parse(words).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{words:?}");
    }
}

mod against_a_server {
    use bytes::Bytes;
    use concord_common::{Digest, Role, chunk};
    use concord_proto::v1::worker_service_client::WorkerServiceClient;
    use futures::stream;
    use tonic::transport::Channel;

    use super::{
        super::against_a_server::{concord, json},
        *,
    };
    use crate::tests::harness::{World, eventually, spec};

    const SAMPLE: &str = include_str!("../../../../deploy/artaug/job.toml");

    /// A worker without an engine.
    pub(super) struct Worker {
        client: WorkerServiceClient<Channel>,
        grip: v1::JobGrip,
    }

    impl Worker {
        /// Takes the job that waits.
        pub(in crate::cli::tests::artaug) async fn claim(world: &World) -> Self {
            let mut client = WorkerServiceClient::new(world.channel(Role::Worker, "gpu-1"));
            let lease = eventually("a job for the worker", async || {
                let request = v1::ClaimJobRequest {
                    kinds: vec!["artaug".to_owned()],
                    version: "test".to_owned(),
                };
                client.claim_job(request).await.unwrap().into_inner().lease
            })
            .await;
            let grip = v1::JobGrip {
                job_id: lease.job_id,
                token: lease.token,
            };
            Self { client, grip }
        }

        pub(in crate::cli::tests::artaug) async fn renew(&mut self, progress: v1::ArtaugProgress) {
            let request = v1::RenewJobLeaseRequest {
                grip: Some(self.grip.clone()),
                progress: Some(progress),
            };
            self.client.renew_job_lease(request).await.unwrap();
        }

        pub(in crate::cli::tests::artaug) async fn put(&mut self, name: &str, content: &Bytes) {
            let digest = Digest::of(content).to_vec();
            let header = v1::PutObjectHeader {
                grip: Some(self.grip.clone()),
                digest: digest.clone(),
                bytes: content.len() as u64,
            };
            let header = v1::put_object_request::Part::Header(header);
            let chunks =
                chunk::chunks(content, 0, 100_000).map(v1::put_object_request::Part::Chunk);
            let parts: Vec<_> = std::iter::once(header)
                .chain(chunks)
                .map(|part| v1::PutObjectRequest { part: Some(part) })
                .collect();
            self.client.put_object(stream::iter(parts)).await.unwrap();
            let request = v1::PutArtefactRequest {
                grip: Some(self.grip.clone()),
                name: name.to_owned(),
                digest,
            };
            self.client.put_artefact(request).await.unwrap();
        }

        pub(in crate::cli::tests::artaug) async fn release(
            mut self,
            release: v1::JobRelease,
            waiting: &[u32],
            reviews: u64,
        ) {
            let mut request = v1::ReleaseJobRequest {
                grip: Some(self.grip.clone()),
                progress: super::job().artaug,
                waiting: waiting.to_vec(),
                reviews,
                ..v1::ReleaseJobRequest::default()
            };
            request.set_release(release);
            self.client.release_job(request).await.unwrap();
        }
    }

    fn artefacts() -> (Bytes, Bytes) {
        let lora: Vec<u8> = (0..1_200_000_u32).map(|n| (n % 251) as u8).collect();
        (lora.into(), Bytes::from_static(b"<!doctype html>pairs"))
    }

    /// Queues the sample with a review, as an operator does.
    pub(super) async fn submitted(world: &World) -> String {
        let file = world.folder.path().join("artaug.toml");
        let text = SAMPLE.replace("review = false", "review = true");
        assert_ne!(text, SAMPLE);
        std::fs::write(&file, text).unwrap();
        let submit = ["job", "submit", file.to_str().unwrap(), "--json"];
        let (exit, text) = concord(world, &submit).await;
        assert_eq!(exit, Exit::Done, "{text}");
        assert_eq!(json(&text)["job"]["kind"], "artaug");
        json(&text)["job"]["job_id"].as_str().unwrap().to_owned()
    }

    /// Runs commands, each with the exit code and a part of what it says.
    pub(super) async fn expect(world: &World, commands: &[(&[&str], Exit, &str)]) {
        for (words, wanted, part) in commands {
            let (exit, text) = concord(world, words).await;
            assert_eq!(exit, *wanted, "{words:?}: {text}");
            assert!(text.contains(part), "{words:?}: {text}");
        }
    }

    #[tokio::test]
    async fn an_operator_follows_a_job_reviews_its_pairs_and_fetches_its_results() {
        let world = World::start().await;
        let job = submitted(&world).await;
        let job = job.as_str();
        expect(
            &world,
            &[
                (&["job", "list"], Exit::Done, "artaug"),
                (&["artaug", "review", job], Exit::Done, "no pair"),
                (
                    &["artaug", "review", job, "--accept", "1"],
                    Exit::Refused,
                    "no pair",
                ),
                (&["artaug", "artefacts", job], Exit::Done, "no artefacts"),
                (
                    &["artaug", "fetch", job, "x"],
                    Exit::NotFound,
                    "no artefacts",
                ),
            ],
        )
        .await;

        let (lora, page) = artefacts();
        let mut worker = Worker::claim(&world).await;
        worker.renew(super::job().artaug.unwrap()).await;
        let (exit, text) = concord(&world, &["job", "show", job]).await;
        assert_eq!(exit, Exit::Done);
        for part in [
            "worker     gpu-1",
            "train-first",
            "40 of 120",
            &"ab".repeat(32),
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        worker.put("lora/merged.safetensors", &lora).await;
        worker.put("review/iteration-2.html", &page).await;
        worker
            .release(v1::JobRelease::WaitsForReview, &[0, 1, 4, 7, 9], 0)
            .await;

        let pages = world.folder.path().join("pages");
        let pages = pages.to_str().unwrap();
        let review = |words: &[&'static str]| [&["artaug", "review", job][..], words].concat();
        expect(
            &world,
            &[
                (&["job", "list"], Exit::Done, "waits for review"),
                (&["job", "show", job], Exit::Done, "concord artaug review"),
                (
                    &["artaug", "review", job],
                    Exit::Done,
                    "5 pairs wait for a word: 0-1,4,7,9",
                ),
                (
                    &["artaug", "review", job, "--gallery", pages],
                    Exit::Done,
                    "review-2.html",
                ),
                (&review(&["--accept", "0,99"]), Exit::Refused, "99"),
                (&review(&["--accept", "2-3"]), Exit::Usage, "0-1,4,7,9"),
                (
                    &review(&["--accept", "0,4-8", "--reject", "1"]),
                    Exit::Done,
                    "3 accepted, 1 rejected, 1 still wait",
                ),
            ],
        )
        .await;
        let written = std::fs::read(format!("{pages}/review-2.html")).unwrap();
        assert_eq!(written, page);
        let (exit, text) = concord(&world, &review(&["--reject-rest", "--json"])).await;
        assert_eq!(exit, Exit::Done, "{text}");
        assert_eq!(json(&text)["rejected"], serde_json::json!([9]));
        assert_eq!(json(&text)["waiting"], 0);
        expect(
            &world,
            &[(&review(&["--reject-rest"]), Exit::Done, "no pair")],
        )
        .await;

        let worker = Worker::claim(&world).await;
        worker.release(v1::JobRelease::Succeeded, &[], 5).await;
        expect(
            &world,
            &[(&["job", "watch", job], Exit::Done, "has succeeded")],
        )
        .await;

        fetches_its_results(&world, job, &lora).await;
    }

    /// The results of an ended job, of which the adapter is `lora`, into a folder.
    async fn fetches_its_results(world: &World, job: &str, lora: &Bytes) {
        let into = world.folder.path().join("results");
        let folder = into.to_str().unwrap();
        let fetch = ["artaug", "fetch", job, folder];
        let named = |pattern: &'static str| [&fetch[..], &["--name", pattern]].concat();
        expect(
            world,
            &[
                (
                    &["artaug", "artefacts", job],
                    Exit::Done,
                    "lora/merged.safetensors",
                ),
                (&named("adapter*"), Exit::NotFound, "adapter*"),
                (&named("lora/*"), Exit::Done, "written"),
            ],
        )
        .await;
        assert!(!into.join("review").exists());
        assert_eq!(
            std::fs::read(into.join("lora/merged.safetensors")).unwrap(),
            *lora
        );
        let (exit, text) = concord(world, &[&fetch[..], &["--json"]].concat()).await;
        assert_eq!(exit, Exit::Done, "{text}");
        let files = &json(&text)["files"];
        assert_eq!(files[0]["name"], "lora/merged.safetensors");
        assert_eq!(
            (&files[0]["written"], &files[1]["written"]),
            (&false.into(), &true.into())
        );
        std::fs::write(into.join("lora/merged.safetensors"), "mine").unwrap();
        expect(world, &[(&fetch, Exit::Usage, "other content")]).await;
    }

    #[tokio::test]
    async fn a_job_rests_and_goes_on() {
        let world = World::start().await;
        let job = submitted(&world).await;
        let job = job.as_str();
        expect(
            &world,
            &[
                (&["job", "pause", job], Exit::Done, "queued, paused"),
                (&["job", "pause", job], Exit::Done, "queued, paused"),
                (&["job", "list"], Exit::Done, "queued, paused"),
                (&["job", "resume", job], Exit::Done, "is queued\n"),
            ],
        )
        .await;
        let worker = Worker::claim(&world).await;
        expect(
            &world,
            &[(
                &["job", "pause", job],
                Exit::Done,
                "its worker saves and gives it back",
            )],
        )
        .await;
        worker.release(v1::JobRelease::Paused, &[], 0).await;
        let (_, text) = concord(&world, &["job", "show", job, "--json"]).await;
        assert_eq!(json(&text)["job"]["paused"], true);
        assert_eq!(json(&text)["job"]["worker"], serde_json::Value::Null);
        expect(
            &world,
            &[
                (&["job", "cancel", job], Exit::Done, "cancelled"),
                (&["job", "watch", job], Exit::Cancelled, ""),
                (&["job", "pause", "nothing"], Exit::NotFound, ""),
            ],
        )
        .await;
    }

    #[tokio::test]
    async fn jobs_of_silos_have_neither_pairs_nor_artefacts() {
        let world = World::start().await;
        let job = world.submit(&spec(1, 1, "")).await;
        let job = job.as_str();
        expect(
            &world,
            &[
                (&["job", "pause", job], Exit::Refused, "WRONG_KIND"),
                (&["artaug", "review", job], Exit::Refused, "WRONG_KIND"),
                (&["artaug", "artefacts", job], Exit::Refused, "WRONG_KIND"),
                (&["artaug", "fetch", "nothing", "x"], Exit::NotFound, ""),
            ],
        )
        .await;
    }
}
