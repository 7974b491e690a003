//! Whole rounds with silos that add constants: kills in the middle, retries, and everything that must be refused.

use bytes::Bytes;
use concord_common::{
    adapter::{AdapterVersion, decode_f32, encode_f32},
    round::Outcome,
};
use concord_integration_tests::{
    harness::{Federation, ServerOptions},
    silo::{Lease, Notice, Silo, added, upload_messages},
};
use concord_proto::v1;
use tonic::Status;

use super::{code, job_toml, operator_of, runtime, silo, submit};

const NAMES: [&str; 3] = ["silo-a", "silo-b", "silo-c"];

fn started(durability: &str) -> Federation {
    let mut federation = Federation::new(&ServerOptions {
        durability: durability.to_owned(),
        ..ServerOptions::default()
    })
    .unwrap();
    federation.start_server().unwrap();
    federation
}

/// Waits for a round and takes its lease.
pub(super) async fn lease(silo: &mut Silo, job_id: &str, done: u32) -> Lease {
    let mut watch = silo.watch().await.unwrap();
    match silo.next_notice(&mut watch, job_id, done).await.unwrap() {
        Notice::Work { round, .. } => silo.claim(job_id, round).await.unwrap(),
        Notice::Ended { state, .. } => panic!("the job ended: {state:?}"),
    }
}

/// Waits for the job's end and gives its last adapter.
pub(super) async fn end(
    silo: &mut Silo,
    job_id: &str,
    done: u32,
) -> (v1::JobState, AdapterVersion) {
    let mut watch = silo.watch().await.unwrap();
    match silo.next_notice(&mut watch, job_id, done).await.unwrap() {
        Notice::Ended { state, version } => {
            let digest = version.as_slice().try_into().unwrap();
            (state, AdapterVersion(digest))
        }
        Notice::Work { round, .. } => panic!("round {round} waits"),
    }
}

/// What the server must publish for these constants and examples, in silo-id order.
fn expected(base: &[u8], parts: &[(f32, u64)]) -> Vec<u8> {
    let total: u64 = parts.iter().map(|part| part.1).sum();
    let values: Vec<f32> = decode_f32(base)
        .unwrap()
        .into_iter()
        .map(|base| {
            let step = parts.iter().fold(0.0, |step, (constant, examples)| {
                let delta = (base + constant) - base;
                step + (*examples as f64 / total as f64) * f64::from(delta)
            });
            (f64::from(base) + step) as f32
        })
        .collect();
    encode_f32(&values)
}

