mod algorithms;
mod edges;
mod privacy;
mod pulse;
mod refusals;
mod repeat;

use super::*;
use crate::testing::{applied, go_on};

const ALGORITHMS: [&str; 7] = [
    "local", "fedavg", "fedprox", "moon", "ditto", "fedrep", "fedmcp",
];

fn number(metrics: &[(String, f64)], name: &str) -> f64 {
    metrics
        .iter()
        .find(|(key, _)| key == name)
        .unwrap_or_else(|| panic!("no {name} among {metrics:?}"))
        .1
}

/// Trains some rounds of a federation of one and gives the last adapter and every round's update.
fn federate(
    trainer: &mut LocalTrainer,
    payload: Vec<u8>,
    rounds: std::ops::RangeInclusive<u32>,
) -> (Vec<u8>, Vec<Vec<u8>>) {
    let mut payload = payload;
    let mut updates = Vec::new();
    for round in rounds {
        let result = trainer.train_round(round, &payload, &mut go_on).unwrap();
        payload = applied(&payload, result.update.payload());
        trainer.after_aggregation(round, &payload).unwrap();
        updates.push(result.update.into_payload());
    }
    (payload, updates)
}
