//! The pieces of adapters that were sent a moment ago: every silo of a round gets the same ones at about the same time, and
//! reading and hashing them is a good part of what sending costs. Digests are kept for longer than bytes, which only stay while
//! somebody sends.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use concord_common::{Digest, adapter::AdapterVersion, chunk::StreamDigest};
use concord_proto::v1;
use tokio::sync::OnceCell;

/// Adapters whose pieces are remembered: what jobs that run side by side send at the same time.
const ADAPTERS: usize = 16;

/// Most bytes of pieces in memory for those that come to them next, over all adapters.
const SHARED_BYTES: u64 = 8 << 20;

/// The digests of one adapter's pieces in a stream from byte 0 on, each computed when it is first sent.
#[derive(Debug)]
pub(crate) struct Pieces {
    size: u64,
    known: Mutex<Known>,
}

/// The first pieces' digests, and what the next one goes on from.
#[derive(Debug, Default)]
struct Known {
    digests: Vec<Digest>,
    last: StreamDigest,
}

impl Pieces {
    fn new(size: u64) -> Self {
        Self {
            size,
            known: Mutex::default(),
        }
    }

    /// The digest of the piece that begins at `offset` and holds `data`; none if a piece before it has not been hashed. Blocking.
    pub(crate) fn digest(&self, offset: u64, data: &[u8]) -> Option<Digest> {
        let index = (offset / self.size) as usize;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if index == known.digests.len() {
            let digest = known.last.then(data);
            known.digests.push(digest);
        }
        known.digests.get(index).copied()
    }
}

/// A piece that is read once for all who send it at about the same time.
pub(crate) type SharedPiece = Arc<OnceCell<v1::Chunk>>;

/// An adapter's file. One that was written anew, because the old one was damaged, is another file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SentFile {
    version: AdapterVersion,
    inode: u64,
}

impl SentFile {
    /// The file that is open.
    ///
    /// # Errors
    /// If the file system does not say which it is.
    pub(crate) fn of(version: AdapterVersion, file: &File) -> io::Result<Self> {
        let inode = file.metadata()?.ino();
        Ok(Self { version, inode })
    }
}

/// The pieces of the adapters that were sent last.
#[derive(Debug, Default)]
pub struct RecentPieces {
    adapters: Mutex<VecDeque<(SentFile, Arc<Pieces>)>>,
    shared: Arc<Mutex<Shared>>,
}

/// The bytes of pieces, in the order in which they were first wanted.
#[derive(Debug, Default)]
struct Shared {
    senders: usize,
    pieces: VecDeque<(Arc<Pieces>, u64, SharedPiece)>,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Somebody who sends an adapter. Bytes are kept until the last one has ended.
#[derive(Debug)]
pub(crate) struct Sender {
    pieces: Arc<Pieces>,
    shared: Arc<Mutex<Shared>>,
}

impl Sender {
    /// The digests of the adapter's pieces.
    pub(crate) fn pieces(&self) -> &Arc<Pieces> {
        &self.pieces
    }

    /// The piece that begins at `offset`, in a stream from byte 0 on.
    pub(crate) fn piece(&self, offset: u64) -> SharedPiece {
        let size = self.pieces.size;
        let mut shared = lock(&self.shared);
        let known = shared
            .pieces
            .iter()
            .find(|(of, at, _)| *at == offset && Arc::ptr_eq(of, &self.pieces));
        if let Some((_, _, piece)) = known {
            return Arc::clone(piece);
        }
        let most = (SHARED_BYTES / size).max(1) as usize;
        while shared.pieces.len() >= most {
            shared.pieces.pop_front();
        }
        let piece = SharedPiece::default();
        let entry = (Arc::clone(&self.pieces), offset, Arc::clone(&piece));
        shared.pieces.push_back(entry);
        piece
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let mut shared = lock(&self.shared);
        shared.senders -= 1;
        if shared.senders == 0 {
            shared.pieces = VecDeque::new();
        }
    }
}

impl RecentPieces {
    /// Begins to send an adapter, cut every `size` bytes; `size` is the same in all calls.
    pub(crate) fn send(&self, file: SentFile, size: u64) -> Sender {
        let pieces = self.of(file, size);
        lock(&self.shared).senders += 1;
        Sender {
            pieces,
            shared: Arc::clone(&self.shared),
        }
    }

