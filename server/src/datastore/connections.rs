//! The connections to the database, lent to one transaction at a time.
//!
//! A statement is a trip to its connection's thread and back, which costs more than most statements do. sqlx's own pool adds two
//! trips to each use, asking the connection for a sign of life before and after it, and its transactions add two more for their
//! begin and end. A connection to a file does not go away by itself, so here nobody asks: one that was not given back in good
//! order is closed, which takes back what it had begun, and the next use opens another one.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sqlx::{
    ConnectOptions as _, Connection as _, Error, SqliteConnection, sqlite::SqliteConnectOptions,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// How long a transaction waits for a connection.
const MAX_WAIT: Duration = Duration::from_mins(1);

/// A bounded number of connections.
#[derive(Debug, Clone)]
pub(super) struct Connections {
    options: SqliteConnectOptions,
    count: u32,
    places: Arc<Semaphore>,
    idle: Arc<Idle>,
}

/// Those that are not in use.
#[derive(Debug, Default)]
struct Idle(Mutex<Vec<SqliteConnection>>);

impl Idle {
    fn lock(&self) -> MutexGuard<'_, Vec<SqliteConnection>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connections {
    /// At most `count` connections, each opened when it is first needed.
    pub(super) fn new(options: SqliteConnectOptions, count: u32) -> Self {
        Self {
            options,
            count,
            places: Arc::new(Semaphore::new(count as usize)),
            idle: Arc::default(),
        }
    }

    /// Waits for a connection, in the order of the calls.
    ///
    /// # Errors
    /// If none becomes free in time, if it cannot be opened, or after [`Connections::close`].
    pub(super) async fn lend(&self) -> Result<Lent, Error> {
        let place = timeout(MAX_WAIT, Arc::clone(&self.places).acquire_owned())
            .await
            .map_err(|_| Error::PoolTimedOut)?
            .map_err(|_| Error::PoolClosed)?;
        let idle = self.idle.lock().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.options.connect().await?,
        };
        Ok(Lent {
            connection: Some(connection),
            in_order: false,
            idle: Arc::clone(&self.idle),
            _place: place,
        })
    }

    /// Waits until all are given back, and closes them. No more are lent.
    pub(super) async fn close(&self) {
        // An error means that they are closed already.
        let _all = self.places.acquire_many(self.count).await;
        self.places.close();
        let idle = std::mem::take(&mut *self.idle.lock());
        for connection in idle {
            if let Err(error) = connection.close().await {
                tracing::warn!(%error, "cannot close the database in good order");
            }
        }
    }
}

/// A connection in use. Dropped before [`Lent::give_back`], it is closed.
#[derive(Debug)]
pub(super) struct Lent {
    /// Only absent while it is dropped.
    connection: Option<SqliteConnection>,
    in_order: bool,
    idle: Arc<Idle>,
    // After the connection, so that its successor cannot be opened before it has a place.
    _place: OwnedSemaphorePermit,
}

impl Lent {
    pub(super) fn connection(&mut self) -> &mut SqliteConnection {
        self.connection
            .as_mut()
            .expect("it is taken out only when this is dropped")
    }

    /// Nothing was begun on the connection that has not ended: the next one may have it.
    pub(super) fn give_back(mut self) {
        self.in_order = true;
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let connection = self.connection.take();
        if self.in_order {
            self.idle.lock().extend(connection);
        }
    }
}
