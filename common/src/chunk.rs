//! Payloads in pieces: cutting them up, and checking what comes in.
//!
//! [`chunks`] cuts without copying. [`ChunkAssembler`] is the check at the other end, for uploads and downloads alike: it
//! holds no payload, only a running hash, so that whoever uses it writes the bytes wherever it wants them.

use std::io;

use bytes::Bytes;
use concord_proto::v1;

use crate::{Digest, ErrorCode, adapter::AdapterLayout, code::Refusal};

mod inspect;
#[cfg(test)]
mod tests;

pub use inspect::PayloadInspector;

/// Largest chunk in bytes.
pub const MAX_CHUNK_BYTES: usize = 1 << 20;
/// Size of the chunks that Concord sends: large enough that framing costs nothing, small enough to stay in a core's cache
/// while it is hashed and copied.
pub const DEFAULT_CHUNK_BYTES: usize = 256 << 10;

/// A piece of a payload with its digest.
pub fn chunk(offset: u64, data: Bytes) -> v1::Chunk {
    v1::Chunk {
        offset,
        digest: Digest::of(&data).to_vec(),
        data,
    }
}

/// The pieces of a payload from byte `from` on, each at most `chunk_bytes` long; the bytes are shared, not copied.
/// `chunk_bytes` is taken as within 1 to [`MAX_CHUNK_BYTES`].
pub fn chunks(
    payload: &Bytes,
    from: u64,
    chunk_bytes: usize,
) -> impl Iterator<Item = v1::Chunk> + use<> {
    let payload = payload.clone();
    let step = chunk_bytes.clamp(1, MAX_CHUNK_BYTES);
    let from = usize::try_from(from)
        .unwrap_or(usize::MAX)
        .min(payload.len());
    (from..payload.len()).step_by(step).map(move |start| {
        let end = payload.len().min(start + step);
        chunk(start as u64, payload.slice(start..end))
    })
}

/// What a payload must be.
#[derive(Clone, PartialEq, Debug)]
pub struct Expected {
    /// Its tensors, from which its size follows.
    pub layout: AdapterLayout,
    /// BLAKE3 of the whole.
    pub digest: Digest,
    /// Largest L2 norm; any if absent.
    pub max_norm: Option<f64>,
}

impl Expected {
    /// Checks a sender's announcement of size against the layout, before anything is received.
    ///
    /// # Errors
    /// `PAYLOAD_SIZE`.
    pub fn check_size(&self, announced: u64) -> Result<(), Refusal> {
        let want = self.layout.payload_bytes();
        if announced == want {
            return Ok(());
        }
        Err(Refusal::new(
            ErrorCode::PayloadSize,
            format!("a payload of this layout has {want} bytes, not {announced}"),
        ))
    }
}

/// A payload that came in whole and passed every check.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Received {
    /// BLAKE3 of the payload.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
    /// Its L2 norm.
    pub norm: f64,
}

/// Why a half-received payload cannot be taken up again.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// What is there cannot be read.
    #[error("what was received before cannot be read")]
    Read(#[source] io::Error),
    /// What is there does not pass the checks (any more); throw it away and start at 0.
    #[error("what was received before cannot be used: {0}")]
    Content(Refusal),
}

/// Checks an incoming payload chunk by chunk: offsets, sizes, digests, and that every value is finite.
///
/// After a refusal the state is as it was before the chunk. The assembler runs ahead of the disk by the chunk that was just
/// accepted: if writing it fails, drop the assembler and [`ChunkAssembler::resume`] from what was written.
#[derive(Clone, Debug)]
pub struct ChunkAssembler {
    expected: Expected,
    offset: u64,
    hasher: blake3::Hasher,
    inspector: PayloadInspector,
}

impl ChunkAssembler {
    /// Expects a payload from its first byte on.
    pub fn new(expected: Expected) -> Self {
        Self {
            expected,
            offset: 0,
            hasher: blake3::Hasher::new(),
            inspector: PayloadInspector::new(),
        }
    }

