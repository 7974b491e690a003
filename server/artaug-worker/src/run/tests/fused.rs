//! The fused model, which is made of the base model's folder at the very end, and the card beside it.

use std::sync::atomic::AtomicUsize;

use concord_common::job::artaug::ArtaugSpec;

use super::*;
use crate::stages::Parts;

/// A folder whose file is another one from a certain look on.
#[derive(Default)]
struct Exchanged {
    inner: FakeWorkshop,
    /// Looks that still find what the card says.
    same: usize,
}

const FILE: &str = "tokenizer/added_tokens.json";

impl Workshop for Exchanged {
    fn parts(&self, spec: &ArtaugSpec) -> Result<Parts, PartsError> {
        let mut parts = self.inner.parts(spec)?;
        let file = |bytes: &[u8]| vec![(FILE.to_owned(), Digest::of(bytes))];
        parts.tools.card.base_files = file(b"tokens");
        let (same, looks) = (self.same, AtomicUsize::new(0));
        parts.tools.base = Box::new(move || {
            let is_same = looks.fetch_add(1, Ordering::SeqCst) < same;
            let bytes: &[u8] = if is_same { b"tokens" } else { b"a key" };
            Ok(file(bytes))
        });
        Ok(parts)
    }
}

#[test]
fn a_model_whose_files_were_exchanged_under_the_job_is_not_published() {
    let server = Arc::new(FakeServer::new(SPEC));
    let folder = tempfile::tempdir().unwrap();
    // Before the fused model is written, and while it is.
    for same in [0, 1] {
        server.state().grants = 1;
        let mut deceived = worker(&server, folder.path());
        deceived.workshop = Box::new(Exchanged {
            same,
            ..Exchanged::default()
        });
        deceived.run();
        assert_eq!(server.state().releases.len(), same + 1);
        let (release, reason) = server.released();
        assert_eq!(release, JobRelease::Stopped, "{reason}");
        assert!(reason.contains(FILE), "{reason}");
        let state = server.state();
        let mut names = state.artefacts.keys();
        assert!(names.all(|name| !name.starts_with("fused/")));
        assert!(!folder.path().join("jobs/job-1/fused").exists());
    }
    // With the files of the beginning it goes on.
    server.state().grants = 1;
    let mut sound = worker(&server, folder.path());
    sound.workshop = Box::new(Exchanged {
        same: usize::MAX,
        ..Exchanged::default()
    });
    sound.run();
    succeeded(&server);
    let wanted = undisturbed(SPEC).lasting_results();
    assert_eq!(server.lasting_results(), wanted);
}

#[test]
fn a_job_without_room_for_one_more_card_succeeds() {
    let run = |most: u64| {
        let limits = format!("[limits]\ndisk = \"{most}\"\n[output]");
        let server = Arc::new(FakeServer::new(&spec_with(&[("[output]", &limits)])));
        {
            let mut state = server.state();
            state.most = most;
            // So small a job would keep less than the least limit.
            let ballast = vec![0; 1 << 20];
            state.objects.insert(Digest::of(&ballast), ballast);
        }
        let folder = tempfile::tempdir().unwrap();
        let mut heavy = worker(&server, folder.path());
        heavy.workshop = Box::new(FakeWorkshop {
            fault: Some("heavy"),
            ..FakeWorkshop::default()
        });
        heavy.run();
        succeeded(&server);
        server
    };
    let card = |server: &FakeServer| {
        let card = server.results().remove("MODEL_CARD.md");
        String::from_utf8(card.unwrap()).unwrap()
    };
    let roomy = run(3 << 20);
    let last = card(&roomy);
    assert!(last.contains("The fused model was left out"), "{last}");
    // All other results have room, and half of the last card.
    let kept = roomy.state().kept();
    let tight = run(kept - last.len() as u64 / 2);
    assert!(card(&tight).contains("The job is not over"));
    assert!(roomy.results().keys().eq(tight.results().keys()));
}
