//! Everything that can be wrong with one contribution: its header, and its payload as a whole.

use bytes::Bytes;
use concord_common::{Digest, ErrorCode, adapter::encode_f32};
use concord_proto::v1::{self, Outcome};

use super::harness::{Offer, World, constant, expect_published, layout, refusal, spec};

/// A name, what is done to a proper offer, and the code that must come back with a sentence that has this in it.
type Case = (&'static str, fn(&mut Offer), ErrorCode, &'static str);

fn tensors(offer: &mut Offer) -> &mut Vec<v1::TensorInfo> {
    &mut offer.begin.layout.as_mut().unwrap().tensors
}

/// Another payload, properly announced.
fn send_instead(offer: &mut Offer, payload: Bytes) {
    offer.begin.payload_digest = Digest::of(&payload).to_vec();
    offer.payload = payload;
}

/// A payload of ones but for one element, which is in the first tensor.
pub(super) fn with_value(value: f32) -> Bytes {
    let mut values = vec![1.0; layout().elements() as usize];
    values[77] = value;
    encode_f32(&values).into()
}

const HEADERS: &[Case] = &[
    (
        "a wrong tensor name",
        |o| tensors(o)[1].name = "other".to_owned(),
        ErrorCode::TensorName,
        "tensor 1 must be `layer.0.down.bias`",
    ),
    (
        "a wrong shape",
        |o| tensors(o)[0].shape.reverse(),
        ErrorCode::TensorShape,
        "`layer.0.down.weight` must have shape [8, 16], the contribution has [16, 8]",
    ),
    (
        "a wrong dtype",
        |o| tensors(o)[2].dtype = 0,
        ErrorCode::TensorDtype,
        "`layer.0.up.weight` must be f32",
    ),
    (
        "a tensor too few",
        |o| drop(tensors(o).pop()),
        ErrorCode::TensorCount,
        "has 8 tensors, the contribution 7",
    ),
    (
        "thousands of tensors",
        |o| {
            let one = tensors(o)[0].clone();
            *tensors(o) = vec![one; 5000];
        },
        ErrorCode::TensorCount,
        "has 8 tensors, the contribution 5000",
    ),
    (
        "tensors in another order",
        |o| tensors(o).swap(0, 2),
        ErrorCode::TensorOrder,
        "tensor 0 must be `layer.0.down.weight`, not `layer.0.up.weight`",
    ),
    (
        "no layout",
        |o| o.begin.layout = None,
        ErrorCode::InvalidRequest,
        "`layout`: is missing",
    ),
    (
        "no examples",
        |o| o.begin.examples = 0,
        ErrorCode::BadWeight,
        "says 0 examples; this job takes 1 to 5000",
    ),
    (
        "a huge weight",
        |o| o.begin.examples = u64::MAX,
        ErrorCode::BadWeight,
        "says 18446744073709551615 examples; this job takes 1 to 5000",
    ),
    (
        "another size",
        |o| o.begin.payload_bytes += 4,
        ErrorCode::PayloadSize,
        "has 2240 bytes, not 2244",
    ),
    (
        "a short digest",
        |o| o.begin.payload_digest.truncate(31),
        ErrorCode::InvalidRequest,
        "`payload_digest`",
    ),
    (
        "another base",
        |o| o.begin.base_version[0] ^= 1,
        ErrorCode::WrongBaseVersion,
        "round 1 starts from",
    ),
    (
        "a round to come",
        |o| o.begin.round = 2,
        ErrorCode::UnknownRound,
        "has no round 2",
    ),
    (
        "round 0",
        |o| o.begin.round = 0,
        ErrorCode::InvalidRequest,
        "`round`: rounds are counted from 1",
    ),
    (
        "another job",
        |o| o.begin.job_id = "nothing".to_owned(),
        ErrorCode::UnknownJob,
        "no job `nothing`",
    ),
    (
        "a job id that is none",
        |o| o.begin.job_id = "../x".to_owned(),
        ErrorCode::InvalidRequest,
        "`job_id`",
    ),
    (
        "a lease that is none",
        |o| o.begin.lease_token[0] ^= 1,
        ErrorCode::LeaseLost,
        "the lease on round 1",
    ),
    (
        "NaN",
        |o| send_instead(o, with_value(f32::NAN)),
        ErrorCode::NotFinite,
        "layer.0.down.weight",
    ),
    (
        "infinity",
        |o| send_instead(o, with_value(f32::INFINITY)),
        ErrorCode::NotFinite,
        "layer.0.down.weight",
    ),
    (
        "a norm beyond the bound",
        |o| send_instead(o, with_value(1e6)),
        ErrorCode::NormTooLarge,
        "the job's bound of 1000",
    ),
    (
        "other bytes than announced",
        |o| o.payload = constant(3.0),
        ErrorCode::DigestMismatch,
        "announced was",
    ),
    (
        "a longer payload",
        |o| {
            let mut longer = o.payload.to_vec();
            longer.extend([0; 8]);
            o.payload = longer.into();
        },
        ErrorCode::PayloadSize,
        "the payload has 2240 bytes; 148 more at byte 2100 are too many",
    ),
    (
        "a shorter payload",
        |o| o.payload.truncate(100),
        ErrorCode::Truncated,
        "after 100 of 2240 bytes",
    ),
    (
        "a header beyond every bound",
        |o| {
            let mut one = tensors(o)[0].clone();
            one.name = "x".repeat(1000);
            *tensors(o) = vec![one; 3000];
        },
        ErrorCode::InvalidRequest,
        "too large",
    ),
];

#[tokio::test]
async fn a_bad_contribution_is_refused_with_its_code_and_the_round_goes_on() {
    let world = World::start().await;
    let [mut a, mut b] = world.silos(["a", "b"]).await;
    let job_id = world
        .submit(&spec(
            1,
            2,
            "[limits]\nmax_update_norm = 1000.0\nmax_examples = 5000",
        ))
        .await;
    let good = a.offer(&job_id, 1, constant(2.0), 3).await;
    for (what, spoil, expected, fragment) in HEADERS {
        let mut bad = good.clone();
        spoil(&mut bad);
        let refused = refusal(a.send(&bad).await);
        assert_eq!(refused.code, *expected, "{what}");
        assert!(refused.message.contains(fragment), "{what}: {refused}");
        let round = world.round(&job_id, 1).await;
        assert_eq!(
            round.round.unwrap().phase(),
            v1::RoundPhase::Announced,
            "{what}"
        );
    }
    assert_eq!(a.send(&good).await.unwrap().outcome(), Outcome::Accepted);
    b.contribute(&job_id, 1, 0.0, 1).await;
    expect_published(&world, &mut b, &job_id, 1, &[("a", 2.0, 3), ("b", 0.0, 1)]).await;
}
