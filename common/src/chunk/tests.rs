use std::io;

use bytes::Bytes;
use concord_proto::v1;
use proptest::{collection::vec, prelude::*};

use super::{
    ChunkAssembler, Cut, DEFAULT_CHUNK_BYTES, Expected, MAX_CHUNK_BYTES, PayloadInspector,
    Received, ResumeError, StreamDigest, chunk, chunks,
};
use crate::{
    Digest, ErrorCode,
    adapter::{AdapterLayout, TensorSpec, encode_f32},
    code::Refusal,
};

fn layout(elements: u64) -> AdapterLayout {
    AdapterLayout::new(vec![
        TensorSpec::new("first", &[1]),
        TensorSpec::new("second", &[elements - 1]),
    ])
    .unwrap()
}

fn payload(elements: u64) -> Bytes {
    let values: Vec<f32> = (0..elements).map(|i| i as f32 - 3.5).collect();
    encode_f32(&values).into()
}

fn expected(payload: &Bytes) -> Expected {
    Expected {
        layout: layout(payload.len() as u64 / 4),
        digest: Digest::of(payload),
        max_norm: None,
    }
}

fn receive(
    assembler: &mut ChunkAssembler,
    chunks: impl IntoIterator<Item = v1::Chunk>,
) -> Result<Received, Refusal> {
    for chunk in chunks {
        assembler.accept(&chunk)?;
    }
    assembler.finish()
}

/// The code of a refusal that must leave the assembler as it was.
fn refused(assembler: &mut ChunkAssembler, chunk: &v1::Chunk) -> Refusal {
    let (offset, before) = (assembler.offset(), format!("{assembler:?}"));
    let refusal = assembler.accept(chunk).unwrap_err();
    assert_eq!(assembler.offset(), offset);
    assert_eq!(
        format!("{assembler:?}"),
        before,
        "a refusal changed the state"
    );
    refusal
}

#[test]
fn chunks_share_the_payload_and_cover_it() {
    let payload = payload(1000);
    let pieces: Vec<_> = chunks(&payload, 0, 1024).collect();
    assert_eq!(
        pieces.iter().map(|c| c.data.len()).collect::<Vec<_>>(),
        [1024, 1024, 1024, 928]
    );
    for piece in &pieces {
        let end = piece.offset as usize + piece.data.len();
        assert_eq!(piece.digest, Digest::of(&payload[..end]).to_vec());
    }
    let rest: Vec<_> = chunks(&payload, 1000, 2000).collect();
    assert_eq!(rest[0].digest, Digest::of(&payload[1000..3000]).to_vec());
    assert_eq!(
        rest[1].digest,
        Digest::of(&payload[1000..]).to_vec(),
        "a stream has a digest of its own"
    );
    assert_eq!(pieces[1].data.as_ptr(), payload[1024..].as_ptr(), "no copy");
    assert_eq!(
        chunks(&payload, 3999, 1024)
            .map(|c| c.offset)
            .collect::<Vec<_>>(),
        [3999]
    );
    assert_eq!(chunks(&payload, 4000, 1024).count(), 0);
    assert_eq!(chunks(&payload, u64::MAX, 1024).count(), 0);
    assert_eq!(
        chunks(&payload, 0, 0).count(),
        4000,
        "a size of 0 is taken as 1"
    );
}

#[test]
fn a_payload_that_is_hashed_once_gives_the_same_chunks_from_any_byte_on() {
    let payload = payload(1000);
    for size in [0, 1, 1024, 4000, MAX_CHUNK_BYTES + 1] {
        let cut = Cut::new(payload.clone(), size);
        assert_eq!(cut.digest(), Digest::of(&payload));
        for from in [0, 1, 1024, 3999, 4000, u64::MAX] {
            assert!(cut.chunks(from).eq(chunks(&payload, from, size)), "{from}");
        }
    }
    let empty = Cut::new(Bytes::new(), 10);
    assert_eq!(empty.digest(), Digest::of(b""));
    assert_eq!(empty.chunks(0).count(), 0);
}