#[test]
fn a_server_killed_in_the_middle_of_a_round_loses_and_doubles_nothing() {
    for durability in ["power", "process"] {
        let mut federation = started(durability);
        let mut operator = operator_of(&federation);
        let mut silos: Vec<Silo> = NAMES.iter().map(|name| silo(&federation, name)).collect();
        let runtime = runtime();
        let (job_id, leases, base, deltas) = runtime.block_on(async {
            let job_id = submit(&mut operator, job_toml(&NAMES, 1)).await;
            let mut leases = Vec::new();
            for silo in &mut silos {
                leases.push(lease(silo, &job_id, 0).await);
            }
            let base = silos[0]
                .download(&job_id, &leases[0].layout, leases[0].base)
                .await
                .unwrap();
            let deltas: Vec<Bytes> = (1_u16..=3)
                .map(|index| added(&base, f32::from(index) * 0.25).unwrap())
                .collect();
            (job_id, leases, base, deltas)
        });
        let before = runtime.block_on(async {
            let mut receipts = Vec::new();
            for index in 0..2 {
                let receipt = silos[index].contribute(&leases[index], &deltas[index], 10 << index);
                receipts.push(receipt.await.unwrap());
            }
            receipts
        });
        // The third has begun, and has sent a part.
        runtime.block_on(async {
            let begun = silos[2]
                .raw()
                .begin_contribution(leases[2].begin(&deltas[2], 40))
                .await
                .unwrap()
                .into_inner();
            let part = deltas[2].slice(..16);
            let messages = upload_messages(&begun.upload_id, &part, 0);
            let status = silos[2]
                .raw()
                .upload_contribution(tokio_stream::iter(messages))
                .await
                .unwrap_err();
            assert_eq!(code(&status), "TRUNCATED");
        });
        federation.kill_server().unwrap();
        federation.start_server().unwrap();
        // New connections: what a broken one tells its first caller is no concern of this test.
        let mut silos: Vec<Silo> = NAMES.iter().map(|name| silo(&federation, name)).collect();
        runtime.block_on(async {
            // A retry of what is recorded gets the very same receipt.
            for index in 0..2 {
                let again = silos[index].contribute(&leases[index], &deltas[index], 10 << index);
                assert_eq!(again.await.unwrap(), before[index], "{durability}");
            }
            // The rest of the third goes on where the server has got to.
            let begun = silos[2]
                .raw()
                .begin_contribution(leases[2].begin(&deltas[2], 40))
                .await
                .unwrap()
                .into_inner();
            assert_eq!(begun.offset, 16, "{durability}");
            let receipt = silos[2]
                .contribute(&leases[2], &deltas[2], 40)
                .await
                .unwrap();
            assert_eq!(receipt.receipt.outcome, Outcome::Accepted);
            let (state, version) = end(&mut silos[0], &job_id, 1).await;
            assert_eq!(state, v1::JobState::Succeeded);
            let want = expected(&base, &[(0.25, 10), (0.5, 20), (0.75, 40)]);
            assert_eq!(version, AdapterVersion::of(&want), "{durability}");
            let published = silos[1]
                .download(&job_id, &leases[1].layout, version)
                .await
                .unwrap();
            assert_eq!(published, want);
        });
    }
}

#[test]
fn receipts_verify_with_the_servers_key_also_after_a_restart() {
    let mut federation = started("process");
    let mut operator = operator_of(&federation);
    let mut first = silo(&federation, "silo-a");
    let runtime = runtime();
    let key = |silo: &mut Silo| {
        let info = runtime.block_on(silo.raw().get_server_info(v1::GetServerInfoRequest {}));
        info.unwrap().into_inner().receipt_public_key
    };
    let receipt = runtime.block_on(async {
        let job_id = submit(&mut operator, job_toml(&["silo-a"], 1)).await;
        let lease = lease(&mut first, &job_id, 0).await;
        let base = first
            .download(&job_id, &lease.layout, lease.base)
            .await
            .unwrap();
        let delta = added(&base, 1.0).unwrap();
        first.contribute(&lease, &delta, 1).await.unwrap()
    });
    receipt.verify(&key(&mut first)).unwrap();
    federation.stop_server().unwrap();
    federation.start_server().unwrap();
    let mut again = silo(&federation, "silo-a");
    receipt.verify(&key(&mut again)).unwrap();
    let mut forged = receipt;
    forged.receipt.round.0 += 1;
    assert!(forged.verify(&key(&mut again)).is_err());
}

