//! The egress log: one JSON object a line for everything that leaves, on the disk before it leaves.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{File, OpenOptions},
    io::{self, BufRead as _, BufReader, Write as _},
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
    /// The wish to take part in a round, or to keep the lease on it.
    Claim {
        /// Round.
        round: RoundNumber,
    },
    /// What is about to be sent: the header of an update.
    Announcement {
        /// Round.
        round: RoundNumber,
        /// BLAKE3 of the whole payload.
        digest: Digest,
        /// Bytes of the whole payload.
        size: u64,
        /// Training examples behind it.
        examples: u64,
    },
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
        /// Bytes of names and numbers.
        #[serde(default)]
        bytes: u64,
        /// Which attempt this is.
        #[serde(default = "first", skip_serializing_if = "is_first")]
        attempt: u32,
    },
    /// A no to a job.
    Decline {
        /// For programs.
        code: ErrorCode,
        /// For people.
        sentence: String,
        /// Which attempt this is.
        #[serde(default = "first", skip_serializing_if = "is_first")]
        attempt: u32,
    },
}

fn first() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
fn is_first(attempt: &u32) -> bool {
    *attempt == 1
}

/// Where lines go: the log's file; something that fails in tests.
pub(super) trait Store {
    /// Appends and syncs.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Forgets all bytes from `length` on, and syncs.
    fn cut(&mut self, length: u64) -> io::Result<()>;
}

impl Store for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)?;
        self.sync_data()
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        self.set_len(length)?;
        self.sync_data()
    }
}

/// The open log.
#[derive(Debug)]
pub(super) struct EgressLog<S = File> {
    path: PathBuf,
    store: S,
    /// Bytes of whole lines.
    length: u64,
    /// Why the end of the file is not a whole line, and could not be made one.
    broken: Option<String>,
    accounts: Accounts,
}

/// What has left, by job.
pub(super) type Accounts = HashMap<JobId, Account>;

/// What has left for a job.
#[derive(Debug, Default)]
pub(super) struct Account {
    /// Bytes of payloads and reports.
    spent: u64,
    /// The last attempt to send an update.
    last: Option<Attempt>,
}

#[derive(Debug)]
struct Attempt {
    round: RoundNumber,
    digest: Digest,
    offset: u64,
    bytes: u64,
}

impl Account {
    /// Bytes that have left when an update is to be sent from byte `offset` on. Each attempt counts with all that it may send; once the server
    /// asks for the rest of the same update, the last attempt counts with what has arrived of it. So a server that is busy, or a connection that
    /// breaks, does not use a job's budget up.
    fn spent_before(&self, round: RoundNumber, digest: Digest, offset: u64) -> u64 {
        match &self.last {
            Some(last) if (last.round, last.digest) == (round, digest) => {
                let arrived = offset.saturating_sub(last.offset).min(last.bytes);
                self.spent.saturating_sub(last.bytes - arrived)
            }
            _ => self.spent,
        }
    }

    fn add(&mut self, what: &What) {
        match *what {
            What::Contribution {
                round,
                digest,
                offset,
                bytes,
                ..
            } => {
                let before = self.spent_before(round, digest, offset);
                self.spent = before.saturating_add(bytes);
                self.last = Some(Attempt {
                    round,
                    digest,
                    offset,
                    bytes,
                });
            }
            What::Metrics { bytes, .. } => self.spent = self.spent.saturating_add(bytes),
            What::Claim { .. } | What::Announcement { .. } | What::Decline { .. } => {}
        }
    }
}

impl EgressLog {
    /// Opens or makes it (0600) and adds up what has left. A torn last line was never synced, so what it speaks of never left: it is
    /// cut off.
    pub(super) fn open(path: &Path) -> Result<Self, EgressError> {
        let io = |source: io::Error| EgressError::io(path, &source);
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(io)?;
        let end = file.metadata().map_err(io)?.len();
        let Lines { whole, accounts } = read(path, &file)?;
        if whole < end {
            let bytes = end - whole;
            tracing::warn!(path = %path.display(), bytes, "the last line of the egress log was torn; it is cut off, as what it speaks of never left");
            file.cut(whole).map_err(io)?;
        }
        Ok(Self::over(path, file, whole, accounts))
    }
}

