//! What a silo is told of the jobs that it is part of.

use concord_common::{
    JobId, RoundNumber, SiloId, Timestamp,
    adapter::AdapterVersion,
    round::{Outcome, RoundPhase, job::JobState},
};
use sqlx::sqlite::SqliteRow;
use std::time::Duration;

use super::{DatastoreError, Tx, rounds::outcome, row};

/// A job in its current or last round, as one silo sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NoticeRecord {
    /// Job.
    pub job_id: JobId,
    /// The job's state.
    pub state: JobState,
    /// The job's last published adapter.
    pub newest: Option<AdapterVersion>,
    /// Current or last round.
    pub round: RoundNumber,
    /// Where the round stands.
    pub phase: RoundPhase,
    /// Adapter that the round started from.
    pub base: AdapterVersion,
    /// When the round closes at the latest.
    pub closes_at: Timestamp,
    /// Whether the silo is in the round's cohort.
    pub asked: bool,
    /// What became of the silo's part in the round.
    pub outcome: Option<Outcome>,
}

impl NoticeRecord {
    fn read(row: &SqliteRow) -> Result<Self, DatastoreError> {
        let announced_at = row::time(row, "announced_at")?;
        Ok(Self {
            job_id: row::parse(row, "job_id")?,
            state: row::parse(row, "state")?,
            newest: row::version_opt(row, "adapter_version")?,
            round: RoundNumber(row::unsigned(row, "round")?),
            phase: row::parse(row, "phase")?,
            base: AdapterVersion(row::digest(row, "base_version")?),
            closes_at: announced_at + Duration::from_millis(row::unsigned(row, "max_millis")?),
            asked: row::get::<Option<&str>>(row, "asked")?.is_some(),
            outcome: outcome(row)?,
        })
    }
}

impl Tx<'_> {
    /// Jobs that a silo is part of and that still run, and the newest `ended` of those that ended at `since` or later, also where it
    /// has declined: it may have a model to keep. Oldest first. Jobs that have not had a round yet are left out. A single statement.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn notices_of_silo(
        &mut self,
        silo_id: &SiloId,
        since: Timestamp,
        ended: u32,
    ) -> Result<Vec<NoticeRecord>, DatastoreError> {
        sqlx::query(
            "SELECT jobs.job_id, state, adapter_version, jobs.round, phase, base_version, announced_at, max_millis,
                 part.silo_id AS asked, part.outcome, part.reason
             FROM jobs
             JOIN rounds ON rounds.job_id = jobs.job_id AND rounds.round = jobs.round
             LEFT JOIN round_silos AS part
                 ON part.job_id = jobs.job_id AND part.round = jobs.round AND part.silo_id = $1
             WHERE seq IN (
                 SELECT seq FROM jobs JOIN job_silos USING (job_id)
                 WHERE silo_id = $1 AND round > 0 AND ended_at IS NULL
             ) OR seq IN (
                 SELECT seq FROM jobs JOIN job_silos USING (job_id)
                 WHERE silo_id = $1 AND round > 0 AND ended_at >= $2
                 ORDER BY seq DESC LIMIT $3
             ) ORDER BY seq",
        )
        .bind(silo_id.as_str())
        .bind(since.as_millis())
        .bind(i64::from(ended))
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(NoticeRecord::read)
        .collect()
    }
}
