//! All state but the adapters' bytes: an SQL database behind named, re-runnable transactions.
//!
//! Nobody outside this module writes SQL. A transaction is a closure over [`Tx`], whose methods are the statements; it may
//! be run more than once, so it must not act on anything but the database. What it decided is carried out after the commit.
//! Statements use `$1` parameters and plain SQL, so that the same text can serve PostgreSQL.

use std::{marker::PhantomData, path::Path, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use sqlx::{
    Connection as _, Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use crate::{config::Durability, metrics};

mod durable;
mod jobs;
mod journal;
mod leases;
mod migrations;
mod objects;
mod reports;
mod reviews;
mod rounds;
mod row;
mod silos;
#[cfg(test)]
pub(crate) mod tests;
mod uploads;
mod versions;
mod workers;

pub use jobs::{JobRecord, JobSiloRecord, NewJob};
pub use leases::LeaseRecord;
pub use objects::ArtefactRecord;
pub use reports::ReportRecord;
pub use rounds::{RoundRecord, RoundSiloRecord};
pub use silos::{Enrollment, SiloRecord};
pub use uploads::UploadRecord;
pub use versions::VersionRecord;
pub use workers::{WorkerJobRecord, WorkerLease};

use durable::LogSync;

/// How often a transaction is tried while another one is in its way.
const MAX_ATTEMPTS: u32 = 8;
/// How long SQLite itself waits for another process before a transaction counts as busy.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections that only read; each has a cache of up to 2 MB.
const READERS: u32 = 2;

/// A fault of the database.
#[derive(Debug, thiserror::Error)]
pub enum DatastoreError {
    /// The database refused or failed.
    #[error("the database failed: {0}")]
    Database(#[from] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("the database's schema cannot be brought up to date: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// A stored value cannot be what it should be.
    #[error("the database holds a bad value in column `{column}`: {what}")]
    BadValue {
        /// Column.
        column: &'static str,
        /// What is wrong.
        what: String,
    },
    /// What was written may not survive a power cut.
    #[error("the disk does not confirm what the database has written: {0}")]
    Sync(#[source] std::io::Error),
    /// A row that must exist is not there.
    #[error("the database has no {0}")]
    Missing(String),
}

/// Errors that may mean "another transaction is in the way: run this one again".
pub trait Retryable {
    /// True if running the same transaction again may succeed.
    fn is_busy(&self) -> bool;
}

impl Retryable for DatastoreError {
    fn is_busy(&self) -> bool {
        let Self::Database(sqlx::Error::Database(error)) = self else {
            return false;
        };
        // Primary result codes SQLITE_BUSY = 5 and SQLITE_LOCKED = 6 are the low byte of the extended ones.
        error
            .code()
            .and_then(|code| code.parse::<i32>().ok())
            .is_some_and(|code| matches!(code & 0xff, 5 | 6))
    }
}

/// The database.
#[derive(Debug, Clone)]
pub struct Datastore {
    writer: SqlitePool,
    readers: SqlitePool,
    /// None if only the process's end must be survived.
    log: Option<Arc<LogSync>>,
}

/// One open transaction. `'e` is the time during which whatever the closure borrows lives.
pub struct Tx<'e> {
    inner: Transaction<'static, Sqlite>,
    scope: PhantomData<&'e ()>,
}

impl Tx<'_> {
    fn conn(&mut self) -> &mut sqlx::SqliteConnection {
        &mut self.inner
    }
}

impl Datastore {
    /// Opens the SQLite file, making it if it is not there, and brings its schema up to date.
    ///
    /// # Errors
    /// If the file cannot be opened, is no database, or was written by a newer version.
    pub async fn open(path: &Path, durability: Durability) -> Result<Self, DatastoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT)
            // A commit is consistent after any crash, and durable once `LogSync` says so.
            .synchronous(SqliteSynchronous::Normal);
        let log = match durability {
            Durability::Power => Some(Arc::new(LogSync::new(path))),
            Durability::Process => None,
        };
        // One writer, so that transactions of this process queue in order instead of colliding.
        let writer = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(Duration::from_mins(1))
            .connect_with(options.clone())
            .await?;
        if let Some(log) = &log {
            settle_log(&writer).await?;
            migrations::run(&writer).await?;
            log.commit();
            log.wait().await.map_err(DatastoreError::Sync)?;
        } else {
            migrations::run(&writer).await?;
        }
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(Duration::from_mins(1))
            .connect_with(options.pragma("query_only", "ON"))
            .await?;
        Ok(Self {
            writer,
            readers,
            log,
        })
    }

    /// Runs `work` as one transaction that may write, again if another process was in the way, and commits if it gives `Ok`.
    /// What it wrote is durable, as configured, when this returns.
    ///
    /// # Errors
    /// The closure's error (nothing was written), or the database's.
    pub async fn run_tx<'e, T, E, F>(&self, name: &'static str, work: F) -> Result<T, E>
    where
        F: for<'t> Fn(&'t mut Tx<'e>) -> BoxFuture<'t, Result<T, E>>,
        E: From<DatastoreError> + Retryable,
    {
        let value = self.run_tx_unsynced(name, work).await?;
        self.sync().await?;
        Ok(value)
    }

    /// The same without waiting for the disk: a power cut may take the transaction back, but none before it. For what the
    /// other side only has to ask for once more, such as a lease; nothing may be promised to anybody before
    /// [`Datastore::sync`].
    ///
    /// # Errors
    /// The closure's error (nothing was written), or the database's.
    pub async fn run_tx_unsynced<'e, T, E, F>(&self, name: &'static str, work: F) -> Result<T, E>
    where
        F: for<'t> Fn(&'t mut Tx<'e>) -> BoxFuture<'t, Result<T, E>>,
        E: From<DatastoreError> + Retryable,
    {
        let value = run(&self.writer, "BEGIN IMMEDIATE", name, work).await?;
        if let Some(log) = &self.log {
            log.commit();
        }
        Ok(value)
    }

    /// Makes everything that was committed so far durable, as configured.
    ///
    /// # Errors
    /// [`DatastoreError::Sync`].
    pub async fn sync(&self) -> Result<(), DatastoreError> {
        match &self.log {
            Some(log) => log.wait().await.map_err(DatastoreError::Sync),
            None => Ok(()),
        }
    }

    /// Ends once a sync has failed: nothing that was written since the one before counts as durable, every further
    /// [`Datastore::sync`] fails, and only a restart helps. Never ends if only the process's end must be survived.
    pub async fn lost(&self) -> DatastoreError {
        match &self.log {
            Some(log) => log.lost().cancelled().await,
            None => std::future::pending().await,
        }
        DatastoreError::Sync(durable::lost())
    }

    /// Runs `work` as one transaction that sees one state of the database and cannot write.
    ///
    /// # Errors
    /// The closure's error, or the database's.
    pub async fn run_read<'e, T, E, F>(&self, name: &'static str, work: F) -> Result<T, E>
    where
        F: for<'t> Fn(&'t mut Tx<'e>) -> BoxFuture<'t, Result<T, E>>,
        E: From<DatastoreError> + Retryable,
    {
        run(&self.readers, "BEGIN", name, work).await
    }

    /// Asks the database for a sign of life.
    ///
    /// # Errors
    /// If it gives none.
    pub async fn ping(&self) -> Result<(), DatastoreError> {
        self.readers.acquire().await?.ping().await?;
        Ok(())
    }

    /// Closes all connections; the write-ahead log is folded into the file.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

