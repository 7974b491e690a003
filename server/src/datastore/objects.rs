//! What workers keep for their jobs: objects, and the names of those that are results. The bytes are in
//! [`ObjectStore`](crate::objects::ObjectStore).

use std::collections::{BTreeMap, BTreeSet};

use concord_common::{Digest, JobId, Timestamp};

use super::{DatastoreError, Tx, jobs::require_one, row};

/// An object by a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ArtefactRecord {
    /// Relative path in plain names.
    pub name: String,
    /// Digest of the object.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
}

impl Tx<'_> {
    /// Size of a job's object; none if the job has no such object.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn object(
        &mut self,
        job_id: &JobId,
        digest: &Digest,
    ) -> Result<Option<u64>, DatastoreError> {
        sqlx::query("SELECT bytes FROM worker_objects WHERE job_id = $1 AND digest = $2")
            .bind(job_id.as_str())
            .bind(&digest.as_bytes()[..])
            .fetch_optional(self.conn())
            .await?
            .map(|found| row::unsigned(&found, "bytes"))
            .transpose()
    }

    /// Every object of every job: the files that must be kept.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn all_objects(
        &mut self,
    ) -> Result<BTreeMap<JobId, BTreeSet<Digest>>, DatastoreError> {
        let rows = sqlx::query("SELECT job_id, digest FROM worker_objects")
            .fetch_all(self.conn())
            .await?;
        let mut objects: BTreeMap<JobId, BTreeSet<Digest>> = BTreeMap::new();
        for found in &rows {
            objects
                .entry(row::parse(found, "job_id")?)
                .or_default()
                .insert(row::digest(found, "digest")?);
        }
        Ok(objects)
    }

    /// Notes an object; nothing changes if it is there.
    ///
    /// # Errors
    /// If no worker may run the job, or the database fails.
    pub async fn put_object(
        &mut self,
        job_id: &JobId,
        digest: &Digest,
        bytes: u64,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query(
            "INSERT INTO worker_objects (job_id, digest, bytes) VALUES ($1, $2, $3)
             ON CONFLICT (job_id, digest) DO NOTHING",
        )
        .bind(job_id.as_str())
        .bind(&digest.as_bytes()[..])
        .bind(bytes as i64)
        .execute(self.conn())
        .await?;
        if done.rows_affected() == 0 {
            return Ok(());
        }
        self.add_object_bytes(job_id, bytes as i64).await
    }

    /// Forgets an object unless it is a result; gives whether there was such an object.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn delete_object(
        &mut self,
        job_id: &JobId,
        digest: &Digest,
    ) -> Result<bool, DatastoreError> {
        let gone = sqlx::query(
            "DELETE FROM worker_objects WHERE job_id = $1 AND digest = $2
               AND NOT EXISTS (SELECT 1 FROM worker_artefacts AS named
                               WHERE named.job_id = $1 AND named.digest = $2)
             RETURNING bytes",
        )
        .bind(job_id.as_str())
        .bind(&digest.as_bytes()[..])
        .fetch_optional(self.conn())
        .await?;
        let Some(gone) = gone else {
            return Ok(false);
        };
        let bytes: i64 = row::get(&gone, "bytes")?;
        self.add_object_bytes(job_id, -bytes).await?;
        Ok(true)
    }

    async fn add_object_bytes(&mut self, job_id: &JobId, bytes: i64) -> Result<(), DatastoreError> {
        let done = sqlx::query(
            "UPDATE worker_jobs SET object_bytes = object_bytes + $2 WHERE job_id = $1",
        )
        .bind(job_id.as_str())
        .bind(bytes)
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || format!("worker's job {job_id}"))
    }

    /// A job's results by name.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn artefacts(
        &mut self,
        job_id: &JobId,
    ) -> Result<Vec<ArtefactRecord>, DatastoreError> {
        sqlx::query(
            "SELECT name, digest, bytes FROM worker_artefacts JOIN worker_objects USING (job_id, digest)
             WHERE job_id = $1 ORDER BY name",
        )
        .bind(job_id.as_str())
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(|found| {
            Ok(ArtefactRecord {
                name: row::get(found, "name")?,
                digest: row::digest(found, "digest")?,
                bytes: row::unsigned(found, "bytes")?,
            })
        })
        .collect()
    }

    /// Whether a job has a result of this name, and how many it has.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn count_artefacts(
        &mut self,
        job_id: &JobId,
        name: &str,
    ) -> Result<(bool, u64), DatastoreError> {
        let counts = sqlx::query(
            "SELECT count(*) AS number, coalesce(sum(name = $2), 0) AS named FROM worker_artefacts WHERE job_id = $1",
        )
        .bind(job_id.as_str())
        .bind(name)
        .fetch_one(self.conn())
        .await?;
        let named: u64 = row::unsigned(&counts, "named")?;
        Ok((named > 0, row::unsigned(&counts, "number")?))
    }

    /// The object that a result is, if there is one of this name.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn artefact(
        &mut self,
        job_id: &JobId,
        name: &str,
    ) -> Result<Option<Digest>, DatastoreError> {
        sqlx::query("SELECT digest FROM worker_artefacts WHERE job_id = $1 AND name = $2")
            .bind(job_id.as_str())
            .bind(name)
            .fetch_optional(self.conn())
            .await?
            .map(|found| row::digest(&found, "digest"))
            .transpose()
    }

    /// A result whose name is a folder of this one's, or the reverse: there cannot be files for both.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn clashing_artefact(
        &mut self,
        job_id: &JobId,
        name: &str,
    ) -> Result<Option<String>, DatastoreError> {
        sqlx::query(
            "SELECT name FROM worker_artefacts WHERE job_id = $1
               AND (substr(name, 1, length($2) + 1) = $2 || '/' OR substr($2, 1, length(name) + 1) = name || '/')
             LIMIT 1",
        )
        .bind(job_id.as_str())
        .bind(name)
        .fetch_optional(self.conn())
        .await?
        .map(|found| row::get(&found, "name"))
        .transpose()
    }

    /// Names an object as a result, in place of an earlier one of this name.
    ///
    /// # Errors
    /// If the job has no such object, or the database fails.
    pub async fn put_artefact(
        &mut self,
        job_id: &JobId,
        name: &str,
        digest: &Digest,
    ) -> Result<(), DatastoreError> {
        sqlx::query(
            "INSERT INTO worker_artefacts (job_id, name, digest) VALUES ($1, $2, $3)
             ON CONFLICT (job_id, name) DO UPDATE SET digest = excluded.digest",
        )
        .bind(job_id.as_str())
        .bind(name)
        .bind(&digest.as_bytes()[..])
        .execute(self.conn())
        .await?;
        Ok(())
    }

    /// Notes that all that is kept for an ended job is to go, and forgets the names of its results, so that nothing of it is one.
    ///
    /// # Errors
    /// If no worker may run the job, or the database fails.
    pub async fn condemn_files(
        &mut self,
        job_id: &JobId,
        now: Timestamp,
    ) -> Result<(), DatastoreError> {
        sqlx::query("DELETE FROM worker_artefacts WHERE job_id = $1")
            .bind(job_id.as_str())
            .execute(self.conn())
            .await?;
        let done = sqlx::query("UPDATE worker_jobs SET files_deleted_at = $2 WHERE job_id = $1")
            .bind(job_id.as_str())
            .bind(now.as_millis())
            .execute(self.conn())
            .await?;
        require_one(done.rows_affected(), || format!("worker's job {job_id}"))
    }

    /// Jobs that ended before this moment, or whose files an operator had deleted, and that still keep more than their results.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn bulky_worker_jobs(
        &mut self,
        ended_before: Timestamp,
    ) -> Result<Vec<JobId>, DatastoreError> {
        sqlx::query(
            "SELECT job_id FROM jobs JOIN worker_jobs USING (job_id)
             WHERE (jobs.ended_at < $1 OR worker_jobs.files_deleted_at IS NOT NULL) AND (
                 worker_jobs.journal_bytes > 0
                 OR EXISTS (SELECT 1 FROM worker_objects AS kept WHERE kept.job_id = jobs.job_id
                            AND NOT EXISTS (SELECT 1 FROM worker_artefacts AS named
                                            WHERE named.job_id = kept.job_id AND named.digest = kept.digest)))
             ORDER BY jobs.seq",
        )
        .bind(ended_before.as_millis())
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(|found| row::parse(found, "job_id"))
        .collect()
    }

    /// Forgets a job's journal and all objects that are no results; gives those.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn keep_only_artefacts(
        &mut self,
        job_id: &JobId,
    ) -> Result<BTreeSet<Digest>, DatastoreError> {
        sqlx::query("DELETE FROM worker_journal WHERE job_id = $1")
            .bind(job_id.as_str())
            .execute(self.conn())
            .await?;
        let rows = sqlx::query(
            "DELETE FROM worker_objects WHERE job_id = $1
               AND NOT EXISTS (SELECT 1 FROM worker_artefacts AS named
                               WHERE named.job_id = worker_objects.job_id AND named.digest = worker_objects.digest)
             RETURNING digest",
        )
        .bind(job_id.as_str())
        .fetch_all(self.conn())
        .await?;
        sqlx::query(
            "UPDATE worker_jobs SET journal_bytes = 0, object_bytes =
                 (SELECT coalesce(sum(bytes), 0) FROM worker_objects WHERE worker_objects.job_id = worker_jobs.job_id)
             WHERE job_id = $1",
        )
        .bind(job_id.as_str())
        .execute(self.conn())
        .await?;
        rows.iter()
            .map(|gone| row::digest(gone, "digest"))
            .collect()
    }
}
