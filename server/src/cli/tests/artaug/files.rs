//! The images of a job that goes on, and the end of what one that has ended has left.

use bytes::Bytes;
use concord_common::Digest;
use concord_proto::v1;

use super::{
    super::{
        Exit,
        against_a_server::{concord, json},
    },
    against_a_server::{Worker, expect, submitted},
};
use crate::{
    cli::output::Job,
    tests::harness::{World, spec},
};

#[test]
fn a_list_says_whose_files_were_deleted() {
    let mut job = super::job();
    job.set_state(v1::JobState::Succeeded);
    job.files_deleted_at = Some(prost_types::Timestamp::default());
    assert_eq!(
        crate::cli::table::state(&Job::from(job.clone())),
        "succeeded, files deleted"
    );
    let text = super::shown(job.clone());
    assert!(text.contains("files      deleted 1970-"), "{text}");
    let value = serde_json::to_value(Job::from(job)).unwrap();
    let time = value["files_deleted_at"].as_str().unwrap();
    assert!(time.starts_with("1970-01-01T00:00:00"), "{time}");
}

#[tokio::test]
async fn an_operator_sees_the_last_images_of_a_job_under_way() {
    let world = World::start().await;
    let job = submitted(&world).await;
    let job = job.as_str();
    let into = world.folder.path().join("images");
    let folder = into.to_str().unwrap();
    let images = ["artaug", "images", job, folder];
    expect(&world, &[(&images, Exit::NotFound, "none yet")]).await;
    let mut worker = Worker::claim(&world).await;
    let pictures = [&b"\x89PNG one"[..], b"\x89PNG two", b"\x89PNG three"].map(Bytes::from_static);
    for (name, picture) in ["1.png", "2.png", "3.png"].into_iter().zip(&pictures) {
        worker.put(name, picture).await;
    }
    let [one, two, three] = pictures.map(|picture| (Digest::of(&picture), picture));
    let at = |images: &[Digest]| v1::ArtaugProgress {
        last_images: images.iter().map(|digest| digest.to_vec()).collect(),
        ..super::job().artaug.unwrap()
    };
    // One of them is not there any more.
    worker.renew(at(&[two.0, Digest::of(b"gone"), one.0])).await;
    let show = format!("concord artaug images {job}");
    expect(
        &world,
        &[
            (&["job", "show", job], Exit::Done, &show),
            (&images, Exit::Done, "written"),
        ],
    )
    .await;
    let written = |digest: Digest| std::fs::read(into.join(format!("{digest}.png")));
    assert_eq!(written(one.0).unwrap(), one.1);
    assert_eq!(written(two.0).unwrap(), two.1);

    worker.renew(at(&[three.0, two.0])).await;
    let (exit, text) = concord(&world, &[&images[..], &["--json"]].concat()).await;
    assert_eq!(exit, Exit::Done, "{text}");
    let files = json(&text)["files"].clone();
    let row = |number: usize| {
        (
            files[number]["digest"].clone(),
            files[number]["written"].clone(),
        )
    };
    assert_eq!(row(0), (three.0.to_string().into(), true.into()));
    assert_eq!(row(1), (two.0.to_string().into(), false.into()));
    assert_eq!(files.as_array().unwrap().len(), 2);
    assert_eq!(written(three.0).unwrap(), three.1);
    let silos = world.submit(&spec(1, 1, "")).await;
    expect(
        &world,
        &[
            (
                &["artaug", "images", &silos, folder],
                Exit::Refused,
                "of kind",
            ),
            (&["artaug", "images", "nothing", folder], Exit::NotFound, ""),
        ],
    )
    .await;
}

#[tokio::test]
async fn the_files_of_an_ended_job_are_deleted_on_the_operators_clear_word() {
    let world = World::start().await;
    let job = submitted(&world).await;
    let job = job.as_str();
    let delete = ["artaug", "delete", job, "--yes"];
    let mut worker = Worker::claim(&world).await;
    worker
        .put("lora/merged.safetensors", &Bytes::from_static(b"lora"))
        .await;
    worker
        .put("gallery.html", &Bytes::from_static(b"<!doctype html>"))
        .await;
    expect(&world, &[(&delete, Exit::Refused, "JOB_NOT_ENDED")]).await;
    worker.release(v1::JobRelease::Succeeded, &[], 0).await;
    let into = world.folder.path().join("results");
    let fetch = ["artaug", "fetch", job, into.to_str().unwrap()];
    expect(
        &world,
        &[
            (&delete[..3], Exit::Usage, "the 2 artefacts"),
            (&delete[..3], Exit::Usage, "--yes"),
            (&["artaug", "artefacts", job], Exit::Done, "lora/merged"),
            (&delete, Exit::Done, "19 B"),
            (&["artaug", "artefacts", job], Exit::Done, "no artefacts\n"),
            (&fetch, Exit::NotFound, "deleted"),
            (&["job", "list"], Exit::Done, "succeeded, files deleted"),
            (&["job", "show", job], Exit::Done, "files      deleted 20"),
            (&["job", "watch", job], Exit::Done, "has succeeded"),
            (&delete, Exit::Done, "0 B"),
        ],
    )
    .await;
    let (exit, text) = concord(&world, &[&delete[..], &["--json"]].concat()).await;
    assert_eq!(exit, Exit::Done, "{text}");
    assert_eq!(json(&text)["bytes_freed"], 0);
    assert!(json(&text)["job"]["files_deleted_at"].is_string(), "{text}");
    let silos = world.submit(&spec(1, 1, "")).await;
    expect(
        &world,
        &[
            (
                &["artaug", "delete", &silos, "--yes"],
                Exit::Refused,
                "WRONG_KIND",
            ),
            (&["artaug", "delete", &silos], Exit::Refused, "WRONG_KIND"),
            (
                &["artaug", "delete", "nothing", "--yes"],
                Exit::NotFound,
                "",
            ),
        ],
    )
    .await;
}

#[tokio::test]
async fn an_operator_is_warned_of_a_job_that_no_worker_will_take() {
    let world = World::start().await;
    let file = world.folder.path().join("artaug.toml");
    std::fs::write(&file, include_str!("../../../../../deploy/artaug/job.toml")).unwrap();
    let submit = ["job", "submit", file.to_str().unwrap(), "--json"];
    let (exit, text) = concord(&world, &submit).await;
    assert_eq!(exit, Exit::Done, "{text}");
    let warning = json(&text)["warning"].as_str().unwrap().to_owned();
    let job = json(&text)["job"]["job_id"].as_str().unwrap().to_owned();
    assert!(warning.contains("no worker asks"), "{warning}");
    expect(&world, &[(&["job", "show", &job], Exit::Done, &warning)]).await;
    let mut worker = Worker::claim(&world).await;
    worker.renew(super::job().artaug.unwrap()).await;
    let (_, text) = concord(&world, &submit).await;
    assert_eq!(json(&text)["warning"], serde_json::Value::Null);
}
