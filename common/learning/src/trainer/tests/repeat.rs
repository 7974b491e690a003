//! Repeatability: runs, resumption, cancellation, the cache, the best model.

use concord_common::{adapter::decode_f32, job::AdapterPosition};
use tch::Kind;

use super::*;
use crate::{
    cache::{CacheMode, DiskBudget},
    testing::{
        applied, backbone, classification, first_payload, go_on, silo, spec, spec_with, tokenizer,
        trainer, try_trainer,
    },
};

#[test]
fn two_runs_give_the_same_bytes() {
    for algorithm in ALGORITHMS {
        let run = || {
            let spec = spec(algorithm);
            let mut trainer = trainer(&spec, &classification(30, 9));
            let (_, updates) = federate(&mut trainer, first_payload(&spec), 1..=2);
            (updates, trainer.save_state().unwrap().to_bytes().unwrap())
        };
        assert!(run() == run(), "{algorithm}");
    }
}

#[test]
fn silos_of_one_job_draw_unlike_batches_heads_and_private_adapters() {
    let spec = spec("fedmcp");
    let data = classification(30, 0);
    let state = |name: &str| {
        let mut trainer = try_trainer(&spec, name, &data, CacheSettings::default(), None).unwrap();
        let (last, updates) = federate(&mut trainer, first_payload(&spec), 1..=1);
        (updates, trainer.personal_model(&last).unwrap())
    };
    let ((update_a, a), (update_b, b)) = (state("north"), state("south"));
    assert_ne!(update_a, update_b);
    for name in ["head.weight", "private.layer.0.down.weight"] {
        assert_ne!(a.tensors[name], b.tensors[name], "{name}");
    }
}

#[test]
fn a_resumed_trainer_goes_on_to_the_bit() {
    for algorithm in ALGORITHMS {
        let spec = spec_with(
            &format!("name = \"{algorithm}\""),
            "combine = \"gate\"",
            "",
            "warmup_steps = 9",
        );
        let data = classification(30, 9);
        let mut whole = trainer(&spec, &data);
        let (_, want) = federate(&mut whole, first_payload(&spec), 1..=3);

        let mut first = trainer(&spec, &data);
        let (payload, mut got) = federate(&mut first, first_payload(&spec), 1..=1);
        let bytes = first.save_state().unwrap().to_bytes().unwrap();
        drop(first);
        let saved = SavedState::from_bytes(&bytes).unwrap();
        assert_eq!(saved.last_round(), 1);
        let mut second =
            try_trainer(&spec, "north", &data, CacheSettings::default(), Some(saved)).unwrap();
        let (_, rest) = federate(&mut second, payload, 2..=3);
        got.extend(rest);
        assert!(got == want, "{algorithm}");
        assert!(
            second.save_state().unwrap() == whole.save_state().unwrap(),
            "{algorithm}"
        );
    }
}

#[test]
fn the_position_of_the_adapters_changes_what_is_learned_and_not_what_travels() {
    let data = classification(30, 9);
    let run = |adapter: &str| {
        let spec = spec_with("name = \"fedmcp\"", adapter, "", "");
        let (first, layout) = (first_payload(&spec), spec.adapter_shape().layout().unwrap());
        let mut trainer = trainer(&spec, &data);
        let updates = federate(&mut trainer, first.clone(), 1..=2).1;
        (layout.digest(), first, updates)
    };
    let (layout, first, updates) = run("");
    assert_eq!(
        run("position = \"ffn\""),
        (layout, first.clone(), updates.clone())
    );
    let other = run("position = \"attention\"");
    assert_eq!((other.0, &other.1), (layout, &first));
    assert_ne!(other.2, updates);
    assert_eq!(other.2[0].len(), updates[0].len());
    assert_eq!(run("position = \"attention\""), other);
}

#[test]
fn a_cancelled_round_leaves_no_trace() {
    for algorithm in ["fedmcp", "ditto"] {
        let spec = spec(algorithm);
        let data = classification(30, 9);
        let mut whole = trainer(&spec, &data);
        let (payload, first) = federate(&mut whole, first_payload(&spec), 1..=1);
        let (_, second) = federate(&mut whole, payload.clone(), 2..=2);

        let mut stopped = trainer(&spec, &data);
        let mut steps = 0;
        let mut stop_at_third = |progress: Progress| {
            steps += 1;
            assert_eq!(progress.step, steps);
            if steps == 3 {
                Continue::Stop
            } else {
                Continue::Yes
            }
        };
        let outcome = stopped.train_round(1, &first_payload(&spec), &mut stop_at_third);
        assert!(matches!(outcome, Err(LearningError::Cancelled)));
        assert_eq!(steps, 3);
        assert_eq!(stopped.last_round(), 0);
        assert_eq!(federate(&mut stopped, first_payload(&spec), 1..=1).1, first);
        let outcome = stopped.train_round(2, &payload, &mut |_| Continue::Stop);
        assert!(matches!(outcome, Err(LearningError::Cancelled)));
        assert_eq!(federate(&mut stopped, payload, 2..=2).1, second);
    }
}

#[test]
fn the_cache_changes_no_bit_wherever_the_rows_are_kept() {
    for adapter in ["layers = [1]", "layers = [1]\nposition = \"attention\""] {
        cache_changes_no_bit(&spec_with("name = \"fedmcp\"", adapter, "", "epochs = 2"));
    }
}

