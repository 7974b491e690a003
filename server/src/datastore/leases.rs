//! Leases: who is at work on its part of a round.

use std::collections::BTreeSet;

use concord_common::{JobId, RoundNumber, SiloId, Timestamp};

use super::{DatastoreError, Tx, row};

/// A silo's claim on its part of a round.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LeaseRecord {
    /// Shown with the contribution.
    pub token: [u8; 16],
    /// When it runs out.
    pub expires_at: Timestamp,
    /// How often it was taken after it had run out, plus one.
    pub attempts: u32,
}

impl Tx<'_> {
    /// A silo's lease on its part of a round, run out or not.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn lease(
        &mut self,
        job_id: &JobId,
        number: RoundNumber,
        silo_id: &SiloId,
    ) -> Result<Option<LeaseRecord>, DatastoreError> {
        let row =
            sqlx::query("SELECT * FROM leases WHERE job_id = $1 AND round = $2 AND silo_id = $3")
                .bind(job_id.as_str())
                .bind(i64::from(number.0))
                .bind(silo_id.as_str())
                .fetch_optional(self.conn())
                .await?;
        row.map(|row| {
            Ok(LeaseRecord {
                token: row::token(&row, "token")?,
                expires_at: row::time(&row, "expires_at")?,
                attempts: row::unsigned(&row, "attempts")?,
            })
        })
        .transpose()
    }

    /// Stores a silo's lease in place of an earlier one.
    ///
    /// # Errors
    /// If the silo is not in the cohort, or the database fails.
    pub async fn put_lease(
        &mut self,
        job_id: &JobId,
        number: RoundNumber,
        silo_id: &SiloId,
        lease: &LeaseRecord,
    ) -> Result<(), DatastoreError> {
        sqlx::query(
            "INSERT INTO leases (job_id, round, silo_id, token, expires_at, attempts) VALUES ($1, $2, $3, $4, $5, $6)
             ON CONFLICT (job_id, round, silo_id) DO UPDATE
             SET token = excluded.token, expires_at = excluded.expires_at, attempts = excluded.attempts",
        )
        .bind(job_id.as_str())
        .bind(i64::from(number.0))
        .bind(silo_id.as_str())
        .bind(&lease.token[..])
        .bind(lease.expires_at.as_millis())
        .bind(i64::from(lease.attempts))
        .execute(self.conn())
        .await?;
        Ok(())
    }

    /// Silos that hold a lease on a round at `now`.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn lease_holders(
        &mut self,
        job_id: &JobId,
        number: RoundNumber,
        now: Timestamp,
    ) -> Result<BTreeSet<SiloId>, DatastoreError> {
        sqlx::query(
            "SELECT silo_id FROM leases WHERE job_id = $1 AND round = $2 AND expires_at > $3",
        )
        .bind(job_id.as_str())
        .bind(i64::from(number.0))
        .bind(now.as_millis())
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(|row| row::parse(row, "silo_id"))
        .collect()
    }
}
