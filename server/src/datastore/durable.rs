//! Group commit: transactions that end at about the same time are synced to the disk together.
//!
//! SQLite's own way (`synchronous = FULL`) is one sync for each commit, one after the other. Here a commit only writes to the
//! write-ahead log (`synchronous = NORMAL`: consistent after any crash), and whoever has to be sure that it survives a power
//! cut waits for a sync of the log, which covers every commit before it.

use std::{
    fs::File,
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

/// The disk's side of the write-ahead log.
#[derive(Debug)]
pub(super) struct LogSync {
    log: PathBuf,
    folder: PathBuf,
    /// Commits that have been written.
    written: AtomicU64,
    disk: Mutex<Disk>,
}

/// What is known to be on the disk.
#[derive(Debug, Default)]
struct Disk {
    /// Commits.
    synced: u64,
    /// The log's file, whose name in the folder is on the disk.
    inode: Option<u64>,
    /// A sync failed. The kernel may have dropped what it could not write, so that a later success would prove nothing.
    lost: bool,
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
            disk: Mutex::default(),
        }
    }

    /// Notes a commit; to be called after it.
    pub(super) fn commit(&self) {
        self.written.fetch_add(1, Ordering::SeqCst);
    }

    /// Returns once every commit noted before this call is on the disk.
    pub(super) async fn wait(self: &Arc<Self>) -> io::Result<()> {
        let wanted = self.written.load(Ordering::SeqCst);
        let mut disk = self.disk.lock().await;
        if disk.lost {
            return Err(io::Error::other(
                "an earlier sync of the database failed; restart the server once the disk is well again",
            ));
        }
        if disk.synced >= wanted {
            return Ok(());
        }
        let covered = self.written.load(Ordering::SeqCst);
        let (this, known) = (Arc::clone(self), disk.inode);
        let synced = tokio::task::spawn_blocking(move || this.sync(known)).await;
        match synced.map_err(io::Error::other).flatten() {
            Ok(inode) => {
                *disk = Disk {
                    synced: covered,
                    inode,
                    lost: false,
                };
                Ok(())
            }
            Err(error) => {
                disk.lost = true;
                Err(error)
            }
        }
    }

    fn sync(&self, known: Option<u64>) -> io::Result<Option<u64>> {
        // Opened anew each time: SQLite replaces the file when its last connection has closed.
        let log = match File::open(&self.log) {
            Ok(log) => log,
            // Then all of it was moved into the database, durably.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        log.sync_data()?;
        let inode = Some(log.metadata()?.ino());
        if inode != known {
            fsutil::sync_folder(&self.folder)?;
        }
        Ok(inode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wait_covers_the_commits_before_it_and_syncs_only_once_for_them() {
        let folder = tempfile::tempdir().unwrap();
        let sync = Arc::new(LogSync::new(&folder.path().join("db")));
        std::fs::write(folder.path().join("db-wal"), b"log").unwrap();
        sync.commit();
        sync.commit();
        sync.wait().await.unwrap();
        assert_eq!(sync.disk.lock().await.synced, 2);
        assert!(sync.disk.lock().await.inode.is_some());

        // Nothing new was committed: the disk is not touched, so that a broken log does not matter.
        std::fs::remove_file(folder.path().join("db-wal")).unwrap();
        std::fs::create_dir(folder.path().join("db-wal")).unwrap();
        sync.wait().await.unwrap();
    }

    #[tokio::test]
    async fn a_log_that_is_gone_was_moved_into_the_database() {
        let folder = tempfile::tempdir().unwrap();
        let sync = Arc::new(LogSync::new(&folder.path().join("db")));
        sync.commit();
        sync.wait().await.unwrap();
    }

    #[tokio::test]
    async fn after_a_failed_sync_nothing_counts_as_durable_any_more() {
        let folder = tempfile::tempdir().unwrap();
        // A loop of links cannot be opened, by nobody.
        let log = folder.path().join("db-wal");
        std::os::unix::fs::symlink(&log, &log).unwrap();
        let sync = Arc::new(LogSync::new(&folder.path().join("db")));
        sync.commit();
        sync.wait().await.unwrap_err();
        std::fs::remove_file(&log).unwrap();
        let error = sync.wait().await.unwrap_err();
        assert!(error.to_string().contains("restart"), "{error}");
    }
}
