//! Jobs that a worker runs: who holds them and how far they are.

use std::collections::BTreeMap;

use concord_common::{JobId, Timestamp};
use concord_proto::v1;
use prost::Message as _;
use sqlx::sqlite::SqliteRow;

use super::{DatastoreError, Tx, jobs::require_one, row};

/// A worker's claim on a job.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WorkerLease {
    /// Name of the worker, from its certificate.
    pub worker: String,
    /// Shown with every call on the job.
    pub token: [u8; 16],
    /// When it runs out.
    pub expires_at: Timestamp,
    /// True from a start of the server until the worker has renewed it.
    pub spared: bool,
}

/// The part of a job that its workers and operators move.
#[derive(Clone, PartialEq, Debug)]
pub struct WorkerJobRecord {
    /// Job.
    pub job_id: JobId,
    /// True once the job can no longer change.
    pub has_ended: bool,
    /// True while an operator lets it rest.
    pub paused: bool,
    /// Who holds it, run out or not.
    pub lease: Option<WorkerLease>,
    /// How often it was taken.
    pub attempts: u32,
    /// Leases in a row that ran out and had added nothing to the journal.
    pub idle_attempts: u32,
    /// Lines in the journal when it was taken last.
    pub lines_at_claim: u64,
    /// Lines in the journal.
    pub lines: u64,
    /// Their bytes.
    pub journal_bytes: u64,
    /// Bytes of all objects.
    pub object_bytes: u64,
    /// Most bytes of journal and objects together.
    pub quota: u64,
    /// How far it is; none before a worker has said so.
    pub progress: Option<v1::ArtaugProgress>,
    /// Whether it was given back to wait for operators' words.
    pub waits: bool,
    /// Number of the last word that a worker has acted on.
    pub reviews_done: u64,
    /// Number of the newest word.
    pub reviews: u64,
    /// Iteration of the pairs about which operators are asked.
    pub waiting_iteration: Option<u32>,
    /// What held it up when it was given back; none once it has got on since.
    pub trouble: Option<String>,
    /// When an operator had deleted all that is kept for it.
    pub files_deleted_at: Option<Timestamp>,
}

impl WorkerJobRecord {
    fn read(row: &SqliteRow) -> Result<Self, DatastoreError> {
        let lease = match row::get::<Option<&str>>(row, "worker")? {
            None => None,
            Some(worker) => Some(WorkerLease {
                worker: worker.to_owned(),
                token: row::token(row, "token")?,
                expires_at: row::time(row, "expires_at")?,
                spared: row::get(row, "spared")?,
            }),
        };
        let progress = row::get::<Option<&[u8]>>(row, "progress")?
            .map(v1::ArtaugProgress::decode)
            .transpose()
            .map_err(|error| row::bad("progress", error.to_string()))?;
        Ok(Self {
            job_id: row::parse(row, "job_id")?,
            has_ended: row::time_opt(row, "ended_at")?.is_some(),
            paused: row::get(row, "paused")?,
            lease,
            attempts: row::unsigned(row, "attempts")?,
            idle_attempts: row::unsigned(row, "idle_attempts")?,
            lines_at_claim: row::unsigned(row, "lines_at_claim")?,
            lines: row::unsigned(row, "lines")?,
            journal_bytes: row::unsigned(row, "journal_bytes")?,
            object_bytes: row::unsigned(row, "object_bytes")?,
            quota: row::unsigned(row, "quota")?,
            progress,
            waits: row::get(row, "waits")?,
            reviews_done: row::unsigned(row, "reviews_done")?,
            reviews: row::unsigned(row, "reviews")?,
            waiting_iteration: row::get::<Option<i64>>(row, "waiting_iteration")?
                .map(|_| row::unsigned(row, "waiting_iteration"))
                .transpose()?,
            trouble: row::get(row, "trouble")?,
            files_deleted_at: row::time_opt(row, "files_deleted_at")?,
        })
    }

    /// Bytes kept for the job.
    pub fn kept_bytes(&self) -> u64 {
        self.journal_bytes + self.object_bytes
    }

    /// The worker that holds the job now.
    pub fn holder(&self, now: Timestamp) -> Option<&WorkerLease> {
        let lease = self.lease.as_ref()?;
        (!self.has_ended && lease.expires_at > now).then_some(lease)
    }