/// Everything that a contribution's header can have wrong, and the code for each.
fn bad_headers(
    good: &v1::BeginContributionRequest,
) -> Vec<(&'static str, v1::BeginContributionRequest)> {
    let with = |change: &dyn Fn(&mut v1::BeginContributionRequest)| {
        let mut request = good.clone();
        change(&mut request);
        request
    };
    let tensors = |change: &dyn Fn(&mut Vec<v1::TensorInfo>)| {
        with(&|request| change(&mut request.layout.as_mut().unwrap().tensors))
    };
    vec![
        (
            "UNKNOWN_JOB",
            with(&|r| "no-such-job".clone_into(&mut r.job_id)),
        ),
        (
            "INVALID_REQUEST",
            with(&|r| "../x".clone_into(&mut r.job_id)),
        ),
        ("INVALID_REQUEST", with(&|r| r.round = 0)),
        ("UNKNOWN_ROUND", with(&|r| r.round = 2)),
        ("LEASE_LOST", with(&|r| r.lease_token = vec![0; 16])),
        (
            "WRONG_BASE_VERSION",
            with(&|r| r.base_version = vec![0; 32]),
        ),
        ("INVALID_REQUEST", with(&|r| r.base_version = vec![0; 31])),
        ("INVALID_REQUEST", with(&|r| r.payload_digest.clear())),
        ("PAYLOAD_SIZE", with(&|r| r.payload_bytes += 4)),
        ("BAD_WEIGHT", with(&|r| r.examples = 0)),
        ("BAD_WEIGHT", with(&|r| r.examples = u64::MAX)),
        ("INVALID_REQUEST", with(&|r| r.layout = None)),
        ("TENSOR_COUNT", tensors(&|t| t.truncate(3))),
        (
            "TENSOR_NAME",
            tensors(&|t| "head.weight".clone_into(&mut t[0].name)),
        ),
        ("TENSOR_ORDER", tensors(&|t| t.swap(0, 1))),
        ("TENSOR_SHAPE", tensors(&|t| t[0].shape.reverse())),
        ("TENSOR_DTYPE", tensors(&|t| t[0].dtype = 0)),
    ]
}

#[test]
fn bad_headers_are_refused_with_their_codes_and_the_round_goes_on() {
    let federation = started("process");
    let mut operator = operator_of(&federation);
    let mut silo = silo(&federation, "silo-a");
    runtime().block_on(async {
        let job_id = submit(&mut operator, job_toml(&["silo-a"], 1)).await;
        let lease = lease(&mut silo, &job_id, 0).await;
        let base = silo
            .download(&job_id, &lease.layout, lease.base)
            .await
            .unwrap();
        let delta = added(&base, 1.0).unwrap();
        for (want, request) in bad_headers(&lease.begin(&delta, 5)) {
            let shown = format!("{request:?}");
            let status = silo.raw().begin_contribution(request).await.unwrap_err();
            assert_eq!(code(&status), want, "{shown}: {status}");
            assert!(status.message().len() > 15, "{status}");
        }
        // A header beyond the bound on messages is refused before it is read.
        let mut request = lease.begin(&delta, 5);
        let tensor = request.layout.as_ref().unwrap().tensors[0].clone();
        request.layout.as_mut().unwrap().tensors = vec![tensor; 200_000];
        let status = silo.raw().begin_contribution(request).await.unwrap_err();
        assert_eq!(code(&status), "INVALID_REQUEST", "{status}");
        assert!(status.message().contains("too large"), "{status}");
        let receipt = silo.contribute(&lease, &delta, 5).await.unwrap();
        assert_eq!(receipt.receipt.outcome, Outcome::Accepted);
        let (state, version) = end(&mut silo, &job_id, 1).await;
        assert_eq!(state, v1::JobState::Succeeded);
        assert_eq!(version, AdapterVersion::of(&expected(&base, &[(1.0, 5)])));
    });
}

/// Begins a contribution and uploads `messages` made from the upload's id.
async fn upload(
    silo: &mut Silo,
    lease: &Lease,
    announced: &Bytes,
    messages: impl FnOnce(&[u8]) -> Vec<v1::UploadContributionRequest>,
) -> Result<v1::UploadContributionResponse, Status> {
    let begun = silo
        .raw()
        .begin_contribution(lease.begin(announced, 5))
        .await?
        .into_inner();
    let messages = messages(&begun.upload_id);
    let response = silo
        .raw()
        .upload_contribution(tokio_stream::iter(messages))
        .await?;
    Ok(response.into_inner())
}

/// Makes an upload's messages from its id and the payload that was announced.
type Messages = fn(&[u8], &Bytes) -> Vec<v1::UploadContributionRequest>;