#[test]
fn a_chunk_is_refused_if_its_digest_leaves_out_what_was_sent_before_it() {
    let payload = payload(100);
    let pieces: Vec<_> = chunks(&payload, 0, 100).collect();
    let mut assembler = ChunkAssembler::new(expected(&payload));
    assembler.accept(&pieces[0]).unwrap();
    let alone = chunk(100, payload.slice(100..200));
    assert_eq!(refused(&mut assembler, &alone).code, ErrorCode::BadChunk);
    assembler.accept(&pieces[1]).unwrap();
    // In a stream that begins here it is the other way round.
    assembler.begin_stream();
    assert_eq!(
        refused(&mut assembler, &pieces[2]).code,
        ErrorCode::BadChunk
    );
    receive(&mut assembler, chunks(&payload, 200, 100)).unwrap();
}

#[test]
fn a_payload_comes_through_whole_and_its_norm_is_known() {
    let payload = Bytes::from(encode_f32(&[3.0, 0.0, -4.0]));
    let mut assembler = ChunkAssembler::new(expected(&payload));
    let received = receive(&mut assembler, chunks(&payload, 0, 5)).unwrap();
    assert!(assembler.is_complete());
    assert_eq!(
        received,
        Received {
            digest: Digest::of(&payload),
            bytes: 12,
            norm: 5.0
        }
    );
}

#[test]
fn an_empty_chunk_and_one_that_is_too_large_are_bad_chunks() {
    let payload = payload(MAX_CHUNK_BYTES as u64);
    let mut assembler = ChunkAssembler::new(expected(&payload));
    assert_eq!(
        refused(&mut assembler, &chunk(0, Bytes::new())).code,
        ErrorCode::BadChunk
    );
    let large = chunk(0, payload.slice(..=MAX_CHUNK_BYTES));
    assert_eq!(refused(&mut assembler, &large).code, ErrorCode::BadChunk);
    let largest = chunk(0, payload.slice(..MAX_CHUNK_BYTES));
    assembler.accept(&largest).unwrap();
}

#[test]
fn a_gap_and_a_repeated_chunk_are_told_where_to_go_on() {
    let payload = payload(100);
    let mut assembler = ChunkAssembler::new(expected(&payload));
    let pieces: Vec<_> = chunks(&payload, 0, 100).collect();
    assembler.accept(&pieces[0]).unwrap();
    for wrong in [&pieces[0], &pieces[2]] {
        let refusal = refused(&mut assembler, wrong);
        assert_eq!(refusal.code, ErrorCode::ChunkOffset);
        assert!(refusal.message.contains("go on at byte 100"), "{refusal}");
    }
    receive(&mut assembler, pieces[1..].iter().cloned()).unwrap();
}

#[test]
fn an_offset_near_the_largest_number_is_refused_without_overflow() {
    let payload = payload(100);
    let mut assembler = ChunkAssembler::new(expected(&payload));
    let far = chunk(u64::MAX - 3, payload.slice(..8));
    assert_eq!(refused(&mut assembler, &far).code, ErrorCode::ChunkOffset);
}

#[test]
fn more_bytes_than_the_layout_has_are_refused() {
    let payload = payload(10);
    let mut assembler = ChunkAssembler::new(expected(&payload));
    let mut long = payload.to_vec();
    long.push(0);
    let refusal = refused(&mut assembler, &chunk(0, long.into()));
    assert_eq!(refusal.code, ErrorCode::PayloadSize);
    receive(&mut assembler, chunks(&payload, 0, 40)).unwrap();
    let more = chunk(40, Bytes::from_static(&[0]));
    assert_eq!(refused(&mut assembler, &more).code, ErrorCode::PayloadSize);
}

#[test]
fn an_announced_size_other_than_the_layouts_is_refused() {
    let expected = expected(&payload(10));
    expected.check_size(40).unwrap();
    for size in [0, 39, 41, u64::MAX] {
        assert_eq!(
            expected.check_size(size).unwrap_err().code,
            ErrorCode::PayloadSize
        );
    }
}

#[test]
fn a_truncated_payload_is_refused_and_can_go_on() {
    let payload = payload(100);
    let mut assembler = ChunkAssembler::new(expected(&payload));
    let mut pieces = chunks(&payload, 0, 99);
    assembler.accept(&pieces.next().unwrap()).unwrap();
    let refusal = assembler.finish().unwrap_err();
    assert_eq!(refusal.code, ErrorCode::Truncated);
    assert!(
        refusal.message.contains("after 99 of 400 bytes"),
        "{refusal}"
    );
    receive(&mut assembler, pieces).unwrap();
}

