//! Bounds on calls and transfers.

use std::time::Duration;

use concord_common::config::ByteSize;
use serde::Deserialize;

/// The section `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Uploads and downloads at once; more wait.
    pub max_transfers: usize,
    /// Uploads and downloads of one silo at once; more of it wait.
    pub max_transfers_per_silo: usize,
    /// Transfers that may wait; one more is refused as busy.
    pub max_waiting_transfers: usize,
    /// How long a transfer waits for its turn before it is refused as busy.
    #[serde(with = "humantime_serde")]
    pub transfer_wait: Duration,
    /// A transfer in which nothing moves for this long is cut.
    #[serde(with = "humantime_serde")]
    pub transfer_idle: Duration,
    /// A transfer that moves fewer bytes a second, from its turn to its end, is cut.
    pub min_transfer_rate: ByteSize,
    /// Size of the chunks that the server sends.
    pub chunk_size: ByteSize,
    /// Bytes that a peer may send ahead on one stream.
    pub stream_window: ByteSize,
    /// Bytes that a peer may send ahead on all streams of a connection together.
    pub connection_window: ByteSize,
    /// Calls at once on one connection.
    pub max_streams: u32,
    /// Largest message that is read.
    pub max_message: ByteSize,
    /// How long the message of a call may take to come in, from the call's headers on; not for those that take a stream of them.
    #[serde(with = "humantime_serde")]
    pub message_time: Duration,
    /// Largest header list that is read.
    pub max_headers: ByteSize,
    /// A connection older than this is to be made anew, with the certificates of then.
    #[serde(with = "humantime_serde")]
    pub max_connection_age: Duration,
}

impl Default for LimitsSection {
    fn default() -> Self {
        Self {
            max_transfers: 8,
            max_transfers_per_silo: 2,
            max_waiting_transfers: 1024,
            transfer_wait: Duration::from_mins(2),
            transfer_idle: Duration::from_secs(30),
            min_transfer_rate: ByteSize(16 << 10),
            chunk_size: ByteSize(256 << 10),
            stream_window: ByteSize(256 << 10),
            connection_window: ByteSize(512 << 10),
            max_streams: 16,
            max_message: ByteSize::mebibytes(2),
            message_time: Duration::from_secs(70),
            max_headers: ByteSize(16 << 10),
            max_connection_age: Duration::from_hours(1),
        }
    }
}

impl LimitsSection {
    /// Its numbers with the least and the most that each may be.
    pub(super) fn numbers(&self) -> [(&'static str, u64, u64, u64); 10] {
        [
            ("limits.max_transfers", self.max_transfers as u64, 1, 1024),
            (
                "limits.max_transfers_per_silo",
                self.max_transfers_per_silo as u64,
                1,
                1024,
            ),
            (
                "limits.min_transfer_rate",
                self.min_transfer_rate.bytes(),
                1,
                1 << 30,
            ),
            (
                "limits.max_waiting_transfers",
                self.max_waiting_transfers as u64,
                0,
                1 << 20,
            ),
            (
                "limits.chunk_size",
                self.chunk_size.bytes(),
                16 << 10,
                1 << 20,
            ),
            (
                "limits.stream_window",
                self.stream_window.bytes(),
                64 << 10,
                64 << 20,
            ),
            (
                "limits.connection_window",
                self.connection_window.bytes(),
                64 << 10,
                256 << 20,
            ),
            ("limits.max_streams", u64::from(self.max_streams), 4, 1024),
            // A chunk of 1 MiB with its frame must pass.
            (
                "limits.max_message",
                self.max_message.bytes(),
                (1 << 20) + 1024,
                64 << 20,
            ),
            (
                "limits.max_headers",
                self.max_headers.bytes(),
                4 << 10,
                1 << 20,
            ),
        ]
    }

    /// Its times, for the same least time as all others.
    pub(super) fn times(&self) -> [(&'static str, Duration); 4] {
        [
            ("limits.transfer_wait", self.transfer_wait),
            ("limits.transfer_idle", self.transfer_idle),
            ("limits.message_time", self.message_time),
            ("limits.max_connection_age", self.max_connection_age),
        ]
    }
}
