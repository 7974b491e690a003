//! Bottleneck adapters, of two kinds that the compiler keeps apart.
//!
//! [`Adapter<Global>`] is what the silos share; [`Adapter<Private>`] is the silo's own. Both have the same tensors and do the same
//! arithmetic, A(h) = W_up GELU(W_down h + b_d) + b_u, but only the first has an `export`, and its result, [`GlobalUpdate`], is the only
//! type that the silo's egress gate takes. There is no way to make one out of bytes or of anything private:
//!
//! ```no_run
//! use concord_learning::adapter::{Adapter, Global, GlobalBase, GlobalUpdate};
//! fn may_leave(adapter: &Adapter<Global>, base: &GlobalBase) -> GlobalUpdate {
//!     adapter.export(None, base).expect("it fits")
//! }
//! ```
//!
//! The same with a private adapter does not compile:
//!
//! ```compile_fail,E0599
//! use concord_learning::adapter::{Adapter, GlobalBase, GlobalUpdate, Private};
//! fn may_leave(adapter: &Adapter<Private>, base: &GlobalBase) -> GlobalUpdate {
//!     adapter.export(None, base).expect("it fits")
//! }
//! ```
//!
//! nor does handing a private head along, where a global one is taken,
//!
//! ```no_run
//! use concord_learning::{
//!     adapter::{Adapter, Global, GlobalBase, GlobalUpdate},
//!     head::Head,
//! };
//! fn may_leave(adapter: &Adapter<Global>, head: &Head<Global>, base: &GlobalBase) -> GlobalUpdate {
//!     adapter.export(Some(head), base).expect("it fits")
//! }
//! ```
//!
//! ```compile_fail,E0308
//! use concord_learning::{
//!     adapter::{Adapter, Global, GlobalBase, GlobalUpdate, Private},
//!     head::Head,
//! };
//! fn may_leave(adapter: &Adapter<Global>, head: &Head<Private>, base: &GlobalBase) -> GlobalUpdate {
//!     adapter.export(Some(head), base).expect("it fits")
//! }
//! ```
//!
//! nor making an update out of bytes, which can only be read,
//!
//! ```no_run
//! use concord_common::adapter::{AdapterLayout, AdapterVersion};
//! use concord_learning::adapter::GlobalUpdate;
//! fn parts(update: &GlobalUpdate) -> (&AdapterLayout, AdapterVersion, &[u8]) {
//!     (update.layout(), update.base(), update.payload())
//! }
//! ```
//!
//! ```compile_fail,E0451
//! use concord_common::adapter::{AdapterLayout, AdapterVersion};
//! use concord_learning::adapter::GlobalUpdate;
//! fn may_leave(layout: AdapterLayout, base: AdapterVersion, payload: Vec<u8>) -> GlobalUpdate {
//!     GlobalUpdate { layout, base, payload }
//! }
//! ```
//!
//! nor inventing a third kind of adapter beside the two.
//!
//! ```no_run
//! use concord_learning::adapter::{Global, Private, Sharing};
//! fn is_a_kind<S: Sharing>() {}
//! is_a_kind::<Global>();
//! is_a_kind::<Private>();
//! ```
//!
//! ```compile_fail,E0277
//! use concord_learning::adapter::Sharing;
//! struct Loophole;
//! impl Sharing for Loophole {}
//! ```
//!
//! (Each example that compiles stands beside one that does not and shares its names, so that a renamed item cannot pass for the compiler's no.)

mod private;
#[cfg(test)]
mod tests;
mod update;

use std::marker::PhantomData;

use concord_common::{
    adapter::{AdapterShape, TensorSpec},
    seed::Seed,
};
use tch::{Kind, Tensor};

pub use self::update::{GlobalBase, GlobalUpdate};
use crate::{
    error::LearningError,
    named::{HostTensor, NamedTensors, Taker, deep_copy},
};

mod sealed {
    /// Keeps other crates from inventing a third kind.
    pub trait Sealed {}
}

/// Whether tensors may leave the silo: [`Global`] or [`Private`], and nothing else.
pub trait Sharing: sealed::Sealed + 'static {}

/// Travels: the silos average it.
#[derive(Debug)]
pub enum Global {}

/// Stays in the silo's vault.
#[derive(Debug)]
pub enum Private {}

impl sealed::Sealed for Global {}
impl sealed::Sealed for Private {}
impl Sharing for Global {}
impl Sharing for Private {}