fn cache_changes_no_bit(spec: &TrainingSpec) {
    let data = classification(30, 9);
    let folder = tempfile::tempdir().unwrap();
    let disk = |bytes| {
        Some(DiskBudget {
            folder: folder.path().to_owned(),
            bytes,
        })
    };
    let run = |mode, memory_bytes, disk| {
        let settings = CacheSettings {
            mode,
            memory_bytes,
            disk,
        };
        let mut trainer = try_trainer(spec, "north", &data, settings, None).unwrap();
        let updates = federate(&mut trainer, first_payload(spec), 1..=2).1;
        (updates, trainer.cache_stats())
    };
    let (memory, stats) = run(CacheMode::On, 1 << 20, None);
    assert_eq!(stats.misses, 39);
    assert!(stats.hits > stats.misses);
    let (on_disk, stats) = run(CacheMode::On, 0, disk(1 << 20));
    assert!(stats.disk_bytes > 0 && stats.misses == 39);
    let (mixed, stats) = run(CacheMode::On, 10_000, disk(10_000));
    assert!(stats.memory_bytes > 0 && stats.disk_bytes > 0 && stats.misses > 39);
    let (none, stats) = run(CacheMode::On, 0, None);
    assert_eq!(stats.hits, 0);
    assert!(memory == on_disk && memory == mixed && memory == none);

    let (off, _) = run(CacheMode::Off, 0, None);
    let values = |updates: &[Vec<u8>]| -> Vec<f32> {
        updates
            .iter()
            .flat_map(|update| decode_f32(update).unwrap())
            .collect()
    };
    let largest = values(&off)
        .iter()
        .zip(&values(&memory))
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(largest < 1e-3, "{largest}");
}

#[test]
fn trainers_can_share_prepared_rows() {
    let spec = spec("fedavg");
    let backbone = backbone(Kind::Float);
    let data = classification(30, 0);
    let task = Arc::new(
        PreparedTask::new(
            &data,
            &backbone,
            &tokenizer(&backbone),
            spec.training.max_length as usize,
            Place::first(&spec),
            CacheSettings::default(),
            &Pulse::default(),
        )
        .unwrap(),
    );
    let with = |spec: &TrainingSpec| {
        LocalTrainer::with_task(spec, &silo("north"), backbone.clone(), task.clone(), None)
    };
    let mut first = with(&spec).unwrap();
    let alone = trainer(&spec, &data)
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    let shared = first
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    assert_eq!(shared.update, alone.update);
    let misses = task.cache_stats().misses;
    let again = with(&spec)
        .unwrap()
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    assert_eq!(again.update, alone.update);
    assert_eq!(task.cache_stats().misses, misses);

    let mut top = spec.clone();
    top.adapter.layers = [1].into();
    assert!(with(&top).is_err());
    let mut after_attention = spec.clone();
    after_attention.adapter.position = AdapterPosition::Attention;
    let error = with(&after_attention).unwrap_err().to_string();
    assert!(error.contains("place of the first adapter"), "{error}");
}

#[test]
fn only_the_wanted_number_of_rows_is_used() {
    let spec = spec_with("name = \"fedavg\"", "", "", "max_examples = 10");
    let data = classification(30, 0);
    let mut north = trainer(&spec, &data);
    assert_eq!(north.examples(), 10);
    north
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    assert_eq!(north.cache_stats().misses, 10);
    let south = try_trainer(&spec, "south", &data, CacheSettings::default(), None).unwrap();
    assert_ne!(north.rows, south.rows);
}

#[test]
fn a_trainer_can_be_handed_to_the_torch_thread() {
    fn send<T: Send>() {}
    send::<LocalTrainer>();
    send::<SavedState>();
    send::<PersonalModel>();
    send::<RoundResult>();
}

#[test]
fn the_best_model_is_the_one_with_the_highest_metric() {
    let spec = spec_with("name = \"fedavg\"", "", "", "epochs = 3");
    let mut trainer = trainer(&spec, &classification(60, 30));
    let mut payload = first_payload(&spec);
    let mut highest = f64::NEG_INFINITY;
    for round in 1..=3 {
        let result = trainer.train_round(round, &payload, &mut go_on).unwrap();
        payload = applied(&payload, result.update.payload());
        let published = trainer.after_aggregation(round, &payload).unwrap().unwrap();
        highest = highest.max(published.metrics["accuracy"]);
        let (name, value) = trainer.best().unwrap().facts.validation.clone().unwrap();
        assert_eq!(name, "accuracy");
        assert!((value - highest).abs() < 1e-12);
    }
}

#[test]
fn without_validation_rows_the_newest_model_is_kept() {
    let spec = spec("fedavg");
    let mut trainer = trainer(&spec, &classification(30, 0));
    let result = trainer
        .train_round(1, &first_payload(&spec), &mut go_on)
        .unwrap();
    assert_eq!(result.validation, None);
    assert_eq!(trainer.best(), None);
    for round in 1..=2 {
        assert_eq!(
            trainer
                .after_aggregation(round, &first_payload(&spec))
                .unwrap(),
            None
        );
        assert_eq!(trainer.best().unwrap().facts.round, round);
    }
}
