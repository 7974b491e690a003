//! Objects: whole and right or not there, within bounds, and swept out when nobody needs them.

use std::{fs, path::PathBuf, time::Duration};

use concord_common::{Digest, ErrorCode, chunk, config::ByteSize};
use concord_proto::v1::{self, JobRelease, put_object_request::Part};

use super::{FakeWorker, Held, artaug};
use crate::{
    driver::sweep_now,
    tests::harness::{World, code, refusal},
};

/// Names of a job's files.
pub(super) fn files(world: &World, job_id: &str) -> Vec<String> {
    let Ok(folder) = fs::read_dir(folder(world, job_id)) else {
        return Vec::new();
    };
    let mut names: Vec<_> = folder
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub(super) fn folder(world: &World, job_id: &str) -> PathBuf {
    world.config.state_dir.join("artaug").join(job_id)
}

async fn held(world: &World) -> Held {
    world.submit(&artaug()).await;
    FakeWorker::of(world, "w1").claim().await
}

#[tokio::test]
async fn an_object_comes_back_as_it_was_from_any_offset_also_after_a_restart() {
    let mut world = World::start_with(|config| {
        config.limits.chunk_size = ByteSize(16 << 10);
    })
    .await;
    let mut held = held(&world).await;
    let picture: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8).collect();
    let digest = Digest::of(&picture);
    assert_eq!(held.put(&picture).await.unwrap(), 100_000);
    assert_eq!(held.get(digest, 0).await.unwrap(), picture);
    world.restart().await;
    held.client = FakeWorker::of(&world, "w1").client;
    assert_eq!(held.get(digest, 99_990).await.unwrap(), picture[99_990..]);
    assert!(held.get(digest, 100_000).await.unwrap().is_empty());
    let answer = held.get(digest, 100_001).await;
    assert_eq!(code(answer), ErrorCode::InvalidRequest);
    let answer = held.get(Digest::of(b"other"), 0).await;
    assert_eq!(code(answer), ErrorCode::UnknownObject);
    // Sending it again changes nothing and need not be completed.
    assert_eq!(held.put_as(digest, 100_000, b"").await.unwrap(), 100_000);
    assert_eq!(held.put(b"").await.unwrap(), 100_000);
    assert!(held.get(Digest::of(b""), 0).await.unwrap().is_empty());
}

