//! Writing to the disk while more is still coming, so that the sync at the end finds little left to do.

use std::fs::File;

use rustix::fs::{Advice, fadvise};

use crate::config::Durability;

/// Bytes after which the kernel is asked to begin with them: large enough for a disk to write in one go, and no more than a sync
/// writes in half a millisecond on a fast one.
const STEP: u64 = 1 << 20;

/// How far a file that is written from start to end has been handed to the disk. It promises nothing: only a sync does.
#[derive(Debug)]
pub(crate) struct Writeback {
    /// None if nobody will wait for the disk.
    from: Option<u64>,
}

impl Writeback {
    /// For a file that has been handed over up to byte `from`.
    pub(crate) fn new(durability: Durability, from: u64) -> Self {
        Self {
            from: (durability == Durability::Power).then_some(from),
        }
    }

    /// Notes that the file has been written up to byte `to`.
    pub(crate) fn written(&mut self, file: &File, to: u64) {
        let Some(from) = &mut self.from else { return };
        let length = to.saturating_sub(*from);
        if length < STEP {
            return;
        }
        // On Linux "not needed" begins to write what is dirty and drops only what is clean. A hint may be ignored.
        let _ = fadvise(
            file,
            *from,
            std::num::NonZeroU64::new(length),
            Advice::DontNeed,
        );
        *from = to;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _, Write as _};

    use super::*;

    #[test]
    fn handing_over_changes_nothing_in_the_file_and_moves_on_by_steps() {
        let mut file = tempfile::tempfile().unwrap();
        let mut writeback = Writeback::new(Durability::Power, 0);
        let piece = vec![7; (STEP / 2) as usize];
        for written in 1..=5 {
            file.write_all(&piece).unwrap();
            writeback.written(&file, written * STEP / 2);
        }
        assert_eq!(writeback.from, Some(2 * STEP));
        let mut all = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut all).unwrap();
        assert_eq!(all.len() as u64, 5 * STEP / 2);
        assert!(all.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn nothing_is_handed_over_if_nobody_will_wait() {
        let mut writeback = Writeback::new(Durability::Process, 0);
        writeback.written(&tempfile::tempfile().unwrap(), 10 * STEP);
        assert_eq!(writeback.from, None);
    }
}