fn message(upload_id: &[u8], offset: u64, data: Bytes) -> v1::UploadContributionRequest {
    v1::UploadContributionRequest {
        upload_id: upload_id.to_vec(),
        chunk: Some(concord_common::chunk::chunk(offset, data)),
    }
}

#[test]
fn bad_payloads_are_refused_with_their_codes_and_the_round_goes_on() {
    let federation = started("process");
    let mut operator = operator_of(&federation);
    let mut silo = silo(&federation, "silo-a");
    runtime().block_on(async {
        let spec = format!(
            "{}limits = {{ max_update_norm = 100.0 }}\n",
            job_toml(&["silo-a"], 1)
        );
        let job_id = submit(&mut operator, spec).await;
        let lease = lease(&mut silo, &job_id, 0).await;
        let base = silo
            .download(&job_id, &lease.layout, lease.base)
            .await
            .unwrap();
        let delta = added(&base, 1.0).unwrap();
        let with = |value: f32| -> Bytes {
            let mut values = decode_f32(&delta).unwrap();
            values[3] = value;
            encode_f32(&values).into()
        };
        for (want, payload) in [
            ("NOT_FINITE", with(f32::NAN)),
            ("NOT_FINITE", with(f32::INFINITY)),
            ("NORM_TOO_LARGE", with(1e9)),
        ] {
            let status = upload(&mut silo, &lease, &payload, |id| {
                upload_messages(id, &payload, 0).collect()
            })
            .await
            .unwrap_err();
            assert_eq!(code(&status), want, "{status}");
        }
        let other = added(&base, 2.0).unwrap();
        let status = upload(&mut silo, &lease, &delta, |id| {
            upload_messages(id, &other, 0).collect()
        })
        .await
        .unwrap_err();
        assert_eq!(code(&status), "DIGEST_MISMATCH", "{status}");
        let cases: [(&str, Messages); 8] = [
            ("TRUNCATED", |id, all| vec![message(id, 0, all.slice(..8))]),
            // What came before stays, so offsets go on from there.
            ("CHUNK_OFFSET", |id, all| {
                vec![message(id, 0, all.slice(..8))]
            }),
            ("CHUNK_OFFSET", |id, all| {
                vec![message(id, 16, all.slice(16..))]
            }),
            ("BAD_CHUNK", |id, all| {
                let mut bad = message(id, 8, all.slice(8..));
                bad.chunk.as_mut().unwrap().digest[0] ^= 1;
                vec![bad]
            }),
            ("BAD_CHUNK", |id, _| vec![message(id, 8, Bytes::new())]),
            ("PAYLOAD_SIZE", |id, all| {
                vec![message(id, 8, Bytes::from([&all[8..], &[0; 4]].concat()))]
            }),
            ("INVALID_REQUEST", |id, _| {
                vec![v1::UploadContributionRequest {
                    upload_id: id[..5].to_vec(),
                    chunk: None,
                }]
            }),
            ("UNKNOWN_UPLOAD", |_, all| {
                vec![message(&[9; 16], 0, all.clone())]
            }),
        ];
        for (want, messages) in cases {
            let status = upload(&mut silo, &lease, &delta, |id| messages(id, &delta))
                .await
                .unwrap_err();
            assert_eq!(code(&status), want, "{status}");
        }
        let receipt = silo.contribute(&lease, &delta, 5).await.unwrap();
        assert_eq!(receipt.receipt.outcome, Outcome::Accepted);
        let status = silo.contribute(&lease, &other, 5).await.unwrap_err();
        assert!(
            matches!(code(&status), "DUPLICATE_CONTRIBUTION" | "JOB_ENDED"),
            "{status}"
        );
        let (_, version) = end(&mut silo, &job_id, 1).await;
        assert_eq!(version, AdapterVersion::of(&expected(&base, &[(1.0, 5)])));
    });
}

