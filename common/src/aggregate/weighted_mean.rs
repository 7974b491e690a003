//! FedAvg (McMahan et al., arXiv 1602.05629): new = base + sum over k of p_k delta_k.

use std::io;

use super::{Aggregate, AggregateError, Aggregation, Aggregator, blocks};
use crate::{SiloId, job::Weighting};

/// The weighted mean of the updates, added to the base.
///
/// Per element, in `f64`: one `p_k * delta_k` after the other is added up in silo-id order, then the base's value is added,
/// and the sum is rounded to `f32` once. p_k is n_k / n with [`Weighting::Examples`] and 1 / K with [`Weighting::Uniform`], computed in
/// `f64`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WeightedMean {
    weighting: Weighting,
}

impl WeightedMean {
    /// The rule with these weights.
    pub fn new(weighting: Weighting) -> Self {
        Self { weighting }
    }

    /// p_k of every contribution, in silo-id order.
    fn weights(self, work: &Aggregation<'_>) -> Result<Vec<f64>, AggregateError> {
        if work.updates.is_empty() {
            return Err(AggregateError::Empty);
        }
        if let Some(silo) = without_examples(work) {
            return Err(AggregateError::NoExamples { silo });
        }
        let total: u128 = work
            .updates
            .values()
            .map(|update| u128::from(update.examples))
            .sum();
        Ok(work
            .updates
            .values()
            .map(|update| match self.weighting {
                Weighting::Examples => update.examples as f64 / total as f64,
                Weighting::Uniform => 1.0 / work.updates.len() as f64,
            })
            .collect())
    }
}

fn without_examples(work: &Aggregation<'_>) -> Option<SiloId> {
    let (silo, _) = work
        .updates
        .iter()
        .find(|(_, update)| update.examples == 0)?;
    Some(silo.clone())
}

impl Aggregator for WeightedMean {
    fn aggregate(
        &self,
        work: &Aggregation<'_>,
        sink: &mut dyn io::Write,
    ) -> Result<Aggregate, AggregateError> {
        let weights = self.weights(work)?;
        blocks::run(work, sink, &|block, step| {
            for (index, weight) in weights.iter().enumerate() {
                block.add(index, *weight, step)?;
            }
            Ok(())
        })
    }
}
