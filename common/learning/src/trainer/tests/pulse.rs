//! Signs of life.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tch::Kind;

use super::*;
use crate::{
    model::Predictor,
    network::EVALUATION_ROWS,
    testing::{backbone, classification, first_payload, go_on, spec, tokenizer, trainer},
};

/// Beats so far, and what beats.
fn counted() -> (Arc<AtomicUsize>, Pulse) {
    let count = Arc::new(AtomicUsize::new(0));
    let beats = Arc::clone(&count);
    let pulse = Pulse::new(move || {
        beats.fetch_add(1, Ordering::Relaxed);
    });
    (count, pulse)
}

#[test]
fn every_batch_of_every_evaluation_beats() {
    const BATCHES: usize = 3;
    let rows = (BATCHES - 1) * EVALUATION_ROWS + 1;
    let (spec, data) = (spec("fedavg"), classification(12, rows));
    let payload = first_payload(&spec);
    let mut trainer = trainer(&spec, &data);
    let (count, pulse) = counted();
    trainer.set_pulse(pulse.clone());
    let beats = || count.swap(0, Ordering::Relaxed);

    trainer.evaluate(&payload, Split::Test).unwrap();
    assert_eq!(beats(), BATCHES, "evaluation");
    trainer.after_aggregation(1, &payload).unwrap();
    assert_eq!(beats(), BATCHES, "after aggregation");
    trainer.train_round(1, &payload, &mut go_on).unwrap();
    assert_eq!(beats(), BATCHES, "validation at the end of a round");

    let backbone = backbone(Kind::Float);
    let tokenizer = tokenizer(&backbone);
    let model = trainer.best().unwrap().clone();
    let mut predictor = Predictor::new(model, backbone).unwrap();
    predictor.set_pulse(pulse);
    predictor.evaluate(trainer.task(), Split::Test).unwrap();
    assert_eq!(beats(), BATCHES, "the best model");
    predictor.evaluate_rows(&tokenizer, &data.test).unwrap();
    assert_eq!(beats(), BATCHES, "rows of a file");
}

#[test]
fn every_split_beats_when_its_rows_are_made_ready() {
    let (spec, backbone) = (spec("fedavg"), backbone(Kind::Float));
    let (count, pulse) = counted();
    PreparedTask::new(
        &classification(12, 3),
        &backbone,
        &tokenizer(&backbone),
        spec.training.max_length as usize,
        Place::first(&spec),
        CacheSettings::default(),
        &pulse,
    )
    .unwrap();
    assert_eq!(count.load(Ordering::Relaxed), 3);
}
