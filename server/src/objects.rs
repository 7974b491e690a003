//! What workers keep for their jobs: one folder for each job, one file for each object under its digest's name.
//!
//! An object is written to a temporary file beside the others and renamed when it is whole and its digest is right, and only
//! then its row is committed; so a row always means a whole file, also after a crash, which may leave files without a row for
//! the next start to sweep out. Rename and row, or row and deletion, are one step to others: whoever does them holds
//! [`ObjectStore::change`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use concord_common::{Digest, JobId, fsutil};
use tempfile::NamedTempFile;
use tokio::sync::{Mutex, MutexGuard};

use crate::{config::Durability, writeback::Writeback};

/// The folder of all jobs. All methods but [`ObjectStore::change`] block.
#[derive(Debug)]
pub struct ObjectStore {
    folder: PathBuf,
    durability: Durability,
    changes: Mutex<()>,
}

impl ObjectStore {
    /// Opens the folder, making it if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(folder: &Path, durability: Durability) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self {
            folder: folder.to_owned(),
            durability,
            changes: Mutex::new(()),
        })
    }

    /// Waits until nobody else changes files together with their rows, and keeps others from it as long as the guard lives.
    pub async fn change(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().await
    }

    fn path(&self, job: &JobId, digest: &Digest) -> PathBuf {
        self.folder.join(job.as_str()).join(digest.to_string())
    }

    /// Begins a new object of a job.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn create(&self, job: &JobId) -> io::Result<ObjectWriter> {
        let folder = self.folder.join(job.as_str());
        match DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) if self.durability == Durability::Power => fsutil::sync_folder(&self.folder)?,
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        Ok(ObjectWriter {
            file: NamedTempFile::new_in(&folder)?,
            hasher: blake3::Hasher::new(),
            bytes: 0,
            writeback: Writeback::new(self.durability, 0),
            durable: self.durability == Durability::Power,
            folder,
        })
    }

    /// Opens an object for reading at any offset.
    ///
    /// # Errors
    /// If there is none, or it cannot be opened.
    pub fn get(&self, job: &JobId, digest: &Digest) -> io::Result<File> {
        File::open(self.path(job, digest))
    }

    /// True if an object is there with this size. What its row says may have been lost since.
    ///
    /// # Errors
    /// If the file cannot be looked at.
    pub fn has(&self, job: &JobId, digest: &Digest, bytes: u64) -> io::Result<bool> {
        match fs::metadata(self.path(job, digest)) {
            Ok(metadata) => Ok(metadata.is_file() && metadata.len() == bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes an object; nothing happens if there is none.
    ///
    /// # Errors
    /// If it cannot be deleted.
    pub fn delete(&self, job: &JobId, digest: &Digest) -> io::Result<()> {
        match fs::remove_file(self.path(job, digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Deletes every file that is no object in `keep`, and gives their number. Only for the start of the server.
    ///
    /// # Errors
    /// If a folder cannot be read or a file cannot be deleted.
    pub fn sweep(&self, keep: &BTreeMap<JobId, BTreeSet<Digest>>) -> io::Result<u64> {
        let mut deleted = 0;
        for job in fs::read_dir(&self.folder)? {
            let job = job?;
            if !job.file_type()?.is_dir() {
                fs::remove_file(job.path())?;
                deleted += 1;
                continue;
            }
            let name = job.file_name();
            let name = name.to_str().and_then(|name| name.parse::<JobId>().ok());
            let objects = name.and_then(|name| keep.get(&name));
            for file in fs::read_dir(job.path())? {
                let file = file?;
                let digest = file.file_name();
                let digest = digest.to_str().and_then(|name| name.parse().ok());
                let is_kept = digest.is_some_and(|digest: Digest| {
                    objects.is_some_and(|objects| objects.contains(&digest))
                });
                if !is_kept {
                    fs::remove_file(file.path())?;
                    deleted += 1;
                }
            }
            if objects.is_none() {
                fs::remove_dir(job.path())?;
            }
        }
        Ok(deleted)
    }
}

/// An object that is being written; dropped before it has its name it leaves nothing behind.
#[derive(Debug)]
pub struct ObjectWriter {
    file: NamedTempFile,
    hasher: blake3::Hasher,
    bytes: u64,
    writeback: Writeback,
    durable: bool,
    folder: PathBuf,
}

impl ObjectWriter {
    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Digest of the bytes so far.
    pub fn digest(&self) -> Digest {
        self.hasher.finalize().into()
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.writeback.written(self.file.as_file(), self.bytes);
        Ok(())
    }

    /// Ends the object: its bytes are on the disk if so configured. The caller has compared [`ObjectWriter::digest`] with what was
    /// announced. It may take long, so nobody is to wait for the caller meanwhile.
    ///
    /// # Errors
    /// If it cannot be synced.
    pub fn sync(self) -> io::Result<WholeObject> {
        if self.durable {
            self.file.as_file().sync_all()?;
        }
        Ok(WholeObject {
            name: self.digest().to_string(),
            file: self.file,
            durable: self.durable,
            folder: self.folder,
        })
    }
}

/// An object that is whole and has no name yet; dropped it leaves nothing behind.
#[derive(Debug)]
pub struct WholeObject {
    file: NamedTempFile,
    name: String,
    durable: bool,
    folder: PathBuf,
}

impl WholeObject {
    /// Gives the object its name, durably if so configured. The caller holds [`ObjectStore::change`].
    ///
    /// # Errors
    /// If it cannot be renamed, or the folder not be synced.
    pub fn finish(self) -> io::Result<()> {
        self.file
            .persist(self.folder.join(self.name))
            .map_err(|error| error.error)?;
        if self.durable {
            fsutil::sync_folder(&self.folder)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn store() -> (tempfile::TempDir, ObjectStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = ObjectStore::open(&folder.path().join("artaug"), Durability::Power).unwrap();
        (folder, store)
    }

    fn job(name: &str) -> JobId {
        name.parse().unwrap()
    }

    fn put(store: &ObjectStore, job: &JobId, bytes: &[u8]) -> Digest {
        let mut writer = store.create(job).unwrap();
        for piece in bytes.chunks(3) {
            writer.write(piece).unwrap();
        }
        let digest = writer.digest();
        writer.sync().unwrap().finish().unwrap();
        digest
    }

    #[test]
    fn an_object_is_found_in_its_job_alone() {
        let (_folder, store) = store();
        let digest = put(&store, &job("a"), b"picture");
        assert_eq!(digest, Digest::of(b"picture"));
        let mut found = Vec::new();
        store
            .get(&job("a"), &digest)
            .unwrap()
            .read_to_end(&mut found)
            .unwrap();
        assert_eq!(found, b"picture");
        assert!(store.has(&job("a"), &digest, 7).unwrap());
        assert!(!store.has(&job("a"), &digest, 8).unwrap());
        assert!(!store.has(&job("b"), &digest, 7).unwrap());
        store.delete(&job("a"), &digest).unwrap();
        store.delete(&job("a"), &digest).unwrap();
        assert!(store.get(&job("a"), &digest).is_err());
    }

    #[test]
    fn an_unfinished_object_leaves_nothing_behind() {
        let (folder, store) = store();
        let mut writer = store.create(&job("a")).unwrap();
        writer.write(b"half").unwrap();
        drop(writer);
        let files = fs::read_dir(folder.path().join("artaug/a")).unwrap();
        assert_eq!(files.count(), 0);
    }

    #[test]
    fn the_sweep_keeps_what_has_a_row() {
        let (folder, store) = store();
        let kept = put(&store, &job("a"), b"kept");
        let dropped = put(&store, &job("a"), b"dropped");
        put(&store, &job("gone"), b"kept");
        fs::write(folder.path().join("artaug/a/.tmpX"), b"torn").unwrap();
        let keep = BTreeMap::from([(job("a"), BTreeSet::from([kept]))]);
        assert_eq!(store.sweep(&keep).unwrap(), 3);
        assert!(store.get(&job("a"), &kept).is_ok());
        assert!(store.get(&job("a"), &dropped).is_err());
        assert!(!folder.path().join("artaug/gone").exists());
    }
}
