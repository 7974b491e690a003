//! What the daemon does next.

use concord_common::{Timestamp, round::RoundPhase};

use super::*;
use crate::coordinator::memory::MemoryCoordinator;

fn id(text: &str) -> JobId {
    text.parse().unwrap()
}

fn running(job: &str, closes_at: i64) -> Notice {
    Notice {
        job: id(job),
        state: JobState::Running,
        round: Some(RoundNumber(1)),
        phase: Some(RoundPhase::Announced),
        base: None,
        closes_at: Some(Timestamp(closes_at)),
        answered: false,
        rejected: false,
    }
}

fn ended(job: &str) -> Notice {
    Notice {
        state: JobState::Succeeded,
        phase: Some(RoundPhase::Published),
        ..running(job, 0)
    }
}

fn daemon(home: &Home) -> Daemon<MemoryCoordinator> {
    let federation = federation(&spec("fedavg", 1, "min_silos = 1"), &["north"]);
    Daemon::new(home.join(&federation), "memory".to_owned(), POLL)
}

fn round(job: &str) -> Task {
    Task::Round(id(job), RoundNumber(1))
}

#[tokio::test]
async fn the_round_that_closes_first_goes_first() {
    let home = Home::new("north");
    let daemon = daemon(&home);
    assert_eq!(
        daemon.choose(&[running("late", 9), running("soon", 5)]),
        Some(round("soon"))
    );
}

#[tokio::test]
async fn a_job_that_went_wrong_waits_behind_the_others() {
    let home = Home::new("north");
    let mut daemon = daemon(&home);
    daemon.failed = Some(id("soon"));
    let notices = [running("late", 9), running("soon", 5)];
    assert_eq!(daemon.choose(&notices), Some(round("late")));
    assert_eq!(daemon.choose(&notices[1..]), Some(round("soon")));
}

#[tokio::test]
async fn a_bad_file_of_one_job_does_not_stop_the_others() {
    let home = Home::new("north");
    let mut daemon = daemon(&home);
    for job in ["torn-state", "torn-model"] {
        let file = home.vault().file(&id(job), Record::State);
        crate::vault::private_folder(file.parent().unwrap()).unwrap();
        std::fs::write(&file, b"no vault file").unwrap();
    }
    let model = home.vault().file(&id("torn-model"), Record::Model);
    std::fs::write(&model, b"torn").unwrap();
    let notices = [
        ended("torn-state"),
        ended("torn-model"),
        running("healthy", 5),
    ];
    for _ in 0..2 {
        let Some(Task::End(notice)) = daemon.choose(&notices) else {
            panic!("ends go first");
        };
        daemon.end(&notice).await.unwrap();
        assert!(daemon.settled.ends.contains(&notice.job));
    }
    assert_eq!(daemon.choose(&notices), Some(round("healthy")));
    assert!(model.exists(), "somebody may want to mend it");
}

#[tokio::test]
async fn an_ended_job_without_anything_to_finish_is_settled_and_cleared() {
    let home = Home::new("north");
    let mut daemon = daemon(&home);
    let left = home.folder.path().join("outbox/job-1.update");
    std::fs::write(&left, b"left behind").unwrap();
    daemon.tidy(&[ended("job-1")]).await;
    assert!(daemon.settled.ends.contains(&id("job-1")));
    assert!(!left.exists());
}

#[tokio::test]
async fn a_job_that_the_server_does_not_list_any_more_leaves_the_memory() {
    let home = Home::new("north");
    let mut daemon = daemon(&home);
    daemon.connect().await.unwrap();
    daemon.attend(&mut None).await.unwrap();
    let key = crate::bench::TrainerKey {
        job: id("job-1"),
        silo: home.silo.clone(),
    };
    let bench = daemon.session.bench.clone();
    assert_eq!(bench.last_round(&key).await.unwrap(), Some(1));
    daemon.tidy(&[running("job-1", 0)]).await;
    assert_eq!(bench.last_round(&key).await.unwrap(), Some(1));
    daemon.tidy(&[]).await;
    assert_eq!(bench.last_round(&key).await.unwrap(), None);
}

#[tokio::test]
async fn a_round_that_an_earlier_life_has_answered_is_asked_for_its_receipt_once() {
    let home = Home::new("north");
    let mut daemon = daemon(&home);
    let answered = Notice {
        answered: true,
        ..running("job-1", 5)
    };
    let wanted = Task::Receipt(id("job-1"), RoundNumber(1));
    assert_eq!(daemon.choose(std::slice::from_ref(&answered)), Some(wanted));
    daemon.receipt(id("job-1"), RoundNumber(1)).await.unwrap();
    assert_eq!(daemon.choose(&[answered]), None);
}

#[tokio::test]
async fn a_job_whose_end_was_told_while_the_daemon_was_away_still_gives_its_model() {
    let home = Home::new("north");
    let federation = federation(&spec("fedavg", 2, "min_silos = 1"), &["north"]);
    let mut daemon = Daemon::new(home.join(&federation), "memory".to_owned(), POLL);
    daemon.attend(&mut None).await.unwrap();
    let (state, model) = (
        home.vault().file(&id("job-1"), Record::State),
        home.vault().file(&id("job-1"), Record::Model),
    );

    // The job runs, and is not listed: nothing is touched, and it is asked about once.
    let before = std::fs::read(&state).unwrap();
    assert!(daemon.ask_unlisted(&[]).await.unwrap());
    assert!(!daemon.ask_unlisted(&[]).await.unwrap());
    assert!(!model.exists());
    assert_eq!(std::fs::read(&state).unwrap(), before);

    daemon.attend(&mut None).await.unwrap();
    assert!(is_over(&federation));
    let mut daemon = Daemon::new(home.join(&federation), "memory".to_owned(), POLL);
    daemon.connect().await.unwrap();
    assert!(!daemon.ask_unlisted(&[ended("job-1")]).await.unwrap());
    assert!(daemon.ask_unlisted(&[]).await.unwrap());
    assert!(model.exists() && !state.exists());
    assert!(!daemon.ask_unlisted(&[]).await.unwrap());
}

#[tokio::test]
async fn a_contribution_that_was_lost_after_its_receipt_is_not_worked_on_again() {
    let home = Home::new("north");
    let mut daemon = daemon(&home);
    daemon.attend(&mut None).await.unwrap();
    let rejected = Notice {
        rejected: true,
        ..running("job-1", 5)
    };
    assert_eq!(daemon.choose(std::slice::from_ref(&rejected)), None);
    daemon.settled = Settled::default();
    assert_eq!(daemon.choose(&[rejected]), None, "its receipt is kept");
}
