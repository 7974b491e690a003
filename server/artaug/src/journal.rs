//! The job's journal, the worker's copy of the server's: one JSON line for each thing that is done and need not be done again. What is in
//! it happened; a line that a crash tore is cut off, and its work done again if the server does not have it.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use concord_common::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Longest line without its newline: as much as goes to the server in one call.
pub const MAX_LINE: usize = 1 << 20;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry<E> {
    /// Its number, counted from 0 without gaps.
    pub n: u64,
    /// When it was written.
    pub at: Timestamp,
    /// Milliseconds worked on the job up to here, over all workers; see [`crate::course::Worked`].
    #[serde(default)]
    pub worked: u64,
    /// The most memory that a worker on the job has held up to here, over all workers, in bytes; none where nobody measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
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
    /// A whole line cannot be read: more than a crash does.
    #[error(
        "{path}, line {line}: {what}; it was written by another version of the worker, or the file is damaged: use that version, restore the \
         file from a backup, or start the job anew"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Its line, counted from 1.
        line: u64,
        /// What is wrong.
        what: String,
    },
    /// A line that does not follow the last one.
    #[error("{path}: line {number} cannot be added, the next is {next}")]
    Number {
        /// The file.
        path: PathBuf,
        /// The line's number.
        number: u64,
        /// The number that comes next.
        next: u64,
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

/// An event as a line, ready to be kept in more than one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its number, from 0.
    pub number: u64,
    /// Its bytes without a newline.
    pub bytes: Vec<u8>,
}

impl Journal {
    /// Opens a journal, or makes one, whose lines are those given (without newlines), and changes the file where it differs: it is the copy of
    /// a journal that is kept elsewhere. A torn last line is cut off.
    ///
    /// # Errors
    /// If another process has it open, a given line cannot be read, or the file system refuses.
    pub fn adopt<E: DeserializeOwned>(
        path: &Path,
        wanted: &[Vec<u8>],
    ) -> Result<(Self, Vec<Entry<E>>), JournalError> {
        let failed = |source| io_error(path, source);
        let entries = read(wanted.iter().map(Vec::as_slice), path)?;
        let mut file = locked(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed)?;
        let own = &bytes[..whole_lines(&bytes)];
        let same: Vec<&[u8]> = lines(own)
            .zip(wanted)
            .take_while(|(own, wanted)| own == wanted)
            .map(|(own, _)| own)
            .collect();
        let kept: usize = same.iter().map(|line| line.len() + 1).sum();
        if kept < bytes.len() || same.len() < wanted.len() {
            tracing::info!(
                journal.file = %path.display(), same = same.len(), lines = wanted.len(), "journal brought in step with the server's"
            );
            file.set_len(kept as u64).map_err(failed)?;
            file.seek(SeekFrom::End(0)).map_err(failed)?;
            for line in &wanted[same.len()..] {
                file.write_all(line).map_err(failed)?;
                file.write_all(b"\n").map_err(failed)?;
            }
            file.sync_all().map_err(failed)?;
        }
        Self::at_end(file, path, entries)
    }

    fn at_end<E>(
        mut file: File,
        path: &Path,
        entries: Vec<Entry<E>>,
    ) -> Result<(Self, Vec<Entry<E>>), JournalError> {
        file.seek(SeekFrom::End(0))
            .map_err(|source| io_error(path, source))?;
        let next = entries.len() as u64;
        let path = path.to_owned();
        Ok((Self { file, path, next }, entries))
    }

    /// The line that an event would be as the next one; for `worked` and `memory` see [`Entry`].
    ///
    /// # Errors
    /// If it is too long.
    pub fn line<E: Serialize>(
        &self,
        event: E,
        at: Timestamp,
        worked: Duration,
        memory: Option<u64>,
    ) -> Result<Line, JournalError> {
        let entry = Entry {
            n: self.next,
            at,
            worked: u64::try_from(worked.as_millis()).unwrap_or(u64::MAX),
            memory,
            event,
        };
        let bytes =
            serde_json::to_vec(&entry).map_err(|error| io_error(&self.path, error.into()))?;
        if bytes.len() > MAX_LINE {
            return Err(JournalError::Long {
                path: self.path.clone(),
                bytes: bytes.len(),
            });
        }
        Ok(Line {
            number: self.next,
            bytes,
        })
    }

