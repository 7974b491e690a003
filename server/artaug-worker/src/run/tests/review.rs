//! Pairs that wait for operators' words.

use super::*;

#[test]
fn a_review_is_waited_for_and_its_words_are_kept() {
    let spec = spec_with(&[
        ("seed = 7", "seed = 7\nreview = true"),
        ("iterations = 2", "iterations = 1"),
    ]);
    let server = Arc::new(FakeServer::new(&spec));
    let folder = tempfile::tempdir().unwrap();
    worker(&server, folder.path()).run();
    let (release, _) = server.released();
    assert_eq!(release, JobRelease::WaitsForReview);
    let (waiting, reviews) = {
        let state = server.state();
        let last = state.releases.last().unwrap();
        (last.waiting.clone(), last.reviews)
    };
    assert_eq!((waiting.len(), reviews), (4, 0));
    let page = server.results()["review/iteration-1.html"].clone();
    assert!(
        String::from_utf8(page)
            .unwrap()
            .contains("concord artaug review")
    );

    let say = |words: &[(u32, bool)]| {
        let mut state = server.state();
        for (item, accepted) in words {
            let number = state.words.len() as u64 + 1;
            state.words.push(v1::PairReview {
                number,
                iteration: 1,
                item: *item,
                accepted: *accepted,
            });
        }
    };
    // A later word on the same pair replaces an earlier one, and words on other pairs mean nothing.
    say(&[
        (waiting[0], true),
        (waiting[0], false),
        (999, true),
        (waiting[1], true),
    ]);
    worker(&server, folder.path()).run();
    let still = server.state().releases.last().unwrap().clone();
    assert_eq!(still.release(), JobRelease::WaitsForReview);
    assert_eq!(
        (still.waiting.as_slice(), still.reviews),
        (&waiting[2..], 4)
    );

    say(&[(waiting[2], true), (waiting[3], true)]);
    worker(&server, folder.path()).run();
    succeeded(&server);
    let manifest = String::from_utf8(server.results()["manifest-1.jsonl"].clone()).unwrap();
    assert_eq!(manifest.matches("\"reason\":\"review\"").count(), 1);
    assert_eq!(manifest.matches("\"verdict\":\"kept\"").count(), 3);
}

#[test]
fn a_review_that_leaves_too_few_pairs_ends_the_job_before_training() {
    let spec = spec_with(&[("seed = 7", "seed = 7\nreview = true")]);
    // All four pairs, and as many as it takes: the last one's word would change nothing.
    for rejected in [4, 3] {
        let server = Arc::new(FakeServer::new(&spec));
        let folder = tempfile::tempdir().unwrap();
        worker(&server, folder.path()).run();
        let waiting = server.state().releases.last().unwrap().waiting.clone();
        assert_eq!(waiting.len(), 4);
        for (number, item) in (1..).zip(waiting.into_iter().take(rejected)) {
            server.state().words.push(v1::PairReview {
                number,
                iteration: 1,
                item,
                accepted: false,
            });
        }
        worker(&server, folder.path()).run();
        succeeded(&server);
        let card = String::from_utf8(server.results()["MODEL_CARD.md"].clone()).unwrap();
        assert!(card.contains("1 pairs were kept"), "{card}");
        let manifest = String::from_utf8(server.results()["manifest-1.jsonl"].clone()).unwrap();
        assert_eq!(manifest.matches("\"reason\":\"review\"").count(), 3);
    }
}
