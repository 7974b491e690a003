use std::{fs, os::unix::fs::PermissionsExt as _};

use concord_common::{
    Timestamp,
    adapter::{AdapterShape, InitialScale, encode_f32},
    clock::MockClock,
    seed::Seed,
};
use concord_learning::adapter::{Adapter, Global, GlobalBase};

use super::*;

mod log_file;
mod outlet;

const NO_LIMITS: GateLimits = GateLimits {
    bytes_per_job: u64::MAX,
    max_update_norm: None,
};

fn shape(bottleneck: u64) -> AdapterShape {
    AdapterShape {
        hidden: 4,
        bottleneck,
        layers: vec![0],
        shared_head: None,
    }
}

/// An adapter of these sizes, as a round gives it out.
fn base(bottleneck: u64) -> GlobalBase {
    let payload = shape(bottleneck)
        .initial_payload(InitialScale::default(), Seed(1))
        .unwrap();
    GlobalBase::receive(&shape(bottleneck), &payload).unwrap()
}

/// The update of an adapter that moved from one set of random weights to another.
fn update(bottleneck: u64) -> GlobalUpdate {
    let other = shape(bottleneck)
        .initial_payload(InitialScale::default(), Seed(2))
        .unwrap();
    let moved: Adapter<Global> = GlobalBase::receive(&shape(bottleneck), &other)
        .unwrap()
        .adapter(tch_kind())
        .unwrap();
    moved.export(None, &base(bottleneck)).unwrap()
}

fn tch_kind() -> concord_learning::Kind {
    concord_learning::Kind::Float
}

fn assignment() -> Assignment {
    Assignment {
        job: "job-1".parse().unwrap(),
        round: RoundNumber(3),
        layout: shape(2).layout().unwrap(),
        base: base(2).version(),
        max_update_norm: None,
        max_examples: 1_000,
    }
}

fn gate(folder: &Path, limits: GateLimits) -> EgressGate {
    let clock = MockClock::new(Timestamp(1_700_000_000_000));
    EgressGate::open(
        folder,
        "clinic-a".parse().unwrap(),
        "https://localhost:7443".to_owned(),
        limits,
        Arc::new(clock),
    )
    .unwrap()
}

