//! The job's objects (images, LoRA files, checkpoints) under their content address, within a quota and inside one folder.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use concord_common::{Digest, fsutil::write_atomic};

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
    /// The bytes are not those of the address.
    #[error("the object {0} is damaged; delete its file and let the job make it again")]
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
        let mut used = 0;
        for entry in fs::read_dir(folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let metadata = entry.metadata().map_err(failed)?;
            let is_object = entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.parse::<Digest>().is_ok());
            if is_object {
                used += metadata.len();
            } else if metadata.is_file() && entry.file_name().to_string_lossy().starts_with(".tmp")
            {
                fs::remove_file(entry.path()).map_err(failed)?;
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
    pub fn path(&self, digest: Digest) -> PathBuf {
        self.folder.join(digest.to_string())
    }

    /// Keeps `bytes` and gives their address; what is there already costs nothing.
    ///
    /// # Errors
    /// If the quota is used up or the file system refuses.
    pub fn put(&mut self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        let path = self.path(digest);
        let wanted = bytes.len() as u64;
        if fs::metadata(&path).is_ok_and(|metadata| metadata.len() == wanted) {
            return Ok(digest);
        }
        if self.used.saturating_add(wanted) > self.quota {
            return Err(StoreError::Quota {
                quota: self.quota,
                used: self.used,
                wanted,
            });
        }
        write_atomic(&path, bytes, 0o600).map_err(|source| StoreError::Io { path, source })?;
        self.used += wanted;
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
        fs::write(store.path(digest), b"imag").unwrap();
        assert!(matches!(store.get(digest), Err(StoreError::Damaged(_))));
        store.put(b"image").unwrap();
        assert!(store.get(digest).is_ok());
    }

    #[test]
    fn what_an_interrupted_write_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".tmpAb12"), b"half").unwrap();
        fs::write(folder.path().join("notes"), b"kept").unwrap();
        let store = Store::open(folder.path(), 10).unwrap();
        assert_eq!(store.used(), 0);
        assert!(!folder.path().join(".tmpAb12").exists() && folder.path().join("notes").exists());
    }
}
