use std::time::Duration;

use concord_proto::v1;
use proptest::{collection::btree_map, num::f64, prelude::*, sample::select};

use super::{
    MAX_METRICS, MetricPoint, MetricReport, Receipt, ReceiptError, ReceiptSigner, SignedReceipt,
    digest, duration_from_proto, duration_to_proto, job_id, job_state_from_proto,
    outcome_from_proto, outcome_to_proto, phase_from_proto, round_number, silo_id,
    window_from_proto, window_to_proto,
};
use crate::{
    Digest, ErrorCode, RoundNumber, Timestamp,
    round::{Outcome, ParticipationWindow, RoundPhase, job::JobState},
};

/// A field, and how to spoil it.
type Change<T> = (&'static str, fn(&mut T));

fn receipt() -> Receipt {
    Receipt {
        job: "job-1".parse().unwrap(),
        round: RoundNumber(7),
        silo: "clinic-a".parse().unwrap(),
        payload_digest: Digest::of(b"payload"),
        outcome: Outcome::Discarded(ErrorCode::Late),
        recorded_at: Timestamp(1_700_000_000_123),
    }
}

fn signer() -> ReceiptSigner {
    ReceiptSigner::from_pkcs8(&ReceiptSigner::generate_pkcs8().unwrap()).unwrap()
}

#[test]
fn the_canonical_form_of_a_receipt_never_changes() {
    let mut expected = b"concord.v1 receipt\0".to_vec();
    for field in [
        b"job-1".as_slice(),
        &[7, 0, 0, 0],
        b"clinic-a",
        Digest::of(b"payload").as_bytes(),
        b"discarded",
        b"LATE",
        &1_700_000_000_123_i64.to_le_bytes(),
    ] {
        expected.extend((field.len() as u64).to_le_bytes());
        expected.extend(field);
    }
    assert_eq!(receipt().canonical_bytes(), expected);
}

#[test]
fn a_receipt_verifies_with_the_servers_key_and_no_other() {
    let signer = signer();
    let signed = signer.sign(receipt());
    assert_eq!(signed.verify(&signer.public_key()), Ok(()));
    assert_eq!(
        signer.sign(receipt()),
        signed,
        "the same receipt again gets the same bytes"
    );
    let other = self::signer().public_key();
    assert_eq!(signed.verify(&other), Err(ReceiptError::Signature));
    assert_eq!(signed.verify(&[0; 3]), Err(ReceiptError::Signature));
}

#[test]
fn a_receipt_with_any_field_changed_does_not_verify() {
    let signer = signer();
    let signed = signer.sign(receipt());
    let changes: [fn(&mut Receipt); 6] = [
        |r| r.job = "job-2".parse().unwrap(),
        |r| r.round = RoundNumber(8),
        |r| r.silo = "clinic-b".parse().unwrap(),
        |r| r.payload_digest = Digest::of(b"other"),
        |r| r.outcome = Outcome::Accepted,
        |r| r.recorded_at = Timestamp(0),
    ];
    for change in changes {
        let mut forged = signed.clone();
        change(&mut forged.receipt);
        assert_eq!(
            forged.verify(&signer.public_key()),
            Err(ReceiptError::Signature),
            "{forged:?}"
        );
    }
}

#[test]
fn a_receipt_survives_the_wire() {
    let signer = signer();
    let signed = signer.sign(receipt());
    let back = SignedReceipt::from_proto(&signed.to_proto()).unwrap();
    assert_eq!(back, signed);
    assert_eq!(back.verify(&signer.public_key()), Ok(()));
}

#[test]
fn a_malformed_receipt_names_the_field() {
    let good = signer().sign(receipt()).to_proto();
    let changes: [Change<v1::Receipt>; 7] = [
        ("job_id", |r| r.job_id.clear()),
        ("round", |r| r.round = 0),
        ("silo_id", |r| r.silo_id = "../x".to_owned()),
        ("payload_digest", |r| r.payload_digest.truncate(31)),
        ("outcome", |r| (r.outcome, r.reason) = (0, String::new())),
        ("reason", |r| r.reason = "BECAUSE".to_owned()),
        ("signature", |r| r.signature.push(0)),
    ];
    for (field, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let refusal = SignedReceipt::from_proto(&bad).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::InvalidRequest);
        assert!(
            refusal.message.contains(&format!("`{field}`")),
            "{field}: {refusal}"
        );
    }
}

