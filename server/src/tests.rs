//! The whole server in one process, over loopback TLS, with silos that only pretend to train.

mod bad_input;
pub(crate) mod harness;
mod jobs;
mod restart;
mod roles;
