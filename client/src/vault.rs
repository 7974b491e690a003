//! The vault: what must never leave a silo, on its disk. Private adapter, head, optimiser state, the best model.
//!
//! One folder a job, mode 0700; one file a record, mode 0600, replaced atomically. A file says whose it is (job, silo, backbone,
//! specification) and carries a BLAKE3 digest over all of it, so that a torn, altered or foreign file is refused by name and
//! never half-loaded.
//!
//! ```text
//! magic "CCVAULT\0" | version u32 | header bytes u32 | body bytes u64 | BLAKE3 of header and body | header (JSON) | body
//! ```
//! Integers are little-endian. There is no function here that gives anything to a network.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use concord_common::{Digest, JobId, RoundNumber, SiloId, fsutil};
use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;

const MAGIC: &[u8; 8] = b"CCVAULT\0";
const VERSION: u32 = 1;
/// Magic, version, the two sizes and the digest.
const PREAMBLE_BYTES: usize = 8 + 4 + 4 + 8 + 32;
const MAX_HEADER_BYTES: usize = 256 * 1024;

/// What a vault file holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Record {
    /// All that training goes on from: adapters, head, optimiser, best model so far.
    State,
    /// The finished job's personal model, for use.
    Model,
}

impl Record {
    fn file_name(self) -> &'static str {
        match self {
            Self::State => "state.vault",
            Self::Model => "model.vault",
        }
    }
}

/// Whose a record is. All of it must match before a body is handed out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Binding {
    /// Job.
    pub job: JobId,
    /// Silo.
    pub silo: SiloId,
    /// BLAKE3 of the backbone's weights.
    pub backbone: Digest,
    /// BLAKE3 of the job's specification as the server sent it.
    pub spec: Digest,
}

/// The readable part of a vault file. It holds no tensors and no rows.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// What the body is.
    pub record: Record,
    /// Whose it is.
    pub binding: Binding,
    /// Last round that went into it.
    pub round: RoundNumber,
    /// Name of the task in the silo's configuration.
    pub task: String,
    /// What the personal model reached, by split and metric; filled when the job has ended.
    #[serde(default)]
    pub metrics: BTreeMap<String, BTreeMap<String, f64>>,
    /// The specification's text.
    pub spec_toml: String,
}

/// A vault that cannot be used, or a file in it that is refused.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// A file or folder could not be read or written.
    #[error("vault {}: {source}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Not a vault file, or one of another version.
    #[error("vault file {} is refused: {reason}", .file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Cut off, or with bytes added.
    #[error("vault file {} is torn: it should have {expected} bytes and has {found}; restore it from a backup or move it away", .file.display())]
    Torn {
        /// The file.
        file: PathBuf,
        /// Bytes by its own preamble.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// The digest does not fit.
    #[error("vault file {} was altered: its digest does not match; restore it from a backup or move it away", .file.display())]
    Altered {
        /// The file.
        file: PathBuf,
    },
    /// It belongs to another job, silo, backbone or specification.
    #[error("vault file {} is foreign: its {what} is {found}, wanted is {wanted}", .file.display())]
    Foreign {
        /// The file.
        file: PathBuf,
        /// `job`, `silo`, `backbone`, `specification` or `record`.
        what: &'static str,
        /// What the file says.
        found: String,
        /// What was asked for.
        wanted: String,
    },
}

/// The vault's folder.
#[derive(Clone, Debug)]
pub struct Vault {
    folder: PathBuf,
}

impl Vault {
    /// Opens `<state folder>/vault`, making it (0700) if need be.
    ///
    /// # Errors
    /// If the folder cannot be made, or others may read it.
    pub fn open(state_folder: &Path) -> Result<Self, VaultError> {
        let folder = state_folder.join("vault");
        private_folder(&folder)?;
        Ok(Self { folder })
    }