#[tokio::test]
async fn an_object_that_is_not_what_was_announced_leaves_nothing_behind() {
    let world = World::start().await;
    let mut held = held(&world).await;
    let (digest, picture) = (Digest::of(b"picture"), b"picture");
    let header = |held: &Held| {
        Part::Header(v1::PutObjectHeader {
            grip: Some(held.grip()),
            digest: digest.to_vec(),
            bytes: 7,
        })
    };
    let chunk = |offset, bytes: &'static [u8]| Part::Chunk(chunk::chunk(offset, bytes.into()));
    let damaged = Part::Chunk(v1::Chunk {
        digest: vec![0; 32],
        ..chunk::chunk(0, picture.as_slice().into())
    });
    let short = Part::Header(v1::PutObjectHeader {
        grip: Some(held.grip()),
        digest: vec![0; 31],
        bytes: 7,
    });
    let first = header(&held);
    for (parts, expected) in [
        (vec![], ErrorCode::Truncated),
        (vec![chunk(0, picture)], ErrorCode::InvalidRequest),
        (vec![short], ErrorCode::InvalidRequest),
        (
            vec![first.clone(), first.clone()],
            ErrorCode::InvalidRequest,
        ),
        (vec![first.clone(), damaged], ErrorCode::BadChunk),
        (vec![first.clone(), chunk(0, b"")], ErrorCode::BadChunk),
        (vec![first.clone(), chunk(1, b"p")], ErrorCode::ChunkOffset),
        (
            vec![first.clone(), chunk(0, b"pictures")],
            ErrorCode::PayloadSize,
        ),
        (vec![first.clone(), chunk(0, b"pict")], ErrorCode::Truncated),
        (
            vec![first.clone(), chunk(0, b"PICTURE")],
            ErrorCode::DigestMismatch,
        ),
    ] {
        let answer = held.put_parts(parts).await;
        assert_eq!(code(answer), expected);
    }
    assert!(files(&world, &held.lease.job_id).is_empty());
    assert_eq!(held.missing(&[digest]).await.unwrap(), [digest.to_vec()]);
    assert_eq!(held.put(picture).await.unwrap(), 7);
    assert!(held.missing(&[digest]).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_job_keeps_no_more_bytes_than_its_specification_says() {
    let world = World::start().await;
    let mut held = held(&world).await;
    let large = vec![1; 1 << 19];
    assert_eq!(held.put(&large).await.unwrap(), 1 << 19);
    // Refused at its announcement, before a byte.
    let announced = (1 << 19) + 1;
    let refused = refusal(held.put_as(Digest::of(b"x"), announced, b"").await);
    assert_eq!(refused.code, ErrorCode::QuotaExceeded);
    assert!(refused.message.contains("limits.disk"), "{refused}");
    let answer = held.put_as(Digest::of(b"x"), u64::MAX, b"").await;
    assert_eq!(code(answer), ErrorCode::QuotaExceeded);
    assert_eq!(held.put(&vec![2; 1 << 19]).await.unwrap(), 1 << 20);
    assert_eq!(code(held.put(b"x").await), ErrorCode::QuotaExceeded);
    assert_eq!(code(held.append(0, &["x"]).await), ErrorCode::QuotaExceeded);
    let gone = Digest::of(&large);
    assert_eq!(held.remove(&[gone]).await.unwrap(), 1 << 19);
    assert_eq!(held.remove(&[gone]).await.unwrap(), 1 << 19);
    assert_eq!(code(held.get(gone, 0).await), ErrorCode::UnknownObject);
    assert_eq!(files(&world, &held.lease.job_id).len(), 1);
    held.put(b"x").await.unwrap();
}

#[tokio::test]
async fn a_worker_that_loses_its_lease_while_it_sends_keeps_nothing() {
    let world = World::start().await;
    let mut held = held(&world).await;
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let header = Part::Header(v1::PutObjectHeader {
        grip: Some(held.grip()),
        digest: Digest::of(b"picture").to_vec(),
        bytes: 7,
    });
    let part = |part| v1::PutObjectRequest { part: Some(part) };
    sender.send(part(header)).await.unwrap();
    let job_id = held.lease.job_id.clone();
    let begun = async {
        crate::tests::harness::eventually("the file", async || {
            (!files(&world, &job_id).is_empty()).then_some(())
        })
        .await;
        super::advance(&world, Duration::from_secs(61));
        let whole = chunk::chunk(0, b"picture".as_slice().into());
        sender.send(part(Part::Chunk(whole))).await.unwrap();
        drop(sender);
    };
    let messages = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let (answer, ()) = tokio::join!(held.client.put_object(messages), begun);
    assert_eq!(code(answer), ErrorCode::LeaseLost);
    assert!(files(&world, &job_id).is_empty());
}

#[tokio::test]
async fn what_a_crash_left_is_swept_and_what_was_lost_is_asked_for_again() {
    let mut world = World::start().await;
    let mut held = held(&world).await;
    let (kept, lost) = (Digest::of(b"kept"), Digest::of(b"lost"));
    held.put(b"kept").await.unwrap();
    held.put(b"lost").await.unwrap();
    let job_id = held.lease.job_id.clone();
    fs::write(folder(&world, &job_id).join(".tmp1"), b"torn").unwrap();
    let nobodys = Digest::of(b"without a row").to_string();
    fs::write(folder(&world, &job_id).join(nobodys), b"without a row").unwrap();
    fs::create_dir(folder(&world, "no-such-job")).unwrap();
    fs::write(folder(&world, "no-such-job").join("x"), b"x").unwrap();
    world.restart().await;
    held.client = FakeWorker::of(&world, "w1").client;
    let mut expected = [kept.to_string(), lost.to_string()];
    expected.sort();
    assert_eq!(files(&world, &job_id), expected);
    assert!(!folder(&world, "no-such-job").exists());

    fs::remove_file(folder(&world, &job_id).join(lost.to_string())).unwrap();
    assert_eq!(held.missing(&[kept, lost]).await.unwrap(), [lost.to_vec()]);
    assert_eq!(code(held.get(lost, 0).await), ErrorCode::UnknownObject);
    // Counted once.
    assert_eq!(held.put(b"lost").await.unwrap(), 8);
    assert_eq!(held.get(lost, 0).await.unwrap(), b"lost");
}

#[tokio::test]
async fn an_ended_job_keeps_its_results_alone_after_its_time() {
    let world = World::start_with(|config| {
        config.retention.ended_jobs = Duration::from_hours(1);
    })
    .await;
    let mut held = held(&world).await;
    held.put(b"result").await.unwrap();
    held.put(b"checkpoint").await.unwrap();
    held.append(0, &["one"]).await.unwrap();
    let result = Digest::of(b"result");
    held.name("lora/merged.safetensors", result).await.unwrap();
    // A result is not removed, whoever asks for it.
    assert_eq!(held.remove(&[result]).await.unwrap(), 19);
    held.release(JobRelease::Succeeded).await.unwrap();
    let job_id = held.lease.job_id.clone();
    sweep_now(world.server().context()).await.unwrap();
    assert_eq!(files(&world, &job_id).len(), 2);
    for _ in 0..2 {
        world.clock.advance(Duration::from_hours(2));
        sweep_now(world.server().context()).await.unwrap();
        assert_eq!(files(&world, &job_id), [result.to_string()]);
    }
    let request = v1::ListArtefactsRequest { job_id };
    let listed = world.operator().list_artefacts(request).await.unwrap();
    let [artefact] = &listed.into_inner().artefacts[..] else {
        panic!("one result");
    };
    assert_eq!(artefact.digest, result.to_vec());
}

#[tokio::test]
async fn results_have_plain_names_of_objects_that_are_there() {
    let world = World::start().await;
    let mut held = held(&world).await;
    let digest = Digest::of(b"result");
    let answer = held.name("a.txt", digest).await;
    assert_eq!(code(answer), ErrorCode::UnknownObject);
    held.put(b"result").await.unwrap();
    for bad in ["", "/a", "../a", "a/../../b", ".a", "a\nb"] {
        let answer = held.name(bad, digest).await;
        assert_eq!(code(answer), ErrorCode::InvalidRequest, "{bad}");
    }
    held.name("a.txt", digest).await.unwrap();
    held.put(b"better").await.unwrap();
    held.name("a.txt", Digest::of(b"better")).await.unwrap();
    let request = v1::ListArtefactsRequest {
        job_id: held.lease.job_id.clone(),
    };
    let listed = world.operator().list_artefacts(request).await.unwrap();
    let listed = listed.into_inner().artefacts;
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].digest, Digest::of(b"better").to_vec());
}

