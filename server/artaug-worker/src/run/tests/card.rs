//! The model card on the way, and what it says of pages that the job has no room for.

use super::{fused::Exchanged, *};

#[test]
fn a_card_on_the_way_names_the_results_of_all_iterations_so_far() {
    let spec = spec_with(&[("iterations = 2", "iterations = 3")]);
    let server = Arc::new(FakeServer::new(&spec));
    server.state().grants = 1;
    let folder = tempfile::tempdir().unwrap();
    let mut deceived = worker(&server, folder.path());
    let two_are_over = |server: &FakeServer| events(server, "decided").len() == 2;
    deceived.workshop = Box::new(Exchanged::of(&server, two_are_over, 0));
    deceived.run();
    let (release, reason) = server.released();
    assert_eq!(release, JobRelease::Stopped, "{reason}");
    let card = text_of(&server, "MODEL_CARD.md");
    assert!(card.contains("after 2 of at most 3 iterations"), "{card}");
    let artefacts = server.state().artefacts.clone();
    let adapters = artefacts
        .iter()
        .filter(|(name, _)| name.starts_with("lora/"));
    let mut folders = BTreeSet::new();
    for (name, digest) in adapters {
        assert!(card.contains(&format!("| {name} | {digest} |")), "{name}");
        folders.insert(Path::new(name).parent().unwrap());
    }
    let wanted = ["iteration-1", "iteration-2", "merged", "reduced"];
    assert!(
        folders
            .into_iter()
            .eq(wanted.map(|name| Path::new("lora").join(name)))
    );
}

/// A job of one iteration with many pairs and held-out images, ended by a worker and a server that keep so many bytes for it.
fn kept_within(most: u64) -> Arc<FakeServer> {
    let server = Arc::new(FakeServer::new(&spec_with(&[
        ("iterations = 2", "iterations = 1"),
        ("pairs = 10", "pairs = 60"),
        ("held_out = 7", "held_out = 60"),
        (
            "[output]\nfused = true",
            &format!("[limits]\ndisk = \"{most}\""),
        ),
    ])));
    {
        let mut state = server.state();
        state.most = most;
        // So small a job would keep less than the least limit.
        let ballast = vec![0; 1 << 20];
        state.objects.insert(Digest::of(&ballast), ballast);
    }
    let folder = tempfile::tempdir().unwrap();
    worker(&server, folder.path()).run();
    succeeded(&server);
    server
}

#[test]
fn a_page_without_room_is_left_out_and_the_card_says_so() {
    let roomy = kept_within(100 << 20);
    let bytes = |name: &str| text_of(&roomy, name).len() as u64;
    // In this order they are brought, when all but the card is there.
    let pages = ["manifest-1.jsonl", "held-out-1.jsonl", "gallery.html"];
    let [manifest, held_out, gallery] = pages.map(bytes);
    let card = bytes("MODEL_CARD.md");
    let others = roomy.state().kept() - manifest - held_out - gallery - card;
    for (name, size, before) in [
        (pages[0], manifest, 0),
        (pages[1], held_out, manifest),
        (pages[2], gallery, manifest + held_out),
    ] {
        // So that what has no room for a page has some for the card.
        assert!(size > 2 * card, "{name}: {size}, the card: {card}");
        let tight = kept_within(others + before + card + card / 2);
        let results = tight.results();
        assert!(!results.contains_key(name));
        let text = text_of(&tight, "MODEL_CARD.md");
        for known in roomy.results().keys() {
            let said = text.contains(&format!("{known} was left out: it takes"));
            assert!(results.contains_key(known) != said, "{known}: {text}");
        }
    }
}