    /// Jobs that have a record here, sorted.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn jobs(&self) -> Result<Vec<JobId>, VaultError> {
        let at = |source| VaultError::Io {
            path: self.folder.clone(),
            source,
        };
        let mut jobs = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(at)? {
            let name = entry.map_err(at)?.file_name();
            if let Some(job) = name.to_str().and_then(|name| name.parse().ok()) {
                jobs.push(job);
            }
        }
        jobs.sort_unstable();
        Ok(jobs)
    }

    /// Replaces a record, atomically and durably.
    ///
    /// # Errors
    /// Any I/O error; the old record is then as it was.
    pub fn save(&self, header: &Header, body: &[u8]) -> Result<(), VaultError> {
        let file = self.file(&header.binding.job, header.record);
        let io = |source| VaultError::Io {
            path: file.clone(),
            source,
        };
        private_folder(&self.folder.join(header.binding.job.as_str()))?;
        let head = serde_json::to_vec(header).map_err(|error| io(error.into()))?;
        if head.len() > MAX_HEADER_BYTES {
            return Err(io(io::Error::other(
                "the specification is too long for a header",
            )));
        }
        let mut bytes = Vec::with_capacity(PREAMBLE_BYTES + head.len() + body.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(head.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
        bytes.extend_from_slice(digest(&head, body).as_bytes());
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(body);
        fsutil::write_atomic(&file, &bytes, 0o600).map_err(io)
    }

    /// A record of this job, silo, backbone and specification; `None` if there is none.
    ///
    /// # Errors
    /// If the file is torn, altered, foreign or cannot be read. Nothing of it is handed out then.
    pub fn load(
        &self,
        binding: &Binding,
        record: Record,
    ) -> Result<Option<(Header, Vec<u8>)>, VaultError> {
        let Some((header, body)) = self.read(&binding.job, record)? else {
            return Ok(None);
        };
        let file = self.file(&binding.job, record);
        same(&file, "silo", &header.binding.silo, &binding.silo)?;
        same(
            &file,
            "backbone",
            &header.binding.backbone,
            &binding.backbone,
        )?;
        same(&file, "specification", &header.binding.spec, &binding.spec)?;
        Ok(Some((header, body)))
    }

    /// A record of a job whose backbone and specification the caller learns from it, for `predict`, `evaluate` and `export`.
    /// Whoever uses the body checks the backbone's digest before.
    ///
    /// # Errors
    /// As [`Vault::load`].
    pub fn read(
        &self,
        job: &JobId,
        record: Record,
    ) -> Result<Option<(Header, Vec<u8>)>, VaultError> {
        let file = self.file(job, record);
        let bytes = match fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(VaultError::Io { path: file, source }),
        };
        let (header, body) = parse(&file, bytes)?;
        same(&file, "job", &header.binding.job, job)?;
        if header.record != record {
            return Err(VaultError::Foreign {
                file,
                what: "record",
                found: format!("{:?}", header.record),
                wanted: format!("{record:?}"),
            });
        }
        let spec = Digest::of(header.spec_toml.as_bytes());
        same(&file, "specification", &spec, &header.binding.spec)?;
        Ok(Some((header, body)))
    }

    /// Removes a record, if there is one.
    ///
    /// # Errors
    /// Any I/O error but that there is none.
    pub fn remove(&self, job: &JobId, record: Record) -> Result<(), VaultError> {
        let path = self.file(job, record);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(VaultError::Io { path, source })
            }
            _ => Ok(()),
        }
    }

    /// Where a record is kept.
    pub fn file(&self, job: &JobId, record: Record) -> PathBuf {
        self.folder.join(job.as_str()).join(record.file_name())
    }
}

fn same<T: PartialEq + ToString>(
    file: &Path,
    what: &'static str,
    found: &T,
    wanted: &T,
) -> Result<(), VaultError> {
    if found == wanted {
        return Ok(());
    }
    Err(VaultError::Foreign {
        file: file.to_path_buf(),
        what,
        found: found.to_string(),
        wanted: wanted.to_string(),
    })
}

fn digest(header: &[u8], body: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key("concord.v1 vault file");
    hasher.update(&(header.len() as u64).to_le_bytes());
    hasher.update(header);
    hasher.update(body);
    hasher.finalize().into()
}

fn parse(file: &Path, mut bytes: Vec<u8>) -> Result<(Header, Vec<u8>), VaultError> {
    let refuse = |reason: String| VaultError::Unreadable {
        file: file.to_path_buf(),
        reason,
    };
    let torn = |expected: usize| VaultError::Torn {
        file: file.to_path_buf(),
        expected: expected as u64,
        found: bytes.len() as u64,
    };
    if !MAGIC.starts_with(&bytes[..bytes.len().min(MAGIC.len())]) {
        return Err(refuse("it is no vault file".to_owned()));
    }
    let Some((preamble, _)) = bytes.split_first_chunk::<PREAMBLE_BYTES>() else {
        return Err(torn(PREAMBLE_BYTES));
    };
    let version = u32::from_le_bytes([preamble[8], preamble[9], preamble[10], preamble[11]]);
    if version != VERSION {
        return Err(refuse(format!(
            "it has version {version}, this program reads version {VERSION}"
        )));
    }
    let header_bytes =
        u32::from_le_bytes([preamble[12], preamble[13], preamble[14], preamble[15]]) as usize;
    let mut body_size = [0_u8; 8];
    body_size.copy_from_slice(&preamble[16..24]);
    let body_bytes = u64::from_le_bytes(body_size) as usize;
    let expected = PREAMBLE_BYTES
        .saturating_add(header_bytes)
        .saturating_add(body_bytes);
    if bytes.len() != expected {
        return Err(torn(expected));
    }
    let body_at = PREAMBLE_BYTES + header_bytes;
    if digest(&bytes[PREAMBLE_BYTES..body_at], &bytes[body_at..]).as_bytes()[..] != preamble[24..] {
        return Err(VaultError::Altered {
            file: file.to_path_buf(),
        });
    }
    let header = serde_json::from_slice(&bytes[PREAMBLE_BYTES..body_at])
        .map_err(|error| refuse(format!("its header cannot be read: {error}")))?;
    bytes.drain(..body_at);
    Ok((header, bytes))
}

/// Makes a folder with mode 0700; an existing one must not be open to others.
pub(crate) fn private_folder(path: &Path) -> Result<(), VaultError> {
    let io = |source| VaultError::Io {
        path: path.to_path_buf(),
        source,
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io)?;
    let mode = fs::metadata(path).map_err(io)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(io(io::Error::other(format!(
            "it is open to others (mode {mode:03o}); run chmod 700 on it"
        ))));
    }
    Ok(())
}