/// The tensors of one layer's adapter.
#[derive(Debug)]
pub(crate) struct Bottleneck {
    pub(crate) layer: usize,
    /// `[r, d]`
    pub(crate) down_weight: Tensor,
    /// `[r]`
    pub(crate) down_bias: Tensor,
    /// `[d, r]`
    pub(crate) up_weight: Tensor,
    /// `[d]`
    pub(crate) up_bias: Tensor,
}

const PARTS: usize = 4;

impl Bottleneck {
    /// Names and tensors in layout order.
    fn named(&self) -> [(String, &Tensor); PARTS] {
        let name = |part: &str| format!("layer.{}.{part}", self.layer);
        [
            (name("down.weight"), &self.down_weight),
            (name("down.bias"), &self.down_bias),
            (name("up.weight"), &self.up_weight),
            (name("up.bias"), &self.up_bias),
        ]
    }
}

/// One bottleneck in each adapted layer, all of one kind of [`Sharing`].
#[derive(Debug)]
pub struct Adapter<S: Sharing> {
    layers: Vec<Bottleneck>,
    sharing: PhantomData<fn() -> S>,
}

impl<S: Sharing> Adapter<S> {
    /// Makes every tensor of the shape's bottlenecks (its shared head is not part of an adapter).
    fn build(
        shape: &AdapterShape,
        mut make: impl FnMut(&TensorSpec) -> Result<Tensor, LearningError>,
    ) -> Result<Self, LearningError> {
        let layout = AdapterShape {
            shared_head: None,
            ..shape.clone()
        }
        .layout()?;
        let (groups, _) = layout.tensors().as_chunks::<PARTS>();
        let layers = shape
            .layers
            .iter()
            .zip(groups)
            .map(|(&layer, [down_weight, down_bias, up_weight, up_bias])| {
                Ok(Bottleneck {
                    layer: layer as usize,
                    down_weight: make(down_weight)?,
                    down_bias: make(down_bias)?,
                    up_weight: make(up_weight)?,
                    up_bias: make(up_bias)?,
                })
            })
            .collect::<Result<_, LearningError>>()?;
        Ok(Self {
            layers,
            sharing: PhantomData,
        })
    }

    /// The bottlenecks, lowest layer first.
    pub(crate) fn layers(&self) -> &[Bottleneck] {
        &self.layers
    }

    /// Names (as in the layout) and tensors, in layout order.
    pub(crate) fn named(&self) -> Vec<(String, &Tensor)> {
        self.layers.iter().flat_map(Bottleneck::named).collect()
    }

    /// Copies of the values, each name after `prefix`.
    pub(crate) fn to_host(&self, prefix: &str) -> Result<NamedTensors, LearningError> {
        self.named()
            .into_iter()
            .map(|(name, tensor)| Ok((format!("{prefix}{name}"), HostTensor::from_tensor(tensor)?)))
            .collect()
    }

    /// The reverse of [`Adapter::to_host`].
    pub(crate) fn from_host(
        shape: &AdapterShape,
        prefix: &str,
        taker: &mut Taker,
        kind: Kind,
    ) -> Result<Self, LearningError> {
        Self::build(shape, |spec| {
            let dims: Vec<usize> = spec.shape.iter().map(|&dim| dim as usize).collect();
            taker.tensor(&format!("{prefix}{}", spec.name), &dims, kind)
        })
    }
}

fn copies(layers: &[Bottleneck]) -> Result<Vec<Bottleneck>, LearningError> {
    layers
        .iter()
        .map(|bottleneck| {
            Ok(Bottleneck {
                layer: bottleneck.layer,
                down_weight: deep_copy(&bottleneck.down_weight)?,
                down_bias: deep_copy(&bottleneck.down_bias)?,
                up_weight: deep_copy(&bottleneck.up_weight)?,
                up_bias: deep_copy(&bottleneck.up_bias)?,
            })
        })
        .collect()
}

/// Standard normal draws times `std`, added to nothing: the way all of Concord's own noise is made.
pub(crate) fn drawn(
    spec: &TensorSpec,
    init: concord_common::adapter::InitialScale,
    seed: Seed,
    kind: Kind,
) -> Result<Tensor, LearningError> {
    HostTensor {
        shape: spec.shape.iter().map(|&dim| dim as usize).collect(),
        values: concord_common::adapter::initial_values(spec, init, seed),
    }
    .to_tensor(kind)
}
