mod pages;

use concord_common::{Timestamp, clock::MockClock, fsutil::UNFINISHED};

use super::*;
use crate::machine::{Ingredients, Stage, Training, testing};

fn open(folder: &Path) -> Result<JobFolder, FolderError> {
    let clock = Arc::new(MockClock::new(Timestamp(5)));
    JobFolder::open(
        folder,
        testing::plan(),
        testing::specification(),
        1 << 20,
        clock,
    )
}

/// Records events until `stop` says so or the job is over.
fn go_on(job: &mut JobFolder, stop: impl Fn(&Machine) -> bool) {
    while job.machine().work() != Work::Done {
        for event in testing::GOOD.act(job.machine()) {
            job.record(&event).unwrap();
            if stop(job.machine()) {
                return;
            }
        }
    }
}

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.metadata().unwrap().is_file())
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                std::fs::read(entry.path()).unwrap(),
            )
        })
        .collect();
    files.sort();
    files
}

#[test]
fn a_job_killed_after_every_event_ends_in_the_same_files() {
    let (once, often) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    go_on(&mut open(once.path()).unwrap(), |_| false);
    loop {
        let mut job = open(often.path()).unwrap();
        if job.machine().work() == Work::Done {
            break;
        }
        go_on(&mut job, |_| true);
    }
    assert_eq!(files(once.path()), files(often.path()));
    let names: Vec<String> = files(once.path())
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(
        names,
        [
            "held-out-1.jsonl",
            "held-out-2.jsonl",
            "held-out-3.jsonl",
            "journal.jsonl",
            "ledger.json",
            "manifest-1.jsonl",
            "manifest-2.jsonl",
            "manifest-3.jsonl",
            "metrics.csv",
            "metrics.jsonl"
        ]
    );
}

#[test]
fn a_torn_last_line_costs_one_event() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = open(folder.path()).unwrap();
    go_on(&mut job, |machine| machine.stage() == Stage::TrainFirst);
    drop(job);
    let path = folder.path().join("journal.jsonl");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    let mut job = open(folder.path()).unwrap();
    assert_eq!(job.machine().stage(), Stage::Filter);
    go_on(&mut job, |machine| machine.stage() == Stage::TrainFirst);
    drop(job);
    assert_eq!(std::fs::read(&path).unwrap(), whole);
}

#[test]
fn only_the_newest_checkpoint_is_kept_and_none_after_the_training() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = open(folder.path()).unwrap();
    go_on(&mut job, |machine| machine.stage() == Stage::TrainFirst);
    let mut states = Vec::new();
    for step in [10, 20] {
        let state = job
            .store_mut()
            .put(format!("state {step}").as_bytes())
            .unwrap();
        states.push(state);
        let result = Checkpoint {
            step,
            state,
            before: 0,
            finished: Vec::new(),
            loss: 1.0,
            seconds: 2.0,
        };
        job.record(&Event::Checkpointed {
            iteration: 1,
            training: Training::First,
            result,
        })
        .unwrap();
    }
    assert!(job.store().get(states[0]).is_err() && job.store().get(states[1]).is_ok());
    while job.machine().stage() == Stage::TrainFirst {
        for event in testing::GOOD.act(job.machine()) {
            job.record(&event).unwrap();
        }
    }
    assert!(job.store().get(states[1]).is_err());
    assert_eq!(job.machine().stage(), Stage::TrainSecond);
}

#[test]
fn finished_pairs_of_a_training_are_kept_until_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let open = || {
        let clock = Arc::new(MockClock::new(Timestamp(5)));
        let plan = Plan {
            per_pair: true,
            ..testing::plan()
        };
        let specification = testing::specification();
        JobFolder::open(folder.path(), plan, specification, 1 << 20, clock).unwrap()
    };
    let mut job = open();
    go_on(&mut job, |machine| machine.stage() == Stage::TrainFirst);
    let mut put = |text: &str| job.store_mut().put(text.as_bytes()).unwrap();
    let objects = ["state 30", "state 40", "state 60", "pair 1", "pair 2"].map(&mut put);
    let [early, middle, late, one, two] = objects;
    let mut unneeded = Vec::new();
    for (step, state, before, finished) in [
        (30, early, 0, vec![one]),
        (40, middle, 1, vec![]),
        (60, late, 1, vec![two]),
    ] {
        let result = Checkpoint {
            step,
            state,
            before,
            finished,
            loss: 1.0,
            seconds: 2.0,
        };
        let event = Event::Checkpointed {
            iteration: 1,
            training: Training::First,
            result,
        };
        let staged = job.stage(&event).unwrap();
        unneeded.extend(job.commit(staged).unwrap());
    }
    assert_eq!(unneeded, [early, middle]);
    drop(job);
    let mut job = open();
    let kept = |job: &JobFolder| objects.map(|object| job.store().get(object).is_ok());
    assert_eq!(kept(&job), [false, false, true, true, true]);
    let is_outdated = |job: &JobFolder| {
        let outdated = job.outdated();
        objects.map(|object| outdated.contains(&object))
    };
    assert_eq!(is_outdated(&job), [true, true, false, false, false]);
    while job.machine().stage() == Stage::TrainFirst {
        for event in testing::GOOD.act(job.machine()) {
            job.record(&event).unwrap();
        }
    }
    assert_eq!(kept(&job), [false; 5]);
    drop(job);
    // The server may have kept them. The sixth is the last state before the training's end.
    let job = open();
    assert_eq!(is_outdated(&job), [true; 5]);
    assert_eq!(job.outdated().len(), 6);
}

