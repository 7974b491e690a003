//! Learning in a silo: the only crate that names `tch`.
//!
//! Synchronous throughout and free of networking. All torch work of a process belongs on one [`torch::TorchThread`].

pub mod backbone;
pub mod error;
pub mod reference;
pub mod tokenize;
pub mod torch;
pub mod weights;

pub use error::LearningError;
