//! Toy silos, a federation that misbehaves on demand, and the same behind gRPC: for the tests of this crate.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use concord_common::{Clock, JobId, SiloId, Timestamp, clock::MockClock, seed::Seed};
use concord_learning::{cache::CacheSettings, data::InputKind};
use tokio_util::sync::CancellationToken;

use crate::{
    bench::Workbench,
    config::{BackboneEntry, Files, PolicySection, ProblemKind, TaskConfig},
    coordinator::memory::Federation,
    data::{Columns, Format},
    egress::{EgressGate, GateLimits},
    patience::Pace,
    profile::Profile,
    receipts::{KeptReceipt, Receipts},
    session::Session,
    status::StatusBoard,
    transfer::Downloads,
    vault::Vault,
};

mod faulty;
mod server;

pub(crate) use self::{
    faulty::{Call, Deed, Fault, Faulty},
    server::FakeServer,
};

pub(crate) const NO_LIMITS: GateLimits = GateLimits {
    bytes_per_job: u64::MAX,
    max_update_norm: None,
};

/// Quick enough for tests on the real clock.
pub(crate) const QUICK: Pace = Pace {
    first: Duration::from_millis(1),
    longest: Duration::from_millis(5),
};

pub(crate) fn silo(name: &str) -> SiloId {
    name.parse().unwrap()
}

pub(crate) fn job() -> JobId {
    "job-1".parse().unwrap()
}

pub(crate) fn clock() -> Arc<dyn Clock> {
    Arc::new(MockClock::new(Timestamp(1_700_000_000_000)))
}

/// BERT with 2 layers of width 24 and random weights.
pub(crate) fn tiny_backbone() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../common/learning/fixtures/bert")
}

/// A job on the tiny backbone. `more` goes to the end.
pub(crate) fn spec(algorithm: &str, rounds: u32, more: &str) -> String {
    format!(
        r#"kind = "federated-training"
name = "toy"
task = "toy"
seed = 7
[backbone]
name = "tiny"
hidden = 24
layers = 2
[adapter]
bottleneck = 4
init_up = 0.02
[algorithm]
name = "{algorithm}"
[training]
batch_size = 8
learning_rate = 0.02
head_learning_rate = 0.02
max_length = 24
[rounds]
count = {rounds}
{more}
"#
    )
}

/// A federation of these silos.
pub(crate) fn federation(spec_toml: &str, silos: &[&str]) -> Arc<Federation> {
    let silos: BTreeSet<SiloId> = silos.iter().map(|name| silo(name)).collect();
    Federation::new(job(), spec_toml, silos, clock()).unwrap()
}

/// Rows whose label is that of the word in them, in three CSV files.
pub(crate) fn write_toy_task(folder: &Path, seed: u64) -> TaskConfig {
    fs::create_dir_all(folder).unwrap();
    let mut rng = Seed(seed).rng();
    let fillers = ["the", "old", "town", "at", "night", "of"];
    for (split, rows) in [("train", 40), ("validation", 12), ("test", 12)] {
        let mut text = "text,label\n".to_owned();
        for index in 0..rows {
            let (word, label) =
                [("rain", "weather"), ("apples", "food"), ("boat", "travel")][index % 3];
            let mut filler = || fillers[rng.below(fillers.len() as u64) as usize];
            let line = [filler(), word, filler(), filler()].join(" ");
            text.extend([&line, ",", label, "\n"]);
        }
        fs::write(folder.join(format!("{split}.csv")), text).unwrap();
    }
    TaskConfig {
        name: "toy".to_owned(),
        kind: InputKind::Single,
        problem: ProblemKind::Classification,
        format: Format::Csv,
        delimiter: ',',
        columns: Columns::default(),
        files: Files::PerSplit {
            train: folder.join("train.csv"),
            validation: folder.join("validation.csv"),
            test: folder.join("test.csv"),
        },
        max_bad_rows: 0,
    }
}

/// One silo's home folder and what a session of it is made of.
pub(crate) struct Home {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) silo: SiloId,
    pub(crate) profile: Profile,
    pub(crate) stop: CancellationToken,
}

impl Home {
    /// A silo with a toy task of its own.
    pub(crate) fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let task = write_toy_task(&folder.path().join("data"), name.len() as u64);
        Self {
            silo: silo(name),
            profile: Profile {
                backbones: vec![BackboneEntry {
                    name: "tiny".to_owned(),
                    path: tiny_backbone(),
                }],
                tasks: vec![task],
                policy: PolicySection::default(),
                cache: CacheSettings::default(),
                reports_metrics: true,
                takes_local: false,
                shares_rows: false,
            },
            folder,
            stop: CancellationToken::new(),
        }
    }

    pub(crate) fn vault(&self) -> Vault {
        Vault::open(self.folder.path()).unwrap()
    }

    pub(crate) fn gate(&self) -> Arc<EgressGate> {
        self.gate_within(NO_LIMITS)
    }

    pub(crate) fn gate_within(&self, limits: GateLimits) -> Arc<EgressGate> {
        let server = "test".to_owned();
        Arc::new(
            EgressGate::open(
                self.folder.path(),
                self.silo.clone(),
                server,
                limits,
                clock(),
            )
            .unwrap(),
        )
    }

    /// The lines of the egress log.
    pub(crate) fn egress_log(&self) -> Vec<serde_json::Value> {
        fs::read_to_string(self.folder.path().join("egress.jsonl"))
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The receipts that are kept.
    pub(crate) fn receipts(&self) -> Vec<KeptReceipt> {
        fs::read_to_string(self.folder.path().join("receipts.jsonl"))
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The same folder for a daemon that has not been told to stop.
    pub(crate) fn revived(self) -> Self {
        Self {
            stop: CancellationToken::new(),
            ..self
        }
    }

    /// A new life of this silo's daemon: whatever it knows comes from the folder.
    pub(crate) fn session<C>(&self, coordinator: C, receipt_key: &[u8]) -> Session<C> {
        let board = StatusBoard::new(
            self.folder.path(),
            self.silo.clone(),
            "test".to_owned(),
            clock(),
            None,
        );
        Session {
            coordinator: Arc::new(coordinator),
            receipt_key: receipt_key.to_vec(),
            silo: self.silo.clone(),
            profile: Arc::new(self.profile.clone()),
            bench: Workbench::start(1).unwrap(),
            vault: self.vault(),
            gate: self.gate(),
            downloads: Downloads::open(self.folder.path()).unwrap(),
            receipts: Arc::new(Receipts::open(self.folder.path()).unwrap()),
            board: Arc::new(board),
            pace: QUICK,
            clock: clock(),
            stop: self.stop.clone(),
        }
    }

    /// A session on a federation that behaves.
    pub(crate) fn join(
        &self,
        federation: &Arc<Federation>,
    ) -> Session<crate::coordinator::memory::MemoryCoordinator> {
        self.session(
            federation.coordinator(self.silo.clone()),
            &federation.receipt_key(),
        )
    }
}

/// What a silo reported at a point of a round.
pub(crate) fn reported(
    federation: &Federation,
    name: &str,
    round: u32,
    point: &str,
) -> Option<BTreeMap<String, f64>> {
    federation
        .reports()
        .into_iter()
        .find(|report| {
            report.silo.as_str() == name
                && report.round.0 == round
                && report.point.as_str() == point
        })
        .map(|report| report.metrics)
}

/// Waits until `done`, at most a generous while.
pub(crate) async fn eventually(what: &str, done: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_mins(1);
    while !done() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