#[test]
fn another_payload_of_the_same_silo_is_refused_while_the_round_is_open() {
    let federation = started("process");
    let mut operator = operator_of(&federation);
    let mut first = silo(&federation, "silo-a");
    runtime().block_on(async {
        let job_id = submit(&mut operator, job_toml(&["silo-a", "silo-b"], 1)).await;
        let lease = lease(&mut first, &job_id, 0).await;
        let base = first
            .download(&job_id, &lease.layout, lease.base)
            .await
            .unwrap();
        let delta = added(&base, 1.0).unwrap();
        let receipt = first.contribute(&lease, &delta, 5).await.unwrap();
        let other = added(&base, 2.0).unwrap();
        let status = first.contribute(&lease, &other, 5).await.unwrap_err();
        assert_eq!(code(&status), "DUPLICATE_CONTRIBUTION");
        assert_eq!(first.contribute(&lease, &delta, 5).await.unwrap(), receipt);
    });
}

#[test]
fn a_late_contribution_is_discarded_with_a_receipt() {
    let federation = started("process");
    let mut operator = operator_of(&federation);
    let mut first = silo(&federation, "silo-a");
    let mut slow = silo(&federation, "silo-b");
    runtime().block_on(async {
        let spec = job_toml(&["silo-a", "silo-b"], 2)
            .replace("min_silos = 2", "min_silos = 1, max_silos = 1");
        let job_id = submit(&mut operator, spec).await;
        let slow_lease = lease(&mut slow, &job_id, 0).await;
        let lease = lease(&mut first, &job_id, 0).await;
        let base = first
            .download(&job_id, &lease.layout, lease.base)
            .await
            .unwrap();
        let delta = added(&base, 1.0).unwrap();
        let begun = slow
            .raw()
            .begin_contribution(slow_lease.begin(&delta, 5))
            .await
            .unwrap()
            .into_inner();
        first.contribute(&lease, &delta, 5).await.unwrap();
        let messages = upload_messages(&begun.upload_id, &delta, 0);
        let receipt = slow
            .raw()
            .upload_contribution(tokio_stream::iter(messages))
            .await
            .unwrap()
            .into_inner()
            .receipt
            .unwrap();
        assert_eq!(receipt.outcome(), v1::Outcome::Discarded);
        assert_eq!(receipt.reason, "LATE");
    });
}

#[test]
fn a_cancelled_job_ends_for_its_silos() {
    let federation = started("process");
    let mut operator = operator_of(&federation);
    let mut silo = silo(&federation, "silo-a");
    runtime().block_on(async {
        let job_id = submit(&mut operator, job_toml(&["silo-a"], 3)).await;
        let lease = lease(&mut silo, &job_id, 0).await;
        let request = v1::CancelJobRequest {
            job_id: job_id.clone(),
        };
        operator.cancel_job(request).await.unwrap();
        let (state, _) = end(&mut silo, &job_id, 0).await;
        assert_eq!(state, v1::JobState::Cancelled);
        let status = silo.claim(&job_id, lease.round).await.unwrap_err();
        assert_eq!(code(&status), "JOB_ENDED");
    });
}

#[test]
fn a_request_id_makes_one_job() {
    let federation = started("process");
    let mut operator = operator_of(&federation);
    runtime().block_on(async {
        let first = submit(&mut operator, job_toml(&["silo-a"], 1)).await;
        let again = submit(&mut operator, job_toml(&["silo-a"], 1)).await;
        assert_eq!(first, again);
        let status = operator
            .submit_job(v1::SubmitJobRequest {
                request_id: "request".to_owned(),
                spec_toml: job_toml(&["silo-a"], 2),
            })
            .await
            .unwrap_err();
        assert_eq!(code(&status), "REQUEST_ID_REUSED");
        let status = operator
            .submit_job(v1::SubmitJobRequest {
                request_id: "other".to_owned(),
                spec_toml: format!("wibble = 1\n{}", job_toml(&["silo-a"], 2)),
            })
            .await
            .unwrap_err();
        assert_eq!(code(&status), "INVALID_JOB_SPEC");
        assert!(status.message().contains("wibble"), "{status}");
    });
}
