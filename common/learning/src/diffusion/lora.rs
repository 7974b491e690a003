//! Sets of LoRA pairs: attaching them to a model, adding them up, cutting their rank, and the files that other tools read and write.

mod algebra;
mod bytes;
mod current;
mod layout;

use std::collections::BTreeMap;

use concord_common::seed::Seed;
use tch::{Kind, Tensor};

pub use self::{
    current::current,
    layout::{Layout, Written},
};
use super::{
    linear::{Linear, LoraPair},
    params::{Compute, shortened},
};
use crate::{error::LearningError, named::HostTensor};

/// Which linear layers a new adapter sits on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Queries, keys, values and outputs of every attention.
    Attention,
    /// All linear layers of the transformers, projections and feed-forward networks included.
    Transformers,
    /// Every linear layer.
    All,
}

impl Placement {
    fn takes(self, name: &str) -> bool {
        let attention = [".to_q", ".to_k", ".to_v", ".to_out.0"]
            .iter()
            .any(|end| name.ends_with(end));
        match self {
            Self::Attention => attention,
            Self::Transformers => name.contains(".attentions."),
            Self::All => true,
        }
    }
}

/// One pair outside a model, in f32 on the CPU: the change of weight is scale B A.
#[derive(Debug)]
pub struct Pair {
    /// A: `[rank, inputs]`.
    pub down: Tensor,
    /// B: `[outputs, rank]`.
    pub up: Tensor,
    /// alpha / rank.
    pub scale: f64,
}

impl Clone for Pair {
    fn clone(&self) -> Self {
        Self {
            down: self.down.copy(),
            up: self.up.copy(),
            scale: self.scale,
        }
    }
}

/// Pairs by the names of the layers that they change (`unet.…`).
#[derive(Debug, Clone, Default)]
pub struct Lora {
    /// The pairs.
    pub pairs: BTreeMap<String, Pair>,
}

/// A model's linear layers by name.
pub type SiteList<'a> = Vec<(String, &'a mut Linear)>;

/// Puts a fresh pair on every layer of the placement: A uniform within 1 / sqrt(inputs), B = 0, scale 1 (alpha = rank). The result is the
/// number of layers.
///
/// # Errors
/// [`LearningError::Config`] if the rank is out of range, no layer is meant, or one has the adapter already.
pub fn attach_fresh(
    sites: SiteList<'_>,
    adapter: &str,
    placement: Placement,
    rank: i64,
    seed: Seed,
    compute: Compute,
) -> Result<usize, LearningError> {
    if !(1..=1024).contains(&rank) {
        return Err(LearningError::Config(format!(
            "LoRA rank {rank} is not in 1..=1024"
        )));
    }
    let mut count = 0;
    for (name, linear) in sites {
        if !placement.takes(&name) {
            continue;
        }
        let bound = 1.0 / (linear.inputs() as f64).sqrt();
        let mut rng = seed.derive(&name).rng();
        let down = HostTensor {
            shape: vec![rank as usize, linear.inputs() as usize],
            values: (0..rank * linear.inputs())
                .map(|_| ((2.0 * rng.uniform() - 1.0) * bound) as f32)
                .collect(),
        };
        linear.attach(LoraPair {
            adapter: adapter.to_owned(),
            down: down
                .to_tensor(compute.kind)?
                .f_to_device(compute.device)?
                .f_set_requires_grad(true)?,
            up: Tensor::f_zeros([linear.outputs(), rank], (compute.kind, compute.device))?
                .f_set_requires_grad(true)?,
            scale: 1.0,
            frozen: false,
        })?;
        count += 1;
    }
    if count == 0 {
        return Err(LearningError::Config(format!(
            "the model has no layer for a LoRA placed on {placement:?}"
        )));
    }
    Ok(count)
}