    /// Writes a line that [`Journal::line`] gave; when this returns, it is on the disk.
    ///
    /// # Errors
    /// If it is not the next line, or the file system refuses; the line may then be torn, and the journal must be opened again.
    pub fn append(&mut self, line: &Line) -> Result<(), JournalError> {
        if line.number != self.next {
            return Err(JournalError::Number {
                path: self.path.clone(),
                number: line.number,
                next: self.next,
            });
        }
        let mut bytes = line.bytes.clone();
        bytes.push(b'\n');
        self.file
            .write_all(&bytes)
            .and_then(|()| self.file.sync_data())
            .map_err(|source| io_error(&self.path, source))?;
        self.next += 1;
        Ok(())
    }

    /// What the journal holds now.
    ///
    /// # Errors
    /// If a line cannot be read, or the file system refuses.
    pub fn entries<E: DeserializeOwned>(&self) -> Result<Vec<Entry<E>>, JournalError> {
        let bytes = std::fs::read(&self.path).map_err(|source| io_error(&self.path, source))?;
        read(lines(&bytes[..whole_lines(&bytes)]), &self.path)
    }
}

fn io_error(path: &Path, source: io::Error) -> JournalError {
    JournalError::Io {
        path: path.to_owned(),
        source,
    }
}

/// The file, opened for this process alone.
fn locked(path: &Path) -> Result<File, JournalError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|source| io_error(path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(JournalError::InUse(path.to_owned())),
        Err(TryLockError::Error(source)) => Err(io_error(path, source)),
    }
}

/// Number of bytes up to and with the last newline. What follows is what a crash left of a line.
fn whole_lines(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |last| last + 1)
}

/// The lines of whole lines, without their newlines.
fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes
        .split_inclusive(|byte| *byte == b'\n')
        .map(|line| line.strip_suffix(b"\n").unwrap_or(line))
}

fn read<'a, E: DeserializeOwned>(
    lines: impl Iterator<Item = &'a [u8]>,
    path: &Path,
) -> Result<Vec<Entry<E>>, JournalError> {
    lines
        .enumerate()
        .map(|(number, line)| {
            read_line(number as u64, line).map_err(|what| JournalError::Damaged {
                path: path.to_owned(),
                line: number as u64 + 1,
                what,
            })
        })
        .collect()
}