#[cfg(test)]
impl EgressLog {
    /// The same file, open for reading only.
    pub(super) fn unwritable(&self) -> Self {
        let file = File::open(&self.path).expect("it has been opened before");
        Self::over(&self.path, file, self.length, Accounts::new())
    }
}

impl<S: Store> EgressLog<S> {
    pub(super) fn over(path: &Path, store: S, length: u64, accounts: Accounts) -> Self {
        Self {
            path: path.to_path_buf(),
            store,
            length,
            broken: None,
            accounts,
        }
    }

    /// Appends and syncs. What a failed attempt has left of a line is cut off again; if that fails too, nothing more is written, as
    /// the next line would be appended to a torn one.
    pub(super) fn write(&mut self, entry: &Entry) -> Result<(), EgressError> {
        if let Some(reason) = &self.broken {
            return Err(EgressError::Broken {
                path: self.path.clone(),
                reason: reason.clone(),
            });
        }
        let mut line = serde_json::to_vec(entry)
            .map_err(|error| EgressError::io(&self.path, &error.into()))?;
        line.push(b'\n');
        if let Err(source) = self.store.append(&line) {
            if let Err(error) = self.store.cut(self.length) {
                tracing::error!(path = %self.path.display(), %error, "a torn line of the egress log cannot be cut off; nothing leaves until the daemon is started anew");
                self.broken = Some(source.to_string());
            }
            return Err(EgressError::io(&self.path, &source));
        }
        self.length += line.len() as u64;
        add(&mut self.accounts, entry);
        Ok(())
    }

    /// Bytes that have left for a job, of payloads and reports.
    pub(super) fn spent(&self, job: &JobId) -> u64 {
        self.accounts.get(job).map_or(0, |account| account.spent)
    }

    /// The same when an update is to be sent from byte `offset` on, because the server has got what is before it and nothing else.
    pub(super) fn spent_before(
        &self,
        job: &JobId,
        round: RoundNumber,
        digest: Digest,
        offset: u64,
    ) -> u64 {
        self.accounts
            .get(job)
            .map_or(0, |account| account.spent_before(round, digest, offset))
    }

    #[cfg(test)]
    pub(super) fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }
}

/// What is in a log.
struct Lines {
    /// Bytes up to the end of the last whole line.
    whole: u64,
    accounts: Accounts,
}

/// Reads all lines. The last one is torn if its end is missing or it is no JSON (as after a power cut, when a file has got its length but
/// not all its bytes); anything strange before it, or whole JSON of another kind, is not of this gate's making.
fn read(path: &Path, file: &File) -> Result<Lines, EgressError> {
    let io = |source: io::Error| EgressError::io(path, &source);
    let mut lines = Lines {
        whole: 0,
        accounts: Accounts::new(),
    };
    let mut reader = BufReader::new(file);
    let mut text = Vec::new();
    for line in 1.. {
        text.clear();
        let bytes = reader.read_until(b'\n', &mut text).map_err(io)?;
        if text.last() != Some(&b'\n') {
            break;
        }
        match serde_json::from_slice::<Entry>(&text) {
            Ok(entry) => add(&mut lines.accounts, &entry),
            Err(error) => {
                let last = reader.fill_buf().map_err(io)?.is_empty();
                if last && !error.is_data() {
                    break;
                }
                return Err(EgressError::Log {
                    path: path.to_path_buf(),
                    line,
                    reason: error.to_string(),
                });
            }
        }
        lines.whole += bytes as u64;
    }
    Ok(lines)
}

fn add(accounts: &mut Accounts, entry: &Entry) {
    accounts
        .entry(entry.job.clone())
        .or_default()
        .add(&entry.what);
}
