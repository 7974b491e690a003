//! Silos that the server has seen.

use concord_common::{SiloId, Timestamp};
use concord_proto::v1;
use sqlx::sqlite::SqliteRow;

use super::{DatastoreError, Tx, row};

pub use v1::Enrollment;

/// A silo that the server has seen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SiloRecord {
    /// Id, from its certificate.
    pub silo_id: SiloId,
    /// Whether it may take part.
    pub enrollment: Enrollment,
    /// When it first called.
    pub first_seen: Timestamp,
    /// When it last called, to the minute or so.
    pub last_seen: Timestamp,
}

impl SiloRecord {
    fn read(row: &SqliteRow) -> Result<Self, DatastoreError> {
        Ok(Self {
            silo_id: row::parse(row, "silo_id")?,
            enrollment: row::named(row, "enrollment", Enrollment::from_str_name)?,
            first_seen: row::time(row, "first_seen")?,
            last_seen: row::time(row, "last_seen")?,
        })
    }
}

impl Tx<'_> {
    /// A silo, if it has called before.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn silo(&mut self, silo_id: &SiloId) -> Result<Option<SiloRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM silos WHERE silo_id = $1")
            .bind(silo_id.as_str())
            .fetch_optional(self.conn())
            .await?
            .as_ref()
            .map(SiloRecord::read)
            .transpose()
    }

    /// Notes that a silo called; a new one gets `enrollment`.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn see_silo(
        &mut self,
        silo_id: &SiloId,
        enrollment: Enrollment,
        now: Timestamp,
    ) -> Result<(), DatastoreError> {
        sqlx::query(
            "INSERT INTO silos (silo_id, enrollment, first_seen, last_seen) VALUES ($1, $2, $3, $3)
             ON CONFLICT (silo_id) DO UPDATE SET last_seen = excluded.last_seen",
        )
        .bind(silo_id.as_str())
        .bind(enrollment.as_str_name())
        .bind(now.as_millis())
        .execute(self.conn())
        .await?;
        Ok(())
    }

    /// Changes whether a silo may take part; false if it is not known.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn set_enrollment(
        &mut self,
        silo_id: &SiloId,
        enrollment: Enrollment,
    ) -> Result<bool, DatastoreError> {
        let done = sqlx::query("UPDATE silos SET enrollment = $2 WHERE silo_id = $1")
            .bind(silo_id.as_str())
            .bind(enrollment.as_str_name())
            .execute(self.conn())
            .await?;
        Ok(done.rows_affected() == 1)
    }

    /// All silos by name.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn silos(&mut self) -> Result<Vec<SiloRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM silos ORDER BY silo_id")
            .fetch_all(self.conn())
            .await?
            .iter()
            .map(SiloRecord::read)
            .collect()
    }
}
