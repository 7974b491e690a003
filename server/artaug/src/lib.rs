//! Concord's ArtAug job: a text-to-image model improves itself with the advice of an image-understanding model
//! (arXiv 2412.12888). See `docs/artaug.md`.

#![cfg_attr(
    test,
    expect(
        clippy::float_cmp,
        reason = "tests compare with numbers that are exact"
    )
)]

pub mod advisor;
pub mod card;
pub mod course;
pub mod data;
pub mod endpoint;
pub mod engine;
pub mod filter;
pub mod folder;
pub mod gallery;
pub mod image;
pub mod journal;
pub mod ledger;
pub mod losses;
pub mod machine;
pub mod photometry;
pub mod prompts;
pub mod region;
pub mod scorer;
pub mod setup;
pub mod stats;
pub mod store;
pub mod words;