#[tokio::test]
async fn a_result_that_is_replaced_makes_room_unless_something_else_needs_its_object() {
    let world = World::start().await;
    let mut held = held(&world).await;
    let (plain, named, kept) = (b"of 1", b"by two names", b"by the journal");
    for (name, bytes) in [
        ("gallery.html", plain.as_slice()),
        ("metrics.csv", named),
        ("copy.csv", named),
        ("lora/merged.bin", kept),
    ] {
        held.put(bytes).await.unwrap();
        held.name(name, Digest::of(bytes)).await.unwrap();
    }
    let line = format!(r#"{{"lora":"{}"}}"#, Digest::of(kept));
    held.append(0, &[&line]).await.unwrap();
    held.put(b"new").await.unwrap();
    let new = Digest::of(b"new");
    // Naming it twice is the same as once.
    for name in [
        "gallery.html",
        "gallery.html",
        "metrics.csv",
        "lora/merged.bin",
    ] {
        held.name(name, new).await.unwrap();
    }
    let gone = held.get(Digest::of(plain), 0).await;
    assert_eq!(code(gone), ErrorCode::UnknownObject);
    assert_eq!(held.get(Digest::of(named), 0).await.unwrap(), named);
    assert_eq!(held.get(Digest::of(kept), 0).await.unwrap(), kept);
    assert_eq!(files(&world, &held.lease.job_id).len(), 3);
    let expected = named.len() + kept.len() + 3 + line.len();
    assert_eq!(held.remove(&[]).await.unwrap(), expected as u64);
    // Iteration after iteration of pages that fill half of what the job may keep.
    for iteration in 0..5 {
        let page = vec![iteration; 1 << 19];
        held.put(&page).await.unwrap();
        held.name("review.html", Digest::of(&page)).await.unwrap();
        held.put(b"small").await.unwrap();
        held.name("review.html", Digest::of(b"small"))
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn results_that_could_not_be_files_of_one_folder_are_refused() {
    let world = World::start().await;
    let mut held = held(&world).await;
    held.put(b"result").await.unwrap();
    let digest = Digest::of(b"result");
    held.name("lora/merged/a.bin", digest).await.unwrap();
    held.name("lora.txt", digest).await.unwrap();
    for bad in [
        "lora",
        "lora/merged",
        "lora.txt/a",
        "lora/merged/a.bin/b/c",
        "-x",
        "a/-x",
    ] {
        let refused = refusal(held.name(bad, digest).await);
        assert_eq!(refused.code, ErrorCode::InvalidRequest, "{bad}");
    }
    for good in ["lora/merged/b.bin", "lora/merge", "lora/merged2", "LORA"] {
        held.name(good, digest).await.unwrap();
    }
}

#[tokio::test]
async fn all_jobs_together_keep_no_more_than_the_server_says_and_wait_for_room() {
    let world = World::start_with(|config| {
        config.workers.max_running = 2;
        config.workers.max_total_disk = ByteSize::mebibytes(1);
    })
    .await;
    let mut first = held(&world).await;
    let mut second = held(&world).await;
    let large = vec![1; 700_000];
    first.put(&large).await.unwrap();
    let refused = refusal(second.put(&vec![2; 400_000]).await);
    assert_eq!(refused.code, ErrorCode::Busy);
    assert!(refused.retry_after.is_some());
    assert!(
        refused.message.contains("workers.max_total_disk"),
        "{refused}"
    );
    assert!(files(&world, &second.lease.job_id).is_empty());
    let line = "x".repeat(400_000);
    assert_eq!(code(second.append(0, &[&line]).await), ErrorCode::Busy);
    first.remove(&[Digest::of(&large)]).await.unwrap();
    second.put(&vec![2; 400_000]).await.unwrap();
    second.append(0, &[&line]).await.unwrap();
}
