//! The journal: added to by one worker at a time, once.

use concord_common::ErrorCode;
use concord_proto::v1;

use super::{FakeWorker, artaug};
use crate::tests::harness::{World, code, refusal};

#[tokio::test]
async fn lines_are_added_once_however_often_they_are_sent() {
    let world = World::start().await;
    world.submit(&artaug()).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    assert_eq!(held.append(0, &["a", "b"]).await.unwrap(), 2);
    assert_eq!(held.append(0, &["a", "b"]).await.unwrap(), 2);
    assert_eq!(held.append(1, &["b"]).await.unwrap(), 2);
    // Partly known, as after a lost answer.
    assert_eq!(held.append(1, &["b", "c"]).await.unwrap(), 3);
    assert_eq!(held.journal(0).await.unwrap(), ["a", "b", "c"]);
    assert_eq!(held.journal(2).await.unwrap(), ["c"]);
    assert!(held.journal(3).await.unwrap().is_empty());
}

#[tokio::test]
async fn another_line_in_the_same_place_is_refused_with_nothing_added() {
    let world = World::start().await;
    world.submit(&artaug()).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    held.append(0, &["a", "b"]).await.unwrap();
    for (first, lines) in [(0, ["A", "b"]), (1, ["B", "c"]), (3, ["d", "e"])] {
        let refused = refusal(held.append(first, &lines).await);
        assert_eq!(refused.code, ErrorCode::JournalConflict, "{refused}");
    }
    assert_eq!(held.journal(0).await.unwrap(), ["a", "b"]);
    assert_eq!(code(held.journal(3).await), ErrorCode::InvalidRequest);
    assert_eq!(
        code(held.journal(u64::MAX).await),
        ErrorCode::InvalidRequest
    );
    let answer = held.append(u64::MAX, &["z"]).await;
    assert_eq!(code(answer), ErrorCode::JournalConflict);
}

#[tokio::test]
async fn a_line_is_bounded_and_counts_towards_what_the_job_may_keep() {
    let world = World::start().await;
    world.submit(&artaug()).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    for bad in ["", "two\nlines", &"x".repeat((1 << 20) + 1)] {
        let answer = held.append(0, &[bad]).await;
        assert_eq!(code(answer), ErrorCode::InvalidRequest);
    }
    let answer = held.append(0, &[]).await;
    assert_eq!(code(answer), ErrorCode::InvalidRequest);
    let half = "x".repeat(1 << 19);
    held.append(0, &[&half]).await.unwrap();
    held.append(1, &[&half]).await.unwrap();
    let refused = refusal(held.append(2, &["x"]).await);
    assert_eq!(refused.code, ErrorCode::QuotaExceeded);
    assert!(refused.message.contains("limits.disk"), "{refused}");
    // What is there may still be sent again.
    assert_eq!(held.append(1, &[&half]).await.unwrap(), 2);
}

#[tokio::test]
async fn a_long_journal_comes_in_messages_of_a_bounded_size() {
    let disk = artaug().replace("1 MiB", "8 MiB");
    let world = World::start().await;
    world.submit(&disk).await;
    let mut held = FakeWorker::of(&world, "w1").claim().await;
    let long = "x".repeat(700_000);
    let mut lines = Vec::new();
    for n in 0..3 {
        held.append(n, &[&long]).await.unwrap();
        lines.push(long.clone());
    }
    let short: Vec<String> = (0..1000).map(|n| format!("line {n}")).collect();
    for first in [3, 1003] {
        let texts: Vec<&str> = short.iter().map(String::as_str).collect();
        held.append(first, &texts).await.unwrap();
        lines.extend(short.iter().cloned());
    }
    assert_eq!(held.journal(0).await.unwrap(), lines);
    let request = v1::ReadJournalRequest {
        grip: Some(held.grip()),
        first: 0,
    };
    let answer = held.client.read_journal(request).await;
    let mut stream = answer.unwrap().into_inner();
    let mut messages = 0;
    while let Some(page) = stream.message().await.unwrap() {
        let bytes: usize = page.lines.iter().map(Vec::len).sum();
        assert!(bytes <= 1 << 20 && page.lines.len() <= 1000, "{bytes}");
        messages += 1;
    }
    assert!(messages >= 4, "{messages}");
}
