//! Journals of jobs that workers run.

use concord_common::{Digest, JobId, Timestamp};

use sqlx::QueryBuilder;

use super::{DatastoreError, ROWS_AT_ONCE, Tx, jobs::require_one, row};

impl Tx<'_> {
    /// Lines of a job's journal from `first` on, in order: at most `lines`, and no more than `bytes` unless it is a single one.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn journal_lines(
        &mut self,
        job_id: &JobId,
        first: u64,
        lines: u32,
        bytes: u64,
    ) -> Result<Vec<Vec<u8>>, DatastoreError> {
        // The lengths at first: lines may be long, and only those that are wanted come into memory.
        let lengths = sqlx::query(
            "SELECT length(line) AS bytes FROM worker_journal WHERE job_id = $1 AND n >= $2 ORDER BY n LIMIT $3",
        )
        .bind(job_id.as_str())
        .bind(first as i64)
        .bind(i64::from(lines))
        .fetch_all(self.conn())
        .await?;
        let (mut count, mut total) = (0_i64, 0_u64);
        for length in &lengths {
            total += row::unsigned::<u64>(length, "bytes")?;
            if count > 0 && total > bytes {
                break;
            }
            count += 1;
        }
        sqlx::query(
            "SELECT line FROM worker_journal WHERE job_id = $1 AND n >= $2 ORDER BY n LIMIT $3",
        )
        .bind(job_id.as_str())
        .bind(first as i64)
        .bind(count)
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(|found| row::get(found, "line"))
        .collect()
    }

    /// Whether line `n` of a job's journal is this one.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn is_journal_line(
        &mut self,
        job_id: &JobId,
        n: u64,
        line: &[u8],
    ) -> Result<bool, DatastoreError> {
        let found =
            sqlx::query("SELECT 1 FROM worker_journal WHERE job_id = $1 AND n = $2 AND line = $3")
                .bind(job_id.as_str())
                .bind(n as i64)
                .bind(line)
                .fetch_optional(self.conn())
                .await?;
        Ok(found.is_some())
    }

    /// Whether a line of a job's journal names an object.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn journal_names(
        &mut self,
        job_id: &JobId,
        digest: &Digest,
    ) -> Result<bool, DatastoreError> {
        let found = sqlx::query(
            "SELECT 1 FROM worker_journal WHERE job_id = $1 AND instr(line, $2) > 0 LIMIT 1",
        )
        .bind(job_id.as_str())
        .bind(digest.to_string().into_bytes())
        .fetch_optional(self.conn())
        .await?;
        Ok(found.is_some())
    }

    /// Forgets some lines of a job's journal, at most `most`, which then take no room any more; gives their number. For jobs that have ended.
    ///
    /// # Errors
    /// If no worker may run the job, or the database fails.
    pub async fn drop_journal_lines(
        &mut self,
        job_id: &JobId,
        most: u32,
    ) -> Result<u64, DatastoreError> {
        let gone = sqlx::query(
            "DELETE FROM worker_journal WHERE job_id = $1 AND n IN
                 (SELECT n FROM worker_journal WHERE job_id = $1 ORDER BY n LIMIT $2)
             RETURNING length(line) AS bytes",
        )
        .bind(job_id.as_str())
        .bind(i64::from(most))
        .fetch_all(self.conn())
        .await?;
        let mut bytes = 0_u64;
        for line in &gone {
            bytes += row::unsigned::<u64>(line, "bytes")?;
        }
        let done = sqlx::query(
            "UPDATE worker_jobs SET journal_bytes = journal_bytes - $2 WHERE job_id = $1",
        )
        .bind(job_id.as_str())
        .bind(bytes as i64)
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || format!("worker's job {job_id}"))?;
        Ok(gone.len() as u64)
    }

    /// Adds lines to the end of a job's journal, of which `first` is the number of the first: the job has come on.
    ///
    /// # Errors
    /// If there is such a line already, or the database fails.
    pub async fn append_journal(
        &mut self,
        job_id: &JobId,
        first: u64,
        lines: &[Vec<u8>],
        now: Timestamp,
    ) -> Result<(), DatastoreError> {
        let bytes: u64 = lines.iter().map(|line| line.len() as u64).sum();
        let numbered: Vec<_> = (first..).zip(lines).collect();
        for some in numbered.chunks(ROWS_AT_ONCE) {
            QueryBuilder::new("INSERT INTO worker_journal (job_id, n, at, line) ")
                .push_values(some, |mut row, (n, line)| {
                    row.push_bind(job_id.as_str())
                        .push_bind(*n as i64)
                        .push_bind(now.as_millis())
                        .push_bind(&line[..]);
                })
                .build()
                .execute(self.conn())
                .await?;
        }
        let done = sqlx::query(
            "UPDATE worker_jobs SET lines = lines + $2, journal_bytes = journal_bytes + $3, idle_attempts = 0,
                 trouble = NULL, not_before = NULL
             WHERE job_id = $1 AND lines = $4",
        )
        .bind(job_id.as_str())
        .bind(lines.len() as i64)
        .bind(bytes as i64)
        .bind(first as i64)
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || {
            format!("journal of job {job_id} with {first} lines")
        })
    }
}
