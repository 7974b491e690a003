//! From contributions to the next adapter: arithmetic on bytes, block by block.
//!
//! An [`Aggregator`] reads the base adapter and the contributions where they lie ([`PayloadSource`]: a spool file, or bytes
//! in memory), and writes the new adapter to a sink in payload order. Its result depends on the inputs only, not on the
//! number of threads or the order in which contributions arrived, and its memory does not grow with their number or size
//! (see [`blocks`] for the bound).

use std::{collections::BTreeMap, fmt, fs::File, io, os::unix::fs::FileExt as _};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    SiloId,
    adapter::{AdapterLayout, AdapterVersion},
    job::{RoundsSpec, Weighting},
};

pub mod blocks;
#[cfg(test)]
mod tests;
mod weighted_mean;

pub use weighted_mean::WeightedMean;

/// A payload that can be read anywhere.
pub trait PayloadSource: Send + Sync {
    /// Size in bytes.
    ///
    /// # Errors
    /// If it cannot be found out.
    fn size(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// If the source cannot be read or ends before `buf` is full.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

impl PayloadSource for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }
}

impl PayloadSource for [u8] {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buf.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

impl PayloadSource for Vec<u8> {
    fn size(&self) -> io::Result<u64> {
        self.as_slice().size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.as_slice().read_at(offset, buf)
    }
}

impl PayloadSource for Bytes {
    fn size(&self) -> io::Result<u64> {
        self.as_ref().size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.as_ref().read_at(offset, buf)
    }
}

impl<T: PayloadSource + ?Sized> PayloadSource for std::sync::Arc<T> {
    fn size(&self) -> io::Result<u64> {
        self.as_ref().size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.as_ref().read_at(offset, buf)
    }
}

/// One contribution: a delta to the base adapter.
#[derive(Clone, Copy)]
pub struct Update<'a> {
    /// Training examples behind it; at least 1.
    pub examples: u64,
    /// Its payload.
    pub delta: &'a dyn PayloadSource,
}

/// What is to be aggregated. The map keeps the contributions in silo-id order, which is the order of summation.
pub struct Aggregation<'a> {
    /// The job's tensors.
    pub layout: &'a AdapterLayout,
    /// Payload of the round's base adapter.
    pub base: &'a dyn PayloadSource,
    /// The accepted contributions.
    pub updates: BTreeMap<SiloId, Update<'a>>,
}

impl fmt::Debug for Aggregation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aggregation")
            .field("elements", &self.layout.elements())
            .field("silos", &self.updates.keys())
            .finish_non_exhaustive()
    }
}

/// What came out.
#[derive(Clone, PartialEq, Debug)]
pub struct Aggregate {
    /// BLAKE3 of the new payload.
    pub version: AdapterVersion,
    /// L2 norm of the step that was added to the base, before rounding to `f32`.
    pub step_norm: f64,
    /// L2 norm of each contribution.
    pub update_norms: BTreeMap<SiloId, f64>,
}

/// Why there is no aggregate. Whatever was written to the sink must be thrown away.
#[derive(Debug, thiserror::Error)]
pub enum AggregateError {
    /// Nothing to aggregate.
    #[error("there are no contributions to aggregate")]
    Empty,
    /// A contribution without weight.
    #[error("the contribution of silo `{silo}` has 0 examples; a weight must be at least 1")]
    NoExamples {
        /// Whose.
        silo: SiloId,
    },
    /// A source does not have the layout's size.
    #[error("the payload of {whose} has {got} bytes, the layout {want}")]
    Size {
        /// `the base adapter` or a silo.
        whose: Whose,
        /// Bytes of the source.
        got: u64,
        /// Bytes of the layout.
        want: u64,
    },
    /// A source cannot be read.
    #[error("the payload of {whose} cannot be read at byte {offset}")]
    Read {
        /// `the base adapter` or a silo.
        whose: Whose,
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The sink failed.
    #[error("the new adapter cannot be written")]
    Write(#[source] io::Error),
    /// An input holds NaN or an infinity.
    #[error("tensor `{tensor}` of {whose} is not finite at element {element} of the payload")]
    NotFinite {
        /// `the base adapter` or a silo.
        whose: Whose,
        /// Name of the tensor.
        tensor: String,
        /// Index in the payload.
        element: u64,
    },
    /// The inputs are finite, the result is not.
    #[error(
        "tensor `{tensor}` overflows f32 at element {element} of the payload; bound the updates with `limits.max_update_norm`"
    )]
    Overflow {
        /// Name of the tensor.
        tensor: String,
        /// Index in the payload.
        element: u64,
    },
}

/// The owner of a payload, in error messages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Whose {
    /// The round's base adapter.
    Base,
    /// A contribution.
    Silo(SiloId),
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base => f.write_str("the base adapter"),
            Self::Silo(silo) => write!(f, "silo `{silo}`"),
        }
    }
}

/// The arithmetic that makes one adapter out of many updates.
pub trait Aggregator: Send + Sync + fmt::Debug {
    /// Writes the new payload to `sink`, in order and exactly once. Blocking: call it off the async runtime. It uses the
    /// rayon pool that it is called in.
    ///
    /// # Errors
    /// See [`AggregateError`]; no partial result counts.
    fn aggregate(
        &self,
        work: &Aggregation<'_>,
        sink: &mut dyn io::Write,
    ) -> Result<Aggregate, AggregateError>;
}

/// The configured choice of an aggregator.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Base plus the weighted mean of the updates (FedAvg).
    WeightedMean(Weighting),
}

impl Strategy {
    /// The strategy that a job asks for.
    pub fn of(rounds: &RoundsSpec) -> Self {
        Self::WeightedMean(rounds.weighting)
    }

    /// What carries it out.
    pub fn aggregator(self) -> Box<dyn Aggregator> {
        match self {
            Self::WeightedMean(weighting) => Box::new(WeightedMean::new(weighting)),
        }
    }
}