    /// The pieces of an adapter, cut every `size` bytes; `size` is the same in all calls.
    fn of(&self, file: SentFile, size: u64) -> Arc<Pieces> {
        let mut adapters = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, pieces)) = adapters.iter().find(|(known, _)| *known == file) {
            return Arc::clone(pieces);
        }
        adapters.truncate(ADAPTERS - 1);
        let pieces = Arc::new(Pieces::new(size));
        adapters.push_front((file, Arc::clone(&pieces)));
        pieces
    }

    /// Forgets an adapter whose file was written anew: a later file may get the old one's number. A transfer that began before goes on
    /// with the pieces and digests of the old file; nobody else gets them.
    pub(crate) fn forget(&self, version: AdapterVersion) {
        let mut adapters = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        adapters.retain(|(known, _)| known.version != version);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(version: AdapterVersion) -> SentFile {
        SentFile { version, inode: 1 }
    }

    #[test]
    fn a_piece_has_the_digest_of_all_until_its_end_and_the_last_one_that_of_the_whole() {
        let payload: Vec<u8> = (0..250).collect();
        let recent = RecentPieces::default();
        let pieces = recent.of(file(AdapterVersion(Digest::of(&payload))), 100);
        assert_eq!(pieces.digest(100, &payload[100..200]), None);
        for _ in 0..2 {
            for (offset, end) in [(0, 100), (100, 200), (200, 250)] {
                let digest = pieces.digest(offset as u64, &payload[offset..end]);
                assert_eq!(digest, Some(Digest::of(&payload[..end])));
            }
        }
    }

    #[test]
    fn a_forgotten_adapter_is_hashed_anew_whatever_an_old_transfer_goes_on_with() {
        let (damaged, mended) = ([0; 200], [1; 200]);
        let version = AdapterVersion(Digest::of(&mended));
        let recent = RecentPieces::default();
        let old = recent.of(file(version), 100);
        old.digest(0, &damaged[..100]);
        recent.forget(version);
        old.digest(100, &damaged[100..]);
        let new = recent.of(file(version), 100);
        for (offset, end) in [(0, 100), (100, 200)] {
            let digest = new.digest(offset as u64, &mended[offset..end]);
            assert_eq!(digest, Some(Digest::of(&mended[..end])));
        }
    }

    #[test]
    fn a_file_that_was_written_anew_is_hashed_anew_before_the_old_one_is_forgotten() {
        let (damaged, mended) = ([0; 100], [1; 100]);
        let version = AdapterVersion(Digest::of(&mended));
        let recent = RecentPieces::default();
        let old = SentFile { version, inode: 1 };
        recent.of(old, 100).digest(0, &damaged);
        let new = SentFile { version, inode: 2 };
        let digest = recent.of(new, 100).digest(0, &mended);
        assert_eq!(digest, Some(Digest::of(&mended)));
    }

    #[test]
    fn senders_of_one_adapter_share_its_pieces_until_the_last_one_ends() {
        let recent = RecentPieces::default();
        let version = |name: &[u8]| AdapterVersion(Digest::of(name));
        let send = || recent.send(file(version(b"a")), 100);
        let (first, second) = (send(), send());
        let piece = first.piece(100);
        assert!(Arc::ptr_eq(&piece, &second.piece(100)));
        assert!(!Arc::ptr_eq(&piece, &second.piece(200)));
        let other = recent.send(file(version(b"b")), 100);
        assert!(!Arc::ptr_eq(&piece, &other.piece(100)));
        // The file was written anew: who began before goes on with the old one, and nobody else gets it.
        recent.forget(version(b"a"));
        assert!(!Arc::ptr_eq(&piece, &send().piece(100)));
        assert!(Arc::ptr_eq(&piece, &first.piece(100)));

        drop((first, second));
        assert!(!lock(&recent.shared).pieces.is_empty());
        drop(other);
        assert!(lock(&recent.shared).pieces.is_empty());
    }

    #[test]
    fn the_bytes_of_no_more_pieces_are_kept_than_are_allowed() {
        let recent = RecentPieces::default();
        let size = SHARED_BYTES / 4;
        let sender = recent.send(file(AdapterVersion(Digest::of(b"a"))), size);
        let first = sender.piece(0);
        for index in 1..10 {
            sender.piece(index * size);
            assert!(lock(&recent.shared).pieces.len() <= 4);
        }
        assert!(!Arc::ptr_eq(&first, &sender.piece(0)), "it is read again");
    }

    #[test]
    fn only_the_latest_adapters_are_remembered() {
        let recent = RecentPieces::default();
        let version = |number: usize| AdapterVersion(Digest::of(&number.to_le_bytes()));
        let first = recent.of(file(version(0)), 100);
        assert!(Arc::ptr_eq(&first, &recent.of(file(version(0)), 100)));
        for number in 1..=ADAPTERS {
            recent.of(file(version(number)), 100);
        }
        assert!(!Arc::ptr_eq(&first, &recent.of(file(version(0)), 100)));
        assert_eq!(recent.adapters.lock().unwrap().len(), ADAPTERS);
    }
}
