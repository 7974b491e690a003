//! Receipts that are kept: the server's signed word on each contribution, one JSON object a line in `receipts.jsonl`.
//!
//! A line holds everything that the signature is about (`docs/protocol.md`, Receipts), the signature and the public key that it
//! verifies with, so that a silo can prove later, and to others, what the server acknowledged.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use concord_common::{
    Digest, JobId, RoundNumber, SiloId, Timestamp, fsutil,
    round::Outcome,
    wire::{Receipt, ReceiptError, SIGNATURE_BYTES, SignedReceipt},
};
use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;

/// The file's name in the state folder.
const FILE: &str = "receipts.jsonl";

/// A line of the file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptReceipt {
    /// When it came here, RFC 3339.
    pub received_at: String,
    /// Who signed: BLAKE3 of the public key.
    pub key_id: Digest,
    /// The public key, 64 hex digits.
    pub public_key: String,
    /// Job.
    pub job: JobId,
    /// Round.
    pub round: RoundNumber,
    /// This silo.
    pub silo: SiloId,
    /// BLAKE3 of the payload.
    pub payload_digest: Digest,
    /// What became of the contribution.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// When the server recorded it, in milliseconds since 1970-01-01T00:00:00Z.
    pub recorded_at_ms: Timestamp,
    /// Ed25519, 128 hex digits.
    pub signature: String,
}

impl KeptReceipt {
    /// What is kept of a receipt that `public_key` has signed and that came at `now`.
    pub fn new(signed: &SignedReceipt, public_key: &[u8], now: Timestamp) -> Self {
        let receipt = signed.receipt.clone();
        Self {
            received_at: now.to_string(),
            key_id: key_id(public_key),
            public_key: to_hex(public_key),
            job: receipt.job,
            round: receipt.round,
            silo: receipt.silo,
            payload_digest: receipt.payload_digest,
            outcome: receipt.outcome,
            recorded_at_ms: receipt.recorded_at,
            signature: to_hex(&signed.signature),
        }
    }

    /// The receipt, without its signature.
    pub fn receipt(&self) -> Receipt {
        Receipt {
            job: self.job.clone(),
            round: self.round,
            silo: self.silo.clone(),
            payload_digest: self.payload_digest,
            outcome: self.outcome,
            recorded_at: self.recorded_at_ms,
        }
    }

    /// Checks the signature against the key in the line. Whose key it is, the caller must know.
    ///
    /// # Errors
    /// [`ReceiptError::Signature`], also if key or signature are not hexadecimal or of another length.
    pub fn verify(&self) -> Result<(), ReceiptError> {
        let unreadable = ReceiptError::Signature;
        let signature: [u8; SIGNATURE_BYTES] = from_hex(&self.signature)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(unreadable)?;
        let key = from_hex(&self.public_key).ok_or(unreadable)?;
        let signed = SignedReceipt {
            receipt: self.receipt(),
            signature,
        };
        signed.verify(&key)
    }
}

/// The name of a receipt key in logs and lines: BLAKE3 of its public half.
pub fn key_id(public_key: &[u8]) -> Digest {
    Digest::of(public_key)
}

/// The open file.
#[derive(Debug)]
pub struct Receipts {
    path: PathBuf,
    kept: Mutex<Kept>,
}

#[derive(Debug)]
struct Kept {
    file: File,
    /// Length of all whole lines.
    bytes: u64,
    last: Option<KeptReceipt>,
    /// Round and signature of each job's last receipt: a repeated one is always that.
    by_job: HashMap<JobId, (RoundNumber, String)>,
}

impl Receipts {
    /// Opens `<state folder>/receipts.jsonl` or makes it (0600). A last line without its end was never synced and is cut off: the
    /// server gives that receipt again. A whole line that cannot be read is left as it is, with a warning.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn open(state_folder: &Path) -> io::Result<Self> {
        let path = state_folder.join(FILE);
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)?;
        fsutil::sync_folder(state_folder)?;
        let mut kept = Kept {
            file,
            bytes: 0,
            last: None,
            by_job: HashMap::new(),
        };
        kept.read(&path)?;
        kept.file.set_len(kept.bytes)?;
        Ok(Self {
            path,
            kept: Mutex::new(kept),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends and syncs, unless it is there already.
    ///
    /// # Errors
    /// Any I/O error; nothing of the line stays then.
    pub fn keep(&self, receipt: KeptReceipt) -> io::Result<()> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.by_job.get(&receipt.job) == Some(&(receipt.round, receipt.signature.clone())) {
            return Ok(());
        }
        let mut line = serde_json::to_vec(&receipt)?;
        line.push(b'\n');
        // An earlier failure may have left a part of a line that could not be cut off then.
        let whole = kept.bytes;
        kept.file.set_len(whole)?;
        let written = kept
            .file
            .write_all(&line)
            .and_then(|()| kept.file.sync_data());
        if let Err(error) = written {
            if let Err(torn) = kept.file.set_len(whole) {
                tracing::warn!(error = %torn, "a torn line stays in the receipts until the next one");
            }
            return Err(error);
        }
        kept.bytes += line.len() as u64;
        kept.note(receipt);
        Ok(())
    }

    /// The newest receipt.
    pub fn last(&self) -> Option<KeptReceipt> {
        self.kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .last
            .clone()
    }

    /// Whether the newest receipt of this job is of this round.
    pub fn has(&self, job: &JobId, round: RoundNumber) -> bool {
        self.kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .by_job
            .get(job)
            .is_some_and(|(last, _)| *last == round)
    }
}

impl Kept {
    fn read(&mut self, path: &Path) -> io::Result<()> {
        let mut reader = BufReader::new(self.file.try_clone()?);
        let mut text = Vec::new();
        let mut line = 0;
        loop {
            text.clear();
            let bytes = reader.read_until(b'\n', &mut text)?;
            if bytes == 0 || text.last() != Some(&b'\n') {
                return Ok(());
            }
            line += 1;
            self.bytes += bytes as u64;
            match serde_json::from_slice::<KeptReceipt>(&text) {
                Ok(receipt) => self.note(receipt),
                Err(error) => {
                    tracing::warn!(path = %path.display(), line, %error, "a kept receipt cannot be read; it stays as it is");
                }
            }
        }
    }

    fn note(&mut self, receipt: KeptReceipt) {
        self.by_job.insert(
            receipt.job.clone(),
            (receipt.round, receipt.signature.clone()),
        );
        self.last = Some(receipt);
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |text, byte| {
            text + &format!("{byte:02x}")
        })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect()
}
