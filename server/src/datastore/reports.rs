//! Metric reports.

use concord_common::{
    JobId, RoundNumber,
    wire::{MetricPoint, MetricReport},
};
use sqlx::sqlite::SqliteRow;

use super::{DatastoreError, Tx, row};

/// A report with its place in the order of arrival.
#[derive(Clone, PartialEq, Debug)]
pub struct ReportRecord {
    /// Grows with every report that arrives or is replaced.
    pub seq: i64,
    /// The report.
    pub report: MetricReport,
}

impl ReportRecord {
    fn read(row: &SqliteRow) -> Result<Self, DatastoreError> {
        let point: &str = row::get(row, "point")?;
        let metrics: &str = row::get(row, "metrics")?;
        Ok(Self {
            seq: row::get(row, "seq")?,
            report: MetricReport {
                silo: row::parse(row, "silo_id")?,
                job: row::parse(row, "job_id")?,
                round: RoundNumber(row::unsigned(row, "round")?),
                point: MetricPoint::from_name(point)
                    .ok_or_else(|| row::bad("point", format!("`{point}` is no known name")))?,
                metrics: serde_json::from_str(metrics)
                    .map_err(|error| row::bad("metrics", error.to_string()))?,
            },
        })
    }
}

impl Tx<'_> {
    /// Stores a report in place of an earlier one for the same point.
    ///
    /// # Errors
    /// If there is no such job, or the database fails.
    pub async fn put_report(&mut self, report: &MetricReport) -> Result<(), DatastoreError> {
        let metrics = serde_json::to_string(&report.metrics)
            .map_err(|error| row::bad("metrics", error.to_string()))?;
        sqlx::query("DELETE FROM metric_reports WHERE job_id = $1 AND round = $2 AND silo_id = $3 AND point = $4")
            .bind(report.job.as_str())
            .bind(i64::from(report.round.0))
            .bind(report.silo.as_str())
            .bind(report.point.as_str())
            .execute(self.conn())
            .await?;
        sqlx::query(
            "INSERT INTO metric_reports (job_id, round, silo_id, point, metrics) VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(report.job.as_str())
        .bind(i64::from(report.round.0))
        .bind(report.silo.as_str())
        .bind(report.point.as_str())
        .bind(metrics)
        .execute(self.conn())
        .await?;
        Ok(())
    }

    /// A job's reports that came after the one with number `after`, by round, silo and point.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn reports_after(
        &mut self,
        job_id: &JobId,
        after: i64,
    ) -> Result<Vec<ReportRecord>, DatastoreError> {
        sqlx::query(
            "SELECT * FROM metric_reports WHERE job_id = $1 AND seq > $2 ORDER BY round, silo_id, point",
        )
        .bind(job_id.as_str())
        .bind(after)
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(ReportRecord::read)
        .collect()
    }
}
