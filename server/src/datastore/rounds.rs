//! Rounds, their cohorts, and what became of each silo's part.

use std::{collections::BTreeSet, time::Duration};

use concord_common::{
    Digest, ErrorCode, JobId, RoundNumber, SiloId, Timestamp,
    adapter::AdapterVersion,
    round::{Outcome, ParticipationWindow, Record, Round, RoundPhase, RoundSpec},
};
use sqlx::{QueryBuilder, sqlite::SqliteRow};

use super::{DatastoreError, ROWS_AT_ONCE, Tx, jobs::require_one, row};

/// A round without its cohort.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RoundRecord {
    /// Number in the job.
    pub number: RoundNumber,
    /// Where it stands.
    pub phase: RoundPhase,
    /// Adapter that it started from.
    pub base: AdapterVersion,
    /// Adapter that it published.
    pub published: Option<AdapterVersion>,
    /// When it was announced.
    pub announced_at: Timestamp,
    /// When it closes at the latest.
    pub closes_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
    /// Silos asked.
    pub cohort: u32,
    /// Contributions counted.
    pub accepted: u32,
}

impl RoundRecord {
    fn read(row: &SqliteRow) -> Result<Self, DatastoreError> {
        let announced_at = row::time(row, "announced_at")?;
        Ok(Self {
            number: RoundNumber(row::unsigned(row, "round")?),
            phase: row::parse(row, "phase")?,
            base: AdapterVersion(row::digest(row, "base_version")?),
            published: row::version_opt(row, "published_version")?,
            announced_at,
            closes_at: announced_at + Duration::from_millis(row::unsigned(row, "max_millis")?),
            ended_at: row::time_opt(row, "ended_at")?,
            cohort: row::unsigned(row, "cohort")?,
            accepted: row::unsigned(row, "accepted")?,
        })
    }
}

/// A silo's part in a round.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RoundSiloRecord {
    /// Silo.
    pub silo_id: SiloId,
    /// What became of it; nothing while it is awaited.
    pub outcome: Option<Outcome>,
    /// When that was recorded.
    pub recorded_at: Option<Timestamp>,
    /// Digest of the accepted or discarded payload.
    pub digest: Option<Digest>,
    /// Training examples behind it.
    pub examples: u64,
    /// The receipt for it, as the message that was sent.
    pub receipt: Option<Vec<u8>>,
    /// The spool's file of an accepted payload.
    pub upload_id: Option<[u8; 16]>,
}

impl RoundSiloRecord {
    fn read(row: &SqliteRow) -> Result<Self, DatastoreError> {
        Ok(Self {
            silo_id: row::parse(row, "silo_id")?,
            outcome: outcome(row)?,
            recorded_at: row::time_opt(row, "recorded_at")?,
            digest: row::version_opt(row, "payload_digest")?.map(|version| version.0),
            examples: row::unsigned(row, "examples")?,
            receipt: row::get(row, "receipt")?,
            upload_id: match row::get::<Option<&[u8]>>(row, "upload_id")? {
                None => None,
                Some(_) => Some(row::token(row, "upload_id")?),
            },
        })
    }
}

/// What became of a silo's part.
pub(super) fn outcome(row: &SqliteRow) -> Result<Option<Outcome>, DatastoreError> {
    let Some(name) = row::get::<Option<&str>>(row, "outcome")? else {
        return Ok(None);
    };
    Outcome::from_parts(name, row::get(row, "reason")?)
        .map(Some)
        .map_err(|error| row::bad("outcome", error.to_string()))
}

const ROUND: &str = "SELECT rounds.*, count(*) AS cohort, count(*) FILTER (WHERE outcome = 'accepted') AS accepted
    FROM rounds JOIN round_silos USING (job_id, round) WHERE job_id = $1 AND round = $2 GROUP BY job_id, round";
const ROUNDS: &str = "SELECT rounds.*, count(*) AS cohort, count(*) FILTER (WHERE outcome = 'accepted') AS accepted
    FROM rounds JOIN round_silos USING (job_id, round) WHERE job_id = $1 GROUP BY job_id, round ORDER BY round";

