//! How rounds run, and the bounds on what they take.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How rounds run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoundsSpec {
    /// Rounds to run.
    pub count: u32,
    /// A round with fewer accepted contributions fails.
    #[serde(default = "two")]
    pub min_silos: u32,
    /// A round closes as soon as it has this many; the whole cohort if absent.
    #[serde(default)]
    pub max_silos: Option<u32>,
    /// A round stays open at least this long, unless the whole cohort has answered.
    #[serde(default, with = "humantime_serde")]
    pub min_time: Duration,
    /// A round closes after this time.
    #[serde(default = "default_max_time", with = "humantime_serde")]
    pub max_time: Duration,
    /// p_k of the weighted mean.
    #[serde(default)]
    pub weighting: Weighting,
}

/// p_k, the weight of silo k.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weighting {
    /// n_k / n: the largest task owns the global adapter.
    #[default]
    Examples,
    /// 1 / K.
    Uniform,
}

/// Bounds on contributions.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSpec {
    /// Largest L2 norm of an update; absent means no bound beyond finite numbers.
    pub max_update_norm: Option<f64>,
    /// Most examples that a silo may claim for one round.
    pub max_examples: u64,
}

impl Default for LimitsSpec {
    fn default() -> Self {
        Self {
            max_update_norm: None,
            max_examples: 100_000_000,
        }
    }
}

fn two() -> u32 {
    2
}
fn default_max_time() -> Duration {
    Duration::from_hours(1)
}
