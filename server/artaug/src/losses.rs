//! The stored list of a training's losses: little-endian 64-bit floats, one a step, without a header.

/// The list as bytes.
pub fn pack(losses: &[f64]) -> Vec<u8> {
    losses.iter().flat_map(|loss| loss.to_le_bytes()).collect()
}

/// The list of stored bytes; none if they are no such list.
pub fn unpack(bytes: &[u8]) -> Option<Vec<f64>> {
    let (losses, rest) = bytes.as_chunks::<8>();
    rest.is_empty().then(|| {
        losses
            .iter()
            .map(|loss| f64::from_le_bytes(*loss))
            .collect()
    })
}

/// Mean of the last tenth of the steps, at least one; 0 without any.
pub fn final_mean(losses: &[f64]) -> f64 {
    let last = &losses[losses.len() - losses.len().div_ceil(10)..];
    last.iter().sum::<f64>() / last.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_come_back_to_the_last_bit() {
        let losses = [0.1, 1.0 / 3.0, f64::MIN_POSITIVE, 7e300];
        assert_eq!(unpack(&pack(&losses)).unwrap(), losses);
        assert_eq!(unpack(&[]).unwrap(), Vec::<f64>::new());
        assert_eq!(unpack(&[0; 9]), None);
    }

    #[test]
    fn the_final_mean_is_that_of_the_last_tenth() {
        let losses: Vec<f64> = (0..20).map(f64::from).collect();
        assert_eq!(final_mean(&losses), 18.5);
        assert_eq!((final_mean(&[3.0]), final_mean(&[])), (3.0, 0.0));
    }
}
