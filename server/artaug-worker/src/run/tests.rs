mod card;
mod endpoints;
mod faults;
mod fused;
mod held_up;
mod limits;
mod lost;
mod method;
mod outside;
mod overlap;
mod own_limits;
mod pauses;
mod per_pair;
mod results;
mod review;
mod samples;
mod sources;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use concord_common::Digest;
use concord_proto::v1::{self, JobRelease, WorkerCommand};
use serde_json::Value;

use super::*;
use crate::testing::{FakeServer, FakeWorkshop, Loss, SPEC, spec_with, worker};

/// Runs a job to its end without a disturbance.
fn undisturbed(spec: &str) -> Arc<FakeServer> {
    run_by(spec, |_| {})
}

/// Has a job run by a worker that something is changed about.
fn run_by(spec: &str, change: impl FnOnce(&mut Worker)) -> Arc<FakeServer> {
    let server = Arc::new(FakeServer::new(spec));
    let folder = tempfile::tempdir().unwrap();
    let mut worker = worker(&server, folder.path());
    change(&mut worker);
    worker.run();
    server
}

/// The job with a limit.
fn limited(limit: &str) -> String {
    let limits = format!("[limits]\n{limit}\n[output]");
    spec_with(&[("[output]", &limits)])
}

/// A workshop whose engine fails so.
#[expect(
    clippy::unnecessary_box_returns,
    reason = "a worker has its workshop in a box"
)]
fn faulty(fault: &'static str) -> Box<FakeWorkshop> {
    Box::new(FakeWorkshop {
        fault: Some(fault),
        ..FakeWorkshop::default()
    })
}

/// Another machine brings a job to the end that it would have had without a disturbance.
fn ends_as_undisturbed(server: &Arc<FakeServer>) {
    let spec = {
        let mut state = server.state();
        state.loss = Loss::Never;
        state.grants = usize::MAX;
        state.spec.clone()
    };
    let folder = tempfile::tempdir().unwrap();
    worker(server, folder.path()).run();
    succeeded(server);
    let wanted = undisturbed(&spec).lasting_results();
    assert_eq!(server.lasting_results(), wanted);
}

/// The events of this name in the job's journal.
fn events(server: &FakeServer, name: &str) -> Vec<Value> {
    let state = server.state();
    let event = |line: &Vec<u8>| serde_json::from_slice::<Value>(line).unwrap()["event"].take();
    let events = state.lines.iter().map(event);
    events.filter(|event| event["event"] == name).collect()
}

/// The iteration and the name of the training that an event is of.
fn training_of(event: &Value) -> (u64, String) {
    let training = event["training"].as_str().unwrap();
    (event["iteration"].as_u64().unwrap(), training.to_owned())
}

fn digest(name: &Value) -> Digest {
    name.as_str().unwrap().parse().unwrap()
}

/// None if there is no list.
fn digests(names: &Value) -> Vec<Digest> {
    names.as_array().into_iter().flatten().map(digest).collect()
}

/// A result.
fn text_of(server: &FakeServer, name: &str) -> String {
    String::from_utf8(server.results()[name].clone()).unwrap()
}

fn succeeded(server: &FakeServer) {
    let (release, reason) = server.released();
    assert_eq!(release, JobRelease::Succeeded, "{reason}");
}

