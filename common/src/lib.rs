//! Concord's vocabulary and its pure decisions: what a silo, a job, a round and an adapter are; how rounds move on and
//! contributions are averaged; and what both sides need at the edge (TLS, configuration, telemetry, life cycle).
//!
//! Nothing here names libtorch or a database.

pub mod adapter;
pub mod aggregate;
pub mod chunk;
pub mod clock;
pub mod code;
pub mod config;
pub mod digest;
mod fault;
pub mod fsutil;
pub mod id;
pub mod job;
pub mod lifecycle;
pub mod pki;
pub mod round;
pub mod seed;
pub mod telemetry;
pub mod tls;
pub mod wire;

pub use clock::{Clock, SystemClock, Timestamp};
pub use code::ErrorCode;
pub use digest::Digest;
pub use fault::error_text;
pub use id::{JobId, Role, RoundNumber, SiloId, SpiffeId};