#[test]
fn bytes_that_are_no_key_are_refused() {
    assert_eq!(
        ReceiptSigner::from_pkcs8(b"no key").unwrap_err(),
        ReceiptError::Key
    );
}

#[test]
fn phases_states_and_points_survive_the_wire_and_unknown_ones_are_refused() {
    for phase in RoundPhase::ALL {
        assert_eq!(
            phase_from_proto(v1::RoundPhase::from(phase) as i32),
            Ok(phase)
        );
    }
    for state in JobState::ALL {
        assert_eq!(
            job_state_from_proto(v1::JobState::from(state) as i32),
            Ok(state)
        );
    }
    for point in MetricPoint::ALL {
        assert_eq!(
            MetricPoint::from_proto(v1::MetricPoint::from(point) as i32),
            Ok(point)
        );
        assert_eq!(MetricPoint::from_name(point.as_str()), Some(point));
    }
    for number in [0, -1, 99] {
        assert_eq!(
            phase_from_proto(number).unwrap_err().code,
            ErrorCode::InvalidRequest
        );
        assert_eq!(
            job_state_from_proto(number).unwrap_err().code,
            ErrorCode::InvalidRequest
        );
        assert_eq!(
            MetricPoint::from_proto(number).unwrap_err().code,
            ErrorCode::InvalidRequest
        );
    }
}

#[test]
fn every_outcome_with_every_reason_survives_the_wire() {
    let kinds = [Outcome::Rejected, Outcome::Discarded, Outcome::Declined];
    let with_reason = kinds
        .iter()
        .flat_map(|kind| ErrorCode::ALL.iter().map(|code| Some(kind(*code))));
    for outcome in with_reason.chain([None, Some(Outcome::Accepted)]) {
        let (number, reason) = outcome_to_proto(outcome);
        assert_eq!(outcome_from_proto(number as i32, &reason), Ok(outcome));
    }
}

#[test]
fn an_outcome_with_a_reason_that_does_not_fit_is_refused() {
    for (number, reason) in [
        (v1::Outcome::Accepted as i32, "LATE"),
        (v1::Outcome::Rejected as i32, ""),
        (v1::Outcome::Unspecified as i32, "LATE"),
        (77, ""),
    ] {
        let refusal = outcome_from_proto(number, reason).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::InvalidRequest, "{number} {reason}");
    }
}

#[test]
fn ids_and_digests_are_checked_and_named() {
    assert!(job_id("a b").unwrap_err().message.contains("`job_id`"));
    assert!(silo_id("").unwrap_err().message.contains("`silo_id`"));
    assert!(round_number(0).unwrap_err().message.contains("`round`"));
    assert_eq!(round_number(1), Ok(RoundNumber(1)));
    assert!(
        digest("base_version", &[0; 31])
            .unwrap_err()
            .message
            .contains("`base_version`")
    );
    assert_eq!(
        digest("x", Digest::of(b"y").as_bytes()),
        Ok(Digest::of(b"y"))
    );
}

#[test]
fn a_window_survives_the_wire_and_a_contradictory_one_is_refused() {
    let window = ParticipationWindow {
        min_count: 2,
        max_count: Some(5),
        min_time: Duration::from_millis(1500),
        max_time: Duration::from_mins(1),
    };
    let proto = window_to_proto(&window);
    assert_eq!(window_from_proto(&proto), Ok(window));
    let whole = ParticipationWindow {
        max_count: None,
        ..window
    };
    assert_eq!(window_from_proto(&window_to_proto(&whole)), Ok(whole));
    let changes: [Change<v1::ParticipationWindow>; 4] = [
        ("max_count", |w| w.max_count = 1),
        ("max_time", |w| {
            w.max_time = Some(duration_to_proto(Duration::from_secs(1)));
        }),
        ("max_time", |w| w.max_time = None),
        ("min_time", |w| {
            w.min_time = Some(prost_types::Duration {
                seconds: -1,
                nanos: 0,
            });
        }),
    ];
    for (field, change) in changes {
        let mut bad = proto;
        change(&mut bad);
        let refusal = window_from_proto(&bad).unwrap_err();
        assert!(refusal.message.contains(&format!("`{field}`")), "{refusal}");
    }
}