    /// Goes on after the bytes that `received` gives until its end, which are hashed and inspected again. Blocking.
    ///
    /// # Errors
    /// If they cannot be read, are too many, or do not pass the checks.
    pub fn resume(expected: Expected, received: &mut dyn io::Read) -> Result<Self, ResumeError> {
        let mut assembler = Self::new(expected);
        let mut buffer = vec![0; DEFAULT_CHUNK_BYTES];
        loop {
            let count = match received.read(&mut buffer) {
                Ok(0) => return Ok(assembler),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(ResumeError::Read(error)),
            };
            assembler
                .advance(&buffer[..count])
                .map_err(ResumeError::Content)?;
        }
    }

    /// The byte that must come next.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// True once all bytes are in; [`ChunkAssembler::finish`] then says whether they are the right ones.
    pub fn is_complete(&self) -> bool {
        self.offset == self.expected.layout.payload_bytes()
    }

    /// Takes the next chunk.
    ///
    /// # Errors
    /// `BAD_CHUNK` if it is empty, larger than [`MAX_CHUNK_BYTES`] or not what its digest says, `CHUNK_OFFSET` if it leaves
    /// a gap or repeats bytes, `PAYLOAD_SIZE` if it goes beyond the payload's end, `NOT_FINITE` naming the tensor of a
    /// value that is NaN or infinite, `NORM_TOO_LARGE` as soon as the values so far are beyond the bound.
    pub fn accept(&mut self, chunk: &v1::Chunk) -> Result<(), Refusal> {
        let refuse = |code, message| Err(Refusal::new(code, message));
        let size = chunk.data.len();
        if size == 0 || size > MAX_CHUNK_BYTES {
            return refuse(
                ErrorCode::BadChunk,
                format!("a chunk has 1 to {MAX_CHUNK_BYTES} bytes, this one {size}"),
            );
        }
        if chunk.offset != self.offset {
            let fault = if chunk.offset > self.offset {
                "leaves a gap"
            } else {
                "repeats bytes"
            };
            return refuse(
                ErrorCode::ChunkOffset,
                format!(
                    "the chunk at byte {} {fault}: go on at byte {}",
                    chunk.offset, self.offset
                ),
            );
        }
        self.check_end(size)?;
        if chunk.digest != Digest::of(&chunk.data).as_bytes() {
            return refuse(
                ErrorCode::BadChunk,
                format!(
                    "the digest of the chunk at byte {} does not match its bytes; send it again",
                    self.offset
                ),
            );
        }
        self.advance(&chunk.data)
    }

    /// Ends the payload.
    ///
    /// # Errors
    /// `TRUNCATED` if bytes are missing, `DIGEST_MISMATCH` if the whole is not what was announced.
    pub fn finish(&self) -> Result<Received, Refusal> {
        let want = self.expected.layout.payload_bytes();
        if self.offset < want {
            return Err(Refusal::new(
                ErrorCode::Truncated,
                format!(
                    "the stream ended after {} of {want} bytes; go on there",
                    self.offset
                ),
            ));
        }
        let digest = Digest::from(self.hasher.finalize());
        if digest != self.expected.digest {
            return Err(Refusal::new(
                ErrorCode::DigestMismatch,
                format!(
                    "the payload's digest is {digest}, announced was {}; start again at byte 0",
                    self.expected.digest
                ),
            ));
        }
        Ok(Received {
            digest,
            bytes: self.offset,
            norm: self.inspector.norm(),
        })
    }

    fn check_end(&self, size: usize) -> Result<(), Refusal> {
        let want = self.expected.layout.payload_bytes();
        if self.offset + size as u64 <= want {
            return Ok(());
        }
        Err(Refusal::new(
            ErrorCode::PayloadSize,
            format!(
                "the payload has {want} bytes; {size} more at byte {} are too many",
                self.offset
            ),
        ))
    }

    fn advance(&mut self, data: &[u8]) -> Result<(), Refusal> {
        self.check_end(data.len())?;
        let inspector = self.inspector.then(data, &self.expected.layout)?;
        if let Some(bound) = self.expected.max_norm
            && inspector.norm() > bound
        {
            return Err(Refusal::new(
                ErrorCode::NormTooLarge,
                format!("the update's L2 norm is above the job's bound of {bound}"),
            ));
        }
        self.inspector = inspector;
        self.hasher.update(data);
        self.offset += data.len() as u64;
        Ok(())
    }
}