#[test]
fn a_job_runs_to_its_end_and_leaves_its_results() {
    let server = undisturbed(SPEC);
    succeeded(&server);
    let results = server.results();
    let names: Vec<&str> = results.keys().map(String::as_str).collect();
    for name in [
        "MODEL_CARD.md",
        "fused/model_index.json",
        "fused/unet/weights",
        "gallery.html",
        "held-out-1.jsonl",
        "ledger.json",
        "lora/iteration-1/lora.diffusers.safetensors",
        "lora/iteration-2/lora.kohya.safetensors",
        "lora/merged/lora.diffusers.safetensors",
        "lora/merged/lora.kohya.safetensors",
        "lora/reduced/lora.diffusers.safetensors",
        "losses/iteration-2-train-control.csv",
        "manifest-1.jsonl",
        "manifest-2.jsonl",
        "metrics.csv",
        "metrics.jsonl",
    ] {
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    let text = |name| text_of(&server, name);
    assert_eq!(text("metrics.jsonl").lines().count(), 2);
    assert_eq!(text("manifest-2.jsonl").lines().count(), 10);
    assert!(text("ledger.json").contains("peak_memory"));
    assert!(text("gallery.html").contains("data:image/png;base64,"));
    // Both LoRA_2 are in the merged one, and the seconds are in none.
    let merged = text("lora/merged/lora.diffusers.safetensors");
    assert_eq!(merged.matches("+12").count(), 2, "{merged}");
    assert!(merged.contains("concord.seed") && !merged.contains("second"));
    // The signs of life told of the stages, and nothing of the worker's folder is left.
    let state = server.state();
    let stages: BTreeSet<&str> = state.progress.iter().map(|p| p.stage.as_str()).collect();
    assert!(!stages.is_empty());
    let last = state.releases.last().unwrap().progress.clone().unwrap();
    assert_eq!((last.stage.as_str(), last.iteration), ("done", 2));
    assert!(last.peak_memory > 0 && last.bytes_kept > 0);
    assert_eq!(last.last_images.len(), 4);
}

#[test]
fn a_job_is_the_same_with_one_helper_and_with_many() {
    let one = Arc::new(FakeServer::new(SPEC));
    let folder = tempfile::tempdir().unwrap();
    let mut alone = worker(&one, folder.path());
    alone.habits.helpers = 1;
    alone.run();
    let many = Arc::new(FakeServer::new(SPEC));
    let mut crowd = worker(&many, folder.path());
    crowd.habits.helpers = 8;
    crowd.run();
    assert_eq!(one.lasting_results(), many.lasting_results());
}

/// Every lease ends after a few writes; what comes out must be as if none had.
fn killed_again_and_again(spec: &str, loss: Loss, same_folder: bool) -> Arc<FakeServer> {
    let wanted = undisturbed(spec).lasting_results();
    let server = Arc::new(FakeServer::new(spec));
    server.state().loss = loss;
    if same_folder {
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
    } else {
        // Each time another machine.
        while server.state().releases.is_empty() {
            let folder = tempfile::tempdir().unwrap();
            server.state().grants = 1;
            worker(&server, folder.path()).run();
        }
    }
    succeeded(&server);
    assert_eq!(server.lasting_results(), wanted);
    assert_eq!(server.state().releases.len(), 1);
    server
}

#[test]
fn a_job_killed_before_every_second_write_ends_in_the_same_bytes() {
    killed_again_and_again(SPEC, Loss::Before(2), true);
}

#[test]
fn a_job_killed_after_every_single_write_unheard_ends_in_the_same_bytes() {
    killed_again_and_again(SPEC, Loss::After(1), true);
}

#[test]
fn a_job_handed_from_machine_to_machine_ends_in_the_same_bytes() {
    killed_again_and_again(SPEC, Loss::After(11), false);
}

#[test]
fn a_job_killed_while_it_brings_its_results_ends_in_the_same_bytes() {
    let wanted = undisturbed(SPEC).lasting_results();
    for at in [1, 2, 5, 12, 20, 24, 31] {
        let server = Arc::new(FakeServer::new(SPEC));
        server.state().loss = Loss::AtResult(at);
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
        succeeded(&server);
        assert_eq!(server.state().loss, Loss::Never, "{at}");
        assert_eq!(server.lasting_results(), wanted);
    }
}

#[test]
fn a_worker_that_has_lost_its_lease_writes_nothing_more() {
    for at in [1, 9, 40, 75] {
        let server = Arc::new(FakeServer::new(SPEC));
        {
            let mut state = server.state();
            state.loss = Loss::Before(at);
            state.grants = 1;
        }
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
        let state = server.state();
        assert!(state.releases.is_empty());
        // Helpers that were in the middle of a call may each find the door closed once.
        assert!(state.fenced <= 4, "{}", state.fenced);
    }
}

#[test]
fn a_folder_with_other_lines_than_the_servers_is_brought_in_step() {
    let wanted = undisturbed(SPEC).lasting_results();
    let server = Arc::new(FakeServer::new(SPEC));
    {
        let mut state = server.state();
        state.loss = Loss::Before(60);
        state.grants = 1;
    }
    let folder = tempfile::tempdir().unwrap();
    worker(&server, folder.path()).run();
    let journal = folder.path().join("jobs/job-1/journal.jsonl");
    let text = std::fs::read_to_string(&journal).unwrap();
    assert!(text.lines().count() > 10);
    // Lines that the server never saw, and damaged objects.
    let poisoned = text.replace("\"forwards\":10", "\"forwards\":99");
    assert_ne!(poisoned, text);
    std::fs::write(&journal, poisoned + "{\"n\":1}\nrubbish").unwrap();
    for entry in std::fs::read_dir(folder.path().join("jobs/job-1/objects")).unwrap() {
        std::fs::write(entry.unwrap().path(), b"poison").unwrap();
    }
    {
        let mut state = server.state();
        state.loss = Loss::Never;
        state.grants = 1;
    }
    worker(&server, folder.path()).run();
    succeeded(&server);
    assert_eq!(server.lasting_results(), wanted);
}

#[test]
fn a_paused_job_is_saved_and_goes_on_when_resumed() {
    let wanted = undisturbed(SPEC).lasting_results();
    let mut paused = 0;
    for lines in [2, 30, 45, 60] {
        let server = Arc::new(FakeServer::new(SPEC));
        server.state().command_at = Some((lines, WorkerCommand::Pause));
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
        let (release, _) = server.released();
        // So small a job may be over before it hears of the pause.
        if release == JobRelease::Paused {
            paused += 1;
            assert!(server.state().lines.len() >= lines);
            server.resume();
            worker(&server, folder.path()).run();
        }
        succeeded(&server);
        assert_eq!(server.lasting_results(), wanted);
    }
    assert!(paused > 0);
}

/// The worker has dropped a cancelled job, so that the server may give out the next one.
fn was_dropped(server: &FakeServer, folder: &Path) {
    assert!(!server.is_held());
    assert!(!folder.join("jobs/job-1").exists());
    assert!(server.state().releases.is_empty());
}

#[test]
fn a_cancelled_job_is_dropped() {
    // Its worker hears of it by a sign of life, or first by a write that is refused: the next sign of life would come much later.
    for lease in [Duration::from_millis(3), Duration::from_hours(1)] {
        let server = Arc::new(FakeServer::new(SPEC));
        {
            let mut state = server.state();
            state.lease = lease;
            state.command_at = Some((1, WorkerCommand::Cancel));
        }
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
        was_dropped(&server, folder.path());
        assert_eq!(server.state().lines.len(), 1);
    }
}

/// Has the job cancelled while it is set up, and lacks what it needs.
struct CancelledMeanwhile(Arc<FakeServer>);

impl Workshop for CancelledMeanwhile {
    fn parts(&self, _spec: &ArtaugSpec, _brake: &Brake) -> Result<Parts, PartsError> {
        self.0.state().command = WorkerCommand::Cancel;
        Err(PartsError::Limit {
            key: "limits.memory",
            what: "too little".to_owned(),
        })
    }
}

#[test]
fn a_job_that_is_cancelled_when_it_is_to_be_given_back_is_dropped() {
    let server = Arc::new(FakeServer::new(SPEC));
    server.state().lease = Duration::from_hours(1);
    let folder = tempfile::tempdir().unwrap();
    let mut late = worker(&server, folder.path());
    late.workshop = Box::new(CancelledMeanwhile(Arc::clone(&server)));
    late.run();
    was_dropped(&server, folder.path());
}

#[test]
fn a_stopped_worker_gives_the_job_back() {
    let server = Arc::new(FakeServer::new(SPEC));
    let folder = tempfile::tempdir().unwrap();
    let stopped = worker(&server, folder.path());
    stopped.stop.tell();
    stopped.run();
    assert!(server.state().releases.is_empty(), "nothing was claimed");

    let stopped = worker(&server, folder.path());
    let stop = Arc::clone(&stopped.stop);
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| {
            let is_early = || {
                let state = server.state();
                state.lines.len() < 20 && state.releases.is_empty()
            };
            while is_early() {
                std::thread::yield_now();
            }
            stop.tell();
        });
        stopped.run();
        server.released()
    });
    assert_eq!(ended.0, JobRelease::Stopped);
    worker(&server, folder.path()).run();
    succeeded(&server);
    assert_eq!(
        server.lasting_results(),
        undisturbed(SPEC).lasting_results()
    );
}

