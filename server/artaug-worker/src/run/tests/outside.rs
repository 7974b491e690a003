//! Models elsewhere: a job that stops does not wait for them, and one that waits does not pay twice.

use std::{io::Read as _, net::TcpListener, sync::atomic::AtomicBool, thread};

use concord_artaug::{
    advisor::chat::{Chat, ChatSettings},
    endpoint::{Endpoint, EndpointError, EndpointSettings},
    image::Image,
    scorer::{ExternalScorer, ForEvaluation, ForFilter, ScoreError, Scorer},
};
use concord_common::{code::ErrorCode, job::artaug::ArtaugSpec};
use tokio::runtime::Runtime;

use super::*;
use crate::stages::Parts;

/// A workshop whose filter asks at an endpoint.
struct Elsewhere {
    inner: FakeWorkshop,
    endpoint: EndpointSettings,
    runtime: Runtime,
}

impl Workshop for Elsewhere {
    fn parts(&self, spec: &ArtaugSpec, brake: &Brake) -> Result<Parts, PartsError> {
        let mut parts = self.inner.parts(spec, brake)?;
        let endpoint = Endpoint::open(self.endpoint.clone(), brake.until()).unwrap();
        let (settings, runtime) = (ChatSettings::new("m"), self.runtime.handle().clone());
        let chat = Chat::new(Arc::new(endpoint), settings, runtime);
        let scorer = ExternalScorer::new("photometry", "how well it is lit", chat);
        parts.tools.filter = vec![Box::new(Unversioned(scorer))];
        Ok(parts)
    }
}

/// To the job it is what it has without an endpoint, so that a worker without one may go on.
struct Unversioned(ExternalScorer<ForFilter>);

impl Scorer for Unversioned {
    type Use = ForFilter;

    fn name(&self) -> &str {
        self.0.name()
    }

    fn score(&self, image: &Image, prompt: &str) -> Result<f64, ScoreError> {
        self.0.score(image, prompt)
    }
}

/// A job halts once a call has come that nobody answers. Gives how it was given back.
fn halted(server: &Arc<FakeServer>, patience: Duration, halt: fn(&FakeServer)) -> Vec<JobRelease> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    server.state().grants = 1;
    let folder = tempfile::tempdir().unwrap();
    let mut asking = worker(server, folder.path());
    asking.habits.stop_within = patience;
    asking.workshop = Box::new(Elsewhere {
        inner: FakeWorkshop::default(),
        endpoint: EndpointSettings {
            timeout: Duration::from_hours(1),
            ..EndpointSettings::new(&url)
        },
        runtime: Runtime::new().unwrap(),
    });
    let is_broken_off = thread::scope(|scope| {
        let model = scope.spawn(|| {
            let (mut call, _) = listener.accept().unwrap();
            call.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
            call.read_exact(&mut [0]).unwrap();
            halt(server);
            let is_broken_off = call.read_to_end(&mut Vec::new()).is_ok();
            // The calls of other helpers, if they wait still.
            drop(listener);
            is_broken_off
        });
        asking.run();
        model.join().unwrap()
    });
    assert!(is_broken_off, "the worker waits for the answer");
    assert!(events(server, "scored").is_empty());
    let state = server.state();
    let released = state.releases.iter();
    released.map(v1::ReleaseJobRequest::release).collect()
}

#[test]
fn a_pause_breaks_a_call_off_when_its_patience_ends_and_the_image_is_scored_later() {
    let server = Arc::new(FakeServer::new(SPEC));
    let released = halted(&server, Duration::ZERO, |server| {
        server.state().command = WorkerCommand::Pause;
    });
    assert_eq!(released, [JobRelease::Paused]);
    server.resume();
    ends_as_undisturbed(&server);
}

#[test]
fn a_cancel_breaks_a_call_off_at_once() {
    let server = Arc::new(FakeServer::new(SPEC));
    let released = halted(&server, Duration::from_hours(1), |server| {
        server.state().command = WorkerCommand::Cancel;
    });
    assert!(released.is_empty(), "{released:?}");
}

#[test]
fn a_lost_lease_breaks_a_call_off_at_once_and_nothing_is_given_back() {
    let server = Arc::new(FakeServer::new(SPEC));
    let released = halted(&server, Duration::from_hours(1), |server| {
        server.state().faults = Some(("renew", ErrorCode::LeaseLost, usize::MAX));
    });
    assert!(released.is_empty(), "{released:?}");
    server.state().faults = None;
    ends_as_undisturbed(&server);
}

/// A workshop whose guard, which is asked after the judge, is away when it is asked first.
struct Unguarded(FakeWorkshop);

impl Workshop for Unguarded {
    fn parts(&self, spec: &ArtaugSpec, brake: &Brake) -> Result<Parts, PartsError> {
        let mut parts = self.0.parts(spec, brake)?;
        let panel = &mut parts.tools.evaluation;
        let guard = panel.pop().unwrap();
        panel.push(Box::new(Late(guard, AtomicBool::new(true))));
        Ok(parts)
    }
}

struct Late(Box<dyn Scorer<Use = ForEvaluation>>, AtomicBool);

impl Scorer for Late {
    type Use = ForEvaluation;

    fn name(&self) -> &str {
        self.0.name()
    }

    fn score(&self, image: &Image, prompt: &str) -> Result<f64, ScoreError> {
        if self.1.swap(false, Ordering::SeqCst) {
            let away = EndpointError::Connection {
                url: "http://guard".to_owned(),
                what: "connection refused".to_owned(),
            };
            return Err(ScoreError::Unavailable {
                scorer: self.name().to_owned(),
                source: away.into(),
            });
        }
        self.0.score(image, prompt)
    }
}

/// How often the judge is asked in a job.
fn judged(is_guard_away: bool) -> usize {
    let workshop = FakeWorkshop::default();
    let outage = Arc::clone(&workshop.outage);
    let server = run_by(SPEC, |worker| {
        // So that nobody gives up, however slow the machine is.
        worker.habits.pace.longest = Duration::from_mins(1);
        worker.workshop = if is_guard_away {
            Box::new(Unguarded(workshop))
        } else {
            Box::new(workshop)
        };
    });
    succeeded(&server);
    outage.judged.load(Ordering::SeqCst)
}

#[test]
fn a_scorer_that_has_answered_is_not_asked_again_while_another_is_away() {
    let usual = judged(false);
    assert!(usual > 0);
    assert_eq!(judged(true), usual);
}
