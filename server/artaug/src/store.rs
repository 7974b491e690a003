//! The job's objects (images, LoRA files, checkpoints) under their content address, within a quota and inside one folder.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use concord_common::{
    Digest,
    fsutil::{sweep_unfinished, write_atomic},
};

/// Largest object that is read back.
const MAX_OBJECT: u64 = 8 << 30;

/// A folder of objects named by the BLAKE3 digest of their bytes.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    quota: u64,
    used: u64,
}

/// Why an object cannot be kept or given.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The quota is used up.
    #[error(
        "the job may keep {quota} bytes and keeps {used}: no room for {wanted} more; raise `limits.disk` or lower the counts"
    )]
    Quota {
        /// The limit in bytes.
        quota: u64,
        /// Bytes kept.
        used: u64,
        /// Bytes of the new object.
        wanted: u64,
    },
    /// Nothing under this address.
    #[error("no object {0} in the job's folder")]
    Missing(Digest),
    /// Bytes of another address.
    #[error(
        "the object {wanted} came out as {found}: it was made by another version, another number of threads or another machine"
    )]
    Different {
        /// The address that was wanted.
        wanted: Digest,
        /// That of the bytes.
        found: Digest,
    },
    /// The bytes are not those of the address.
    #[error(
        "the object {0} is damaged; a worker that takes the job up fetches it or makes it again"
    )]
    Damaged(Digest),
}