    /// True while the job waits for an operator's word.
    pub fn waits_for_review(&self) -> bool {
        self.waits && !self.has_ended && self.reviews <= self.reviews_done
    }
}

/// The rows of worker_jobs with what the record needs besides.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT worker_jobs.*, jobs.ended_at,
                 (SELECT coalesce(max(number), 0) FROM worker_reviews
                  WHERE worker_reviews.job_id = worker_jobs.job_id) AS reviews
             FROM worker_jobs JOIN jobs ON jobs.job_id = worker_jobs.job_id ",
            $rest
        )
    };
}

impl Tx<'_> {
    /// Makes a job one that workers run.
    ///
    /// # Errors
    /// If it is one already or is not there, or the database fails.
    pub async fn insert_worker_job(
        &mut self,
        job_id: &JobId,
        quota: u64,
    ) -> Result<(), DatastoreError> {
        sqlx::query("INSERT INTO worker_jobs (job_id, quota) VALUES ($1, $2)")
            .bind(job_id.as_str())
            .bind(i64::try_from(quota).unwrap_or(i64::MAX))
            .execute(self.conn())
            .await?;
        Ok(())
    }

    /// The workers' part of a job; none if silos run it.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn worker_job(
        &mut self,
        job_id: &JobId,
    ) -> Result<Option<WorkerJobRecord>, DatastoreError> {
        sqlx::query(select!("WHERE worker_jobs.job_id = $1"))
            .bind(job_id.as_str())
            .fetch_optional(self.conn())
            .await?
            .as_ref()
            .map(WorkerJobRecord::read)
            .transpose()
    }

    /// The workers' parts of the newest jobs.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn newest_worker_jobs(
        &mut self,
        limit: u32,
    ) -> Result<BTreeMap<JobId, WorkerJobRecord>, DatastoreError> {
        sqlx::query(select!(
            "WHERE jobs.seq IN (SELECT seq FROM jobs ORDER BY seq DESC LIMIT $1)"
        ))
        .bind(i64::from(limit))
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(|row| WorkerJobRecord::read(row).map(|record| (record.job_id.clone(), record)))
        .collect()
    }

    /// The oldest job that a worker may take at `now`. One that is put off comes after all others.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn claimable_job(
        &mut self,
        kind: &str,
        now: Timestamp,
    ) -> Result<Option<WorkerJobRecord>, DatastoreError> {
        sqlx::query(select!(
            "WHERE jobs.kind = $1 AND jobs.state IN ('queued', 'running') AND worker_jobs.paused = 0
               AND (worker_jobs.token IS NULL OR worker_jobs.expires_at <= $2)
               AND (worker_jobs.waits = 0 OR reviews > worker_jobs.reviews_done)
             ORDER BY coalesce(worker_jobs.not_before, 0) > $2, jobs.seq LIMIT 1"
        ))
        .bind(kind)
        .bind(now.as_millis())
        .fetch_optional(self.conn())
        .await?
        .as_ref()
        .map(WorkerJobRecord::read)
        .transpose()
    }

    /// Number of jobs that a worker holds at `now`, those counted that were cancelled and whose worker has not heard of it.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn held_jobs(&mut self, now: Timestamp) -> Result<u64, DatastoreError> {
        let row = sqlx::query(
            "SELECT count(*) AS held FROM worker_jobs WHERE token IS NOT NULL AND expires_at > $1",
        )
        .bind(now.as_millis())
        .fetch_one(self.conn())
        .await?;
        row::unsigned(&row, "held")
    }

    /// Jobs whose lease has run out at `now`.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn lost_jobs(
        &mut self,
        now: Timestamp,
    ) -> Result<Vec<WorkerJobRecord>, DatastoreError> {
        sqlx::query(select!(
            "WHERE worker_jobs.token IS NOT NULL AND worker_jobs.expires_at <= $1 ORDER BY jobs.seq"
        ))
        .bind(now.as_millis())
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(WorkerJobRecord::read)
        .collect()
    }

    /// Gives a job to a worker.
    ///
    /// # Errors
    /// If no worker may run the job, or the database fails.
    pub async fn take_worker_job(
        &mut self,
        job_id: &JobId,
        lease: &WorkerLease,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query(
            "UPDATE worker_jobs SET worker = $2, token = $3, expires_at = $4, attempts = attempts + 1,
                 lines_at_claim = lines, waits = 0, spared = 0
             WHERE job_id = $1",
        )
        .bind(job_id.as_str())
        .bind(&lease.worker)
        .bind(&lease.token[..])
        .bind(lease.expires_at.as_millis())
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || format!("worker's job {job_id}"))
    }

    /// Takes a job from its worker.
    ///
    /// # Errors
    /// If no worker may run the job, or the database fails.
    pub async fn free_worker_job(
        &mut self,
        job_id: &JobId,
        idle_attempts: u32,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query(
            "UPDATE worker_jobs SET worker = NULL, token = NULL, expires_at = NULL, idle_attempts = $2
             WHERE job_id = $1",
        )
        .bind(job_id.as_str())
        .bind(i64::from(idle_attempts))
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || format!("worker's job {job_id}"))
    }

    /// Sets when the lease on a job runs out.
    ///
    /// # Errors
    /// If nobody holds the job, or the database fails.
    pub async fn renew_worker_lease(
        &mut self,
        job_id: &JobId,
        expires_at: Timestamp,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query(
            "UPDATE worker_jobs SET expires_at = $2, spared = 0 WHERE job_id = $1 AND token IS NOT NULL",
        )
        .bind(job_id.as_str())
        .bind(expires_at.as_millis())
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || format!("held job {job_id}"))
    }

    /// Makes all leases last until `until` at least, as those of workers that could not renew them. Gives their number.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn spare_worker_leases(&mut self, until: Timestamp) -> Result<u64, DatastoreError> {
        let done = sqlx::query(
            "UPDATE worker_jobs SET expires_at = max(expires_at, $1), spared = 1 WHERE token IS NOT NULL",
        )
        .bind(until.as_millis())
        .execute(self.conn())
        .await?;
        Ok(done.rows_affected())
    }

    /// Notes what holds a job up, and that other jobs go before it until `not_before`.
    ///
    /// # Errors
    /// If no worker may run the job, or the database fails.
    pub async fn put_off(
        &mut self,
        job_id: &JobId,
        trouble: &str,
        not_before: Timestamp,
    ) -> Result<(), DatastoreError> {
        let done =
            sqlx::query("UPDATE worker_jobs SET trouble = $2, not_before = $3 WHERE job_id = $1")
                .bind(job_id.as_str())
                .bind(trouble)
                .bind(not_before.as_millis())
                .execute(self.conn())
                .await?;
        require_one(done.rows_affected(), || format!("worker's job {job_id}"))
    }

    /// Bytes kept for all jobs.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn all_kept_bytes(&mut self) -> Result<u64, DatastoreError> {
        let row = sqlx::query(
            "SELECT coalesce(sum(journal_bytes + object_bytes), 0) AS kept FROM worker_jobs",
        )
        .fetch_one(self.conn())
        .await?;
        row::unsigned(&row, "kept")
    }

    /// Notes how far a job is.
    ///
    /// # Errors
    /// If no worker may run the job, or the database fails.
    pub async fn set_worker_progress(
        &mut self,
        job_id: &JobId,
        progress: &v1::ArtaugProgress,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query("UPDATE worker_jobs SET progress = $2 WHERE job_id = $1")
            .bind(job_id.as_str())
            .bind(progress.encode_to_vec())
            .execute(self.conn())
            .await?;
        require_one(done.rows_affected(), || format!("worker's job {job_id}"))
    }

    /// Notes whether an operator lets a job rest.
    ///
    /// # Errors
    /// If no worker may run the job, or the database fails.
    pub async fn set_paused(&mut self, job_id: &JobId, paused: bool) -> Result<(), DatastoreError> {
        let done = sqlx::query("UPDATE worker_jobs SET paused = $2 WHERE job_id = $1")
            .bind(job_id.as_str())
            .bind(paused)
            .execute(self.conn())
            .await?;
        require_one(done.rows_affected(), || format!("worker's job {job_id}"))
    }
}