#[test]
fn another_payload_than_the_announced_one_is_refused_at_the_end() {
    let (announced, sent) = (payload(10), Bytes::from(encode_f32(&[1.0; 10])));
    let mut assembler = ChunkAssembler::new(expected(&announced));
    let refusal = receive(&mut assembler, chunks(&sent, 0, 16)).unwrap_err();
    assert_eq!(refusal.code, ErrorCode::DigestMismatch);
}

#[test]
fn a_value_that_is_not_finite_names_its_tensor_wherever_chunks_cut() {
    for (bad, at, tensor) in [
        (f32::NAN, 0, "`first`"),
        (f32::INFINITY, 1, "`second`"),
        (f32::NEG_INFINITY, 9, "`second`"),
    ] {
        let mut values = [1.0; 10];
        values[at] = bad;
        let payload = Bytes::from(encode_f32(&values));
        for size in 1..=40 {
            let mut assembler = ChunkAssembler::new(expected(&payload));
            let refusal = receive(&mut assembler, chunks(&payload, 0, size)).unwrap_err();
            assert_eq!(refusal.code, ErrorCode::NotFinite);
            assert!(refusal.message.contains(tensor), "{refusal}");
            assert!(
                refusal.message.contains(&format!("element {at} ")),
                "{refusal}"
            );
        }
    }
}

#[test]
fn a_good_chunk_is_welcome_after_a_refused_one() {
    let payload = payload(10);
    let mut bad = payload.to_vec();
    bad[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
    let mut assembler = ChunkAssembler::new(expected(&payload));
    let good = cut(&payload, &[6, 14]);
    assembler.accept(&good[0]).unwrap();
    assert_eq!(
        refused(&mut assembler, &cut(&bad.into(), &[6, 14])[1]).code,
        ErrorCode::NotFinite
    );
    receive(&mut assembler, good[1..].iter().cloned()).unwrap();
}

#[test]
fn an_update_beyond_the_norm_bound_is_refused() {
    let payload = Bytes::from(encode_f32(&[3.0, 4.0]));
    let bounded = |bound| Expected {
        max_norm: Some(bound),
        ..expected(&payload)
    };
    receive(
        &mut ChunkAssembler::new(bounded(5.0)),
        chunks(&payload, 0, 4),
    )
    .unwrap();
    let mut assembler = ChunkAssembler::new(bounded(4.99));
    let pieces = cut(&payload, &[4]);
    assembler.accept(&pieces[0]).unwrap();
    let refusal = refused(&mut assembler, &pieces[1]);
    assert_eq!(refusal.code, ErrorCode::NormTooLarge);
}

#[test]
fn the_largest_finite_values_are_finite() {
    let payload = encode_f32(&[f32::MAX; 64]);
    let seen = PayloadInspector::new().then(&payload, &layout(64)).unwrap();
    assert!((seen.norm() / (8.0 * f64::from(f32::MAX)) - 1.0).abs() < 1e-12);
}

#[test]
fn what_was_received_before_is_checked_again_on_resuming() {
    let payload = payload(10);
    let resume = |mut bytes: &[u8]| ChunkAssembler::resume(expected(&payload), &mut bytes);
    assert_eq!(resume(&payload[..13]).unwrap().offset(), 13);
    let mut spoiled = payload[..13].to_vec();
    spoiled[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(matches!(
        resume(&spoiled),
        Err(ResumeError::Content(refusal)) if refusal.code == ErrorCode::NotFinite
    ));
    let long = [payload.as_ref(), &[0]].concat();
    assert!(matches!(
        resume(&long),
        Err(ResumeError::Content(refusal)) if refusal.code == ErrorCode::PayloadSize
    ));
}

#[test]
fn a_spool_that_cannot_be_read_is_an_error_of_its_own() {
    struct Broken;
    impl io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::PermissionDenied.into())
        }
    }
    let expected = expected(&payload(10));
    assert!(matches!(
        ChunkAssembler::resume(expected, &mut Broken),
        Err(ResumeError::Read(_))
    ));
}

/// A payload of 2 to 200 elements, and sizes of the chunks to cut it into.
fn payload_and_cuts() -> impl Strategy<Value = (Bytes, Vec<usize>)> {
    let values = vec(-1e3_f32..1e3, 2..200);
    let cuts = vec(1_usize..90, 1..20);
    (values, cuts).prop_map(|(values, cuts)| (encode_f32(&values).into(), cuts))
}