/// Puts known pairs on their layers, frozen, at a strength.
///
/// # Errors
/// [`LearningError::Config`] that names every pair without a layer, or a pair that does not fit its layer.
pub fn attach(
    sites: SiteList<'_>,
    adapter: &str,
    lora: &Lora,
    strength: f64,
    compute: Compute,
) -> Result<(), LearningError> {
    let mut by_name: BTreeMap<String, &mut Linear> = sites.into_iter().collect();
    let strangers: Vec<String> = lora
        .pairs
        .keys()
        .filter(|name| !by_name.contains_key(*name))
        .cloned()
        .collect();
    if !strangers.is_empty() {
        return Err(LearningError::Config(format!(
            "adapter {adapter} has pairs for layers that the model lacks: {}",
            shortened(&strangers)
        )));
    }
    for (name, pair) in &lora.pairs {
        let Some(linear) = by_name.get_mut(name) else {
            continue;
        };
        let placed = |tensor: &Tensor| -> Result<Tensor, LearningError> {
            Ok(tensor
                .f_detach_copy()?
                .f_to_kind(compute.kind)?
                .f_to_device(compute.device)?)
        };
        linear.attach(LoraPair {
            adapter: adapter.to_owned(),
            down: placed(&pair.down)?,
            up: placed(&pair.up)?,
            scale: pair.scale * strength,
            frozen: true,
        })?;
    }
    Ok(())
}

/// Freezes an adapter, or lets it be trained.
///
/// # Errors
/// [`LearningError::Config`] if no layer has it.
pub fn set_frozen(sites: SiteList<'_>, adapter: &str, frozen: bool) -> Result<(), LearningError> {
    let mut count = 0;
    for (_, linear) in sites {
        for pair in linear.pairs_mut() {
            if pair.adapter == adapter {
                pair.frozen = frozen;
                pair.down = pair.down.f_detach()?.f_set_requires_grad(!frozen)?;
                pair.up = pair.up.f_detach()?.f_set_requires_grad(!frozen)?;
                count += 1;
            }
        }
    }
    known(count, adapter)
}

/// A copy of an adapter's pairs, as they are now.
///
/// # Errors
/// [`LearningError::Config`] if no layer has it.
pub fn extract(sites: SiteList<'_>, adapter: &str) -> Result<Lora, LearningError> {
    let mut pairs = BTreeMap::new();
    for (name, linear) in sites {
        for pair in linear.pairs() {
            if pair.adapter == adapter {
                pairs.insert(
                    name.clone(),
                    Pair {
                        down: host(&pair.down)?,
                        up: host(&pair.up)?,
                        scale: pair.scale,
                    },
                );
            }
        }
    }
    known(pairs.len(), adapter)?;
    Ok(Lora { pairs })
}

fn host(tensor: &Tensor) -> Result<Tensor, LearningError> {
    Ok(tensor
        .f_detach_copy()?
        .f_to_device(tch::Device::Cpu)?
        .f_to_kind(Kind::Float)?)
}

/// Takes an adapter off all layers.
///
/// # Errors
/// [`LearningError::Config`] if no layer has it.
pub fn detach(sites: SiteList<'_>, adapter: &str) -> Result<(), LearningError> {
    let count = sites
        .into_iter()
        .filter_map(|(_, linear)| linear.detach(adapter))
        .count();
    known(count, adapter)
}

/// Adds an adapter's changes to the weights and takes it off; see [`Linear::merge`]. [`current()`] is the way to the model of a job's iteration.
///
/// # Errors
/// [`LearningError::Config`] if no layer has it, or one holds a merged change already.
pub fn merge(sites: SiteList<'_>, adapter: &str) -> Result<(), LearningError> {
    let mut count = 0;
    for (_, linear) in sites {
        count += usize::from(linear.merge(adapter)?);
    }
    known(count, adapter)
}

/// The layers that files may speak of.
pub fn layers(sites: SiteList<'_>) -> Vec<Written> {
    sites
        .into_iter()
        .map(|(name, linear)| Written {
            name,
            pixel: linear.is_pixel(),
        })
        .collect()
}

fn known(count: usize, adapter: &str) -> Result<(), LearningError> {
    if count == 0 {
        return Err(LearningError::Config(format!(
            "no layer has the adapter {adapter}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
