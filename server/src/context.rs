//! What services and driver share.

use std::{
    collections::HashMap,
    fs::{File, TryLockError},
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use concord_common::{
    Clock, ErrorCode, SiloId, Timestamp,
    code::Refusal,
    fsutil::{sweep_unfinished, write_atomic},
    lifecycle::Shutdown,
    wire::ReceiptSigner,
};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{
    blobs::BlobStore, config::ServerConfig, datastore::Datastore, digests::RecentPieces,
    error::Failure, hub::Hub, ids::Ids, objects::ObjectStore, presence::LastSeen,
    service::transfer::TransferGate, specs::RecentSpecs, spool::Spool,
};

/// Long works on payloads at the same time. The program has a few threads for them more, which the syncs need: see the
/// runtime that `concord-server` makes.
const LONG_WORKS: usize = 2;

/// Calls of one silo that are worked on at a time, apart from transfers.
const CALLS_PER_SILO: usize = 16;
/// What a silo with more is told to wait.
const BUSY_RETRY: Duration = Duration::from_secs(1);

/// Name of the file with the key that receipts are signed with.
const RECEIPT_KEY: &str = "receipt.key";

/// The server's parts, made once and shared by everything that runs in it.
#[derive(Debug)]
pub struct Context {
    /// Settings.
    pub config: ServerConfig,
    /// State.
    pub datastore: Datastore,
    /// Adapter payloads.
    pub blobs: BlobStore,
    /// Digests of the pieces that are being sent.
    pub pieces: RecentPieces,
    /// Specifications of the jobs that silos ask about.
    pub specs: RecentSpecs,
    /// Uploads.
    pub spool: Arc<Spool>,
    /// What workers keep for their jobs.
    pub objects: Arc<ObjectStore>,
    /// Turns to move it.
    pub objects_gate: TransferGate,
    /// When a worker that runs jobs of this server's kinds called last.
    pub workers_seen: LastSeen,
    /// Cancelled once no worker of this server's runs any more, at its stop.
    pub workers_ended: CancellationToken,
    /// Who must be told of changes.
    pub hub: Hub,
    /// Signs receipts.
    pub signer: ReceiptSigner,
    /// Now.
    pub clock: Arc<dyn Clock>,
    /// New ids.
    pub ids: Arc<dyn Ids>,
    /// The server's tasks and the way to stop them.
    pub shutdown: Shutdown,
    /// Places for long works.
    long_works: Arc<Semaphore>,
    /// Places for the calls of each silo.
    calls: Mutex<HashMap<SiloId, Arc<Semaphore>>>,
    /// Held for as long as the folder is in use.
    _lock: File,
}

impl Context {
    /// Opens everything under the state folder and sweeps out what a crash may have left there.
    ///
    /// # Errors
    /// If a file or the database cannot be opened.
    pub async fn open(
        config: ServerConfig,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn Ids>,
    ) -> Result<Self, Failure> {
        let folder = config.state_dir.clone();
        let shown = folder.display();
        make_private_folder(&folder).map_err(Failure::io(format!("cannot make {shown}")))?;
        let lock =
            lock(&folder.join("lock")).map_err(Failure::io(format!("cannot use {shown}")))?;
        sweep_unfinished(&folder).map_err(Failure::io(format!("cannot sweep {shown}")))?;
        let datastore = Datastore::open(&folder.join("concord.db"), config.durability).await?;
        let blobs = BlobStore::open(&folder.join("adapters"), config.durability)
            .map_err(Failure::io(format!("cannot open {shown}/adapters")))?;
        let spool = Spool::open(&folder.join("spool"), config.durability)
            .map_err(Failure::io(format!("cannot open {shown}/spool")))?;
        let objects = ObjectStore::open(&folder.join("artaug"), config.durability)
            .map_err(Failure::io(format!("cannot open {shown}/artaug")))?;
        let signer = receipt_signer(&folder.join(RECEIPT_KEY))
            .map_err(Failure::io(format!("cannot use {shown}/{RECEIPT_KEY}")))?;
        let (versions, spooled, kept) = datastore
            .run_read("list_referenced_files", |tx| {
                Box::pin(async move {
                    Ok::<_, Failure>((
                        tx.all_versions().await?,
                        tx.spooled().await?,
                        tx.all_objects().await?,
                    ))
                })
            })
            .await?;
        let swept = blobs
            .sweep(&versions)
            .and_then(|blobs| Ok(blobs + spool.sweep(&spooled)? + objects.sweep(&kept)?))
            .map_err(Failure::io(format!("cannot sweep {shown}")))?;
        if swept > 0 {
            tracing::info!(files = swept, "swept files that nothing refers to");
        }
        let objects_gate = TransferGate::new(&config.limits);
        Ok(Self {
            config,
            datastore,
            blobs,
            pieces: RecentPieces::default(),
            specs: RecentSpecs::default(),
            spool: Arc::new(spool),
            objects: Arc::new(objects),
            objects_gate,
            workers_seen: LastSeen::default(),
            workers_ended: CancellationToken::new(),
            hub: Hub::default(),
            signer,
            clock,
            ids,
            shutdown: Shutdown::new(),
            long_works: Arc::new(Semaphore::new(LONG_WORKS)),
            calls: Mutex::default(),
            _lock: lock,
        })
    }

    /// Runs `work`, a transaction and what must follow its commit, as a task of its own: a handler is dropped when its caller
    /// disconnects, and that must not come between a commit and the announcement of what it changed. A stop waits for it.
    ///
    /// # Errors
    /// The work's.
    pub async fn to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> Result<T, Failure> {
        self.shutdown.spawn(work).await?
    }

    /// The same for a silo's call, of which few are at work at a time: what goes on without its caller is no longer bounded by the
    /// number of calls on a connection, and a silo that calls and hangs up again and again would keep the database from the others.
    ///
    /// # Errors
    /// The work's, or `BUSY`.
    pub async fn to_the_end_for<T: Send + 'static>(
        &self,
        silo_id: &SiloId,
        work: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> Result<T, Failure> {
        let Ok(place) = self.places_of(silo_id).try_acquire_owned() else {
            return Err(Refusal::new(
                ErrorCode::Busy,
                format!("{CALLS_PER_SILO} calls of this silo are being worked on; wait for their answers"),
            )
            .retry_after(BUSY_RETRY)
            .into());
        };
        self.to_the_end(async move {
            // The task's: it works on although its caller may have gone.
            let _place = place;
            work.await
        })
        .await
    }

    fn places_of(&self, silo_id: &SiloId) -> Arc<Semaphore> {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        // Here and nowhere else do entries come in, so the map stays as small as the number of silos that call just now. Who holds a
        // place holds its semaphore too.
        calls.retain(|_, places| Arc::strong_count(places) > 1);
        let places = calls
            .entry(silo_id.clone())
            .or_insert_with(|| Arc::new(Semaphore::new(CALLS_PER_SILO)));
        Arc::clone(places)
    }

    /// Runs blocking work that may take minutes on a worker thread, few at a time: there would be no thread left to sync what
    /// others wait for.
    ///
    /// # Errors
    /// If the thread breaks off.
    pub async fn long_work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Failure> {
        // The semaphore is never closed.
        let place = Arc::clone(&self.long_works).acquire_owned().await.ok();
        let worker = tokio::task::spawn_blocking(move || {
            // The thread's: it works on although its caller may have gone.
            let _place = place;
            work()
        });
        Ok(worker.await?)
    }

    /// Now.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }
}

/// Two servers with one state folder would sweep out each other's files.
fn lock(path: &Path) -> io::Result<File> {
    let file = File::create(path)?;
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => io::Error::other("another server uses this state folder"),
        TryLockError::Error(error) => error,
    })?;
    Ok(file)
}

