//! Jobs, and each silo's part in them.

use concord_common::{
    ErrorCode, JobId, RoundNumber, SiloId, Timestamp, adapter::AdapterVersion, round::job::JobState,
};
use sqlx::{QueryBuilder, sqlite::SqliteRow};

use super::{DatastoreError, ROWS_AT_ONCE, Tx, row};

/// A job to be queued.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Id.
    pub job_id: JobId,
    /// Chosen by the caller; a second job with it is not made.
    pub request_id: String,
    /// Operator.
    pub submitted_by: String,
    /// Now.
    pub submitted_at: Timestamp,
    /// The specification as submitted, already checked.
    pub spec_toml: String,
    /// Kind from the specification.
    pub kind: &'static str,
}

/// A job.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JobRecord {
    /// Id.
    pub job_id: JobId,
    /// Chosen by the caller.
    pub request_id: String,
    /// Operator.
    pub submitted_by: String,
    /// When it was queued.
    pub submitted_at: Timestamp,
    /// The specification as submitted.
    pub spec_toml: String,
    /// Kind from the specification: who runs it.
    pub kind: String,
    /// State.
    pub state: JobState,
    /// Why it failed or was cancelled.
    pub reason: String,
    /// Current or last round; 0 while queued.
    pub round: u32,
    /// Last published adapter; none while queued.
    pub adapter_version: Option<AdapterVersion>,
    /// When it left the queue.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}

impl JobRecord {
    fn read(row: &SqliteRow) -> Result<Self, DatastoreError> {
        Ok(Self {
            job_id: row::parse(row, "job_id")?,
            request_id: row::get(row, "request_id")?,
            submitted_by: row::get(row, "submitted_by")?,
            submitted_at: row::time(row, "submitted_at")?,
            spec_toml: row::get(row, "spec_toml")?,
            kind: row::get(row, "kind")?,
            state: row::parse(row, "state")?,
            reason: row::get(row, "reason")?,
            round: row::unsigned(row, "round")?,
            adapter_version: row::version_opt(row, "adapter_version")?,
            started_at: row::time_opt(row, "started_at")?,
            ended_at: row::time_opt(row, "ended_at")?,
        })
    }

    /// True once the job can no longer change.
    pub fn has_ended(&self) -> bool {
        self.state.is_over()
    }
}

/// A silo's part in a job, over all rounds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JobSiloRecord {
    /// Silo.
    pub silo_id: SiloId,
    /// Code and sentence with which it declined.
    pub declined: Option<(ErrorCode, String)>,
    /// Payload bytes received from it.
    pub bytes_up: u64,
    /// Payload bytes sent to it.
    pub bytes_down: u64,
    /// Contributions counted.
    pub accepted: u32,
}

impl JobSiloRecord {
    fn read(row: &SqliteRow) -> Result<Self, DatastoreError> {
        let declined = match row::get::<Option<&str>>(row, "declined_code")? {
            None => None,
            Some(_) => Some((
                row::parse(row, "declined_code")?,
                row::get(row, "declined_message")?,
            )),
        };
        Ok(Self {
            silo_id: row::parse(row, "silo_id")?,
            declined,
            bytes_up: row::unsigned(row, "bytes_up")?,
            bytes_down: row::unsigned(row, "bytes_down")?,
            accepted: row::unsigned(row, "accepted")?,
        })
    }
}

