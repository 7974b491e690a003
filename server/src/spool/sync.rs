//! Group commit: uploads that end at about the same time are synced to the disk together.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use concord_common::fsutil;
use tokio::sync::oneshot;

use crate::metrics;

/// Files of one group that are synced at the same time, so that the file system can join their journal entries.
const PARALLEL: usize = 8;

type Answer = oneshot::Sender<io::Result<()>>;

/// Those who wait for the disk. The first of them takes all who have come until the disk is free.
#[derive(Debug)]
pub(super) struct GroupSync {
    folder: PathBuf,
    waiting: Mutex<Vec<(Arc<File>, Answer)>>,
    disk: tokio::sync::Mutex<()>,
}

impl GroupSync {
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            waiting: Mutex::default(),
            disk: tokio::sync::Mutex::default(),
        }
    }

    /// Returns once the file's bytes and its name are on the disk.
    pub(super) async fn sync(&self, file: Arc<File>) -> io::Result<()> {
        let (answer, answered) = oneshot::channel();
        self.lock().push((file, answer));
        {
            let _disk = self.disk.lock().await;
            let group = std::mem::take(&mut *self.lock());
            // Empty if the one before has taken this file along.
            if !group.is_empty() {
                let folder = self.folder.clone();
                tokio::task::spawn_blocking(move || sync_group(group, &folder)).await?;
            }
        }
        answered
            .await
            .unwrap_or_else(|_| Err(io::Error::other("the thread that syncs broke off")))
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Arc<File>, Answer)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sync_group(group: Vec<(Arc<File>, Answer)>, folder: &Path) {
    metrics::spool_sync(group.len());
    let share = group.len().div_ceil(PARALLEL);
    let (results, names) = std::thread::scope(|scope| {
        let workers: Vec<_> = group
            .chunks(share)
            .map(|files| {
                scope.spawn(|| {
                    files
                        .iter()
                        .map(|(file, _)| file.sync_data())
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        // They have had their names since before they came here.
        let names = fsutil::sync_folder(folder);
        let results: Vec<io::Result<()>> = workers
            .into_iter()
            .zip(group.chunks(share))
            .flat_map(|(worker, files)| {
                worker.join().unwrap_or_else(|_| {
                    let broken = || Err(io::Error::other("the thread that syncs broke off"));
                    files.iter().map(|_| broken()).collect()
                })
            })
            .collect();
        (results, names)
    });
    for ((_, answer), result) in group.into_iter().zip(results) {
        let whole = result.and_then(|()| match &names {
            Ok(()) => Ok(()),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        });
        // A caller that has gone away needs no answer.
        let _ = answer.send(whole);
    }
}