/// Moves what an earlier process left in the write-ahead log into the database, durably: that process may have ended because
/// a sync of the log had failed, and no sync of ours would tell.
async fn settle_log(writer: &SqlitePool) -> Result<(), DatastoreError> {
    let (busy, _, _): (i64, i64, i64) = sqlx::query_as("PRAGMA wal_checkpoint(TRUNCATE)")
        .fetch_one(writer)
        .await?;
    if busy == 0 {
        return Ok(());
    }
    Err(DatastoreError::Sync(std::io::Error::new(
        std::io::ErrorKind::ResourceBusy,
        "another program is using it; end that one and start the server again",
    )))
}

async fn run<'e, T, E, F>(
    pool: &SqlitePool,
    begin: &'static str,
    name: &'static str,
    work: F,
) -> Result<T, E>
where
    F: for<'t> Fn(&'t mut Tx<'e>) -> BoxFuture<'t, Result<T, E>>,
    E: From<DatastoreError> + Retryable,
{
    let mut attempt = 1;
    loop {
        let result = run_once(pool, begin, &work).await;
        match result {
            Ok(value) => {
                metrics::transaction(name, "committed");
                return Ok(value);
            }
            Err(error) if error.is_busy() && attempt < MAX_ATTEMPTS => {
                metrics::transaction(name, "retried");
                let delay = Duration::from_millis(5 << attempt);
                tracing::debug!(tx = name, attempt, ?delay, "transaction will be run again");
                tokio::time::sleep(delay).await;
                attempt += 1;
            }
            Err(error) => {
                metrics::transaction(name, "failed");
                return Err(error);
            }
        }
    }
}

async fn run_once<'e, T, E, F>(pool: &SqlitePool, begin: &'static str, work: &F) -> Result<T, E>
where
    F: for<'t> Fn(&'t mut Tx<'e>) -> BoxFuture<'t, Result<T, E>>,
    E: From<DatastoreError>,
{
    let inner = pool.begin_with(begin).await.map_err(DatastoreError::from)?;
    let mut tx = Tx {
        inner,
        scope: PhantomData,
    };
    match work(&mut tx).await {
        Ok(value) => {
            tx.inner.commit().await.map_err(DatastoreError::from)?;
            Ok(value)
        }
        Err(error) => {
            // Rolling back can only fail if the connection is lost, and then nothing was written either.
            if let Err(rollback) = tx.inner.rollback().await {
                tracing::warn!(error = %rollback, "rollback failed");
            }
            Err(error)
        }
    }
}