#[test]
fn what_a_kill_left_of_a_write_is_removed_when_the_job_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()).unwrap());
    let whole = files(folder.path());
    let name = format!("{UNFINISHED}Ab12");
    let left = [
        folder.path().join(&name),
        folder.path().join("objects").join(&name),
    ];
    for file in &left {
        std::fs::write(file, b"half").unwrap();
    }
    let job = open(folder.path()).unwrap();
    assert!(left.iter().all(|file| !file.exists()));
    assert_eq!((files(folder.path()), job.store().used()), (whole, 0));
}

#[test]
fn the_folder_of_another_job_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()).unwrap());
    let clock = Arc::new(MockClock::new(Timestamp(5)));
    let error = JobFolder::open(
        folder.path(),
        testing::plan(),
        Digest::of(b"other"),
        1,
        clock,
    )
    .unwrap_err();
    assert!(error.to_string().contains("line 1"), "{error}");
}

#[test]
fn two_workers_do_not_share_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let _job = open(folder.path()).unwrap();
    assert!(matches!(
        open(folder.path()),
        Err(FolderError::Journal(JournalError::InUse(_)))
    ));
}

fn lines(folder: &Path) -> Vec<Vec<u8>> {
    let text = std::fs::read_to_string(folder.join("journal.jsonl")).unwrap();
    text.lines().map(|line| line.as_bytes().to_vec()).collect()
}

fn adopt(folder: &Path, lines: &[Vec<u8>]) -> Result<JobFolder, FolderError> {
    let clock = Arc::new(MockClock::new(Timestamp(5)));
    let (plan, specification) = (testing::plan(), testing::specification());
    JobFolder::adopt(folder, plan, specification, 1 << 20, clock, lines)
}

#[test]
fn a_job_that_changes_hands_after_every_line_ends_in_the_same_files() {
    let once = tempfile::tempdir().unwrap();
    go_on(&mut open(once.path()).unwrap(), |_| false);
    // The server's copy is all that goes from hand to hand; every other worker has an old folder, the others none. Half of the kills come
    // after the server has a line and before the worker's own copy has it.
    let mut server: Vec<Vec<u8>> = Vec::new();
    let (old, last) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for turn in 0.. {
        let new = tempfile::tempdir().unwrap();
        let folder = if turn % 2 == 0 {
            old.path()
        } else {
            new.path()
        };
        let mut job = adopt(folder, &server).unwrap();
        if job.machine().work() == Work::Done {
            break;
        }
        let event = if job.machine().has_begun() {
            testing::GOOD.act(job.machine()).swap_remove(0)
        } else {
            job.machine().beginning(Ingredients::default())
        };
        let staged = job.stage(&event).unwrap();
        assert_eq!(staged.line.number, server.len() as u64);
        server.push(staged.line.bytes.clone());
        if turn % 3 == 0 {
            job.commit(staged).unwrap();
        }
    }
    drop(adopt(last.path(), &server).unwrap());
    assert_eq!(files(once.path()), files(last.path()));
}

#[test]
fn a_staged_event_changes_nothing_until_it_is_committed() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = open(folder.path()).unwrap();
    let event = testing::GOOD.act(job.machine()).swap_remove(0);
    let (first, second) = (job.stage(&event).unwrap(), job.stage(&event).unwrap());
    assert_eq!(first, second);
    job.commit(first).unwrap();
    assert!(matches!(job.commit(second), Err(FolderError::Misfit(_))));
    assert_eq!(lines(folder.path()).len(), 2);
}

