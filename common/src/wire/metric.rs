//! Metric reports with their bounds.

use std::collections::BTreeMap;

use concord_proto::v1;

use super::{job_id, round_number, silo_id};
use crate::{ErrorCode, JobId, RoundNumber, SiloId, code::Refusal};

/// Most metrics in a report.
pub const MAX_METRICS: usize = 64;
/// Longest name of a metric in bytes.
pub const MAX_METRIC_NAME_BYTES: usize = 64;

/// Every name that this version's silos give to a number in a report. The egress gate lets no other out, so that a name carries nothing
/// but which number it is; whoever adds a number to a report adds its name here.
pub const METRIC_NAMES: [&str; 19] = [
    // Of an evaluation.
    "loss",
    "accuracy",
    "macro_f1",
    "mcc",
    "spearman",
    "rows",
    // Of the training of a round, besides `loss`.
    "task_loss",
    "contrastive",
    "cka_pull",
    "cka_push",
    "regulariser",
    "global_loss",
    "gradient_norm",
    "update_norm",
    "steps",
    "examples",
    "seconds",
    // Of the end of a job.
    "best_round",
    "majority",
];

/// The point of a silo's work that metrics were taken at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum MetricPoint {
    /// While training in this round.
    Training,
    /// Personal model after local training, before aggregation, on the validation split.
    AfterTraining,
    /// Personal model with this round's published adapter, on the validation split.
    AfterAggregation,
    /// Best personal model on the test split, when the job has ended.
    FinalTest,
    /// Model of the last round on the test split, when the job has ended.
    LastTest,
}

impl MetricPoint {
    /// Every point.
    pub const ALL: [Self; 5] = [
        Self::Training,
        Self::AfterTraining,
        Self::AfterAggregation,
        Self::FinalTest,
        Self::LastTest,
    ];

    /// The name in stores and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::AfterTraining => "after_training",
            Self::AfterAggregation => "after_aggregation",
            Self::FinalTest => "final_test",
            Self::LastTest => "last_test",
        }
    }

    /// The point of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|point| point.as_str() == name)
    }

    /// From the wire form.
    ///
    /// # Errors
    /// `INVALID_REQUEST` if it is missing or unknown.
    pub fn from_proto(number: i32) -> Result<Self, Refusal> {
        Self::ALL
            .into_iter()
            .find(|point| v1::MetricPoint::from(*point) as i32 == number)
            .ok_or_else(|| {
                Refusal::new(
                    ErrorCode::InvalidRequest,
                    format!("`point`: {number} is no point at which metrics are taken"),
                )
            })
    }
}

impl From<MetricPoint> for v1::MetricPoint {
    fn from(point: MetricPoint) -> Self {
        match point {
            MetricPoint::Training => Self::Training,
            MetricPoint::AfterTraining => Self::AfterTraining,
            MetricPoint::AfterAggregation => Self::AfterAggregation,
            MetricPoint::FinalTest => Self::FinalTest,
            MetricPoint::LastTest => Self::LastTest,
        }
    }
}

/// The metrics of one silo at one point of one round; within the protocol's bounds if it came from a message.
#[derive(Clone, PartialEq, Debug)]
pub struct MetricReport {
    /// Who measured.
    pub silo: SiloId,
    /// Job.
    pub job: JobId,
    /// Round.
    pub round: RoundNumber,
    /// When in the round.
    pub point: MetricPoint,
    /// The numbers by name.
    pub metrics: BTreeMap<String, f64>,
}

impl MetricReport {
    /// From a silo's message; whatever the message says, the report is of the silo of the certificate.
    ///
    /// # Errors
    /// `INVALID_REQUEST` naming the field: a missing or malformed id, no metric or more than [`MAX_METRICS`], a name that
    /// repeats or is not `[a-z0-9_]{1,64}`, a value that is NaN or infinite.
    pub fn from_silo(proto: &v1::MetricReport, silo: SiloId) -> Result<Self, Refusal> {
        Ok(Self {
            silo,
            job: job_id(&proto.job_id)?,
            round: round_number(proto.round)?,
            point: MetricPoint::from_proto(proto.point)?,
            metrics: metrics_from_proto(&proto.metrics)?,
        })
    }

    /// From the server's message.
    ///
    /// # Errors
    /// As [`MetricReport::from_silo`].
    pub fn from_proto(proto: &v1::MetricReport) -> Result<Self, Refusal> {
        Self::from_silo(proto, silo_id(&proto.silo_id)?)
    }

    /// The wire form.
    pub fn to_proto(&self) -> v1::MetricReport {
        v1::MetricReport {
            silo_id: self.silo.to_string(),
            job_id: self.job.to_string(),
            round: self.round.0,
            point: v1::MetricPoint::from(self.point) as i32,
            metrics: self
                .metrics
                .iter()
                .map(|(name, &value)| v1::Metric {
                    name: name.clone(),
                    value,
                })
                .collect(),
        }
    }
}

fn metrics_from_proto(metrics: &[v1::Metric]) -> Result<BTreeMap<String, f64>, Refusal> {
    let refuse = |message: String| {
        Err(Refusal::new(
            ErrorCode::InvalidRequest,
            format!("`metrics`: {message}"),
        ))
    };
    if metrics.is_empty() || metrics.len() > MAX_METRICS {
        return refuse(format!(
            "a report has 1 to {MAX_METRICS} metrics, this one {}",
            metrics.len()
        ));
    }
    let mut checked = BTreeMap::new();
    for (index, metric) in metrics.iter().enumerate() {
        if !is_metric_name(&metric.name) {
            return refuse(format!(
                "the name of metric {index} is not 1 to {MAX_METRIC_NAME_BYTES} characters of [a-z0-9_]"
            ));
        }
        if !metric.value.is_finite() {
            return refuse(format!(
                "`{}` must be finite, is {}",
                metric.name, metric.value
            ));
        }
        if checked.insert(metric.name.clone(), metric.value).is_some() {
            return refuse(format!("`{}` is there twice", metric.name));
        }
    }
    Ok(checked)
}

/// Whether `name` may name a metric.
pub fn is_metric_name(name: &str) -> bool {
    (1..=MAX_METRIC_NAME_BYTES).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// Whether `name` is in [`METRIC_NAMES`].
pub fn is_known_metric(name: &str) -> bool {
    METRIC_NAMES.contains(&name)
}
