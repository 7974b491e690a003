//! Concord's ArtAug worker: takes text-to-image jobs from the server and runs them, in a process of its own. See `docs/artaug.md`.

pub mod base;
