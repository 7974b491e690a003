//! Concord's ArtAug worker: takes text-to-image jobs from the server and runs them, in a process of its own. See `docs/artaug.md`.

mod artefacts;
pub mod base;
pub mod brake;
pub mod config;
pub mod desk;
pub mod engine;
pub mod imagetext;
pub mod limits;
pub mod remote;
pub mod run;
pub mod stages;
#[cfg(test)]
mod testing;
pub mod workshop;
