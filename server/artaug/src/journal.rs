//! The job's journal: one JSON line for each thing that is done and need not be done again. What is in it happened; a line that
//! a crash tore is cut off and its work done again.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use concord_common::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Longest line. A verdict on 5,000 pairs has about 600 kB.
const MAX_LINE: u64 = 16 << 20;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry<E> {
    /// Its number, counted from 0 without gaps.
    pub n: u64,
    /// When it was written.
    pub at: Timestamp,
    /// What happened.
    pub event: E,
}

/// An open journal; no second process can open it.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    next: u64,
}

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process works on the job.
    #[error("{0}: another process has it open; stop that one first")]
    InUse(PathBuf),
    /// A line before the last cannot be read: more than a crash does.
    #[error("{path}, line {line}: {what}; restore the file from a backup or start the job anew")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Its line, counted from 1.
        line: u64,
        /// What is wrong.
        what: String,
    },
    /// An event that is longer than a line may be.
    #[error("{path}: an event of {bytes} bytes is too long for a line")]
    Long {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
}

impl Journal {
    /// Opens a journal, or makes one, and reads what it holds. A torn last line is cut off.
    ///
    /// # Errors
    /// If another process has it open, a line other than the last is damaged, or the file system refuses.
    pub fn open<E: DeserializeOwned>(path: &Path) -> Result<(Self, Vec<Entry<E>>), JournalError> {
        let failed = |source| JournalError::Io {
            path: path.to_owned(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::InUse(path.to_owned())),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let length = file.metadata().map_err(failed)?.len();
        let (entries, sound) = read(&file, path, length)?;
        if sound < length {
            tracing::warn!(journal.file = %path.display(), bytes = length - sound, "torn last line cut off");
            file.set_len(sound).map_err(failed)?;
            file.sync_all().map_err(failed)?;
        }
        file.seek(SeekFrom::End(0)).map_err(failed)?;
        let next = entries.len() as u64;
        let path = path.to_owned();
        Ok((Self { file, path, next }, entries))
    }

    /// Writes one event; when this returns, it is on the disk.
    ///
    /// # Errors
    /// If the file system refuses. The line may then be torn, and the journal must be opened again.
    pub fn append<E: Serialize>(&mut self, event: E, at: Timestamp) -> Result<(), JournalError> {
        let failed = |source| JournalError::Io {
            path: self.path.clone(),
            source,
        };
        let entry = Entry {
            n: self.next,
            at,
            event,
        };
        let mut line = serde_json::to_vec(&entry).map_err(|error| failed(error.into()))?;
        line.push(b'\n');
        if line.len() as u64 > MAX_LINE {
            return Err(JournalError::Long {
                path: self.path.clone(),
                bytes: line.len(),
            });
        }
        self.file.write_all(&line).map_err(failed)?;
        self.file.sync_data().map_err(failed)?;
        self.next += 1;
        Ok(())
    }
}

/// The entries, and the number of bytes that hold them.
fn read<E: DeserializeOwned>(
    file: &File,
    path: &Path,
    length: u64,
) -> Result<(Vec<Entry<E>>, u64), JournalError> {
    let mut reader = BufReader::new(file);
    let (mut entries, mut sound) = (Vec::new(), 0);
    let mut line = Vec::new();
    while sound < length {
        line.clear();
        let count = reader
            .by_ref()
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .map_err(|source| JournalError::Io {
                path: path.to_owned(),
                source,
            })? as u64;
        let is_last = sound + count >= length;
        let number = entries.len() as u64;
        let read = line
            .strip_suffix(b"\n")
            .ok_or_else(|| "it has no end".to_owned())
            .and_then(|text| serde_json::from_slice(text).map_err(|error| error.to_string()))
            .and_then(|entry: Entry<E>| {
                if entry.n == number {
                    Ok(entry)
                } else {
                    Err(format!("its number is {}, expected {number}", entry.n))
                }
            });
        match read {
            Ok(entry) => entries.push(entry),
            Err(_) if is_last => break,
            Err(what) => {
                return Err(JournalError::Damaged {
                    path: path.to_owned(),
                    line: number + 1,
                    what,
                });
            }
        }
        sound += count;
    }
    Ok((entries, sound))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(events: &[&str]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let (mut journal, _) = Journal::open::<String>(&path).unwrap();
        for event in events {
            journal.append(event, Timestamp(7)).unwrap();
        }
        (folder, path)
    }

    fn read_back(path: &Path) -> Vec<String> {
        let (_, entries) = Journal::open::<String>(path).unwrap();
        entries.into_iter().map(|entry| entry.event).collect()
    }

    #[test]
    fn events_come_back_in_order_and_more_can_follow() {
        let (_folder, path) = written(&["a", "b\nc"]);
        let (mut journal, entries) = Journal::open::<String>(&path).unwrap();
        assert_eq!(entries.len(), 2);
        journal.append("d", Timestamp(8)).unwrap();
        drop(journal);
        assert_eq!(read_back(&path), ["a", "b\nc", "d"]);
    }

    #[test]
    fn a_line_torn_anywhere_is_cut_off_and_written_again() {
        let (_folder, path) = written(&["first", "second"]);
        let whole = std::fs::read(&path).unwrap();
        let first = whole.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        for length in first..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(read_back(&path), ["first"], "{length}");
            assert_eq!(std::fs::metadata(&path).unwrap().len(), first as u64);
            let (mut journal, _) = Journal::open::<String>(&path).unwrap();
            journal.append("second", Timestamp(7)).unwrap();
            drop(journal);
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn zeros_that_a_power_cut_left_at_the_end_are_cut_off() {
        let (_folder, path) = written(&["first"]);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend([0; 64]);
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(read_back(&path), ["first"]);
    }

    #[test]
    fn a_damaged_line_in_the_middle_is_named() {
        let (_folder, path) = written(&["a", "b", "c"]);
        let text = std::fs::read_to_string(&path).unwrap();
        for (wrong, line) in [
            (text.replace("\"b\"", "\"b"), "line 2"),
            (text.replace("\"n\":1", "\"n\":5"), "line 2"),
            (text.replacen('{', "", 1), "line 1"),
        ] {
            std::fs::write(&path, wrong).unwrap();
            let error = Journal::open::<String>(&path).unwrap_err().to_string();
            assert!(error.contains(line), "{error}");
        }
    }

    #[test]
    fn a_second_process_is_kept_out() {
        let (_folder, path) = written(&[]);
        let (_journal, _) = Journal::open::<String>(&path).unwrap();
        assert!(matches!(
            Journal::open::<String>(&path),
            Err(JournalError::InUse(_))
        ));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_crash_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("journal.jsonl");
            std::fs::write(&path, bytes).unwrap();
            let _ = Journal::open::<String>(&path);
        }
    }
}
