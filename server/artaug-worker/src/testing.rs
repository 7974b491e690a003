//! A made-up engine, advisor, scorers and server, so that whole jobs run in a moment.

mod engine;
mod overlap;
mod server;
mod tools;

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use concord_artaug::setup::SetupError;
use concord_common::{SystemClock, job::artaug::ArtaugSpec};

pub(crate) use self::{
    engine::{FakeEngine, Fitting, Told, WINDOW},
    overlap::Overlap,
    server::{FakeServer, Loss},
    tools::{Outage, refused, tools},
};
use crate::{
    brake::{Brake, Stop},
    limits::MemoryLimit,
    remote::Pace,
    run::{Habits, PartsError, Worker, Workshop},
    stages::{Opened, Parts},
};

/// A whole job in few and small steps.
pub(crate) const SPEC: &str = r#"
kind = "artaug"
name = "test job"
seed = 7
[model]
folder = "m"
[prompts]
texts = ["red apple", "blue car", "green tree", "grey cat", "old house"]
[held_out]
texts = ["white dog", "black boat", "small lamp"]
[advisor]
kind = "rules"
[scorers]
filter = [{ kind = "photometry", least_gain = 0.01 }]
evaluation = [{ kind = "statistics" }]
[counts]
iterations = 2
pairs = 10
kept = 4
least_kept = 2
held_out = 7
[sampler]
batch = 4
steps = 2
[lora]
first_steps = 25
second_steps = 15
batch = 2
checkpoint_every = 10
reduced_rank = 4
[evaluation]
resamples = 200
[output]
fused = true
"#;

/// Its held-out prompts.
pub(crate) const HELD_OUT: [&str; 3] = ["white dog", "black boat", "small lamp"];

/// The job with something else in it.
pub(crate) fn spec_with(changes: &[(&str, &str)]) -> String {
    changes.iter().fold(SPEC.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    })
}

/// A workshop of made-up parts.
#[derive(Debug, Default)]
pub(crate) struct FakeWorkshop {
    /// How the engine fails, if so.
    pub(crate) fault: Option<&'static str>,
    /// Lacks what every job needs.
    pub(crate) is_bare: bool,
    /// Has these prompts beside those of the job.
    pub(crate) more_prompts: Vec<String>,
    /// When advisor and scorers cannot be asked.
    pub(crate) outage: Arc<Outage>,
    /// Who has to be at work at the same time, if so.
    pub(crate) overlap: Option<Arc<Overlap>>,
    /// What the engines were told.
    pub(crate) told: Arc<Mutex<Told>>,
    /// At which step of a training the job is paused, and where, if so. Its worker must have no patience.
    pub(crate) pause_at: Option<(u64, Arc<FakeServer>)>,
}

impl Workshop for FakeWorkshop {
    fn parts(&self, spec: &ArtaugSpec, _brake: &Brake) -> Result<Parts, PartsError> {
        if self.is_bare || spec.model.folder == "missing" {
            return Err(SetupError::NoEndpoint("vision".to_owned()).into());
        }
        let mut tools = tools(spec, &self.outage, self.overlap.as_ref());
        tools.prompts.extend_from_slice(&self.more_prompts);
        Ok(Parts {
            engine: Box::new(FakeEngine::new(spec, self)),
            opened: Opened::Nothing,
            tools,
        })
    }
}

/// A worker of a made-up server that ends when there is nothing to do.
pub(crate) fn worker(server: &Arc<FakeServer>, folder: &Path) -> Worker {
    Worker {
        server: Arc::clone(server) as _,
        workshop: Box::new(FakeWorkshop::default()),
        habits: Habits {
            jobs: folder.join("jobs"),
            disk: 20 << 30,
            memory: MemoryLimit(u64::MAX),
            helpers: 3,
            stop_within: Duration::from_mins(1),
            pace: Pace {
                first: Duration::from_millis(1),
                longest: Duration::from_millis(5),
            },
            exit_when_idle: Some(Duration::ZERO),
        },
        clock: Arc::new(SystemClock),
        stop: Arc::new(Stop::default()),
    }
}
