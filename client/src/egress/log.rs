//! The egress log: one JSON object a line for everything that leaves, on the disk before it leaves.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{File, OpenOptions},
    io::{self, BufRead as _, BufReader, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use concord_common::{Digest, ErrorCode, JobId, RoundNumber};
use serde::{Deserialize, Serialize};

use super::EgressError;

/// A line of the log.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    /// RFC 3339.
    pub(super) time: String,
    /// Where it goes.
    pub(super) server: String,
    /// For which job.
    pub(super) job: JobId,
    /// What leaves.
    #[serde(flatten)]
    pub(super) what: What,
}

/// What leaves.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(super) enum What {
    /// An update of the global adapter.
    Contribution {
        /// Round.
        round: RoundNumber,
        /// Number of tensors.
        tensors: u64,
        /// First byte of this attempt; above 0 when an upload is taken up again.
        offset: u64,
        /// Bytes of this attempt.
        bytes: u64,
        /// BLAKE3 of the whole payload.
        digest: Digest,
        /// L2 norm.
        norm: f64,
        /// Training examples behind it.
        examples: u64,
    },
    /// Named numbers.
    Metrics {
        /// Round.
        round: RoundNumber,
        /// When in the round.
        point: String,
        /// The numbers.
        metrics: BTreeMap<String, f64>,
    },
    /// A no to a job.
    Decline {
        /// For programs.
        code: ErrorCode,
        /// For people.
        sentence: String,
    },
}

/// The open log.
#[derive(Debug)]
pub(super) struct EgressLog {
    path: PathBuf,
    file: File,
    spent: HashMap<JobId, u64>,
}

impl EgressLog {
    /// Opens or makes it (0600) and adds up what has left. A last line without its end was never synced, so what it speaks of
    /// never left: it is cut off.
    pub(super) fn open(path: &Path) -> Result<Self, EgressError> {
        let io = |source| EgressError::Io {
            path: path.to_path_buf(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(io)?;
        let mut spent = HashMap::new();
        let mut whole = 0;
        let mut line = 0;
        let mut reader = BufReader::new(&file);
        let mut text = Vec::new();
        loop {
            text.clear();
            let bytes = reader.read_until(b'\n', &mut text).map_err(io)?;
            if bytes == 0 || text.last() != Some(&b'\n') {
                break;
            }
            line += 1;
            whole += bytes as u64;
            let entry: Entry = serde_json::from_slice(&text).map_err(|error| EgressError::Log {
                path: path.to_path_buf(),
                line,
                reason: error.to_string(),
            })?;
            add(&mut spent, &entry);
        }
        file.set_len(whole).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
            spent,
        })
    }

    /// Appends and syncs.
    pub(super) fn write(&mut self, entry: &Entry) -> Result<(), EgressError> {
        let written = (|| -> io::Result<()> {
            let mut line = serde_json::to_vec(entry)?;
            line.push(b'\n');
            self.file.write_all(&line)?;
            self.file.sync_data()
        })();
        written.map_err(|source| EgressError::Io {
            path: self.path.clone(),
            source,
        })?;
        add(&mut self.spent, entry);
        Ok(())
    }

    /// Payload bytes logged for a job.
    pub(super) fn spent(&self, job: &JobId) -> u64 {
        self.spent.get(job).copied().unwrap_or(0)
    }
}

fn add(spent: &mut HashMap<JobId, u64>, entry: &Entry) {
    if let What::Contribution { bytes, .. } = entry.what {
        let total = spent.entry(entry.job.clone()).or_default();
        *total = total.saturating_add(bytes);
    }
}