#[test]
fn a_fault_of_the_engine_ends_the_job_and_not_the_worker() {
    for (fault, word) in [
        ("open", "open is broken"),
        ("draw", "draw is broken"),
        ("fit", "fit is broken"),
        ("export", "export is broken"),
        ("panic", "fault of its own"),
    ] {
        let server = Arc::new(FakeServer::new(SPEC));
        let folder = tempfile::tempdir().unwrap();
        let mut worker = worker(&server, folder.path());
        worker.workshop = faulty(fault);
        worker.run();
        let (release, reason) = server.released();
        assert_eq!(release, JobRelease::Failed);
        assert!(reason.contains(word), "{reason}");
        assert!(!folder.path().join("jobs/job-1").exists());
    }
}

#[test]
fn what_a_job_may_not_have_fails_it_with_a_sentence() {
    for (spec, word) in [
        (
            spec_with(&[("folder = \"m\"", "folder = \"missing\"")]),
            "[allowed.endpoints.vision]",
        ),
        (spec_with(&[("seed = 7", "sead = 7")]), "sead"),
    ] {
        let server = undisturbed(&spec);
        let (release, reason) = server.released();
        assert_eq!(release, JobRelease::Failed);
        assert!(reason.contains(word), "{reason}");
    }
}

#[test]
fn a_server_that_is_busy_is_asked_again_and_one_that_refuses_ends_the_job() {
    let server = Arc::new(FakeServer::new(SPEC));
    server.state().busy = 7;
    let folder = tempfile::tempdir().unwrap();
    worker(&server, folder.path()).run();
    succeeded(&server);

    let server = Arc::new(FakeServer::new(SPEC));
    server.state().refused = Some("put_object");
    worker(&server, folder.path()).run();
    let (release, reason) = server.released();
    assert_eq!(release, JobRelease::Failed);
    assert!(reason.contains("no put_object"), "{reason}");
}

