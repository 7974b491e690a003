//! Advisors and scorers that are away, or that refuse.

use concord_artaug::advisor::{Advice, Advisor, AdvisorError, Question};
use concord_common::job::artaug::ArtaugSpec;

use super::{
    held_up::{stopped_when, was_held_up},
    *,
};
use crate::{stages::Parts, testing::refused};

#[test]
fn an_advisor_or_scorer_that_is_away_for_a_while_changes_nothing() {
    let workshop = FakeWorkshop::default();
    workshop.outage.advisor.store(3, Ordering::SeqCst);
    workshop.outage.scorers.store(3, Ordering::SeqCst);
    let server = run_by(SPEC, |worker| worker.workshop = Box::new(workshop));
    succeeded(&server);
    assert_eq!(
        server.lasting_results(),
        undisturbed(SPEC).lasting_results()
    );
}

#[test]
fn an_advisor_that_stays_away_holds_the_job_up() {
    let server = Arc::new(FakeServer::new(SPEC));
    server.state().grants = 2;
    let folder = tempfile::tempdir().unwrap();
    let mut away = worker(&server, folder.path());
    let workshop = FakeWorkshop::default();
    workshop.outage.advisor.store(usize::MAX, Ordering::SeqCst);
    away.workshop = Box::new(workshop);
    away.run();
    assert_eq!(server.state().releases.len(), 2);
    assert!(folder.path().join("jobs/job-1").exists());
    was_held_up(&server, "connection refused");
}

#[test]
fn an_endpoint_that_refuses_the_first_question_of_a_job_fails_it_at_once() {
    for (is_advisor, event) in [(true, "advised"), (false, "scored")] {
        let workshop = FakeWorkshop::default();
        let outage = &workshop.outage;
        let key = if is_advisor {
            &outage.key
        } else {
            &outage.scorers_key
        };
        key.store(usize::MAX, Ordering::SeqCst);
        let server = run_by(SPEC, |worker| worker.workshop = Box::new(workshop));
        let (release, reason) = server.released();
        assert_eq!(release, JobRelease::Failed, "{reason}");
        assert!(reason.contains("the key is refused"), "{reason}");
        assert_eq!(server.state().releases.len(), 1);
        assert!(events(&server, event).is_empty());
    }
}

/// A workshop whose advisor is asked with a key that is withdrawn once a pair is scored.
struct Withdrawn {
    inner: FakeWorkshop,
    server: Arc<FakeServer>,
}

impl Workshop for Withdrawn {
    fn parts(&self, spec: &ArtaugSpec, brake: &Brake) -> Result<Parts, PartsError> {
        let mut parts = self.inner.parts(spec, brake)?;
        let inner = parts.tools.advisor;
        parts.tools.advisor = Box::new(Refusing {
            inner,
            server: Arc::clone(&self.server),
        });
        Ok(parts)
    }
}

struct Refusing {
    inner: Box<dyn Advisor>,
    server: Arc<FakeServer>,
}

impl Advisor for Refusing {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn advise(&self, question: &Question<'_>) -> Result<Advice, AdvisorError> {
        if events(&self.server, "scored").is_empty() {
            self.inner.advise(question)
        } else {
            Err(refused().into())
        }
    }
}

#[test]
fn an_advisor_that_refuses_after_it_has_answered_holds_the_job_up_lease_after_lease() {
    let server = Arc::new(FakeServer::new(SPEC));
    server.state().grants = 2;
    let folder = tempfile::tempdir().unwrap();
    let mut worker = worker(&server, folder.path());
    worker.workshop = Box::new(Withdrawn {
        inner: FakeWorkshop::default(),
        server: Arc::clone(&server),
    });
    worker.run();
    {
        let state = server.state();
        assert_eq!(state.releases.len(), 2);
        for release in &state.releases {
            assert_eq!(release.release(), JobRelease::Stopped);
            let reason = &release.reason;
            assert!(reason.starts_with("the advisor refuses"), "{reason}");
        }
    }
    was_held_up(&server, "the key is refused");
}

#[test]
fn a_scorer_that_refuses_after_it_has_answered_holds_the_job_up() {
    let folder = tempfile::tempdir().unwrap();
    let server = stopped_when(SPEC, folder.path(), |server| {
        !events(server, "scored").is_empty()
    });
    let workshop = FakeWorkshop::default();
    let key = &workshop.outage.scorers_key;
    key.store(usize::MAX, Ordering::SeqCst);
    let mut locked = worker(&server, folder.path());
    locked.workshop = Box::new(workshop);
    locked.run();
    was_held_up(&server, "the key is refused");
}
