//! What a silo keeps between rounds, apart from the optimiser and the best model.

use concord_common::{
    adapter::{AdapterShape, InitialScale},
    seed::Seed,
};
use tch::{Kind, Tensor};

use super::plan::{Plan, Start};
use crate::{
    adapter::{Adapter, Global, Private},
    error::LearningError,
    head::{Head, Linear},
    named::{HostTensor, NamedTensors, Taker},
};

/// Sizes of everything private.
#[derive(Clone, Debug)]
pub(super) struct Sizes {
    /// Of the global adapter.
    pub(super) global: AdapterShape,
    /// Outputs of the silo's own head.
    pub(super) outputs: usize,
    pub(super) kind: Kind,
    /// Whether the two adapters are joined by a learned gate.
    pub(super) gate: bool,
}

/// The silo's own tensors.
#[derive(Debug)]
pub(super) struct Personal {
    pub(super) private: Option<Adapter<Private>>,
    pub(super) head: Option<Head<Private>>,
    /// Ditto's head of the global path.
    pub(super) path_head: Option<Head<Private>>,
    /// One number a layer; g = sigmoid of it.
    pub(super) gate: Option<Tensor>,
    /// MOON's model of the round before: a copy of what was then the global adapter after local training.
    pub(super) previous: Option<Adapter<Private>>,
}

impl Sizes {
    fn private_shape(&self, bottleneck: u64) -> AdapterShape {
        AdapterShape {
            bottleneck,
            shared_head: None,
            ..self.global.clone()
        }
    }

    fn hidden(&self) -> usize {
        self.global.hidden as usize
    }
}

impl Personal {
    /// The first values, from the silo's seed and the first global adapter that it receives.
    pub(super) fn begin(
        plan: &Plan,
        sizes: &Sizes,
        init: InitialScale,
        seed: Seed,
        received: &Adapter<Global>,
        received_head: Option<&Head<Global>>,
    ) -> Result<Self, LearningError> {
        let kind = sizes.kind;
        let private = plan
            .private
            .map(|(bottleneck, start)| {
                let seed = seed.derive("private-adapter");
                match start {
                    Start::Independent => {
                        Adapter::independent(&sizes.private_shape(bottleneck), init, seed, kind)
                    }
                    Start::Near { noise } => Adapter::near(received, noise, seed, kind),
                    Start::Copy => Adapter::copy_of(received),
                }
            })
            .transpose()?;
        let own_head = || match received_head {
            // Ditto and Local under a shared head: the personal head starts where the shared one does.
            Some(shared) => Head::copy_of(&shared.linear),
            None => Head::draw(sizes.outputs, sizes.hidden(), seed.derive("head"), kind),
        };
        Ok(Self {
            private,
            head: plan.own_head().then(own_head).transpose()?,
            path_head: plan.path_head.then(own_head).transpose()?,
            gate: (plan.private.is_some() && plan.personal.0.global() && sizes.gate)
                .then(|| {
                    Tensor::f_zeros([sizes.global.layers.len() as i64], (kind, tch::Device::Cpu))
                })
                .transpose()?,
            previous: None,
        })
    }

    /// Names and tensors of what is trained, as the optimiser knows them.
    pub(super) fn named(&self) -> Vec<(String, &Tensor)> {
        let mut named = Vec::new();
        if let Some(private) = &self.private {
            named.extend(
                private
                    .named()
                    .into_iter()
                    .map(|(name, tensor)| (format!("private.{name}"), tensor)),
            );
        }
        if let Some(head) = &self.head {
            named.extend(head.linear.named("head."));
        }
        if let Some(head) = &self.path_head {
            named.extend(head.linear.named("path_head."));
        }
        if let Some(gate) = &self.gate {
            named.push(("gate".to_owned(), gate));
        }
        named
    }

    pub(super) fn to_host(&self) -> Result<NamedTensors, LearningError> {
        let mut tensors = NamedTensors::new();
        for (name, tensor) in self.named() {
            tensors.insert(name, HostTensor::from_tensor(tensor)?);
        }
        if let Some(previous) = &self.previous {
            tensors.extend(previous.to_host("previous.")?);
        }
        Ok(tensors)
    }

    /// The reverse of [`Personal::to_host`].
    pub(super) fn from_host(
        plan: &Plan,
        sizes: &Sizes,
        taker: &mut Taker,
    ) -> Result<Self, LearningError> {
        let kind = sizes.kind;
        let private = plan
            .private
            .map(|(bottleneck, _)| {
                Adapter::from_host(&sizes.private_shape(bottleneck), "private.", taker, kind)
            })
            .transpose()?;
        let mut head = |present: bool, prefix: &str| {
            present
                .then(|| {
                    Linear::from_host(prefix, sizes.outputs, sizes.hidden(), taker, kind)
                        .map(Head::own)
                })
                .transpose()
        };
        let own = head(plan.own_head(), "head.")?;
        let path_head = head(plan.path_head, "path_head.")?;
        let gate = if taker.has("gate") {
            Some(taker.tensor("gate", &[sizes.global.layers.len()], kind)?)
        } else {
            None
        };
        let kept = taker.has(&format!(
            "previous.layer.{}.up.bias",
            sizes.global.layers[0]
        ));
        let previous = (plan.keeps_previous && kept)
            .then(|| {
                let shape = sizes.private_shape(sizes.global.bottleneck);
                Adapter::from_host(&shape, "previous.", taker, kind)
            })
            .transpose()?;
        Ok(Self {
            private,
            head: own,
            path_head,
            gate,
            previous,
        })
    }
}
