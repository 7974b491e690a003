//! What a simulation gives back, as it is written as JSON.

use std::collections::BTreeMap;

use concord_common::{SiloId, round::job::JobState};
use serde::Serialize;

/// What came out; written as JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SimulationReport {
    /// Name of the job.
    pub job: String,
    /// Algorithm.
    pub algorithm: &'static str,
    /// Seed.
    pub seed: u64,
    /// Rounds.
    pub rounds: u32,
    /// How the job ended.
    pub state: JobState,
    /// Why it failed; empty otherwise.
    pub reason: String,
    /// The first adapter's version, then each round's.
    pub versions: Vec<String>,
    /// Bytes of one adapter.
    pub payload_bytes: u64,
    /// The silos.
    pub silos: Vec<SiloReport>,
    /// Silos that are here and that the job does not name.
    pub left_out: Vec<SiloId>,
    /// Everything that the silos reported, in order.
    pub metrics: Vec<MetricEntry>,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Largest resident memory of this process so far.
    pub peak_rss_bytes: Option<u64>,
}

/// A silo at the end.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SiloReport {
    /// Silo.
    pub silo_id: SiloId,
    /// Training rows in use.
    pub examples: u64,
    /// Accuracy of the most frequent class on the test rows; `null` for regression.
    pub majority: Option<f64>,
    /// Round of the best personal model.
    pub best_round: Option<u32>,
    /// The best personal model on the validation rows.
    pub best_validation: BTreeMap<String, f64>,
    /// The best personal model on the test rows.
    pub best_test: BTreeMap<String, f64>,
    /// The model of the last round on the test rows.
    pub last_test: BTreeMap<String, f64>,
}

/// A report in the operator's form.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MetricEntry {
    /// Silo.
    pub silo_id: SiloId,
    /// Round.
    pub round: u32,
    /// Point, as `after_training`.
    pub point: &'static str,
    /// Numbers by name.
    pub metrics: BTreeMap<String, f64>,
}
