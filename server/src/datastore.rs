//! All state but the adapters' bytes: an SQL database behind named, re-runnable transactions.
//!
//! Nobody outside this module writes SQL. A transaction is a closure over [`Tx`], whose methods are the statements; it may
//! be run more than once, so it must not act on anything but the database. What it decided is carried out after the commit.
//! Statements use `$1` parameters and plain SQL, so that the same text can serve PostgreSQL.

use std::{marker::PhantomData, path::Path, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use sqlx::{
    Connection as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};

use crate::{config::Durability, metrics};

mod connections;
mod durable;
mod jobs;
mod journal;
mod leases;
mod migrations;
mod notices;
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
pub use notices::NoticeRecord;
pub use objects::ArtefactRecord;
pub use reports::ReportRecord;
pub use rounds::{RoundRecord, RoundSiloRecord};
pub use silos::{Enrollment, SiloRecord};
pub use uploads::UploadRecord;
pub use versions::VersionRecord;
pub use workers::{WorkerJobRecord, WorkerLease};

use connections::{Connections, Lent};
use durable::LogSync;

/// How often a transaction is tried while another one is in its way.
const MAX_ATTEMPTS: u32 = 8;
/// How long SQLite itself waits for another process before a transaction counts as busy.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// Rows that one statement inserts: each statement is a trip to the connection's thread.
const ROWS_AT_ONCE: usize = 64;
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
    writer: Connections,
    readers: Connections,
    /// None if only the process's end must be survived.
    log: Option<Arc<LogSync>>,
}

/// One open transaction. `'e` is the time during which whatever the closure borrows lives.
pub struct Tx<'e> {
    lent: Lent,
    /// Statements that it may still run; any number if absent.
    statements: Option<u32>,
    scope: PhantomData<&'e ()>,
}

impl Tx<'_> {
    fn conn(&mut self) -> &mut SqliteConnection {
        if let Some(left) = &mut self.statements {
            debug_assert!(*left > 0, "two statements need a transaction around them");
            *left = left.saturating_sub(1);
        }
        self.lent.connection()
    }
}

/// What stands around the statements of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frame {
    /// It may write from the start, so that none has to be run again because another one came between its reads and its writes.
    Write,
    /// It sees one state of the database.
    Read,
    /// Nothing: a single statement is a transaction by itself.
    Alone,
}

impl Frame {
    fn begin(self) -> Option<&'static str> {
        match self {
            Self::Write => Some("BEGIN IMMEDIATE"),
            Self::Read => Some("BEGIN"),
            Self::Alone => None,
        }
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
        let writer = Connections::new(options.clone(), 1);
        let mut first = writer.lend().await?;
        if let Some(log) = &log {
            settle_log(first.connection()).await?;
            migrations::run(first.connection()).await?;
            log.commit();
            log.wait().await.map_err(DatastoreError::Sync)?;
        } else {
            migrations::run(first.connection()).await?;
        }
        first.give_back();
        let readers = Connections::new(options.pragma("query_only", "ON"), READERS);
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
        self.write(Frame::Write, name, work).await
    }

    /// The same for work that is a single statement, which needs no transaction around it.
    ///
    /// # Errors
    /// The closure's error, or the database's.
    pub async fn run_statement_unsynced<'e, T, E, F>(
        &self,
        name: &'static str,
        work: F,
    ) -> Result<T, E>
    where
        F: for<'t> Fn(&'t mut Tx<'e>) -> BoxFuture<'t, Result<T, E>>,
        E: From<DatastoreError> + Retryable,
    {
        self.write(Frame::Alone, name, work).await
    }

    async fn write<'e, T, E, F>(&self, frame: Frame, name: &'static str, work: F) -> Result<T, E>
    where
        F: for<'t> Fn(&'t mut Tx<'e>) -> BoxFuture<'t, Result<T, E>>,
        E: From<DatastoreError> + Retryable,
    {
        let value = run(&self.writer, frame, name, work).await?;
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
        run(&self.readers, Frame::Read, name, work).await
    }

    /// The same for work that is a single statement, which sees one state of the database by itself.
    ///
    /// # Errors
    /// The closure's error, or the database's.
    pub async fn read_statement<'e, T, E, F>(&self, name: &'static str, work: F) -> Result<T, E>
    where
        F: for<'t> Fn(&'t mut Tx<'e>) -> BoxFuture<'t, Result<T, E>>,
        E: From<DatastoreError> + Retryable,
    {
        run(&self.readers, Frame::Alone, name, work).await
    }

    /// Asks the database for a sign of life.
    ///
    /// # Errors
    /// If it gives none.
    pub async fn ping(&self) -> Result<(), DatastoreError> {
        let mut lent = self.readers.lend().await?;
        lent.connection().ping().await?;
        lent.give_back();
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
async fn settle_log(writer: &mut SqliteConnection) -> Result<(), DatastoreError> {
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
    connections: &Connections,
    frame: Frame,
    name: &'static str,
    work: F,
) -> Result<T, E>
where
    F: for<'t> Fn(&'t mut Tx<'e>) -> BoxFuture<'t, Result<T, E>>,
    E: From<DatastoreError> + Retryable,
{
    let mut attempt = 1;
    loop {
        let result = run_once(connections, frame, &work).await;
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

/// Dropped in the middle, or if the end of the transaction fails, it leaves the connection to be closed, which rolls back.
async fn run_once<'e, T, E, F>(connections: &Connections, frame: Frame, work: &F) -> Result<T, E>
where
    F: for<'t> Fn(&'t mut Tx<'e>) -> BoxFuture<'t, Result<T, E>>,
    E: From<DatastoreError>,
{
    let lent = connections.lend().await.map_err(DatastoreError::from)?;
    let mut tx = Tx {
        lent,
        statements: (frame == Frame::Alone).then_some(1),
        scope: PhantomData,
    };
    if let Some(begin) = frame.begin() {
        tx.execute(begin).await?;
    }
    let result = work(&mut tx).await;
    let ended = match (frame, &result) {
        (Frame::Alone, Ok(_)) => Ok(()),
        // The statement may have failed because its connection is lost.
        (Frame::Alone, Err(_)) => tx.lent.connection().ping().await.map_err(Into::into),
        (_, Ok(_)) => tx.execute("COMMIT").await,
        (_, Err(_)) => tx.execute("ROLLBACK").await,
    };
    match (ended, result) {
        (Ok(()), result) => {
            tx.lent.give_back();
            result
        }
        (Err(error), Ok(_)) => Err(error.into()),
        (Err(end), Err(error)) => {
            // Nothing was written: the connection is closed.
            tracing::warn!(error = %end, "rollback failed");
            Err(error)
        }
    }
}

impl Tx<'_> {
    async fn execute(&mut self, statement: &'static str) -> Result<(), DatastoreError> {
        sqlx::query(statement)
            .execute(self.lent.connection())
            .await?;
        Ok(())
    }
}