impl Store {
    /// Opens the folder, makes it if need be, removes what an interrupted write left, and counts what is there.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn open(folder: &Path, quota: u64) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Io {
            path: folder.to_owned(),
            source,
        };
        fs::create_dir_all(folder).map_err(failed)?;
        sweep_unfinished(folder).map_err(failed)?;
        let mut used = 0;
        for entry in fs::read_dir(folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let is_object = entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.parse::<Digest>().is_ok());
            if is_object {
                used += entry.metadata().map_err(failed)?.len();
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
            quota,
            used,
        })
    }

    /// Bytes kept.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// The file of an object, whether it is there or not.
    fn path(&self, digest: Digest) -> PathBuf {
        self.folder.join(digest.to_string())
    }

    /// Keeps bytes that must have this address: an object from elsewhere, or one that was made again.
    ///
    /// # Errors
    /// [`StoreError::Different`] if they have another; else as [`Store::put`].
    pub fn put_as(&mut self, wanted: Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let found = Digest::of(bytes);
        if found != wanted {
            return Err(StoreError::Different { wanted, found });
        }
        self.put(bytes).map(|_| ())
    }

    /// Keeps `bytes` and gives their address; what is there already costs nothing. What is there damaged is replaced.
    ///
    /// # Errors
    /// If the quota is used up or the file system refuses.
    pub fn put(&mut self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        let path = self.path(digest);
        let wanted = bytes.len() as u64;
        let there = fs::metadata(&path).map_or(0, |metadata| metadata.len());
        if there == wanted && fs::read(&path).is_ok_and(|kept| kept == bytes) {
            return Ok(digest);
        }
        let others = self.used.saturating_sub(there);
        if others.saturating_add(wanted) > self.quota {
            return Err(StoreError::Quota {
                quota: self.quota,
                used: self.used,
                wanted,
            });
        }
        write_atomic(&path, bytes, 0o600).map_err(|source| StoreError::Io { path, source })?;
        self.used = others + wanted;
        Ok(digest)
    }

    /// The bytes of an object, checked against its address.
    ///
    /// # Errors
    /// If it is missing, damaged or cannot be read.
    pub fn get(&self, digest: Digest) -> Result<Vec<u8>, StoreError> {
        let path = self.path(digest);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() > MAX_OBJECT => return Err(StoreError::Damaged(digest)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::Missing(digest));
            }
            _ => {}
        }
        let bytes = fs::read(&path).map_err(|source| StoreError::Io { path, source })?;
        if Digest::of(&bytes) == digest {
            Ok(bytes)
        } else {
            Err(StoreError::Damaged(digest))
        }
    }

    /// Removes every object that `is_needed` does not name, and gives their number.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn sweep(&mut self, is_needed: impl Fn(Digest) -> bool) -> Result<usize, StoreError> {
        let failed = |source| StoreError::Io {
            path: self.folder.clone(),
            source,
        };
        let mut unneeded = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let digest = name.to_str().and_then(|name| name.parse::<Digest>().ok());
            unneeded.extend(digest.filter(|digest| !is_needed(*digest)));
        }
        for digest in &unneeded {
            self.remove(*digest)?;
        }
        Ok(unneeded.len())
    }

    /// Removes an object that nothing refers to any more, such as an outdated checkpoint.
    ///
    /// # Errors
    /// If the file system refuses; an object that is not there is none.
    pub fn remove(&mut self, digest: Digest) -> Result<(), StoreError> {
        let path = self.path(digest);
        let length = match fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(StoreError::Io { path, source }),
        };
        fs::remove_file(&path).map_err(|source| StoreError::Io { path, source })?;
        self.used = self.used.saturating_sub(length);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use concord_common::fsutil::UNFINISHED;

    use super::*;

    #[test]
    fn an_object_is_found_under_its_address_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 100).unwrap();
        let digest = store.put(b"image").unwrap();
        assert_eq!(store.put(b"image").unwrap(), digest);
        let store = Store::open(folder.path(), 100).unwrap();
        assert_eq!(
            (store.used(), store.get(digest).unwrap()),
            (5, b"image".to_vec())
        );
    }

    #[test]
    fn the_quota_holds_and_what_is_there_already_costs_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 8).unwrap();
        let digest = store.put(b"12345").unwrap();
        let error = store.put(b"6789").unwrap_err();
        assert!(error.to_string().contains("limits.disk"), "{error}");
        assert!(store.put(b"12345").is_ok());
        store.remove(digest).unwrap();
        store.remove(digest).unwrap();
        assert!(store.put(b"6789").is_ok());
        assert!(matches!(store.get(digest), Err(StoreError::Missing(_))));
    }

    #[test]
    fn a_damaged_object_is_not_given_and_can_be_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 1000).unwrap();
        let digest = store.put(b"image").unwrap();
        // Shorter, as long, and longer.
        for damaged in [&b"imag"[..], b"imagf", b"images and more"] {
            fs::write(store.path(digest), damaged).unwrap();
            let mut store = Store::open(folder.path(), 20).unwrap();
            assert!(matches!(store.get(digest), Err(StoreError::Damaged(_))));
            store.put(b"image").unwrap();
            assert_eq!(
                (store.used(), store.get(digest).unwrap()),
                (5, b"image".to_vec())
            );
        }
    }

    #[test]
    fn an_object_made_again_must_come_out_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 1000).unwrap();
        let digest = Digest::of(b"image");
        assert!(matches!(
            store.put_as(digest, b"other"),
            Err(StoreError::Different { .. })
        ));
        store.put_as(digest, b"image").unwrap();
        assert_eq!(store.get(digest).unwrap(), b"image");
    }

    #[test]
    fn only_what_is_needed_outlives_a_sweep() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 1000).unwrap();
        let (needed, other) = (store.put(b"needed").unwrap(), store.put(b"other").unwrap());
        assert_eq!(store.sweep(|digest| digest == needed).unwrap(), 1);
        assert!(store.get(needed).is_ok());
        assert!(matches!(store.get(other), Err(StoreError::Missing(_))));
        assert_eq!(store.used(), 6);
    }

    #[test]
    fn what_an_interrupted_write_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let left = folder.path().join(format!("{UNFINISHED}Ab12"));
        fs::write(&left, b"half").unwrap();
        fs::write(folder.path().join("notes"), b"kept").unwrap();
        let store = Store::open(folder.path(), 10).unwrap();
        assert_eq!(store.used(), 0);
        assert!(!left.exists() && folder.path().join("notes").exists());
    }
}
