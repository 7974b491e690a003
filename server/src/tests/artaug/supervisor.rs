//! The worker that the server starts for itself, played by a few lines of shell.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use concord_proto::v1::{JobRelease, JobState};
use rustix::process::{Pid, test_kill_process};

use super::{FakeWorker, artaug, is_waiting};
use crate::tests::harness::{World, eventually, spec};

/// A server whose worker is this script. Each start adds its process id and that of a child of its own to the file `starts`.
async fn world(script: &str) -> World {
    let mut world = World::stopped();
    let folder = world.folder.path();
    let program = folder.join("worker.sh");
    let text = format!(
        "#!/bin/sh\ncd '{}'\nprintf '%s ' \"$@\" > arguments\necho $CONCORD__LIMITS__STOP_WITHIN > within\n{script}\n",
        folder.display()
    );
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let config = folder.join("worker.toml");
    fs::write(&config, "").unwrap();
    world.config.workers.program = Some(program);
    world.config.workers.config = Some(config);
    world.restart().await;
    world
}

const PATIENT: &str = "sleep 1000 &\necho $$ $! >> starts\nwait";
const DEAF: &str = "trap '' TERM\nsleep 1000 &\necho $$ $! >> starts\nwait\nwait";

/// Process ids by start.
fn starts(folder: &Path) -> Vec<Vec<Pid>> {
    let text = fs::read_to_string(folder.join("starts")).unwrap_or_default();
    let ids = |line: &str| {
        line.split_whitespace()
            .map(|id| Pid::from_raw(id.parse().unwrap()).unwrap())
            .collect()
    };
    // A last line without its end is still being written.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(ids).collect()
}

async fn started(world: &World, number: usize) -> Vec<Pid> {
    eventually("the worker's start", async || {
        starts(world.folder.path()).get(number - 1).cloned()
    })
    .await
}

async fn gone(processes: &[Pid]) {
    eventually("the processes' end", async || {
        let alive = |id: &Pid| test_kill_process(*id).is_ok();
        (!processes.iter().any(alive)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_worker_is_started_for_a_job_and_ends_with_the_server() {
    let mut world = world(PATIENT).await;
    assert!(starts(world.folder.path()).is_empty());
    world.submit(&artaug()).await;
    let processes = started(&world, 1).await;
    let arguments = fs::read_to_string(world.folder.path().join("arguments")).unwrap();
    let config = world.folder.path().join("worker.toml");
    assert_eq!(
        arguments,
        format!("run --config {} --exit-when-idle 30s ", config.display())
    );
    // Less than the server waits for it, which is half of its own time to stop.
    let within = fs::read_to_string(world.folder.path().join("within")).unwrap();
    let within = humantime::parse_duration(within.trim()).unwrap();
    assert!(
        !within.is_zero() && within < world.config.stop_timeout / 2,
        "{within:?}"
    );
    world.stop().await;
    gone(&processes).await;
    assert_eq!(starts(world.folder.path()).len(), 1);
}

#[tokio::test]
async fn a_dead_worker_is_started_again_and_nothing_of_it_is_left() {
    let world = world(PATIENT).await;
    world.submit(&artaug()).await;
    let first = started(&world, 1).await;
    rustix::process::kill_process(first[0], rustix::process::Signal::KILL).unwrap();
    let second = started(&world, 2).await;
    assert_ne!(first, second);
    gone(&first).await;
}

#[tokio::test]
async fn a_worker_that_does_not_stop_is_killed_with_all_that_it_started() {
    let mut world = world(DEAF).await;
    world.submit(&artaug()).await;
    let processes = started(&world, 1).await;
    world.stop().await;
    gone(&processes).await;
}

#[tokio::test]
async fn a_worker_that_fails_at_once_is_tried_again_and_the_rounds_go_on() {
    let world = world("echo $$ >> starts\nexit 3").await;
    let [mut a] = world.silos(["a"]).await;
    world.submit(&artaug()).await;
    started(&world, 2).await;
    let job_id = world.submit(&spec(1, 1, "")).await;
    a.contribute(&job_id, 1, 1.0, 1).await;
    world.wait_for_state(&job_id, JobState::Succeeded).await;
    assert!(is_waiting(&world).await);
}

#[tokio::test]
async fn a_worker_that_cannot_be_started_is_no_harm_to_the_server() {
    let world = world(PATIENT).await;
    let program = world.config.workers.program.clone().unwrap();
    fs::remove_file(&program).unwrap();
    let job_id = world.submit(&artaug()).await;
    let mut held = FakeWorker::of(&world, "elsewhere").claim().await;
    assert_eq!(held.lease.job_id, job_id);
    held.release(JobRelease::Succeeded).await.unwrap();
    assert!(starts(world.folder.path()).is_empty());
}

#[tokio::test]
async fn a_worker_of_this_machine_may_bring_its_work_while_the_server_stops() {
    // It says that it was asked to stop, and waits for leave to go.
    let script = "trap 'echo asked > asked; while [ ! -e leave ]; do sleep 0.05; done; exit 0' TERM\n\
                  sleep 1000 &\necho $$ $! >> starts\nwait";
    let mut world = world(script).await;
    let job_id = world.submit(&artaug()).await;
    started(&world, 1).await;
    // What that worker would do, over a connection that is there already.
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    assert_eq!(held.lease.job_id, job_id);
    let server = world.server.take().unwrap();
    let folder = world.folder.path().to_owned();
    let work = async {
        eventually("the signal", async || {
            folder.join("asked").exists().then_some(())
        })
        .await;
        held.put(b"checkpoint").await.unwrap();
        held.append(0, &["saved"]).await.unwrap();
        held.release(JobRelease::Stopped).await.unwrap();
        fs::write(folder.join("leave"), "").unwrap();
    };
    tokio::join!(server.stop(Duration::from_secs(10)), work);
    world.restart().await;
    assert!(is_waiting(&world).await);
}
