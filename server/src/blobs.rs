//! Adapter payloads in a folder, each under its digest's name.
//!
//! A blob is written to a temporary file beside the others and renamed when it is whole, so that a name always means whole
//! content, also after a crash.
//!
//! The database says which blobs are needed, but a blob is written before its row is committed. So it is deleted in two steps
//! while the server runs: [`BlobStore::condemn`] marks it, then the caller looks into the database once more, then
//! [`BlobStore::delete_condemned`] deletes it, unless it was written anew in between. A blob that was written and not yet
//! [settled](BlobStore::settled) cannot be condemned.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use concord_common::{Digest, fsutil};
use tempfile::NamedTempFile;

use crate::{config::Durability, writeback::Writeback};

/// The folder. All methods block.
#[derive(Debug, Clone)]
pub struct BlobStore {
    folder: PathBuf,
    durability: Durability,
    marks: Arc<Mutex<Marks>>,
}

/// What deleting has to know of blobs.
#[derive(Debug, Default)]
struct Marks {
    /// How often a blob was written without its row's having been committed.
    unsettled: BTreeMap<Digest, u32>,
    condemned: BTreeSet<Digest>,
}

impl BlobStore {
    /// Opens the folder, making it if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(folder: &Path, durability: Durability) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self {
            folder: folder.to_owned(),
            durability,
            marks: Arc::default(),
        })
    }

    fn marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a blob is, or would be.
    fn path(&self, digest: &Digest) -> PathBuf {
        self.folder.join(digest.to_string())
    }

    /// Begins a new blob.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn create(&self) -> io::Result<BlobWriter> {
        Ok(BlobWriter {
            file: NamedTempFile::new_in(&self.folder)?,
            bytes: 0,
            writeback: Writeback::new(self.durability, 0),
            store: self.clone(),
        })
    }

    /// Stores a whole payload.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn put(&self, payload: &[u8]) -> io::Result<Digest> {
        let digest = Digest::of(payload);
        let mut writer = self.create()?;
        writer.write_all(payload)?;
        writer.finish(&digest)?;
        Ok(digest)
    }

    /// Opens a blob for reading at any offset.
    ///
    /// # Errors
    /// If there is none, or it cannot be opened.
    pub fn get(&self, digest: &Digest) -> io::Result<File> {
        File::open(self.path(digest))
    }

    /// The row that refers to a blob which was just written is committed: from now on the database alone says whether it is
    /// needed. To be called once for each time that it was written; without it the blob stays until the next start.
    pub fn settled(&self, digest: &Digest) {
        let mut marks = self.marks();
        if let Some(count) = marks.unsettled.get_mut(digest) {
            *count -= 1;
            if *count == 0 {
                marks.unsettled.remove(digest);
            }
        }
    }

    /// Marks a blob that the database does not refer to, to be deleted; false if someone is about to refer to it.
    #[must_use]
    pub fn condemn(&self, digest: &Digest) -> bool {
        let mut marks = self.marks();
        let free = !marks.unsettled.contains_key(digest);
        if free {
            marks.condemned.insert(*digest);
        }
        free
    }

    /// Takes the mark of [`BlobStore::condemn`] away.
    pub fn spare(&self, digest: &Digest) {
        self.marks().condemned.remove(digest);
    }

    /// Deletes a blob that is still condemned: true if it was, and has not been written anew since.
    ///
    /// # Errors
    /// If it cannot be deleted; it then stays until the next start.
    pub fn delete_condemned(&self, digest: &Digest) -> io::Result<bool> {
        // Deleted under the lock: a writer of the same blob gives it its name after it has taken the mark away.
        let mut marks = self.marks();
        if !marks.condemned.remove(digest) {
            return Ok(false);
        }
        fs::remove_file(self.path(digest)).map(|()| true)
    }

    /// Deletes every file that is no blob in `keep`, and gives their number. Only for the start of the server: a blob that
    /// is just being written would go too.
    ///
    /// # Errors
    /// If the folder cannot be read or a file cannot be deleted.
    pub fn sweep(&self, keep: &BTreeSet<Digest>) -> io::Result<u64> {
        let mut deleted = 0;
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let digest = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if digest.is_none_or(|digest: Digest| !keep.contains(&digest)) {
                fs::remove_file(entry.path())?;
                deleted += 1;
            }
        }
        Ok(deleted)
    }
}

