//! Which rows go through the model together: batches of rows of like length, so that little is padded.
//!
//! Training rows are shuffled, cut into windows of a few batches, sorted by length within each window and cut into batches, and the batches are
//! shuffled again: rows meet different rows in every epoch, yet a batch's rows are of like length. All of it follows from the seed.

use concord_common::seed::Seed;

/// Batches' worth of rows that are sorted together.
const WINDOW: usize = 8;

/// How training rows are put into batches.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Batching {
    /// As [`training_batches`] does it.
    #[default]
    Bucketed,
    /// As they stand, the same in every epoch: to compare the time of a step with programs that do so.
    InOrder,
}

/// Batches of training rows, `batch_size` rows each. `rows` are row numbers, `lengths` is indexed by them.
///
/// The last batch has what is left over. If that is fewer than `least` rows it joins the batch before it, because the unbiased CKA is not
/// defined for fewer than 4 rows and a gradient over 1 or 2 is mostly noise; when it is the only batch it stays as it is.
pub fn training_batches(
    rows: &[usize],
    lengths: &[usize],
    batch_size: usize,
    least: usize,
    seed: Seed,
) -> Vec<Vec<usize>> {
    let batch_size = batch_size.max(1);
    let mut rng = seed.rng();
    let mut order = rows.to_vec();
    rng.shuffle(&mut order);
    let mut batches: Vec<Vec<usize>> = Vec::with_capacity(order.len().div_ceil(batch_size));
    for window in order.chunks(batch_size * WINDOW) {
        let mut sorted = window.to_vec();
        // Stable, so that rows of one length stay in the shuffled order.
        sorted.sort_by_key(|&row| lengths[row]);
        batches.extend(sorted.chunks(batch_size).map(<[usize]>::to_vec));
    }
    if batches.len() > 1
        && let Some(rest) = batches.pop_if(|batch| batch.len() < least)
        && let Some(before) = batches.last_mut()
    {
        before.extend(rest);
    }
    rng.shuffle(&mut batches);
    batches
}

/// Batches of rows `0..lengths.len()` for evaluation, shortest rows first.
pub fn evaluation_batches(lengths: &[usize], batch_size: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&row| lengths[row]);
    order
        .chunks(batch_size.max(1))
        .map(<[usize]>::to_vec)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lengths(n: usize) -> Vec<usize> {
        (0..n).map(|row| 3 + (row * 37) % 50).collect()
    }

    fn all(n: usize) -> Vec<usize> {
        (0..n).collect()
    }

    proptest! {
        #[test]
        fn every_row_is_in_exactly_one_batch(n in 1_usize..300, size in 1_usize..40, seed: u64) {
            let batches = training_batches(&all(n), &lengths(n), size, 4, Seed(seed));
            let mut seen: Vec<usize> = batches.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, all(n));
            prop_assert!(batches.iter().all(|batch| batch.len() < size + 4));
        }

        #[test]
        fn no_batch_is_too_short_for_the_similarity_estimate(n in 4_usize..300, size in 4_usize..40, seed: u64) {
            let batches = training_batches(&all(n), &lengths(n), size, 4, Seed(seed));
            prop_assert!(batches.iter().all(|batch| batch.len() >= 4));
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_batches_and_another_seed_others() {
        let batches = |seed| training_batches(&all(100), &lengths(100), 16, 4, Seed(seed));
        assert_eq!(batches(1), batches(1));
        assert_ne!(batches(1), batches(2));
    }

    #[test]
    fn bucketing_saves_most_of_the_padding() {
        let n = 512;
        let lengths = lengths(n);
        let cells = |batches: &[Vec<usize>]| -> usize {
            batches
                .iter()
                .map(|batch| batch.len() * batch.iter().map(|&row| lengths[row]).max().unwrap_or(0))
                .sum()
        };
        let plain: Vec<Vec<usize>> = all(n).chunks(16).map(<[usize]>::to_vec).collect();
        let bucketed = training_batches(&all(n), &lengths, 16, 4, Seed(5));
        let real: usize = lengths.iter().sum();
        assert!(cells(&plain) > real * 17 / 10);
        assert!(cells(&bucketed) < real * 12 / 10);
    }

    #[test]
    fn evaluation_takes_every_row_once_and_short_rows_first() {
        let lengths = [9, 2, 5, 2];
        assert_eq!(evaluation_batches(&lengths, 3), [vec![1, 3, 2], vec![0]]);
    }
}