fn log_lines(folder: &Path) -> Vec<serde_json::Value> {
    fs::read_to_string(folder.join("egress.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

impl EgressGate {
    /// Gives the gate a log that can neither take a line nor be mended: its file is open for reading only.
    pub(crate) fn break_log(&self) {
        let mut log = self.log.lock().unwrap();
        *log = log.unwritable();
    }
}

fn held(result: Result<Cleared, EgressError>) -> ErrorCode {
    match result.unwrap_err() {
        EgressError::Held(refusal) => refusal.code,
        error => panic!("{error}"),
    }
}

#[test]
fn the_log_entry_is_on_disk_before_anything_can_be_sent() {
    let folder = tempfile::tempdir().unwrap();
    let gate = gate(folder.path(), NO_LIMITS);
    let cleared = gate.pass(&assignment(), update(2), 10).unwrap();
    assert!(
        log_lines(folder.path()).is_empty(),
        "passing the check sends nothing yet"
    );
    let departure = gate.depart(&cleared, 0).unwrap();
    let lines = log_lines(folder.path());
    assert_eq!(departure.cleared().payload().len(), 4 * (2 * 4 * 2 + 2 + 4));
    assert_eq!(lines.len(), 1);
    let line = &lines[0];
    assert_eq!(line["kind"], "contribution");
    assert_eq!(line["job"], "job-1");
    assert_eq!(line["round"], 3);
    assert_eq!(line["tensors"], 4);
    assert_eq!(line["bytes"], cleared.payload().len());
    assert_eq!(line["digest"], cleared.digest().to_string());
    assert_eq!(line["server"], "https://localhost:7443");
    assert_eq!(line["time"], "2023-11-14T22:13:20Z");
    assert!((line["norm"].as_f64().unwrap() - cleared.norm()).abs() < 1e-12);
    let mode = fs::metadata(folder.path().join("egress.jsonl"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn an_update_of_another_layout_is_held_back() {
    let folder = tempfile::tempdir().unwrap();
    let gate = gate(folder.path(), NO_LIMITS);
    assert_eq!(
        held(gate.pass(&assignment(), update(3), 10)),
        ErrorCode::TensorShape
    );
    let two_layers = Assignment {
        layout: AdapterShape {
            layers: vec![0, 1],
            ..shape(2)
        }
        .layout()
        .unwrap(),
        ..assignment()
    };
    assert_eq!(
        held(gate.pass(&two_layers, update(2), 10)),
        ErrorCode::TensorCount
    );
    let other_layer = Assignment {
        layout: AdapterShape {
            layers: vec![1],
            ..shape(2)
        }
        .layout()
        .unwrap(),
        ..assignment()
    };
    assert_eq!(
        held(gate.pass(&other_layer, update(2), 10)),
        ErrorCode::TensorName
    );
}

#[test]
fn an_update_to_another_base_or_without_examples_is_held_back() {
    let folder = tempfile::tempdir().unwrap();
    let gate = gate(folder.path(), NO_LIMITS);
    let other_base = Assignment {
        base: AdapterVersion::of(b"other"),
        ..assignment()
    };
    assert_eq!(
        held(gate.pass(&other_base, update(2), 10)),
        ErrorCode::WrongBaseVersion
    );
    assert_eq!(
        held(gate.pass(&assignment(), update(2), 0)),
        ErrorCode::BadWeight
    );
    assert_eq!(
        held(gate.pass(&assignment(), update(2), 1_001)),
        ErrorCode::BadWeight
    );
}

#[test]
fn the_smaller_of_the_two_norm_bounds_counts() {
    let folder = tempfile::tempdir().unwrap();
    let norm = gate(folder.path(), NO_LIMITS)
        .pass(&assignment(), update(2), 10)
        .unwrap()
        .norm();
    let strict = gate(
        folder.path(),
        GateLimits {
            max_update_norm: Some(norm * 0.9),
            ..NO_LIMITS
        },
    );
    assert_eq!(
        held(strict.pass(&assignment(), update(2), 10)),
        ErrorCode::NormTooLarge
    );
    let job_is_strict = Assignment {
        max_update_norm: Some(norm * 0.9),
        ..assignment()
    };
    let wide = gate(folder.path(), NO_LIMITS);
    assert_eq!(
        held(wide.pass(&job_is_strict, update(2), 10)),
        ErrorCode::NormTooLarge
    );
}

#[test]
fn bytes_that_are_no_finite_payload_of_the_layout_are_held_back() {
    let layout = assignment().layout;
    let mut values = vec![0.5_f32; layout.elements() as usize];
    assert!(check_payload(&layout, &encode_f32(&values), None).is_ok());
    for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        values[9] = broken;
        let refusal = check_payload(&layout, &encode_f32(&values), None).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::NotFinite);
        assert!(
            refusal.message.contains("layer.0.down.bias") || refusal.message.contains("layer.0."),
            "{refusal}"
        );
    }
    let refusal = check_payload(&layout, &[0; 12], None).unwrap_err();
    assert_eq!(refusal.code, ErrorCode::PayloadSize);
}

#[test]
fn the_byte_budget_of_a_job_outlives_the_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let limits = GateLimits {
        bytes_per_job: 200,
        max_update_norm: None,
    };
    let first = gate(folder.path(), limits);
    let cleared = first.pass(&assignment(), update(2), 10).unwrap();
    assert_eq!(cleared.payload().len(), 88);
    first.depart(&cleared, 0).unwrap();
    drop(first);
    let second = gate(folder.path(), limits);
    second.depart(&cleared, 44).unwrap();
    assert_eq!(second.spent(cleared.job()), 88, "half had not arrived");
    second.depart(&cleared, 0).unwrap();
    assert_eq!(
        second.spent(cleared.job()),
        132,
        "the server has lost what had arrived"
    );
    second.depart(&cleared, 0).unwrap();
    assert_eq!(second.spent(cleared.job()), 132, "nothing had arrived");
    let next = Assignment {
        round: RoundNumber(4),
        ..assignment()
    };
    // The same bytes in another round are another update.
    let next = second.pass(&next, update(2), 10).unwrap();
    match second.depart(&next, 0).unwrap_err() {
        EgressError::Budget {
            wanted: 88,
            spent: 132,
            budget: 200,
            ..
        } => {}
        error => panic!("{error}"),
    }
    assert_eq!(
        log_lines(folder.path()).len(),
        4,
        "what is held back is not logged as sent"
    );
}

#[test]
fn an_update_on_its_way_is_found_again_after_a_restart_for_its_own_round_only() {
    let folder = tempfile::tempdir().unwrap();
    let first = gate(folder.path(), NO_LIMITS);
    let cleared = first.pass(&assignment(), update(2), 10).unwrap();
    drop(first);
    let second = gate(folder.path(), NO_LIMITS);
    assert_eq!(
        second.pending(&assignment()).unwrap(),
        Some(cleared.clone())
    );
    let next = Assignment {
        round: RoundNumber(4),
        ..assignment()
    };
    assert_eq!(second.pending(&next).unwrap(), None);
    second.done(cleared.job()).unwrap();
    assert_eq!(second.pending(&assignment()).unwrap(), None);
}

#[test]
fn an_altered_update_in_the_outbox_is_not_sent() {
    let folder = tempfile::tempdir().unwrap();
    let gate = gate(folder.path(), NO_LIMITS);
    gate.pass(&assignment(), update(2), 10).unwrap();
    let path = folder.path().join("outbox/job-1.update");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert_eq!(gate.pending(&assignment()).unwrap(), None);
}

#[test]
fn a_report_lets_named_finite_numbers_out_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let gate = gate(folder.path(), NO_LIMITS);
    let job: JobId = "job-1".parse().unwrap();
    let report = |metrics: Vec<(&str, f64)>| {
        let metrics = metrics
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        gate.report(&job, RoundNumber(1), MetricPoint::AfterTraining, metrics)
    };
    assert!(report(vec![]).is_err());
    assert!(report(vec![("accuracy", f64::NAN)]).is_err());
    assert!(report(vec![("Dear patient, ", 1.0)]).is_err());
    assert!(
        report(vec![("accuracy", 0.5), ("patient_4711", 1.0)]).is_err(),
        "well shaped, but no known metric"
    );
    assert!(log_lines(folder.path()).is_empty());
    let cleared = report(vec![("accuracy", 0.5)]).unwrap();
    assert_eq!(cleared.report().silo.as_str(), "clinic-a");
    let lines = log_lines(folder.path());
    assert_eq!(lines[0]["metrics"]["accuracy"], 0.5);
    assert_eq!(lines[0]["point"], "after_training");
}

#[test]
fn every_known_metric_has_a_name_that_the_protocol_takes() {
    for name in concord_common::wire::METRIC_NAMES {
        assert!(concord_common::wire::is_metric_name(name), "{name}");
    }
}

#[test]
fn reports_count_towards_the_byte_budget_each_time_they_are_sent() {
    let folder = tempfile::tempdir().unwrap();
    let limits = GateLimits {
        bytes_per_job: 40,
        ..NO_LIMITS
    };
    let job: JobId = "job-1".parse().unwrap();
    let report = |gate: &EgressGate| {
        let metrics = BTreeMap::from([("accuracy".to_owned(), 0.5)]);
        gate.report(&job, RoundNumber(1), MetricPoint::AfterTraining, metrics)
    };
    let first = gate(folder.path(), limits);
    let cleared = report(&first).unwrap();
    assert_eq!(first.spent(&job), 16, "8 letters and a number");
    first.send_report(&cleared).unwrap();
    assert_eq!(first.spent(&job), 16, "the first attempt is in the log");
    first.send_report(&cleared).unwrap();
    assert_eq!(first.spent(&job), 32);
    assert!(matches!(
        first.send_report(&cleared).unwrap_err(),
        EgressError::Report(reason) if reason.contains("egress.max_bytes_per_job")
    ));
    drop(first);
    let second = gate(folder.path(), limits);
    assert_eq!(second.spent(&job), 32);
    assert!(matches!(
        report(&second).unwrap_err(),
        EgressError::Report(_)
    ));
    let lines = log_lines(folder.path());
    assert_eq!(lines.len(), 2, "what is held back is not logged as sent");
    assert_eq!(lines[0].get("attempt"), None);
    assert_eq!(
        (&lines[1]["attempt"], &lines[1]["bytes"]),
        (&2.into(), &16.into())
    );
}

#[test]
fn a_decline_is_one_line_of_the_protocols_length_and_logged() {
    let folder = tempfile::tempdir().unwrap();
    let gate = gate(folder.path(), NO_LIMITS);
    let job = "job-1".parse().unwrap();
    let refusal = Refusal::new(ErrorCode::UnknownTask, "é".repeat(400));
    let decline = gate.decline(&job, &refusal).unwrap();
    assert_eq!(decline.sentence().len(), MAX_SENTENCE_BYTES);
    let refusal = Refusal::new(
        ErrorCode::UnknownTask,
        "no task `a\nb\u{1b}[31m\u{85}c`".to_owned(),
    );
    let decline = gate.decline(&job, &refusal).unwrap();
    assert_eq!(decline.sentence(), "no task `a b [31m c`");
    let lines = log_lines(folder.path());
    assert_eq!(lines[0]["code"], "UNKNOWN_TASK");
    assert_eq!(lines[1]["sentence"], decline.sentence());
}
