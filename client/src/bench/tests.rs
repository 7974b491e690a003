use std::sync::mpsc;

use concord_common::job::JobSpec;
use concord_learning::data::{InputKind, Label, Problem};
use tokio::sync::oneshot;

use super::*;
use crate::testing::{federation, job, silo, spec, tiny_backbone};

#[tokio::test]
async fn a_job_that_hangs_is_busy_without_turns() {
    let bench = Workbench::start(1).unwrap();
    let activity = bench.activity();
    let (begun, begins) = oneshot::channel();
    let (release, hang) = mpsc::sync_channel::<()>(1);
    let hanging = bench.run("hang", move |_| {
        begun.send(()).unwrap();
        hang.recv().unwrap();
        Ok(())
    });
    let (outcome, turns) = tokio::join!(hanging, async {
        begins.await.unwrap();
        assert!(activity.is_busy());
        let turns = activity.turns();
        release.send(()).unwrap();
        turns
    });
    outcome.unwrap();
    assert!(!activity.is_busy());
    assert_eq!(activity.turns(), turns + 1, "its end and nothing before");
}

#[tokio::test]
async fn a_job_that_panics_is_busy_no_more() {
    let bench = Workbench::start(1).unwrap();
    let outcome: Result<(), _> = bench.run("panic", |_| panic!("planned")).await;
    assert!(matches!(outcome, Err(LearningError::Panicked { .. })));
    assert!(!bench.activity().is_busy());
}

/// Rows that are evaluated together.
const BATCH: usize = 64;

fn rows(count: usize) -> Vec<Row> {
    let classes = [("rain", "weather"), ("boat", "travel")].iter().cycle();
    let row = |&(word, class): &(&str, &str)| Row {
        text: format!("the old {word}"),
        pair: None,
        label: Label::Class(class.to_owned()),
    };
    classes.take(count).map(row).collect()
}

#[tokio::test]
async fn every_batch_of_an_evaluation_is_a_sign_of_life() {
    const BATCHES: usize = 4;
    let spec_toml = spec("fedavg", 1, "min_silos = 1");
    let key = TrainerKey {
        job: job(),
        silo: silo("north"),
    };
    let split = rows((BATCHES - 1) * BATCH + 1);
    let parts = TrainerParts {
        spec: JobSpec::parse(&spec_toml).unwrap().training().clone(),
        backbone: tiny_backbone(),
        data: TaskData {
            kind: InputKind::Single,
            problem: Problem::Classification {
                classes: vec!["travel".to_owned(), "weather".to_owned()],
            },
            train: rows(8),
            validation: split.clone(),
            test: split,
        },
        cache: CacheSettings::default(),
        share: false,
        saved: None,
    };
    let bench = Workbench::start(1).unwrap();
    let turns = || bench.activity().turns();
    // The start and the end of a torch job are signs too.
    let around = 2;

    bench.open(&key, parts).await.unwrap();
    let opened = turns();
    assert!(
        opened >= around + 2 + 3,
        "{opened}: backbone, tokeniser and three splits"
    );

    let federation = federation(&spec_toml, &["north"]);
    let first = federation.versions()[0];
    let payload = federation.payload(&job(), first).unwrap();
    let batches = BATCHES as u64;
    bench
        .evaluate(&key, payload.clone(), Split::Test)
        .await
        .unwrap();
    assert_eq!(turns(), opened + around + batches, "a split");

    let before = turns();
    let result = bench
        .train(&key, 1, payload.clone(), |_| Continue::Yes)
        .await
        .unwrap();
    let steps = result.training.iter().find(|(name, _)| name == "steps");
    let steps = steps.unwrap().1 as u64;
    assert_eq!(turns(), before + around + steps + batches, "a round's end");

    let before = turns();
    bench.after_aggregation(&key, 1, payload).await.unwrap();
    assert_eq!(turns(), before + around + batches, "an aggregation");

    let before = turns();
    bench.best(&key).await.unwrap().unwrap();
    assert_eq!(turns(), before + around + 2 * batches, "the best model");
}
