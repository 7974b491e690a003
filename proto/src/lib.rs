//! Concord's wire protocol: the messages and services of package `concord.v1`, generated from `proto/concord/v1/*.proto`.
//!
//! The fields are described in the .proto files; the rules between them stand in `docs/protocol.md`.

pub mod codec;

/// Package `concord.v1`.
#[expect(
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated code: the comments of the .proto files become its docs"
)]
pub mod v1 {
    tonic::include_proto!("concord.v1");
}

/// The compiled file descriptors, for the reflection service.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/concord.v1.bin"));
