//! Digests of the pieces of adapters that were sent a moment ago: every silo of a round gets the same ones, and hashing is
//! a good part of what sending costs.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use concord_common::{Digest, adapter::AdapterVersion};

/// Adapters whose pieces are remembered: what jobs that run side by side send at the same time.
const ADAPTERS: usize = 16;

/// The digests of one adapter's pieces, each computed when it is first sent.
#[derive(Debug)]
pub(crate) struct Pieces {
    size: u64,
    digests: Vec<OnceLock<Digest>>,
}

impl Pieces {
    fn new(size: u64, payload_bytes: u64) -> Self {
        let count = payload_bytes.div_ceil(size) as usize;
        Self {
            size,
            digests: (0..count).map(|_| OnceLock::new()).collect(),
        }
    }

    /// The digest of `data`, which are the adapter's bytes from `offset` on, as far as a piece goes.
    pub(crate) fn digest(&self, offset: u64, data: &[u8]) -> Digest {
        let compute = || Digest::of(data);
        // A silo that goes on with a download begins where it stopped, which may be inside a piece.
        if !offset.is_multiple_of(self.size) {
            return compute();
        }
        match self.digests.get((offset / self.size) as usize) {
            Some(digest) => *digest.get_or_init(compute),
            None => compute(),
        }
    }
}

/// The pieces of the adapters that were sent last.
#[derive(Debug, Default)]
pub struct RecentPieces {
    adapters: Mutex<VecDeque<(AdapterVersion, Arc<Pieces>)>>,
}

impl RecentPieces {
    /// The pieces of an adapter of `payload_bytes`, cut every `size` bytes; `size` is the same in all calls.
    pub(crate) fn of(&self, version: AdapterVersion, size: u64, payload_bytes: u64) -> Arc<Pieces> {
        let mut adapters = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, pieces)) = adapters.iter().find(|(known, _)| *known == version) {
            return Arc::clone(pieces);
        }
        adapters.truncate(ADAPTERS - 1);
        let pieces = Arc::new(Pieces::new(size, payload_bytes));
        adapters.push_front((version, Arc::clone(&pieces)));
        pieces
    }

    /// Forgets an adapter whose file was written anew. A transfer that began before goes on with the digests of the old file;
    /// nobody else gets them.
    pub(crate) fn forget(&self, version: AdapterVersion) {
        let mut adapters = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        adapters.retain(|(known, _)| *known != version);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_have_their_own_digests_also_the_short_last_one_and_those_from_inside() {
        let payload: Vec<u8> = (0..250).collect();
        let recent = RecentPieces::default();
        let pieces = recent.of(AdapterVersion(Digest::of(&payload)), 100, 250);
        for _ in 0..2 {
            for (offset, end) in [(0, 100), (100, 200), (200, 250), (150, 250)] {
                let data = &payload[offset..end];
                assert_eq!(pieces.digest(offset as u64, data), Digest::of(data));
            }
        }
    }

    #[test]
    fn a_forgotten_adapter_is_hashed_anew_whatever_an_old_transfer_goes_on_with() {
        let (damaged, mended) = ([0; 200], [1; 200]);
        let version = AdapterVersion(Digest::of(&mended));
        let recent = RecentPieces::default();
        let old = recent.of(version, 100, 200);
        old.digest(0, &damaged[..100]);
        recent.forget(version);
        old.digest(100, &damaged[100..]);
        let new = recent.of(version, 100, 200);
        for offset in [0, 100] {
            let data = &mended[offset..offset + 100];
            assert_eq!(new.digest(offset as u64, data), Digest::of(data));
        }
    }

    #[test]
    fn only_the_latest_adapters_are_remembered() {
        let recent = RecentPieces::default();
        let version = |number: usize| AdapterVersion(Digest::of(&number.to_le_bytes()));
        let first = recent.of(version(0), 100, 250);
        assert!(Arc::ptr_eq(&first, &recent.of(version(0), 100, 250)));
        for number in 1..=ADAPTERS {
            recent.of(version(number), 100, 250);
        }
        assert!(!Arc::ptr_eq(&first, &recent.of(version(0), 100, 250)));
        assert_eq!(recent.adapters.lock().unwrap().len(), ADAPTERS);
    }
}
