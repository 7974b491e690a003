//! The whole server in one process, over loopback TLS, with silos that only pretend to train.

mod artaug;
mod bad_header;
mod bad_input;
mod bounds;
mod damage;
mod disk;
mod enrollment;
mod gone;
pub(crate) mod harness;
mod health;
mod jobs;
mod offers;
mod restart;
mod retention;
mod roles;