fn report(metrics: Vec<(&str, f64)>) -> v1::MetricReport {
    v1::MetricReport {
        silo_id: "someone-else".to_owned(),
        job_id: "job-1".to_owned(),
        round: 2,
        point: v1::MetricPoint::AfterTraining as i32,
        metrics: metrics
            .into_iter()
            .map(|(name, value)| v1::Metric {
                name: name.to_owned(),
                value,
            })
            .collect(),
    }
}

#[test]
fn a_report_belongs_to_the_silo_of_the_certificate() {
    let proto = report(vec![("accuracy", 0.5)]);
    let report = MetricReport::from_silo(&proto, "clinic-a".parse().unwrap()).unwrap();
    assert_eq!(report.silo.as_str(), "clinic-a");
    assert_eq!(
        MetricReport::from_proto(&proto).unwrap().silo.as_str(),
        "someone-else"
    );
}

#[test]
fn metrics_out_of_bounds_are_refused() {
    let names: Vec<String> = (0..=MAX_METRICS).map(|i| format!("m{i}")).collect();
    let many: Vec<_> = names.iter().map(|name| (name.as_str(), 0.0)).collect();
    assert!(MetricReport::from_proto(&report(many[..MAX_METRICS].to_vec())).is_ok());
    let long = "x".repeat(65);
    let cases = [
        (vec![], "1 to 64 metrics"),
        (many, "1 to 64 metrics"),
        (vec![("a", 1.0), ("a", 2.0)], "`a` is there twice"),
        (vec![("Accuracy", 1.0)], "name of metric 0"),
        (vec![("a", 1.0), ("", 1.0)], "name of metric 1"),
        (vec![(long.as_str(), 1.0)], "name of metric 0"),
        (vec![("loss", f64::NAN)], "`loss` must be finite"),
        (vec![("loss", f64::INFINITY)], "`loss` must be finite"),
    ];
    for (metrics, message) in cases {
        let refusal = MetricReport::from_proto(&report(metrics)).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::InvalidRequest);
        assert!(refusal.message.contains(message), "{refusal}");
    }
}

proptest! {
    #[test]
    fn any_report_within_bounds_survives_the_wire(
        metrics in btree_map("[a-z0-9_]{1,64}", f64::NORMAL | f64::SUBNORMAL | f64::ZERO, 1..=MAX_METRICS),
        point in select(&MetricPoint::ALL[..]),
        round in 1_u32..,
    ) {
        let report = MetricReport {
            silo: "clinic-a".parse().unwrap(),
            job: "job-1".parse().unwrap(),
            round: RoundNumber(round),
            point,
            metrics,
        };
        prop_assert_eq!(MetricReport::from_proto(&report.to_proto()).unwrap(), report);
    }

    #[test]
    fn any_duration_survives_the_wire(seconds in 0..=i64::MAX as u64, nanos in 0_u32..1_000_000_000) {
        let duration = Duration::new(seconds, nanos);
        prop_assert_eq!(duration_from_proto("d", &duration_to_proto(duration)), Ok(duration));
    }

    #[test]
    fn receipts_that_differ_have_canonical_forms_that_differ(
        ids in ("[a-z0-9][a-z0-9.-]{0,5}", "[a-z0-9][a-z0-9.-]{0,5}"),
        other in ("[a-z0-9][a-z0-9.-]{0,5}", "[a-z0-9][a-z0-9.-]{0,5}"),
    ) {
        let make = |(job, silo): &(String, String)| Receipt {
            job: job.parse().unwrap(),
            silo: silo.parse().unwrap(),
            ..receipt()
        };
        prop_assert_eq!(make(&ids).canonical_bytes() == make(&other).canonical_bytes(), ids == other);
    }
}