fn make_private_folder(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
}

/// The key that receipts are signed with, made at the first start.
fn receipt_signer(path: &Path) -> io::Result<ReceiptSigner> {
    let der = match std::fs::read(path) {
        Ok(der) => der,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let der = ReceiptSigner::generate_pkcs8().map_err(io::Error::other)?;
            write_atomic(path, &der, 0o600)?;
            der
        }
        Err(error) => return Err(error),
    };
    ReceiptSigner::from_pkcs8(&der).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use concord_common::ErrorCode;
    use tokio::sync::mpsc;
    use tokio_util::sync::CancellationToken;

    use super::{CALLS_PER_SILO, LONG_WORKS};
    use crate::{
        error::Failure,
        tests::harness::{World, eventually},
    };

    #[tokio::test]
    async fn few_long_works_run_at_once_also_if_their_callers_have_gone() {
        let world = World::start().await;
        let context = world.server().context();
        let (started, mut starts) = mpsc::channel(LONG_WORKS);
        let mut gates = Vec::new();
        for _ in 0..LONG_WORKS {
            let (gate, opened) = std::sync::mpsc::sync_channel::<()>(0);
            gates.push(gate);
            let started = started.clone();
            let work = context.long_work(move || {
                started.blocking_send(()).unwrap();
                // Until the gate is gone.
                opened.recv().unwrap_err();
            });
            assert!(futures::poll!(pin!(work)).is_pending());
            starts.recv().await.unwrap();
        }
        assert_eq!(context.long_works.available_permits(), 0);
        let mut waiting = pin!(context.long_work(|| 3));
        assert!(futures::poll!(waiting.as_mut()).is_pending());
        drop(gates);
        assert_eq!(waiting.await.unwrap(), 3);
    }

    #[tokio::test]
    async fn a_silo_that_calls_and_hangs_up_again_and_again_is_busy_and_keeps_nobody_else_out() {
        let world = World::start().await;
        let context = world.server().context();
        let (a, b) = (&"a".parse().unwrap(), &"b".parse().unwrap());
        let open = CancellationToken::new();
        for _ in 0..CALLS_PER_SILO {
            let opened = open.clone();
            let work = async move {
                opened.cancelled().await;
                Ok(())
            };
            // Begun, and its caller gone at once.
            assert!(futures::poll!(pin!(context.to_the_end_for(a, work))).is_pending());
        }
        let refused = context.to_the_end_for(a, async { Ok(()) }).await;
        assert!(
            matches!(&refused, Err(Failure::Refused(refusal)) if refusal.code == ErrorCode::Busy),
            "{refused:?}"
        );
        context.to_the_end_for(b, async { Ok(()) }).await.unwrap();
        open.cancel();
        eventually("a place", async || {
            context.to_the_end_for(a, async { Ok(()) }).await.ok()
        })
        .await;
    }
}
