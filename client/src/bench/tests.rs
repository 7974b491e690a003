use std::sync::mpsc;

use super::*;
use crate::testing::eventually;

#[tokio::test]
async fn a_job_that_hangs_is_busy_without_turns() {
    let bench = Workbench::start(1).unwrap();
    let activity = bench.activity();
    let (release, hang) = mpsc::sync_channel::<()>(1);
    let hanging = bench.run("hang", move |_| {
        let _ = hang.recv();
        Ok(())
    });
    let (outcome, ()) = tokio::join!(hanging, async {
        eventually("a running job", || activity.is_busy()).await;
        let turns = activity.turns();
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        assert!(activity.is_busy());
        assert_eq!(activity.turns(), turns);
        release.send(()).unwrap();
    });
    outcome.unwrap();
    assert!(!activity.is_busy());
}

#[tokio::test]
async fn a_job_that_panics_is_busy_no_more() {
    let bench = Workbench::start(1).unwrap();
    let outcome: Result<(), _> = bench.run("panic", |_| panic!("planned")).await;
    assert!(matches!(outcome, Err(LearningError::Panicked { .. })));
    assert!(!bench.activity().is_busy());
}