#[test]
fn a_journal_of_another_job_is_not_gone_on_with() {
    let server = undisturbed(SPEC);
    let lines = server.state().lines.clone();
    let other = Arc::new(FakeServer::new(&spec_with(&[("seed = 7", "seed = 8")])));
    other.state().lines = lines.clone();
    other.state().grants = 1;
    let folder = tempfile::tempdir().unwrap();
    worker(&other, folder.path()).run();
    assert_eq!(other.state().lines, lines);
    let (release, reason) = other.released();
    assert_eq!(release, JobRelease::Stopped);
    assert!(reason.contains("another specification"), "{reason}");
}

#[test]
fn a_job_id_that_leads_out_of_the_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let server = Arc::new(FakeServer::new(SPEC));
    let worker = worker(&server, folder.path());
    for id in ["../escape", "/etc/x", "", "a/b"] {
        let lease = v1::WorkerLease {
            job_id: id.to_owned(),
            ..v1::WorkerLease::default()
        };
        assert!(!job::work(&worker, &lease));
    }
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert!(names.is_empty(), "{names:?}");
}

#[test]
fn copies_of_other_jobs_make_room() {
    let server = Arc::new(FakeServer::new(SPEC));
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("jobs/job-0");
    std::fs::create_dir_all(old.join("objects")).unwrap();
    std::fs::write(old.join("objects/x"), vec![0; 5000]).unwrap();
    let mut worker = worker(&server, folder.path());
    worker.run();
    succeeded(&server);
    assert!(old.exists(), "there was room");
    // Now the jobs together may hold no more than this one may take.
    let server = Arc::new(FakeServer::new(&limited("disk = \"1 MiB\"")));
    worker.server = Arc::clone(&server) as _;
    worker.habits.disk = 1 << 20;
    worker.run();
    succeeded(&server);
    assert!(!Path::new(&old).exists());
}

#[test]
fn a_worker_without_a_job_ends_after_its_patience() {
    let server = Arc::new(FakeServer::new(SPEC));
    server.state().grants = 0;
    let folder = tempfile::tempdir().unwrap();
    let mut idle = worker(&server, folder.path());
    idle.habits.exit_when_idle = Some(Duration::from_millis(10));
    idle.run();
    assert!(server.state().releases.is_empty());
}
