//! Learning in a silo: the only crate that names `tch`.
//!
//! Synchronous throughout and free of networking. All torch work of a process belongs on one [`torch::TorchThread`].

pub mod adapter;
pub mod backbone;
pub mod batch;
pub mod brisque;
pub mod cache;
pub mod data;
pub mod diffusion;
pub mod error;
pub mod fusion;
pub mod head;
pub mod loss;
pub mod metric;
pub mod model;
pub mod named;
mod network;
pub mod optimiser;
pub mod pulse;
pub mod reference;
pub mod task;
#[cfg(test)]
mod testing;
pub mod tokenize;
pub mod torch;
pub mod trainer;
pub mod vision;
pub mod weights;

pub use error::LearningError;
/// The kind of numbers that a backbone computes in, so that users of this crate need not name `tch`.
pub use tch::Kind;
