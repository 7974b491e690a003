//! Where private adapters come from.

use std::marker::PhantomData;

use concord_common::{
    adapter::{AdapterShape, InitialScale},
    seed::Seed,
};
use tch::Kind;

use super::{Adapter, Global, Private, copies, drawn};
use crate::{error::LearningError, named::HostTensor};

impl Adapter<Private> {
    /// Own random weights. `seed` must be the silo's, so that no two adapters of a model start equal: equal ones would receive equal
    /// gradients and never separate.
    ///
    /// # Errors
    /// [`LearningError::Payload`] for an impossible shape.
    pub fn independent(
        shape: &AdapterShape,
        init: InitialScale,
        seed: Seed,
        kind: Kind,
    ) -> Result<Self, LearningError> {
        Self::build(shape, |spec| drawn(spec, init, seed, kind))
    }

    /// The global adapter's weights plus normal noise whose standard deviation is `noise` times that of each tensor's own elements.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if a tensor cannot be copied.
    pub fn near(
        global: &Adapter<Global>,
        noise: f64,
        seed: Seed,
        kind: Kind,
    ) -> Result<Self, LearningError> {
        let private = Self::copy_of(global)?;
        for (name, tensor) in private.named() {
            let mut host = HostTensor::from_tensor(tensor)?;
            let std = noise * standard_deviation(&host.values);
            let mut rng = seed.derive(&name).rng();
            for value in &mut host.values {
                *value = (f64::from(*value) + std * rng.normal()) as f32;
            }
            let mut place = tensor.shallow_clone();
            place.f_copy_(&host.to_tensor(kind)?)?;
        }
        Ok(private)
    }

    /// The global adapter's weights as they are; for algorithms in which the private adapter stands alone.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if a tensor cannot be copied.
    pub fn copy_of(global: &Adapter<Global>) -> Result<Self, LearningError> {
        Ok(Self {
            layers: copies(&global.layers)?,
            sharing: PhantomData,
        })
    }
}

fn standard_deviation(values: &[f32]) -> f64 {
    let n = values.len().max(1) as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = values
        .iter()
        .map(|&x| (f64::from(x) - mean).powi(2))
        .sum::<f64>()
        / n;
    variance.sqrt()
}
