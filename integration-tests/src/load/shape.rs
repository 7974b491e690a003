//! A backbone's sizes from which an adapter of a wanted size follows.

/// Layers of the load's backbone; each gives four tensors.
pub const LAYERS: u32 = 25;
/// Tensors of the load's adapter, as many as the peers' scripts send.
pub const TENSORS: u64 = 4 * LAYERS as u64;

/// Width d and bottleneck r whose adapter has at least `parameters` elements over [`LAYERS`] layers, and hardly more.
///
/// A layer has 2dr + r + d elements, and 2(2dr + r + d) + 1 = (2d + 1)(2r + 1): the first number from `parameters / LAYERS`
/// on that factors with a usable r and d is taken.
///
/// # Panics
/// If there is none, with `parameters` beyond what a layout may have.
pub fn shape_for(parameters: u64) -> (u64, u64) {
    let wanted = parameters.div_ceil(u64::from(LAYERS)).max(4);
    (wanted..)
        .find_map(|elements| {
            let product = 2 * elements + 1;
            // The largest factor up to the square root, so that d and r are alike and both within the server's bounds.
            let factor = (1..=product.isqrt())
                .rev()
                .find(|factor| product % factor == 0)
                .filter(|&factor| factor >= 3)?;
            let hidden = (product / factor - 1) / 2;
            let bottleneck = (factor - 1) / 2;
            (hidden <= 65_536).then_some((hidden, bottleneck))
        })
        .expect("every third number gives a product that 3 divides")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_benchmarks_sizes_are_met_within_a_thousandth() {
        for parameters in [900_000, 7_000_000, 250_000, 110_000_000] {
            let (d, r) = shape_for(parameters);
            let elements = u64::from(LAYERS) * (2 * d * r + r + d);
            assert!(elements >= parameters, "{parameters}: {elements}");
            assert!(
                elements < parameters + parameters / 1000,
                "{parameters}: {elements}"
            );
        }
    }
}
