//! Pairs that wait for an operator's word, and the words.

use std::collections::BTreeSet;

use concord_common::{JobId, Timestamp};
use concord_proto::v1;
use sqlx::QueryBuilder;

use super::{DatastoreError, ROWS_AT_ONCE, Tx, jobs::require_one, row};

impl Tx<'_> {
    /// The job waits for words on these pairs of an iteration, beyond those that its worker has acted on.
    ///
    /// # Errors
    /// If no worker may run the job, or the database fails.
    pub async fn wait_for_reviews(
        &mut self,
        job_id: &JobId,
        iteration: u32,
        items: &BTreeSet<u32>,
    ) -> Result<(), DatastoreError> {
        self.stop_asking(job_id).await?;
        let items: Vec<u32> = items.iter().copied().collect();
        for some in items.chunks(ROWS_AT_ONCE) {
            QueryBuilder::new("INSERT INTO worker_waiting (job_id, item) ")
                .push_values(some, |mut row, item| {
                    row.push_bind(job_id.as_str()).push_bind(i64::from(*item));
                })
                .build()
                .execute(self.conn())
                .await?;
        }
        let done = sqlx::query(
            "UPDATE worker_jobs SET waits = 1, waiting_iteration = $2 WHERE job_id = $1",
        )
        .bind(job_id.as_str())
        .bind(i64::from(iteration))
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || format!("worker's job {job_id}"))
    }

    /// No operator is asked any more about pairs of a job.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn stop_asking(&mut self, job_id: &JobId) -> Result<(), DatastoreError> {
        sqlx::query("DELETE FROM worker_waiting WHERE job_id = $1")
            .bind(job_id.as_str())
            .execute(self.conn())
            .await?;
        sqlx::query("UPDATE worker_jobs SET waits = 0, waiting_iteration = NULL WHERE job_id = $1")
            .bind(job_id.as_str())
            .execute(self.conn())
            .await?;
        Ok(())
    }

    /// Notes the last word that a worker has acted on; an earlier one changes nothing.
    ///
    /// # Errors
    /// If no worker may run the job, or the database fails.
    pub async fn set_reviews_done(
        &mut self,
        job_id: &JobId,
        number: u64,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query(
            "UPDATE worker_jobs SET reviews_done = max(reviews_done, $2) WHERE job_id = $1",
        )
        .bind(job_id.as_str())
        .bind(number as i64)
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || format!("worker's job {job_id}"))
    }

    /// Pairs about which operators are asked, with whether one has said a word that no worker has acted on yet.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn asked_pairs(
        &mut self,
        job_id: &JobId,
    ) -> Result<Vec<(u32, bool)>, DatastoreError> {
        sqlx::query(
            "SELECT item, EXISTS (
                 SELECT 1 FROM worker_reviews AS word
                 WHERE word.job_id = worker_jobs.job_id AND word.iteration = worker_jobs.waiting_iteration
                   AND word.item = worker_waiting.item AND word.number > worker_jobs.reviews_done
             ) AS answered
             FROM worker_waiting JOIN worker_jobs USING (job_id) WHERE job_id = $1 ORDER BY item",
        )
        .bind(job_id.as_str())
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(|found| Ok((row::unsigned(found, "item")?, row::get(found, "answered")?)))
        .collect()
    }

    /// Records an operator's words.
    ///
    /// # Errors
    /// If there is one of the same number, or the database fails.
    pub async fn insert_reviews(
        &mut self,
        job_id: &JobId,
        words: &[v1::PairReview],
        operator: &str,
        now: Timestamp,
    ) -> Result<(), DatastoreError> {
        for some in words.chunks(ROWS_AT_ONCE) {
            QueryBuilder::new(
                "INSERT INTO worker_reviews (job_id, number, iteration, item, accepted, operator, at) ",
            )
            .push_values(some, |mut row, word| {
                row.push_bind(job_id.as_str())
                    .push_bind(word.number as i64)
                    .push_bind(i64::from(word.iteration))
                    .push_bind(i64::from(word.item))
                    .push_bind(word.accepted)
                    .push_bind(operator)
                    .push_bind(now.as_millis());
            })
            .build()
            .execute(self.conn())
            .await?;
        }
        Ok(())
    }

    /// Words on a job's pairs after number `after`, in order.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn reviews_after(
        &mut self,
        job_id: &JobId,
        after: u64,
        limit: u32,
    ) -> Result<Vec<v1::PairReview>, DatastoreError> {
        sqlx::query(
            "SELECT * FROM worker_reviews WHERE job_id = $1 AND number > $2 ORDER BY number LIMIT $3",
        )
        .bind(job_id.as_str())
        .bind(i64::try_from(after).unwrap_or(i64::MAX))
        .bind(i64::from(limit))
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(|found| {
            Ok(v1::PairReview {
                number: row::unsigned(found, "number")?,
                iteration: row::unsigned(found, "iteration")?,
                item: row::unsigned(found, "item")?,
                accepted: row::get(found, "accepted")?,
            })
        })
        .collect()
    }
}
