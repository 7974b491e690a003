//! Uploads in progress; their bytes are in the spool.

use concord_common::{Digest, JobId, RoundNumber, SiloId, Timestamp};
use sqlx::sqlite::SqliteRow;

use super::{DatastoreError, Tx, row};

/// An announced contribution whose bytes are on their way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UploadRecord {
    /// Names the upload and its file.
    pub upload_id: [u8; 16],
    /// Job.
    pub job_id: JobId,
    /// Round.
    pub round: RoundNumber,
    /// Who sends it.
    pub silo_id: SiloId,
    /// BLAKE3 of the whole payload, as announced.
    pub payload_digest: Digest,
    /// Size of the whole payload.
    pub payload_bytes: u64,
    /// Training examples behind it.
    pub examples: u64,
    /// When it was announced or last resumed.
    pub touched_at: Timestamp,
}

impl UploadRecord {
    fn read(row: &SqliteRow) -> Result<Self, DatastoreError> {
        Ok(Self {
            upload_id: row::token(row, "upload_id")?,
            job_id: row::parse(row, "job_id")?,
            round: RoundNumber(row::unsigned(row, "round")?),
            silo_id: row::parse(row, "silo_id")?,
            payload_digest: row::digest(row, "payload_digest")?,
            payload_bytes: row::unsigned(row, "payload_bytes")?,
            examples: row::unsigned(row, "examples")?,
            touched_at: row::time(row, "touched_at")?,
        })
    }
}

impl Tx<'_> {
    /// Stores an announced upload.
    ///
    /// # Errors
    /// If the silo has another upload for the round or is not in its cohort, or the database fails.
    pub async fn insert_upload(&mut self, upload: &UploadRecord) -> Result<(), DatastoreError> {
        sqlx::query(
            "INSERT INTO uploads (upload_id, job_id, round, silo_id, payload_digest, payload_bytes, examples, touched_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(&upload.upload_id[..])
        .bind(upload.job_id.as_str())
        .bind(i64::from(upload.round.0))
        .bind(upload.silo_id.as_str())
        .bind(&upload.payload_digest.as_bytes()[..])
        .bind(upload.payload_bytes as i64)
        .bind(upload.examples as i64)
        .bind(upload.touched_at.as_millis())
        .execute(self.conn())
        .await?;
        Ok(())
    }

    /// An upload.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn upload(
        &mut self,
        upload_id: &[u8; 16],
    ) -> Result<Option<UploadRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM uploads WHERE upload_id = $1")
            .bind(&upload_id[..])
            .fetch_optional(self.conn())
            .await?
            .as_ref()
            .map(UploadRecord::read)
            .transpose()
    }

    /// A silo's upload for a round.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn upload_of(
        &mut self,
        job_id: &JobId,
        round: RoundNumber,
        silo_id: &SiloId,
    ) -> Result<Option<UploadRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM uploads WHERE job_id = $1 AND round = $2 AND silo_id = $3")
            .bind(job_id.as_str())
            .bind(i64::from(round.0))
            .bind(silo_id.as_str())
            .fetch_optional(self.conn())
            .await?
            .as_ref()
            .map(UploadRecord::read)
            .transpose()
    }

    /// All uploads, the longest untouched first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn uploads(&mut self) -> Result<Vec<UploadRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM uploads ORDER BY touched_at")
            .fetch_all(self.conn())
            .await?
            .iter()
            .map(UploadRecord::read)
            .collect()
    }

    /// All uploads of a silo.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn uploads_of(
        &mut self,
        silo_id: &SiloId,
    ) -> Result<Vec<UploadRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM uploads WHERE silo_id = $1 ORDER BY touched_at")
            .bind(silo_id.as_str())
            .fetch_all(self.conn())
            .await?
            .iter()
            .map(UploadRecord::read)
            .collect()
    }

    /// Number of uploads and the sum of their payloads' sizes.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn upload_load(&mut self) -> Result<(u64, u64), DatastoreError> {
        let row = sqlx::query(
            "SELECT count(*) AS uploads, coalesce(sum(payload_bytes), 0) AS bytes FROM uploads",
        )
        .fetch_one(self.conn())
        .await?;
        Ok((
            row::unsigned(&row, "uploads")?,
            row::unsigned(&row, "bytes")?,
        ))
    }

    /// Notes that an upload goes on; false if there is no such upload.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn touch_upload(
        &mut self,
        upload_id: &[u8; 16],
        now: Timestamp,
    ) -> Result<bool, DatastoreError> {
        let done = sqlx::query("UPDATE uploads SET touched_at = $2 WHERE upload_id = $1")
            .bind(&upload_id[..])
            .bind(now.as_millis())
            .execute(self.conn())
            .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Forgets an upload; false if there was none.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn delete_upload(&mut self, upload_id: &[u8; 16]) -> Result<bool, DatastoreError> {
        let done = sqlx::query("DELETE FROM uploads WHERE upload_id = $1")
            .bind(&upload_id[..])
            .execute(self.conn())
            .await?;
        Ok(done.rows_affected() == 1)
    }
}
