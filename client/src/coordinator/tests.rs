use concord_common::{Timestamp, adapter::AdapterShape, wire::duration_to_proto};

use super::*;
use crate::testing::{federation, job, silo, spec};

fn notice() -> v1::RoundNotice {
    v1::RoundNotice {
        job_id: "job-1".to_owned(),
        job_state: v1::JobState::Running as i32,
        round: 2,
        phase: v1::RoundPhase::Collecting as i32,
        base_version: vec![7; 32],
        closes_at: Some(Timestamp(5_000).to_proto()),
        outcome: 0,
    }
}

#[test]
fn a_notice_is_read_with_every_field() {
    let read = Notice::from_proto(&notice()).unwrap();
    assert_eq!(
        (read.job.as_str(), read.round),
        ("job-1", Some(RoundNumber(2)))
    );
    assert_eq!(read.closes_at, Some(Timestamp(5_000)));
    assert!(read.wants_work());
    let ended = v1::RoundNotice {
        job_state: v1::JobState::Cancelled as i32,
        round: 0,
        phase: 0,
        base_version: vec![],
        ..notice()
    };
    let ended = Notice::from_proto(&ended).unwrap();
    assert_eq!((ended.round, ended.phase, ended.base), (None, None, None));
    assert!(!ended.wants_work());
}

#[test]
fn a_notice_that_makes_no_sense_is_a_breach_of_the_protocol() {
    for broken in [
        v1::RoundNotice {
            job_id: "../x".to_owned(),
            ..notice()
        },
        v1::RoundNotice {
            job_state: 99,
            ..notice()
        },
        v1::RoundNotice {
            phase: 0,
            ..notice()
        },
        v1::RoundNotice {
            base_version: vec![1; 31],
            ..notice()
        },
    ] {
        let error = Notice::from_proto(&broken).unwrap_err();
        assert!(matches!(error, CallError::Protocol(_)), "{error}");
    }
}

fn claim() -> v1::ClaimLeaseResponse {
    federation(&spec("fedmcp", 2, ""), &["north", "south"])
        .claim_message(&silo("north"), &job(), RoundNumber(1))
        .unwrap()
}

#[test]
fn a_claim_is_believed_only_if_everything_in_it_agrees() {
    assert!(Claim::from_proto(claim()).is_ok());
    let other = AdapterShape {
        hidden: 24,
        bottleneck: 5,
        layers: vec![0, 1],
        shared_head: None,
    };
    let other = other.layout().unwrap();
    for (what, broken) in [
        (
            "token",
            v1::ClaimLeaseResponse {
                lease_token: vec![1; 15],
                ..claim()
            },
        ),
        (
            "specification",
            v1::ClaimLeaseResponse {
                spec_toml: "kind = 1".to_owned(),
                ..claim()
            },
        ),
        (
            "layout",
            v1::ClaimLeaseResponse {
                layout: Some(other.to_proto()),
                ..claim()
            },
        ),
        (
            "no layout",
            v1::ClaimLeaseResponse {
                layout: None,
                ..claim()
            },
        ),
        (
            "digest",
            v1::ClaimLeaseResponse {
                layout_digest: other.digest().to_vec(),
                ..claim()
            },
        ),
        (
            "size",
            v1::ClaimLeaseResponse {
                payload_bytes: 1,
                ..claim()
            },
        ),
        (
            "expiry",
            v1::ClaimLeaseResponse {
                expires_at: None,
                ..claim()
            },
        ),
        (
            "length",
            v1::ClaimLeaseResponse {
                lease_duration: Some(duration_to_proto(Duration::ZERO)),
                ..claim()
            },
        ),
        (
            "base",
            v1::ClaimLeaseResponse {
                base_version: vec![],
                ..claim()
            },
        ),
    ] {
        let error = Claim::from_proto(broken).unwrap_err();
        assert!(matches!(error, CallError::Protocol(_)), "{what}: {error}");
    }
}

#[test]
fn an_answer_to_a_contribution_names_an_upload_or_holds_a_receipt() {
    let upload = v1::BeginContributionResponse {
        upload_id: vec![3; 16],
        offset: 12,
        receipt: None,
    };
    assert_eq!(
        Begun::from_proto(upload.clone()),
        Ok(Begun::Upload {
            id: vec![3; 16],
            offset: 12
        })
    );
    let nameless = v1::BeginContributionResponse {
        upload_id: vec![],
        ..upload.clone()
    };
    assert!(Begun::from_proto(nameless).is_err());
    let empty_receipt = v1::BeginContributionResponse {
        receipt: Some(v1::Receipt::default()),
        ..upload
    };
    assert!(Begun::from_proto(empty_receipt).is_err());
}

#[test]
fn server_facts_without_a_key_are_refused() {
    let info = v1::GetServerInfoResponse {
        version: "1.0.0".to_owned(),
        federation: "north".to_owned(),
        receipt_public_key: vec![1; 32],
        max_chunk_bytes: 1024,
    };
    assert_eq!(
        ServerInfo::from_proto(info.clone()).unwrap().federation,
        "north"
    );
    let keyless = v1::GetServerInfoResponse {
        receipt_public_key: vec![],
        ..info
    };
    assert!(ServerInfo::from_proto(keyless).is_err());
}

#[test]
fn limits_and_stops_are_worth_another_try_and_other_refusals_are_not() {
    let of = |code| CallError::from_refusal(Refusal::new(code, "no"));
    for code in [
        ErrorCode::Busy,
        ErrorCode::ShuttingDown,
        ErrorCode::TooSlow,
        ErrorCode::Internal,
    ] {
        assert!(of(code).is_transient(), "{code}");
    }
    for code in [
        ErrorCode::WrongRound,
        ErrorCode::NotEnrolled,
        ErrorCode::NotFinite,
    ] {
        assert!(!of(code).is_transient(), "{code}");
        assert_eq!(of(code).code(), Some(code));
    }
}
