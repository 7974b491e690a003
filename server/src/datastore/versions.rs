//! The adapter versions that rounds start from and publish.

use std::collections::BTreeSet;

use concord_common::{Digest, JobId, Timestamp, adapter::AdapterVersion};

use super::{DatastoreError, Tx, row};

/// An adapter version of a job.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VersionRecord {
    /// Round that published it; 0 for the one that the server drew.
    pub round: u32,
    /// Content address.
    pub version: AdapterVersion,
    /// Size of the payload.
    pub payload_bytes: u64,
    /// When it was made.
    pub created_at: Timestamp,
}

impl Tx<'_> {
    /// Stores an adapter version of a job.
    ///
    /// # Errors
    /// If the round has one already, or the database fails.
    pub async fn insert_version(
        &mut self,
        job_id: &JobId,
        record: &VersionRecord,
    ) -> Result<(), DatastoreError> {
        sqlx::query(
            "INSERT INTO adapter_versions (job_id, round, version, payload_bytes, created_at) VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(job_id.as_str())
        .bind(i64::from(record.round))
        .bind(&record.version.0.as_bytes()[..])
        .bind(record.payload_bytes as i64)
        .bind(record.created_at.as_millis())
        .execute(self.conn())
        .await?;
        Ok(())
    }

    /// The newest entry of a version in a job.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn version(
        &mut self,
        job_id: &JobId,
        version: AdapterVersion,
    ) -> Result<Option<VersionRecord>, DatastoreError> {
        sqlx::query(
            "SELECT * FROM adapter_versions WHERE job_id = $1 AND version = $2 ORDER BY round DESC LIMIT 1",
        )
        .bind(job_id.as_str())
        .bind(&version.0.as_bytes()[..])
        .fetch_optional(self.conn())
        .await?
        .map(|row| {
            Ok(VersionRecord {
                round: row::unsigned(&row, "round")?,
                version: AdapterVersion(row::digest(&row, "version")?),
                payload_bytes: row::unsigned(&row, "payload_bytes")?,
                created_at: row::time(&row, "created_at")?,
            })
        })
        .transpose()
    }

    /// Every adapter version of any job: the blobs that must be kept.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn all_versions(&mut self) -> Result<BTreeSet<Digest>, DatastoreError> {
        sqlx::query("SELECT DISTINCT version FROM adapter_versions")
            .fetch_all(self.conn())
            .await?
            .iter()
            .map(|row| row::digest(row, "version"))
            .collect()
    }

    /// Forgets adapter versions that need not be kept: all but the newest `newest` of a job, and all but the last one of a job
    /// that ended before `ended_before`. A job's present version and the base of an open round always stay. Gives the versions
    /// that no job has any more, so that their payloads can be deleted.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn prune_versions(
        &mut self,
        newest: u32,
        ended_before: Timestamp,
    ) -> Result<BTreeSet<Digest>, DatastoreError> {
        let rows = sqlx::query(
            "DELETE FROM adapter_versions WHERE (job_id, round) IN (
                 SELECT aged.job_id, aged.round FROM (
                     SELECT job_id, round, version, row_number() OVER (PARTITION BY job_id ORDER BY round DESC) AS age
                     FROM adapter_versions
                 ) AS aged JOIN jobs ON jobs.job_id = aged.job_id
                 WHERE (aged.age > $1 OR jobs.ended_at < $2)
                   AND aged.version <> jobs.adapter_version
                   AND NOT EXISTS (
                       SELECT 1 FROM rounds
                       WHERE rounds.job_id = aged.job_id AND rounds.ended_at IS NULL AND rounds.base_version = aged.version
                   )
             ) RETURNING version",
        )
        .bind(i64::from(newest))
        .bind(ended_before.as_millis())
        .fetch_all(self.conn())
        .await?;
        let mut gone = BTreeSet::new();
        for row in &rows {
            let version = row::digest(row, "version")?;
            if !self.is_version(&version).await? {
                gone.insert(version);
            }
        }
        Ok(gone)
    }

    /// True if any job has this adapter version.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn is_version(&mut self, version: &Digest) -> Result<bool, DatastoreError> {
        let found = sqlx::query("SELECT 1 FROM adapter_versions WHERE version = $1 LIMIT 1")
            .bind(&version.as_bytes()[..])
            .fetch_optional(self.conn())
            .await?;
        Ok(found.is_some())
    }
}
