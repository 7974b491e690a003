//! Group commit: transactions that end at about the same time are synced to the disk together.
//!
//! SQLite's own way (`synchronous = FULL`) is one sync for each commit, one after the other. Here a commit only writes to the
//! write-ahead log (`synchronous = NORMAL`: consistent after any crash), and whoever has to be sure that it survives a power
//! cut waits for a sync of the log, which covers every commit before it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use concord_common::fsutil;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

/// The disk's side of the write-ahead log.
#[derive(Debug)]
pub(super) struct LogSync {
    log: PathBuf,
    folder: PathBuf,
    /// Commits that have been written.
    written: AtomicU64,
    disk: Arc<Mutex<Disk>>,
    /// Cancelled when a sync has failed. The kernel may have dropped what it could not write, so that a later success would
    /// prove nothing.
    lost: CancellationToken,
}

/// What is known to be on the disk.
#[derive(Debug, Default)]
struct Disk {
    /// Commits.
    synced: u64,
    /// The log, whose name in the folder is on the disk. It stays open: the kernel tells of a failed write once on each
    /// descriptor, and a new one does not hear of a failure that another has been told of.
    log: Option<File>,
}

impl LogSync {
    /// For the database at `path`.
    pub(super) fn new(path: &Path) -> Self {
        let mut log = path.as_os_str().to_owned();
        log.push("-wal");
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        Self {
            log: log.into(),
            folder: folder.to_owned(),
            written: AtomicU64::new(0),
            disk: Arc::default(),
            lost: CancellationToken::new(),
        }
    }

    /// Notes a commit; to be called after it.
    pub(super) fn commit(&self) {
        self.written.fetch_add(1, Ordering::SeqCst);
    }

    /// Cancelled once nothing counts as durable any more.
    pub(super) fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// Returns once every commit noted before this call is on the disk.
    pub(super) async fn wait(self: &Arc<Self>) -> io::Result<()> {
        let wanted = self.written.load(Ordering::SeqCst);
        let mut disk = Arc::clone(&self.disk).lock_owned().await;
        if self.lost.is_cancelled() {
            return Err(lost());
        }
        if disk.synced >= wanted {
            return Ok(());
        }
        let this = Arc::clone(self);
        // The thread keeps the lock and notes how it went, also if nobody waits for it any more.
        tokio::task::spawn_blocking(move || {
            let covered = this.written.load(Ordering::SeqCst);
            let unless_synced = this.lost.clone().drop_guard();
            this.sync(&mut disk)?;
            unless_synced.disarm();
            disk.synced = covered;
            Ok::<_, io::Error>(())
        })
        .await
        .map_err(io::Error::other)
        .flatten()
    }

    fn sync(&self, disk: &mut Disk) -> io::Result<()> {
        let named = match fs::metadata(&self.log) {
            Ok(metadata) => Some(identity(&metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let open = disk.log.as_ref().map(File::metadata).transpose()?;
        if open.map(|metadata| identity(&metadata)) != named {
            // SQLite replaces the file when its last connection has closed. All of the old one was then moved into the
            // database, durably.
            disk.log = None;
        }
        if let (None, Some(_)) = (&disk.log, named) {
            let log = File::open(&self.log)?;
            fsutil::sync_folder(&self.folder)?;
            disk.log = Some(log);
        }
        match &disk.log {
            Some(log) => log.sync_data(),
            None => Ok(()),
        }
    }
}

/// Two names or descriptors of one file have the same.
fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// What is said once a sync has failed.
pub(super) fn lost() -> io::Error {
    io::Error::other(
        "a sync of the database failed, and what it has written since may be lost; restart the server once the disk is well again",
    )
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;
    use crate::{
        config::Durability,
        datastore::{Datastore, DatastoreError},
    };

    fn log_of(folder: &Path) -> (PathBuf, Arc<LogSync>) {
        (
            folder.join("db-wal"),
            Arc::new(LogSync::new(&folder.join("db"))),
        )
    }

    #[tokio::test]
    async fn a_wait_covers_the_commits_before_it_and_syncs_only_once_for_them() {
        let folder = tempfile::tempdir().unwrap();
        let (log, sync) = log_of(folder.path());
        fs::write(&log, b"log").unwrap();
        sync.commit();
        sync.commit();
        sync.wait().await.unwrap();
        assert_eq!(sync.disk.lock().await.synced, 2);

        // Nothing new was committed: the disk is not touched, so that a broken log does not matter.
        fs::remove_file(&log).unwrap();
        std::os::unix::fs::symlink(&log, &log).unwrap();
        sync.wait().await.unwrap();
        assert!(!sync.lost().is_cancelled());
    }

    #[tokio::test]
    async fn what_an_earlier_process_left_in_the_log_is_settled_before_anything_is_promised() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let log = folder.path().join("db-wal");
        let earlier = Datastore::open(&path, Durability::Process).await.unwrap();
        let left = fs::metadata(&log).unwrap().len();
        assert_ne!(left, 0);
        // Somebody still reads what is in the log.
        let read = earlier.run_read("test", |tx| {
            let path = path.clone();
            Box::pin(async move {
                tx.silos().await?;
                Ok::<_, DatastoreError>(Datastore::open(&path, Durability::Power).await.err())
            })
        });
        let refused = read.await.unwrap().unwrap().to_string();
        assert!(refused.contains("another program"), "{refused}");

        let now = Datastore::open(&path, Durability::Power).await.unwrap();
        assert!(fs::metadata(&log).unwrap().len() < left);
        now.close().await;
        earlier.close().await;
    }

    #[tokio::test]
    async fn the_log_stays_open_until_another_file_has_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let (log, sync) = log_of(folder.path());
        let open = async || {
            sync.commit();
            sync.wait().await.unwrap();
            let disk = sync.disk.lock().await;
            let log = disk.log.as_ref()?;
            Some((log.as_raw_fd(), log.metadata().unwrap().ino()))
        };
        assert_eq!(open().await, None, "all of it was moved into the database");
        fs::write(&log, b"first").unwrap();
        let first = open().await.unwrap();
        assert_eq!(open().await, Some(first));
        // The old file is kept, so that the new one cannot get its number.
        fs::rename(&log, folder.path().join("old")).unwrap();
        fs::write(&log, b"second").unwrap();
        let second = open().await.unwrap();
        assert_ne!(second.1, first.1);
        assert_eq!(second.1, fs::metadata(&log).unwrap().ino());
    }

    #[tokio::test]
    async fn after_a_failed_sync_nothing_counts_as_durable_any_more_although_nobody_waited_for_it()
    {
        let folder = tempfile::tempdir().unwrap();
        let (log, sync) = log_of(folder.path());
        // A loop of links cannot be opened, by nobody.
        std::os::unix::fs::symlink(&log, &log).unwrap();
        sync.commit();
        {
            let mut waiting = Box::pin(sync.wait());
            // Begun, and dropped as the work of a caller who goes away.
            let _ = futures::poll!(waiting.as_mut());
        }
        sync.lost().cancelled().await;
        fs::remove_file(&log).unwrap();
        let error = sync.wait().await.unwrap_err();
        assert!(error.to_string().contains("restart"), "{error}");
    }
}
