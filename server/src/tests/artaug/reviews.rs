//! Pairs that wait for an operator's word.

use std::time::Duration;

use concord_common::{Digest, ErrorCode};
use concord_proto::v1::{self, JobRelease};

use super::{FakeWorker, advance, artaug, at, is_waiting};
use crate::tests::harness::{World, code};

async fn list(world: &World, job_id: &str) -> v1::ListReviewResponse {
    let request = v1::ListReviewRequest {
        job_id: job_id.to_owned(),
    };
    let answer = world.operator().list_review(request).await;
    answer.unwrap().into_inner()
}

async fn say(
    world: &World,
    job_id: &str,
    iteration: u32,
    accepted: &[u32],
    rejected: &[u32],
) -> Result<u32, tonic::Status> {
    let request = v1::ReviewPairsRequest {
        job_id: job_id.to_owned(),
        iteration,
        accepted: accepted.to_vec(),
        rejected: rejected.to_vec(),
    };
    let answer = world.operator().review_pairs(request).await?;
    Ok(answer.into_inner().waiting)
}

fn words(reviews: &[v1::PairReview]) -> Vec<(u64, u32, bool)> {
    reviews
        .iter()
        .map(|word| (word.number, word.item, word.accepted))
        .collect()
}

#[tokio::test]
async fn a_job_waits_for_words_and_goes_on_with_the_first_ones() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    let mut held = worker.claim().await;
    held.put(b"<html>").await.unwrap();
    let page = Digest::of(b"<html>");
    held.name("review/iteration-1.html", page).await.unwrap();
    assert_eq!(
        list(&world, &job_id).await,
        v1::ListReviewResponse::default()
    );
    held.wait_for_words(1, &[3, 5, 8], 0).await.unwrap();
    assert!(!is_waiting(&world).await);
    let job = world.job(&job_id).await.job.unwrap();
    assert!(job.waits_for_review && job.worker.is_empty());
    let listed = list(&world, &job_id).await;
    assert_eq!((listed.iteration, &listed.waiting[..]), (1, &[3, 5, 8][..]));
    assert_eq!(listed.gallery, "review/iteration-1.html");

    assert_eq!(say(&world, &job_id, 1, &[5], &[3]).await.unwrap(), 1);
    assert!(!world.job(&job_id).await.job.unwrap().waits_for_review);
    assert_eq!(list(&world, &job_id).await.waiting, [8]);
    let mut held = worker.claim().await;
    assert_eq!(held.renew(None).await.unwrap().reviews, 2);
    let said = held.reviews(0).await.unwrap();
    assert_eq!(words(&said), [(1, 3, false), (2, 5, true)]);
    assert!(said.iter().all(|word| word.iteration == 1));
    // It acts on them and waits for the rest.
    held.wait_for_words(1, &[8], 2).await.unwrap();
    assert!(!is_waiting(&world).await);
    assert_eq!(say(&world, &job_id, 1, &[], &[8]).await.unwrap(), 0);
    let mut held = worker.claim().await;
    assert_eq!(words(&held.reviews(2).await.unwrap()), [(3, 8, false)]);
    held.renew(Some(at(1, "train-first"))).await.unwrap();
    assert_eq!(
        list(&world, &job_id).await,
        v1::ListReviewResponse::default()
    );
    let answer = say(&world, &job_id, 1, &[8], &[]).await;
    assert_eq!(code(answer), ErrorCode::NotWaiting);
    held.release(JobRelease::Succeeded).await.unwrap();
}

#[tokio::test]
async fn a_later_word_on_a_pair_counts_until_the_worker_has_acted() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    worker
        .claim()
        .await
        .wait_for_words(2, &[1, 2], 0)
        .await
        .unwrap();
    assert_eq!(say(&world, &job_id, 2, &[1], &[]).await.unwrap(), 1);
    assert_eq!(say(&world, &job_id, 2, &[], &[1]).await.unwrap(), 1);
    let mut held = worker.claim().await;
    // Also while a worker has the job.
    assert_eq!(say(&world, &job_id, 2, &[1, 2], &[]).await.unwrap(), 0);
    assert_eq!(held.renew(None).await.unwrap().reviews, 4);
    let said = words(&held.reviews(0).await.unwrap());
    assert_eq!(
        said,
        [(1, 1, true), (2, 1, false), (3, 1, true), (4, 2, true)]
    );
}

#[tokio::test]
async fn a_word_that_came_while_the_worker_gave_the_job_back_is_not_overlooked() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    worker
        .claim()
        .await
        .wait_for_words(1, &[1, 2], 0)
        .await
        .unwrap();
    say(&world, &job_id, 1, &[1], &[]).await.unwrap();
    let mut held = worker.claim().await;
    say(&world, &job_id, 1, &[2], &[]).await.unwrap();
    // It has seen the first word only.
    held.wait_for_words(1, &[2], 1).await.unwrap();
    assert!(is_waiting(&world).await);
    assert!(list(&world, &job_id).await.waiting.is_empty());
    let mut held = worker.claim().await;
    assert_eq!(words(&held.reviews(1).await.unwrap()), [(2, 2, true)]);
    // Nobody has said so many.
    let answer = held.wait_for_words(1, &[2], 3).await;
    assert_eq!(code(answer), ErrorCode::InvalidRequest);
}

#[tokio::test]
async fn words_on_pairs_that_do_not_wait_are_refused_and_none_is_recorded() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let answer = say(&world, &job_id, 1, &[1], &[]).await;
    assert_eq!(code(answer), ErrorCode::NotWaiting);
    let mut worker = FakeWorker::of(&world, "w1");
    let mut held = worker.claim().await;
    for (waiting, iteration) in [(&[][..], 1), (&[1, 1], 1), (&[1], 0)] {
        let answer = held.wait_for_words(iteration, waiting, 0).await;
        assert_eq!(code(answer), ErrorCode::InvalidRequest);
    }
    held.wait_for_words(2, &[1, 2], 0).await.unwrap();
    for (iteration, accepted, expected) in [
        (1, &[1][..], ErrorCode::NotWaiting),
        (3, &[1], ErrorCode::NotWaiting),
        (2, &[1, 3], ErrorCode::NotWaiting),
        (2, &[], ErrorCode::InvalidRequest),
        (2, &[1, 1], ErrorCode::InvalidRequest),
    ] {
        let answer = say(&world, &job_id, iteration, accepted, &[]).await;
        assert_eq!(code(answer), expected);
    }
    let answer = say(&world, &job_id, 2, &[1], &[1]).await;
    assert_eq!(code(answer), ErrorCode::InvalidRequest);
    assert_eq!(list(&world, &job_id).await.waiting, [1, 2]);
    assert!(!is_waiting(&world).await);
}

#[tokio::test]
async fn a_job_that_failed_because_its_workers_were_lost_asks_about_no_pair_any_more() {
    let world = World::start().await;
    let job_id = world.submit(&artaug()).await;
    let mut worker = FakeWorker::of(&world, "w1");
    let mut held = worker.claim().await;
    held.wait_for_words(1, &[1, 2], 0).await.unwrap();
    say(&world, &job_id, 1, &[1], &[]).await.unwrap();
    for _ in 0..3 {
        worker.claim().await;
        advance(&world, Duration::from_secs(61));
    }
    world.wait_for_state(&job_id, v1::JobState::Failed).await;
    let listed = list(&world, &job_id).await;
    assert_eq!((listed.iteration, listed.waiting), (0, vec![]));
}
