//! Cutting payloads up.

use std::sync::Arc;

use bytes::Bytes;
use concord_proto::v1;

use super::MAX_CHUNK_BYTES;
use crate::Digest;

/// The digest that chunks carry: of all bytes that were sent in their stream so far.
#[derive(Clone, Debug, Default)]
pub struct StreamDigest(blake3::Hasher);

impl StreamDigest {
    /// Before the first byte of a stream, which need not be the first of the payload.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in the next bytes; gives what their chunk carries.
    pub fn then(&mut self, data: &[u8]) -> Digest {
        self.0.update(data);
        self.0.finalize().into()
    }

    /// The next chunk of the stream.
    pub fn chunk(&mut self, offset: u64, data: Bytes) -> v1::Chunk {
        v1::Chunk {
            offset,
            digest: self.then(&data).to_vec(),
            data,
        }
    }
}

/// The first chunk of a stream.
pub fn chunk(offset: u64, data: Bytes) -> v1::Chunk {
    StreamDigest::new().chunk(offset, data)
}

/// The chunks of a stream with a payload from byte `from` on, each at most `chunk_bytes` long and hashed when it is taken; the
/// bytes are shared, not copied. `chunk_bytes` is taken as within 1 to [`MAX_CHUNK_BYTES`].
pub fn chunks(
    payload: &Bytes,
    from: u64,
    chunk_bytes: usize,
) -> impl Iterator<Item = v1::Chunk> + use<> {
    let mut digest = StreamDigest::new();
    pieces(payload, from, chunk_bytes).map(move |(start, data)| digest.chunk(start, data))
}

fn pieces(
    payload: &Bytes,
    from: u64,
    chunk_bytes: usize,
) -> impl Iterator<Item = (u64, Bytes)> + use<> {
    let payload = payload.clone();
    let step = chunk_bytes.clamp(1, MAX_CHUNK_BYTES);
    let from = usize::try_from(from)
        .unwrap_or(usize::MAX)
        .min(payload.len());
    (from..payload.len()).step_by(step).map(move |start| {
        let end = payload.len().min(start + step);
        (start as u64, payload.slice(start..end))
    })
}

/// A payload that is hashed once for both: its own digest, which is announced before it is sent, and those of its chunks.
#[derive(Clone, PartialEq, Debug)]
pub struct Cut {
    payload: Bytes,
    chunk_bytes: usize,
    /// What the chunks of a stream from byte 0 on carry.
    digests: Arc<[Digest]>,
}

impl Cut {
    /// Hashes a payload that is to be sent in chunks of at most `chunk_bytes`, as in [`chunks`].
    pub fn new(payload: Bytes, chunk_bytes: usize) -> Self {
        let mut digest = StreamDigest::new();
        let digests = pieces(&payload, 0, chunk_bytes)
            .map(|(_, data)| digest.then(&data))
            .collect();
        Self {
            payload,
            chunk_bytes,
            digests,
        }
    }

    /// The bytes.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// BLAKE3 of all bytes.
    pub fn digest(&self) -> Digest {
        self.digests
            .last()
            .copied()
            .unwrap_or_else(|| Digest::of(&[]))
    }

    /// The same as [`chunks`]; those of a stream from byte 0 on are not hashed again.
    pub fn chunks(&self, from: u64) -> impl Iterator<Item = v1::Chunk> + use<> {
        let known = (from == 0).then(|| Arc::clone(&self.digests));
        let mut running = StreamDigest::new();
        let pieces = pieces(&self.payload, from, self.chunk_bytes).enumerate();
        pieces.map(move |(index, (offset, data))| match &known {
            Some(digests) => v1::Chunk {
                offset,
                digest: digests[index].to_vec(),
                data,
            },
            None => running.chunk(offset, data),
        })
    }
}
