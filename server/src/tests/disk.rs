//! A disk that does not confirm what was written, with `durability = "power"`.

use std::{os::unix::fs::symlink, time::Duration};

use concord_common::{ErrorCode, chunk, lifecycle::StopOutcome};
use concord_proto::v1::{self, JobState, Outcome};

use super::{
    harness::{World, code},
    offers::offering,
};
use crate::{config::Durability, error::Failure};

async fn world() -> World {
    World::start_with(|config| config.durability = Durability::Power).await
}

#[tokio::test]
async fn an_upload_that_the_disk_did_not_confirm_is_thrown_away_and_comes_anew() {
    let world = world().await;
    let (mut a, job_id, offer) = offering(&world, "").await;
    let begun = a.begin(&offer).await;
    let id: [u8; 16] = begun.upload_id.as_slice().try_into().unwrap();
    let path = world.server().context().spool.path(&id);
    // Takes every byte and cannot be synced.
    symlink("/dev/null", &path).unwrap();
    let chunks = chunk::chunks(&offer.payload, 0, 300).collect();
    let answer = a.upload(&begun.upload_id, chunks).await;
    assert_eq!(code(answer), ErrorCode::Internal);
    std::fs::symlink_metadata(&path).unwrap_err();
    // Nobody can go on with it and find a disk that says yes.
    let again = a.upload(&begun.upload_id, vec![]).await;
    assert_eq!(code(again), ErrorCode::UnknownUpload);
    let silos = world.round(&job_id, 1).await.silos;
    assert_eq!(silos[0].outcome(), Outcome::Unspecified);

    let anew = a.begin(&offer).await;
    assert_ne!(anew.upload_id, begun.upload_id);
    assert_eq!(anew.offset, 0);
    assert_eq!(a.send(&offer).await.unwrap().outcome(), Outcome::Accepted);
    world.wait_for_state(&job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn a_server_whose_database_is_no_longer_synced_ends_as_failed() {
    let mut world = world().await;
    let log = world.config.state_dir.join("concord.db-wal");
    std::fs::rename(&log, world.folder.path().join("log")).unwrap();
    // A loop of links cannot be opened, by nobody.
    symlink(&log, &log).unwrap();
    let server = world.server.take().unwrap();
    let context = server.context();
    let (now, silo) = (context.now(), &"a".parse().unwrap());
    let written = context
        .datastore
        .run_tx("test", |tx| {
            Box::pin(async move {
                Ok::<_, Failure>(tx.see_silo(silo, v1::Enrollment::Active, now).await?)
            })
        })
        .await;
    let error = written.unwrap_err().to_string();
    assert!(error.contains("does not confirm"), "{error}");
    let shutdown = server.shutdown().clone();
    shutdown.token().cancelled().await;
    assert_eq!(shutdown.failed_task(), Some("database"));
    let outcome = server.stop(Duration::from_secs(5)).await;
    assert_eq!(outcome, StopOutcome::TaskFailed);
    assert!(!outcome.is_success());
}

#[tokio::test]
async fn a_server_that_is_told_to_stop_leaves_no_task_behind() {
    let mut world = world().await;
    let server = world.server.take().unwrap();
    assert_eq!(
        server.stop(Duration::from_secs(20)).await,
        StopOutcome::Clean
    );
}