fn cut(payload: &Bytes, cuts: &[usize]) -> Vec<v1::Chunk> {
    let mut pieces = Vec::new();
    let mut digest = StreamDigest::new();
    let mut offset = 0;
    for size in cuts.iter().cycle() {
        if offset == payload.len() {
            break;
        }
        let end = payload.len().min(offset + size);
        pieces.push(digest.chunk(offset as u64, payload.slice(offset..end)));
        offset = end;
    }
    pieces
}

proptest! {
    #[test]
    fn any_way_of_cutting_gives_the_same((payload, cuts) in payload_and_cuts()) {
        let mut assembler = ChunkAssembler::new(expected(&payload));
        let pieces = receive(&mut assembler, cut(&payload, &cuts)).unwrap();
        let mut assembler = ChunkAssembler::new(expected(&payload));
        let whole = receive(&mut assembler, chunks(&payload, 0, DEFAULT_CHUNK_BYTES)).unwrap();
        prop_assert_eq!(pieces.digest, whole.digest);
        prop_assert_eq!(pieces.bytes, payload.len() as u64);
        prop_assert!((pieces.norm - whole.norm).abs() <= 1e-9 * whole.norm);
    }

    #[test]
    fn an_upload_resumed_anywhere_ends_like_an_unbroken_one(
        (payload, cuts) in payload_and_cuts(),
        share in 0.0_f64..=1.0,
    ) {
        let kept = (payload.len() as f64 * share) as usize;
        let mut assembler = ChunkAssembler::resume(expected(&payload), &mut &payload[..kept]).unwrap();
        prop_assert_eq!(assembler.offset(), kept as u64);
        let rest = payload.slice(kept..);
        let pieces = cut(&rest, &cuts).into_iter().map(|piece| v1::Chunk {
            offset: piece.offset + kept as u64,
            ..piece
        });
        let received = receive(&mut assembler, pieces).unwrap();
        prop_assert_eq!(received.digest, Digest::of(&payload));
    }

    #[test]
    fn any_flipped_bit_is_refused_and_changes_nothing(
        (payload, cuts) in payload_and_cuts(),
        place in any::<prop::sample::Index>(),
        bit in 0_u8..8,
        honest_digest in any::<bool>(),
    ) {
        let at = place.index(payload.len());
        let mut spoiled = payload.to_vec();
        spoiled[at] ^= 1 << bit;
        let spoiled = Bytes::from(spoiled);
        let mut assembler = ChunkAssembler::new(expected(&payload));
        let mut refusal = None;
        for (good, bad) in cut(&payload, &cuts).into_iter().zip(cut(&spoiled, &cuts)) {
            // Spoiled on the way (the digest is the good bytes'), or by the sender (the digest fits).
            let digest = if honest_digest { bad.digest.clone() } else { good.digest.clone() };
            let sent = v1::Chunk { digest, ..bad };
            let before = format!("{assembler:?}");
            if let Err(error) = assembler.accept(&sent) {
                prop_assert_eq!(format!("{assembler:?}"), before);
                refusal.get_or_insert(error.code);
                assembler.accept(&good).unwrap();
            }
        }
        if honest_digest {
            let end = refusal.or(assembler.finish().err().map(|error| error.code));
            prop_assert!(
                matches!(end, Some(ErrorCode::DigestMismatch | ErrorCode::NotFinite)),
                "{end:?}"
            );
        } else {
            prop_assert_eq!(refusal, Some(ErrorCode::BadChunk));
            assembler.finish().unwrap();
        }
    }

    #[test]
    fn chunks_in_any_order_advance_only_the_next_one(
        (payload, cuts) in payload_and_cuts(),
        picks in vec(any::<prop::sample::Index>(), 0..100),
    ) {
        let pieces = cut(&payload, &cuts);
        let mut assembler = ChunkAssembler::new(expected(&payload));
        for pick in picks {
            let piece = &pieces[pick.index(pieces.len())];
            let offset = assembler.offset();
            if piece.offset == offset {
                assembler.accept(piece).unwrap();
                prop_assert_eq!(assembler.offset(), offset + piece.data.len() as u64);
            } else {
                prop_assert_eq!(assembler.accept(piece).unwrap_err().code, ErrorCode::ChunkOffset);
                prop_assert_eq!(assembler.offset(), offset);
            }
        }
    }
}