impl Tx<'_> {
    /// Queues a job.
    ///
    /// # Errors
    /// If the job id or the request id is taken (look first), or the database fails.
    pub async fn insert_job(&mut self, job: &NewJob) -> Result<(), DatastoreError> {
        sqlx::query(
            "INSERT INTO jobs (job_id, request_id, submitted_by, submitted_at, spec_toml, state, reason, round, kind)
             VALUES ($1, $2, $3, $4, $5, $6, '', 0, $7)",
        )
        .bind(job.job_id.as_str())
        .bind(&job.request_id)
        .bind(&job.submitted_by)
        .bind(job.submitted_at.as_millis())
        .bind(&job.spec_toml)
        .bind(JobState::Queued.as_str())
        .bind(job.kind)
        .execute(self.conn())
        .await?;
        Ok(())
    }

    /// A job.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn job(&mut self, job_id: &JobId) -> Result<Option<JobRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM jobs WHERE job_id = $1")
            .bind(job_id.as_str())
            .fetch_optional(self.conn())
            .await?
            .as_ref()
            .map(JobRecord::read)
            .transpose()
    }

    /// The job that was made for a request.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn job_by_request(
        &mut self,
        request_id: &str,
    ) -> Result<Option<JobRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM jobs WHERE request_id = $1")
            .bind(request_id)
            .fetch_optional(self.conn())
            .await?
            .as_ref()
            .map(JobRecord::read)
            .transpose()
    }

    /// The newest jobs, newest first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn newest_jobs(&mut self, limit: u32) -> Result<Vec<JobRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM jobs ORDER BY seq DESC LIMIT $1")
            .bind(i64::from(limit))
            .fetch_all(self.conn())
            .await?
            .iter()
            .map(JobRecord::read)
            .collect()
    }

    /// Jobs of a kind in a state, oldest first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn jobs_in_state(
        &mut self,
        state: JobState,
        kind: &str,
    ) -> Result<Vec<JobRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM jobs WHERE state = $1 AND kind = $2 ORDER BY seq")
            .bind(state.as_str())
            .bind(kind)
            .fetch_all(self.conn())
            .await?
            .iter()
            .map(JobRecord::read)
            .collect()
    }

    /// Marks a queued job as running with its first adapter.
    ///
    /// # Errors
    /// If the job is not queued, or the database fails.
    pub async fn start_job(
        &mut self,
        job_id: &JobId,
        version: AdapterVersion,
        now: Timestamp,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query(
            "UPDATE jobs SET state = $2, adapter_version = $3, started_at = $5 WHERE job_id = $1 AND state = $4",
        )
        .bind(job_id.as_str())
        .bind(JobState::Running.as_str())
        .bind(&version.0.as_bytes()[..])
        .bind(JobState::Queued.as_str())
        .bind(now.as_millis())
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || format!("queued job {job_id}"))
    }

    /// Marks a queued job as running that has no adapter.
    ///
    /// # Errors
    /// If the job is not queued, or the database fails.
    pub async fn start_worker_job(
        &mut self,
        job_id: &JobId,
        now: Timestamp,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query(
            "UPDATE jobs SET state = $2, started_at = $4 WHERE job_id = $1 AND state = $3",
        )
        .bind(job_id.as_str())
        .bind(JobState::Running.as_str())
        .bind(JobState::Queued.as_str())
        .bind(now.as_millis())
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || format!("queued job {job_id}"))
    }

    /// Sets a running job's round.
    ///
    /// # Errors
    /// If the job is not running, or the database fails.
    pub async fn set_job_round(
        &mut self,
        job_id: &JobId,
        round: RoundNumber,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query("UPDATE jobs SET round = $2 WHERE job_id = $1 AND state = $3")
            .bind(job_id.as_str())
            .bind(i64::from(round.0))
            .bind(JobState::Running.as_str())
            .execute(self.conn())
            .await?;
        require_one(done.rows_affected(), || format!("running job {job_id}"))
    }

    /// Sets a running job's newest adapter.
    ///
    /// # Errors
    /// If the job is not running, or the database fails.
    pub async fn set_job_version(
        &mut self,
        job_id: &JobId,
        version: AdapterVersion,
    ) -> Result<(), DatastoreError> {
        let done =
            sqlx::query("UPDATE jobs SET adapter_version = $2 WHERE job_id = $1 AND state = $3")
                .bind(job_id.as_str())
                .bind(&version.0.as_bytes()[..])
                .bind(JobState::Running.as_str())
                .execute(self.conn())
                .await?;
        require_one(done.rows_affected(), || format!("running job {job_id}"))
    }

    /// Ends a job that has not ended.
    ///
    /// # Errors
    /// If the job has ended or is not there, or the database fails.
    pub async fn end_job(
        &mut self,
        job_id: &JobId,
        state: JobState,
        reason: &str,
        now: Timestamp,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query(
            "UPDATE jobs SET state = $2, reason = $3, ended_at = $4
             WHERE job_id = $1 AND ended_at IS NULL",
        )
        .bind(job_id.as_str())
        .bind(state.as_str())
        .bind(reason)
        .bind(now.as_millis())
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || {
            format!("job {job_id} that has not ended")
        })
    }

    /// Makes silos part of a job; nothing changes for those that already are.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn add_job_silos(
        &mut self,
        job_id: &JobId,
        silos: impl IntoIterator<Item = &SiloId>,
    ) -> Result<(), DatastoreError> {
        let silos: Vec<_> = silos.into_iter().collect();
        for silos in silos.chunks(ROWS_AT_ONCE) {
            QueryBuilder::new("INSERT INTO job_silos (job_id, silo_id, bytes_up, bytes_down) ")
                .push_values(silos, |mut row, silo_id| {
                    row.push_bind(job_id.as_str())
                        .push_bind(silo_id.as_str())
                        .push("0")
                        .push("0");
                })
                .push(" ON CONFLICT (job_id, silo_id) DO NOTHING")
                .build()
                .execute(self.conn())
                .await?;
        }
        Ok(())
    }

    /// Every silo's part in a job, by name.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn job_silos(
        &mut self,
        job_id: &JobId,
    ) -> Result<Vec<JobSiloRecord>, DatastoreError> {
        sqlx::query(
            "SELECT job_silos.*, (SELECT count(*) FROM round_silos
                 WHERE round_silos.job_id = job_silos.job_id AND round_silos.silo_id = job_silos.silo_id
                   AND round_silos.outcome = 'accepted') AS accepted
             FROM job_silos WHERE job_id = $1 ORDER BY silo_id",
        )
        .bind(job_id.as_str())
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(JobSiloRecord::read)
        .collect()
    }

    /// True if a silo is part of a job.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn is_job_silo(
        &mut self,
        job_id: &JobId,
        silo_id: &SiloId,
    ) -> Result<bool, DatastoreError> {
        Ok(
            sqlx::query("SELECT 1 FROM job_silos WHERE job_id = $1 AND silo_id = $2")
                .bind(job_id.as_str())
                .bind(silo_id.as_str())
                .fetch_optional(self.conn())
                .await?
                .is_some(),
        )
    }

    /// Records why a silo will not take part in a job.
    ///
    /// # Errors
    /// If the silo is not part of the job, or the database fails.
    pub async fn decline_job(
        &mut self,
        job_id: &JobId,
        silo_id: &SiloId,
        code: ErrorCode,
        message: &str,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query(
            "UPDATE job_silos SET declined_code = $3, declined_message = $4
             WHERE job_id = $1 AND silo_id = $2",
        )
        .bind(job_id.as_str())
        .bind(silo_id.as_str())
        .bind(code.as_str())
        .bind(message)
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || {
            format!("silo {silo_id} in job {job_id}")
        })
    }

    /// Counts payload bytes that went to or came from a silo; nothing happens if it is not part of the job.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn count_bytes(
        &mut self,
        job_id: &JobId,
        silo_id: &SiloId,
        up: u64,
        down: u64,
    ) -> Result<(), DatastoreError> {
        sqlx::query(
            "UPDATE job_silos SET bytes_up = bytes_up + $3, bytes_down = bytes_down + $4
             WHERE job_id = $1 AND silo_id = $2",
        )
        .bind(job_id.as_str())
        .bind(silo_id.as_str())
        .bind(up as i64)
        .bind(down as i64)
        .execute(self.conn())
        .await?;
        Ok(())
    }
}

pub(super) fn require_one(rows: u64, what: impl Fn() -> String) -> Result<(), DatastoreError> {
    if rows == 1 {
        Ok(())
    } else {
        Err(DatastoreError::Missing(what()))
    }
}
