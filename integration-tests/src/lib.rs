//! Concord's programs as their users run them: real binaries, real sockets, real databases.
//!
//! [`harness`] starts the programs in a folder of its own, [`silo`] is a silo without a model (it adds a constant instead of
//! training), [`load`] measures rounds with many of those, and the tests stand in `tests/it`. Nothing here links libtorch.

pub mod harness;
pub mod load;
pub mod procfs;
pub mod silo;