impl Tx<'_> {
    /// Stores a round that was just announced, with its cohort.
    ///
    /// # Errors
    /// If the round is there already, or the database fails.
    pub async fn insert_round(&mut self, round: &Round) -> Result<(), DatastoreError> {
        let spec = round.spec();
        sqlx::query(
            "INSERT INTO rounds (job_id, round, phase, base_version, min_count, max_count, min_millis, max_millis, announced_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        )
        .bind(spec.job.as_str())
        .bind(i64::from(spec.number.0))
        .bind(round.phase().as_str())
        .bind(&spec.base.0.as_bytes()[..])
        .bind(i64::from(spec.window.min_count))
        .bind(spec.window.max_count.map(i64::from))
        .bind(spec.window.min_time.as_millis() as i64)
        .bind(spec.window.max_time.as_millis() as i64)
        .bind(spec.opened_at.as_millis())
        .execute(self.conn())
        .await?;
        let cohort: Vec<_> = spec.cohort.iter().collect();
        for silos in cohort.chunks(ROWS_AT_ONCE) {
            QueryBuilder::new("INSERT INTO round_silos (job_id, round, silo_id) ")
                .push_values(silos, |mut row, silo_id| {
                    row.push_bind(spec.job.as_str())
                        .push_bind(i64::from(spec.number.0))
                        .push_bind(silo_id.as_str());
                })
                .build()
                .execute(self.conn())
                .await?;
        }
        Ok(())
    }

    /// A round as the machine that was stored.
    ///
    /// # Errors
    /// If the rows are none that a round leaves behind, or the database fails.
    pub async fn round_machine(
        &mut self,
        job_id: &JobId,
        number: RoundNumber,
    ) -> Result<Option<Round>, DatastoreError> {
        let Some(row) = sqlx::query("SELECT * FROM rounds WHERE job_id = $1 AND round = $2")
            .bind(job_id.as_str())
            .bind(i64::from(number.0))
            .fetch_optional(self.conn())
            .await?
        else {
            return Ok(None);
        };
        let silos = self.round_silos(job_id, number).await?;
        let spec = RoundSpec {
            job: job_id.clone(),
            number,
            cohort: silos.iter().map(|silo| silo.silo_id.clone()).collect(),
            window: ParticipationWindow {
                min_count: row::unsigned(&row, "min_count")?,
                max_count: row::get::<Option<u32>>(&row, "max_count")?,
                min_time: Duration::from_millis(row::unsigned(&row, "min_millis")?),
                max_time: Duration::from_millis(row::unsigned(&row, "max_millis")?),
            },
            base: AdapterVersion(row::digest(&row, "base_version")?),
            opened_at: row::time(&row, "announced_at")?,
        };
        let records = silos.into_iter().filter_map(|silo| {
            Some(Record {
                outcome: silo.outcome?,
                silo: silo.silo_id,
                digest: silo.digest,
                examples: silo.examples,
            })
        });
        Round::restore(spec, row::parse(&row, "phase")?, records)
            .map(Some)
            .map_err(|error| row::bad("phase", error.to_string()))
    }

    /// A round without its cohort.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn round(
        &mut self,
        job_id: &JobId,
        number: RoundNumber,
    ) -> Result<Option<RoundRecord>, DatastoreError> {
        sqlx::query(ROUND)
            .bind(job_id.as_str())
            .bind(i64::from(number.0))
            .fetch_optional(self.conn())
            .await?
            .as_ref()
            .map(RoundRecord::read)
            .transpose()
    }

    /// All rounds of a job in order.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn rounds(&mut self, job_id: &JobId) -> Result<Vec<RoundRecord>, DatastoreError> {
        sqlx::query(ROUNDS)
            .bind(job_id.as_str())
            .fetch_all(self.conn())
            .await?
            .iter()
            .map(RoundRecord::read)
            .collect()
    }

    /// The cohort of a round by name, with what became of each silo's part.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn round_silos(
        &mut self,
        job_id: &JobId,
        number: RoundNumber,
    ) -> Result<Vec<RoundSiloRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM round_silos WHERE job_id = $1 AND round = $2 ORDER BY silo_id")
            .bind(job_id.as_str())
            .bind(i64::from(number.0))
            .fetch_all(self.conn())
            .await?
            .iter()
            .map(RoundSiloRecord::read)
            .collect()
    }

    /// One silo's part in a round; nothing if it is not in the cohort.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn round_silo(
        &mut self,
        job_id: &JobId,
        number: RoundNumber,
        silo_id: &SiloId,
    ) -> Result<Option<RoundSiloRecord>, DatastoreError> {
        sqlx::query("SELECT * FROM round_silos WHERE job_id = $1 AND round = $2 AND silo_id = $3")
            .bind(job_id.as_str())
            .bind(i64::from(number.0))
            .bind(silo_id.as_str())
            .fetch_optional(self.conn())
            .await?
            .as_ref()
            .map(RoundSiloRecord::read)
            .transpose()
    }

    /// Replaces what is recorded of a silo's part.
    ///
    /// # Errors
    /// If the silo is not in the cohort, a digest comes without a receipt, or the database fails.
    pub async fn record_outcome(
        &mut self,
        job_id: &JobId,
        number: RoundNumber,
        silo: &RoundSiloRecord,
    ) -> Result<(), DatastoreError> {
        let reason = silo
            .outcome
            .and_then(Outcome::reason)
            .map_or("", ErrorCode::as_str);
        let done = sqlx::query(
            "UPDATE round_silos SET outcome = $4, reason = $5, recorded_at = $6, payload_digest = $7, examples = $8,
                 receipt = $9, upload_id = $10
             WHERE job_id = $1 AND round = $2 AND silo_id = $3",
        )
        .bind(job_id.as_str())
        .bind(i64::from(number.0))
        .bind(silo.silo_id.as_str())
        .bind(silo.outcome.map(Outcome::as_str))
        .bind(reason)
        .bind(silo.recorded_at.map(Timestamp::as_millis))
        .bind(silo.digest.as_ref().map(|digest| &digest.as_bytes()[..]))
        .bind(silo.examples as i64)
        .bind(silo.receipt.as_deref())
        .bind(silo.upload_id.as_ref().map(|id| &id[..]))
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || {
            format!("silo {} in round {number} of job {job_id}", silo.silo_id)
        })
    }

    /// Sets how long after its announcement a round closes at the latest.
    ///
    /// # Errors
    /// If there is no such round, or the database fails.
    pub async fn set_round_time(
        &mut self,
        job_id: &JobId,
        number: RoundNumber,
        max_time: Duration,
    ) -> Result<(), DatastoreError> {
        let done =
            sqlx::query("UPDATE rounds SET max_millis = $3 WHERE job_id = $1 AND round = $2")
                .bind(job_id.as_str())
                .bind(i64::from(number.0))
                .bind(max_time.as_millis() as i64)
                .execute(self.conn())
                .await?;
        require_one(done.rows_affected(), || {
            format!("round {number} of job {job_id}")
        })
    }

    /// Sets where a round stands.
    ///
    /// # Errors
    /// If there is no such round, or the database fails.
    pub async fn set_round_phase(
        &mut self,
        job_id: &JobId,
        number: RoundNumber,
        phase: RoundPhase,
        ended_at: Option<Timestamp>,
        published: Option<AdapterVersion>,
    ) -> Result<(), DatastoreError> {
        let done = sqlx::query(
            "UPDATE rounds SET phase = $3, ended_at = $4, published_version = $5
             WHERE job_id = $1 AND round = $2",
        )
        .bind(job_id.as_str())
        .bind(i64::from(number.0))
        .bind(phase.as_str())
        .bind(ended_at.map(Timestamp::as_millis))
        .bind(published.as_ref().map(|version| &version.0.as_bytes()[..]))
        .execute(self.conn())
        .await?;
        require_one(done.rows_affected(), || {
            format!("round {number} of job {job_id}")
        })
    }

    /// Every file of the spool that must be kept: uploads in progress, and counted contributions of rounds that are not over.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn spooled(&mut self) -> Result<BTreeSet<[u8; 16]>, DatastoreError> {
        sqlx::query(
            "SELECT upload_id FROM uploads
             UNION
             SELECT upload_id FROM round_silos JOIN rounds USING (job_id, round)
             WHERE rounds.ended_at IS NULL AND round_silos.outcome = 'accepted' AND upload_id IS NOT NULL",
        )
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(|row| row::token(row, "upload_id"))
        .collect()
    }

    /// Forgets the files of counted contributions of rounds that are over, and gives them, so that they can be deleted.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn release_contributions(&mut self) -> Result<Vec<[u8; 16]>, DatastoreError> {
        let files = sqlx::query(
            "SELECT upload_id FROM round_silos JOIN rounds USING (job_id, round)
             WHERE upload_id IS NOT NULL AND rounds.ended_at IS NOT NULL",
        )
        .fetch_all(self.conn())
        .await?
        .iter()
        .map(|row| row::token(row, "upload_id"))
        .collect::<Result<Vec<_>, _>>()?;
        if !files.is_empty() {
            sqlx::query(
                "UPDATE round_silos SET upload_id = NULL
                 WHERE upload_id IS NOT NULL AND EXISTS (
                     SELECT 1 FROM rounds WHERE rounds.job_id = round_silos.job_id AND rounds.round = round_silos.round
                         AND rounds.ended_at IS NOT NULL
                 )",
            )
            .execute(self.conn())
            .await?;
        }
        Ok(files)
    }
}
