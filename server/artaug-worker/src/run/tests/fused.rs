//! The base model's folder, of which every model is made, the fused one at the very end; and the card beside that.

use std::sync::atomic::AtomicUsize;

use concord_common::job::artaug::ArtaugSpec;

use super::*;
use crate::stages::Parts;

/// A folder whose file is another one from a certain look on.
pub(super) struct Exchanged {
    inner: FakeWorkshop,
    server: Arc<FakeServer>,
    /// When looks begin to count.
    when: fn(&FakeServer) -> bool,
    /// Looks from then on that still find what the card says.
    same: usize,
}

impl Exchanged {
    /// The workshop of a server's job.
    pub(super) fn of(server: &Arc<FakeServer>, when: fn(&FakeServer) -> bool, same: usize) -> Self {
        Self {
            inner: FakeWorkshop::default(),
            server: Arc::clone(server),
            when,
            same,
        }
    }
}

const FILE: &str = "tokenizer/added_tokens.json";

impl Workshop for Exchanged {
    fn parts(&self, spec: &ArtaugSpec, brake: &Brake) -> Result<Parts, PartsError> {
        let mut parts = self.inner.parts(spec, brake)?;
        let file = |bytes: &[u8]| vec![(FILE.to_owned(), Digest::of(bytes))];
        parts.tools.card.base_files = file(b"tokens");
        let (server, when) = (Arc::clone(&self.server), self.when);
        let (same, looks) = (self.same, AtomicUsize::new(0));
        parts.tools.base = Box::new(move || {
            let is_same = !when(&server) || looks.fetch_add(1, Ordering::SeqCst) < same;
            let bytes: &[u8] = if is_same { b"tokens" } else { b"a key" };
            Ok(file(bytes))
        });
        Ok(parts)
    }
}

/// All but the results is done.
fn is_over(server: &FakeServer) -> bool {
    events(server, "decided").len() == 2
}

#[test]
fn a_base_that_is_exchanged_under_the_job_is_noticed_at_the_next_model_that_is_made_of_it() {
    // Without a fused model nobody looks at the end.
    let spec = spec_with(&[("[output]\nfused = true\n", "")]);
    let server = Arc::new(FakeServer::new(&spec));
    server.state().grants = 1;
    let folder = tempfile::tempdir().unwrap();
    let mut deceived = worker(&server, folder.path());
    let is_joined = |server: &FakeServer| !events(server, "fused").is_empty();
    deceived.workshop = Box::new(Exchanged::of(&server, is_joined, 0));
    deceived.run();
    // These are drawn with the model that was open already.
    let evaluated = events(&server, "evaluated");
    let arms = evaluated.iter().map(|event| event["arm"].as_str().unwrap());
    let arms: BTreeSet<&str> = arms.collect();
    assert_eq!(arms, BTreeSet::from(["base", "rewriting"]));
    let (release, reason) = server.released();
    assert_eq!(release, JobRelease::Stopped, "{reason}");
    assert!(reason.contains(FILE), "{reason}");
    goes_on_with_the_files_of_the_beginning(&server, folder.path());
}

fn goes_on_with_the_files_of_the_beginning(server: &Arc<FakeServer>, folder: &Path) {
    server.state().grants = 1;
    let mut sound = worker(server, folder);
    sound.workshop = Box::new(Exchanged::of(server, is_over, usize::MAX));
    sound.run();
    succeeded(server);
    let spec = server.state().spec.clone();
    assert_eq!(
        server.lasting_results(),
        undisturbed(&spec).lasting_results()
    );
}

#[test]
fn a_model_whose_files_were_exchanged_under_the_job_is_not_published() {
    let server = Arc::new(FakeServer::new(SPEC));
    let folder = tempfile::tempdir().unwrap();
    // Before the fused model is written, and while it is.
    for same in [0, 1] {
        server.state().grants = 1;
        let mut deceived = worker(&server, folder.path());
        deceived.workshop = Box::new(Exchanged::of(&server, is_over, same));
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
    goes_on_with_the_files_of_the_beginning(&server, folder.path());
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
    assert!(card(&tight).contains("The job was not over when"));
    assert!(roomy.results().keys().eq(tight.results().keys()));
}