#[test]
fn what_no_event_names_is_removed_when_the_job_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = open(folder.path()).unwrap();
    go_on(&mut job, |machine| machine.stage() == Stage::TrainFirst);
    let mut put = |text: &str| job.store_mut().put(text.as_bytes()).unwrap();
    // The second kind: a kill between a checkpoint's line and the removal of the one before.
    let (stray, old, new) = (put("stray"), put("old state"), put("new state"));
    for (step, state) in [(10, old), (20, new)] {
        let result = Checkpoint {
            step,
            state,
            before: 0,
            finished: Vec::new(),
            loss: 1.0,
            seconds: 2.0,
        };
        let training = Training::First;
        let event = Event::Checkpointed {
            iteration: 1,
            training,
            result,
        };
        job.record(&event).unwrap();
    }
    job.store_mut().put(b"old state").unwrap();
    drop(job);
    let job = open(folder.path()).unwrap();
    let is_there = |object| job.store().get(object).is_ok();
    assert_eq!([stray, old, new].map(is_there), [false, false, true]);
    assert_eq!(job.store().used(), 9);
}

#[test]
fn a_lost_object_is_made_again_from_its_origin() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = open(folder.path()).unwrap();
    go_on(&mut job, |machine| machine.iteration() == 3);
    let mut retrace = job.retrace().unwrap();
    let (machine, event) = {
        let second = job.machine().made()[1].clone();
        let image = testing::object(&testing::drawn(
            "enhanced",
            job.machine().made()[0]
                .fused
                .as_ref()
                .map(|fused| fused.merged),
            1,
            &[0, 1, 2, 3],
        ));
        let merged = second.fused.unwrap().merged;
        // One way through the journal finds both, the earlier one first.
        let lost = [merged, image].into();
        let (before, event) = retrace.next_of(&lost).unwrap().unwrap();
        let first = (before.clone(), event.clone());
        let (before, event) = retrace.next_of(&lost).unwrap().unwrap();
        assert!(matches!(event, Event::Fused { iteration: 2, .. }));
        let again = testing::joined(before.current(), before.trained(Training::Second));
        job.store_mut().put_as(merged, again.as_bytes()).unwrap();
        assert!(retrace.next_of(&lost).unwrap().is_none());
        first
    };
    let Event::Regenerated {
        iteration: 2,
        item: 1,
        result,
    } = event
    else {
        panic!("{event:?}")
    };
    let members = machine.regenerated_with(1);
    let again = testing::drawn("enhanced", machine.current(), 1, &members);
    job.store_mut()
        .put_as(result.image, again.as_bytes())
        .unwrap();
    let alone = testing::drawn("enhanced", machine.current(), 1, &[1]);
    assert!(
        job.store_mut()
            .put_as(result.image, alone.as_bytes())
            .is_err()
    );
    let nobodys = [Digest::of(b"nobody's")].into();
    assert!(job.retrace().unwrap().next_of(&nobodys).unwrap().is_none());
}

#[test]
fn time_worked_goes_on_from_the_journal_and_rests_during_a_review() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Arc::new(MockClock::new(Timestamp(0)));
    let plan = Plan {
        review: true,
        ..testing::plan()
    };
    let open = || {
        let specification = testing::specification();
        let clock: Arc<dyn Clock> = clock.clone();
        JobFolder::open(folder.path(), plan.clone(), specification, 1 << 20, clock).unwrap()
    };
    let mut job = open();
    while job.machine().stage() < Stage::Review {
        clock.advance(Duration::from_secs(1));
        let event = testing::GOOD.act(job.machine()).swap_remove(0);
        job.record(&event).unwrap();
    }
    let before = job.worked();
    clock.advance(Duration::from_hours(50));
    assert_eq!(job.worked(), before);
    drop(job);
    let mut job = open();
    clock.advance(Duration::from_hours(50));
    assert_eq!(job.worked(), before);
    while job.machine().stage() == Stage::Review {
        let event = testing::GOOD.act(job.machine()).swap_remove(0);
        job.record(&event).unwrap();
    }
    clock.advance(Duration::from_secs(7));
    assert_eq!(job.worked(), before + Duration::from_secs(7));
    let event = testing::GOOD.act(job.machine()).swap_remove(0);
    job.record(&event).unwrap();
    drop(job);
    clock.advance(Duration::from_hours(1));
    assert_eq!(open().worked(), before + Duration::from_secs(7));
}

#[test]
fn the_peak_of_memory_outlives_the_worker_that_reached_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = open(folder.path()).unwrap();
    assert_eq!(job.peak_memory(), None);
    job.note_memory(900);
    job.note_memory(500);
    go_on(&mut job, |_| true);
    drop(job);
    // The next worker needs less.
    let mut job = open(folder.path()).unwrap();
    job.note_memory(300);
    go_on(&mut job, |_| true);
    drop(job);
    assert_eq!(open(folder.path()).unwrap().peak_memory(), Some(900));
}
