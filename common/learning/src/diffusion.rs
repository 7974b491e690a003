//! Text-to-image models: the engine of ArtAug jobs.
//!
//! Stable Diffusion 1.x and 2.x, written anew from the diffusers folder layout: the names and shapes in `unet|vae|text_encoder/*.safetensors`
//! and the numbers in their `config.json` say what a module computes, and fixtures made with Python's `diffusers` say whether it does
//! (`fixtures/diffusion`, made by `deploy/interop/diffusion_fixtures.py`). Everything differentiable is on libtorch's autograd; everything that
//! is arithmetic on a handful of numbers (noise tables, samplers, seeds) is plain Rust in f64.
//!
//! Shapes in this module: `n` samples in a batch, `c` channels, `h` and `w` height and width in the latent, `t` tokens, `d` hidden units.

pub mod attention;
pub mod clip;
pub mod denoiser;
pub mod draw;
mod files;
pub mod layers;
pub mod linear;
pub mod lora;
pub mod params;
pub mod pipeline;
pub mod pretrain;
pub mod prompt;
pub mod region;
pub mod resnet;
pub mod schedule;
pub mod seeds;
pub mod train;
pub mod unet;
pub mod vae;

#[cfg(test)]
pub(crate) mod hostile;
#[cfg(test)]
mod published;
#[cfg(test)]
mod testing;
