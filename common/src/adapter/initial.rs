//! Where a new adapter's weights come from.

use super::TensorSpec;
use crate::seed::Seed;

/// Standard deviations of a new adapter's weights.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct InitialScale {
    /// Of `down.weight`; 0 means `1/sqrt(d)`.
    pub down: f32,
    /// Of `up.weight`. Not 0: zero outputs make CKA 0/0.
    pub up: f32,
    /// Of `head.weight`; 0 means 0.02, BERT's initialiser range.
    pub head: f32,
}

impl Default for InitialScale {
    fn default() -> Self {
        Self {
            down: 0.0,
            up: 1e-3,
            head: 0.0,
        }
    }
}

/// First values of one tensor: normal with the scale that belongs to the name, biases 0. A tensor's draws depend on the
/// seed and its name alone, so that adding a layer does not change the others.
pub fn initial_values(tensor: &TensorSpec, init: InitialScale, seed: Seed) -> Vec<f32> {
    let elements = tensor.elements() as usize;
    let fan_in = *tensor.shape.last().unwrap_or(&1) as f32;
    let std = if tensor.name.ends_with("down.weight") {
        if init.down == 0.0 {
            fan_in.sqrt().recip()
        } else {
            init.down
        }
    } else if tensor.name.ends_with("up.weight") {
        init.up
    } else if tensor.name.ends_with("head.weight") {
        if init.head == 0.0 { 0.02 } else { init.head }
    } else {
        return vec![0.0; elements];
    };
    let mut rng = seed.derive(&tensor.name).rng();
    (0..elements)
        .map(|_| (rng.normal() * f64::from(std)) as f32)
        .collect()
}
