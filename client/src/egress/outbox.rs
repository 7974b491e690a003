//! Checked updates on their way: one file a job, so that a daemon that was stopped sends the very same bytes again.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use concord_common::{Digest, JobId, RoundNumber, adapter::AdapterVersion, fsutil};
use serde::{Deserialize, Serialize};

use super::{Assignment, Cleared, EgressError};

/// First line of a file; the payload follows.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    round: RoundNumber,
    base: AdapterVersion,
    layout: Digest,
    examples: u64,
    payload: Digest,
}

/// The folder.
#[derive(Debug)]
pub(super) struct Outbox {
    folder: PathBuf,
}

impl Outbox {
    pub(super) fn open(folder: &Path) -> Result<Self, EgressError> {
        crate::vault::private_folder(folder)
            .map_err(|error| EgressError::io(folder, &io::Error::other(error.to_string())))?;
        Ok(Self {
            folder: folder.to_path_buf(),
        })
    }

    /// Replaces the job's file.
    pub(super) fn keep(&self, cleared: &Cleared) -> Result<(), EgressError> {
        let path = self.path(&cleared.job);
        let written = (|| -> io::Result<()> {
            let mut bytes = serde_json::to_vec(&Header {
                round: cleared.round,
                base: cleared.base,
                layout: cleared.layout.digest(),
                examples: cleared.examples,
                payload: cleared.digest(),
            })?;
            bytes.push(b'\n');
            bytes.extend_from_slice(cleared.payload());
            fsutil::write_atomic(&path, &bytes, 0o600)
        })();
        written.map_err(|source| EgressError::io(&path, &source))
    }

    /// The payload and its number of examples, if the job's file is for this very round and whole.
    pub(super) fn find(
        &self,
        assignment: &Assignment,
    ) -> Result<Option<(Bytes, u64)>, EgressError> {
        let path = self.path(&assignment.job);
        let bytes = match fs::read(&path) {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(EgressError::io(&path, &source)),
        };
        let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
            return Ok(None);
        };
        let Ok(header) = serde_json::from_slice::<Header>(&bytes[..end]) else {
            return Ok(None);
        };
        let payload = bytes.slice(end + 1..);
        let fits = header.round == assignment.round
            && header.base == assignment.base
            && header.layout == assignment.layout.digest()
            && header.payload == Digest::of(&payload);
        Ok(fits.then_some((payload, header.examples)))
    }

    pub(super) fn remove(&self, job: &JobId) -> Result<(), EgressError> {
        let path = self.path(job);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(EgressError::io(&path, &source))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, job: &JobId) -> PathBuf {
        self.folder.join(format!("{job}.update"))
    }
}
