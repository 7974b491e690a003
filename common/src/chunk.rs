//! Payloads in pieces: cutting them up, and checking what comes in.
//!
//! [`chunks`] and [`Cut`] cut without copying. [`ChunkAssembler`] is the check at the other end, for uploads and downloads alike:
//! it holds no payload, only a running hash, so that whoever uses it writes the bytes wherever it wants them.
//!
//! A chunk carries the digest of its stream from the first byte sent to the chunk's end ([`StreamDigest`]). In a stream that
//! begins at byte 0 the last one is the digest of the whole, so that nobody hashes a byte twice.

use std::io;

use concord_proto::v1;

use crate::{Digest, ErrorCode, adapter::AdapterLayout, code::Refusal};

mod cut;
mod inspect;
#[cfg(test)]
mod tests;

pub use cut::{Cut, StreamDigest, chunk, chunks};
pub use inspect::PayloadInspector;

/// Largest chunk in bytes.
pub const MAX_CHUNK_BYTES: usize = 1 << 20;
/// Size of the chunks that Concord sends: large enough that framing costs nothing, small enough to stay in a core's cache
/// while it is hashed and copied.
pub const DEFAULT_CHUNK_BYTES: usize = 256 << 10;

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

/// Checks an incoming payload chunk by chunk: offsets, sizes, digests, and that every value is finite. It is there for one
/// stream; the next one begins with [`ChunkAssembler::resume`] or [`ChunkAssembler::begin_stream`].
///
/// After a refusal the state is as it was before the chunk. The assembler runs ahead of the disk by the chunk that was just
/// accepted: if writing it fails, drop the assembler and [`ChunkAssembler::resume`] from what was written.
#[derive(Clone, Debug)]
pub struct ChunkAssembler {
    expected: Expected,
    offset: u64,
    hasher: blake3::Hasher,
    /// None in a stream from byte 0: it has the same bytes as `hasher`.
    stream: Option<Box<StreamDigest>>,
    inspector: PayloadInspector,
}

impl ChunkAssembler {
    /// Expects a payload from its first byte on.
    pub fn new(expected: Expected) -> Self {
        Self {
            expected,
            offset: 0,
            hasher: blake3::Hasher::new(),
            stream: None,
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
                Ok(0) => {
                    assembler.begin_stream();
                    return Ok(assembler);
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(ResumeError::Read(error)),
            };
            let received = &buffer[..count];
            assembler
                .check_end(count)
                .and_then(|()| {
                    let mut hasher = assembler.hasher.clone();
                    hasher.update(received);
                    assembler.advance(received, hasher, None)
                })
                .map_err(ResumeError::Content)?;
        }
    }

    /// Expects that the sender begins anew, with the byte that must come next.
    pub fn begin_stream(&mut self) {
        self.stream = (self.offset > 0).then(Box::default);
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
        let mut hasher = self.hasher.clone();
        hasher.update(&chunk.data);
        let mut stream = self.stream.clone();
        let digest = match &mut stream {
            Some(stream) => stream.then(&chunk.data),
            None => hasher.finalize().into(),
        };
        if chunk.digest != digest.as_bytes() {
            return refuse(
                ErrorCode::BadChunk,
                format!(
                    "the digest of the chunk at byte {} does not match the bytes that were sent until its end; send it again",
                    self.offset
                ),
            );
        }
        self.advance(&chunk.data, hasher, stream)
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

    /// Goes on behind `data`, which both hashes have taken in, if its values may pass.
    fn advance(
        &mut self,
        data: &[u8],
        hasher: blake3::Hasher,
        stream: Option<Box<StreamDigest>>,
    ) -> Result<(), Refusal> {
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
        self.hasher = hasher;
        self.stream = stream;
        self.offset += data.len() as u64;
        Ok(())
    }
}