/// A blob that is being written; dropped before [`BlobWriter::finish`] it leaves nothing behind.
#[derive(Debug)]
pub struct BlobWriter {
    file: NamedTempFile,
    bytes: u64,
    writeback: Writeback,
    store: BlobStore,
}

impl Write for BlobWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let count = self.file.write(buf)?;
        self.bytes += count as u64;
        self.writeback.written(self.file.as_file(), self.bytes);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl BlobWriter {
    /// Gives the blob its name, which its writer has computed on the way: durably if so configured. Returns its size.
    ///
    /// # Errors
    /// If it cannot be synced or renamed.
    pub fn finish(self, digest: &Digest) -> io::Result<u64> {
        let durable = self.store.durability == Durability::Power;
        if durable {
            self.file.as_file().sync_all()?;
        }
        {
            let mut marks = self.store.marks();
            *marks.unsettled.entry(*digest).or_default() += 1;
            marks.condemned.remove(digest);
        }
        self.file
            .persist(self.store.path(digest))
            .map_err(|error| error.error)?;
        if durable {
            fsutil::sync_folder(&self.store.folder)?;
        }
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn store() -> (tempfile::TempDir, BlobStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = BlobStore::open(&folder.path().join("blobs"), Durability::Power).unwrap();
        (folder, store)
    }

    #[test]
    fn a_blob_is_found_by_its_digest_and_read_at_an_offset() {
        let (_folder, store) = store();
        let digest = store.put(b"adapter").unwrap();
        assert_eq!(digest, Digest::of(b"adapter"));
        let mut buf = [0; 3];
        store
            .get(&digest)
            .unwrap()
            .read_exact_at(&mut buf, 2)
            .unwrap();
        assert_eq!(&buf, b"apt");
        assert!(store.get(&Digest::of(b"other")).is_err());
    }

    #[test]
    fn an_unfinished_blob_leaves_nothing_behind() {
        let (folder, store) = store();
        let mut writer = store.create().unwrap();
        writer.write_all(b"half").unwrap();
        drop(writer);
        assert_eq!(
            fs::read_dir(folder.path().join("blobs")).unwrap().count(),
            0
        );
    }

    #[test]
    fn a_condemned_blob_is_deleted_unless_it_was_written_anew_in_between() {
        let (_folder, store) = store();
        let digest = store.put(b"adapter").unwrap();
        assert!(!store.condemn(&digest), "its row is not there yet");
        store.settled(&digest);
        assert!(store.condemn(&digest));
        store.put(b"adapter").unwrap();
        assert!(!store.delete_condemned(&digest).unwrap());
        assert!(store.get(&digest).is_ok());

        store.settled(&digest);
        assert!(store.condemn(&digest));
        store.spare(&digest);
        assert!(!store.delete_condemned(&digest).unwrap());
        assert!(store.condemn(&digest));
        assert!(store.delete_condemned(&digest).unwrap());
        assert!(store.get(&digest).is_err());
    }

    #[test]
    fn two_writers_of_one_blob_both_have_to_settle() {
        let (_folder, store) = store();
        let digest = store.put(b"adapter").unwrap();
        store.put(b"adapter").unwrap();
        store.settled(&digest);
        assert!(!store.condemn(&digest));
        store.settled(&digest);
        assert!(store.condemn(&digest));
    }

    #[test]
    fn the_sweep_keeps_what_is_referenced() {
        let (_folder, store) = store();
        let kept = store.put(b"kept").unwrap();
        let dropped = store.put(b"dropped").unwrap();
        assert_eq!(store.sweep(&BTreeSet::from([kept])).unwrap(), 1);
        assert!(store.get(&kept).is_ok());
        assert!(store.get(&dropped).is_err());
    }
}