fn read_line<E: DeserializeOwned>(number: u64, line: &[u8]) -> Result<Entry<E>, String> {
    if line.len() > MAX_LINE {
        return Err(format!(
            "it has {} bytes, at most {MAX_LINE} are allowed",
            line.len()
        ));
    }
    let entry: Entry<E> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if entry.n == number {
        Ok(entry)
    } else {
        Err(format!("its number is {}, expected {number}", entry.n))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(events: &[&str]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let (mut journal, _) = adopt(&path, &[]).unwrap();
        for event in events {
            add(&mut journal, event);
        }
        (folder, path)
    }

    fn adopt(
        path: &Path,
        lines: &[Vec<u8>],
    ) -> Result<(Journal, Vec<Entry<String>>), JournalError> {
        Journal::adopt(path, lines)
    }

    fn add(journal: &mut Journal, event: &str) {
        let line = journal
            .line(event, Timestamp(7), Duration::ZERO, None)
            .unwrap();
        journal.append(&line).unwrap();
    }

    /// The lines of a text, as a server keeps them.
    fn kept(text: &[u8]) -> Vec<Vec<u8>> {
        lines(text).map(<[u8]>::to_vec).collect()
    }

    /// The events that the file holds, which is sound.
    fn read_back(path: &Path) -> Vec<String> {
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(whole_lines(&bytes), bytes.len());
        let entries = read::<String>(lines(&bytes), path).unwrap();
        entries.into_iter().map(|entry| entry.event).collect()
    }

    #[test]
    fn events_come_back_in_order_and_more_can_follow() {
        let (_folder, path) = written(&["a", "b\nc"]);
        let theirs = kept(&std::fs::read(&path).unwrap());
        let (mut journal, entries) = adopt(&path, &theirs).unwrap();
        assert_eq!(entries.len(), 2);
        add(&mut journal, "d");
        drop(journal);
        assert_eq!(read_back(&path), ["a", "b\nc", "d"]);
    }

    #[test]
    fn a_line_torn_anywhere_is_cut_off_and_written_again() {
        let (_folder, path) = written(&["first", "second"]);
        let whole = std::fs::read(&path).unwrap();
        let theirs = kept(&whole);
        for length in theirs[0].len() + 1..whole.len() {
            // The server does not have the line: it is cut off, and written when its work is done again.
            std::fs::write(&path, &whole[..length]).unwrap();
            let (mut journal, entries) = adopt(&path, &theirs[..1]).unwrap();
            assert_eq!(entries.len(), 1);
            assert_eq!(read_back(&path), ["first"], "{length}");
            add(&mut journal, "second");
            drop(journal);
            assert_eq!(std::fs::read(&path).unwrap(), whole);
            // The server has it.
            std::fs::write(&path, &whole[..length]).unwrap();
            adopt(&path, &theirs).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn zeros_that_a_power_cut_left_at_the_end_are_cut_off() {
        let (_folder, path) = written(&["first"]);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [whole.as_slice(), &[0; 64]].concat()).unwrap();
        adopt(&path, &kept(&whole)).unwrap();
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
            let error = adopt(&path, &kept(wrong.as_bytes())).unwrap_err();
            assert!(error.to_string().contains(line), "{error}");
        }
        // Nothing of it has come into the file.
        assert_eq!(read_back(&path), ["a", "b", "c"]);
    }

    #[test]
    fn a_whole_last_line_of_another_version_is_never_cut_off() {
        let (_folder, path) = written(&["a", "b"]);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"n\":2,\"at\":7,\"event\":{\"new\":1}}\n");
        std::fs::write(&path, &bytes).unwrap();
        let error = adopt(&path, &kept(&bytes)).unwrap_err().to_string();
        assert!(
            error.contains("line 3") && error.contains("another version"),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn a_line_counts_only_once_it_is_appended_and_only_in_its_place() {
        let (_folder, path) = written(&["a"]);
        let theirs = kept(&std::fs::read(&path).unwrap());
        let (mut journal, _) = adopt(&path, &theirs).unwrap();
        let line =
            |journal: &Journal| journal.line("b", Timestamp(7), Duration::from_secs(2), Some(9));
        let staged = line(&journal).unwrap();
        assert_eq!(line(&journal).unwrap(), staged);
        journal.append(&staged).unwrap();
        assert!(matches!(
            journal.append(&staged),
            Err(JournalError::Number { next: 2, .. })
        ));
        let entries = journal.entries::<String>().unwrap();
        assert_eq!((entries.len(), entries[0].memory), (2, None));
        assert_eq!((entries[1].worked, entries[1].memory), (2000, Some(9)));
        let long = journal.line("x".repeat(MAX_LINE), Timestamp(7), Duration::ZERO, None);
        assert!(matches!(long, Err(JournalError::Long { .. })));
    }

    #[test]
    fn the_lines_from_elsewhere_win_over_the_files() {
        let (_folder, path) = written(&["a", "b", "c"]);
        let bytes = std::fs::read(&path).unwrap();
        let theirs = kept(&bytes);
        let (_other, other) = written(&["a", "x"]);
        let foreign = std::fs::read(&other).unwrap();
        for mut own in [bytes.clone(), Vec::new(), foreign, bytes[..30].to_vec()] {
            for torn in [false, true] {
                if torn {
                    own.extend_from_slice(b"{\"n\":");
                }
                std::fs::write(&path, &own).unwrap();
                let (mut journal, entries) = adopt(&path, &theirs).unwrap();
                assert_eq!(entries.len(), 3);
                assert_eq!(std::fs::read(&path).unwrap(), bytes);
                add(&mut journal, "d");
                drop(journal);
                assert_eq!(read_back(&path), ["a", "b", "c", "d"]);
                let (_journal, entries) = adopt(&path, &theirs[..1]).unwrap();
                assert_eq!(entries.len(), 1);
            }
        }
        let hostile = [b"{}".to_vec()];
        assert!(matches!(
            adopt(&path, &hostile),
            Err(JournalError::Damaged { line: 1, .. })
        ));
        assert_eq!(read_back(&path), ["a"]);
    }

    #[test]
    fn a_second_process_is_kept_out() {
        let (_folder, path) = written(&[]);
        let (_journal, _) = adopt(&path, &[]).unwrap();
        assert!(matches!(adopt(&path, &[]), Err(JournalError::InUse(_))));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_crash_the_reader(
            file in prop::collection::vec(any::<u8>(), 0..200),
            line in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let (_folder, path) = written(&["a"]);
            let theirs = kept(&std::fs::read(&path).unwrap());
            std::fs::write(&path, &file).unwrap();
            let _ = adopt(&path, &[theirs[0].clone(), line]);
            // Whatever the file held, the server's lines are what counts.
            drop(adopt(&path, &theirs).unwrap());
            prop_assert_eq!(read_back(&path), ["a"]);
        }
    }
}
