use bytes::Bytes;
use concord_common::{
    Digest, ErrorCode,
    adapter::{AdapterLayout, TensorSpec, encode_f32},
    chunk,
};

use super::*;

const ID: UploadId = [7; 16];

fn layout() -> AdapterLayout {
    AdapterLayout::new(vec![TensorSpec::new("w", &[100])]).unwrap()
}

fn payload() -> Bytes {
    encode_f32(&(0..100_u8).map(f32::from).collect::<Vec<_>>()).into()
}

fn expected(payload: &[u8]) -> Expected {
    Expected {
        layout: layout(),
        digest: Digest::of(payload),
        max_norm: None,
    }
}

fn open(folder: &Path) -> Spool {
    Spool::open(&folder.join("spool"), Durability::Power).unwrap()
}

async fn session(spool: &Spool, payload: &[u8]) -> Session {
    let turn = spool.take_turn(ID).await;
    spool.resume(turn, expected(payload)).unwrap()
}

#[tokio::test]
async fn an_upload_goes_on_at_the_files_length_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let payload = payload();
    let chunks: Vec<_> = chunk::chunks(&payload, 0, 150).collect();
    {
        let spool = open(folder.path());
        let mut session = session(&spool, &payload).await;
        session.push(&chunks[0]).unwrap();
        session.push(&chunks[1]).unwrap();
    }
    let spool = open(folder.path());
    assert_eq!(spool.offset(&ID, 400).unwrap(), 300);
    let mut session = session(&spool, &payload).await;
    assert_eq!(session.offset(), 300);
    let last = chunk::chunks(&payload, 300, 150).next().unwrap();
    session.push(&last).unwrap();
    assert_eq!(session.finish().unwrap().digest, Digest::of(&payload));
    spool.sync(&session).await.unwrap();
    assert_eq!(fs::read(spool.path(&ID)).unwrap(), payload);
}

#[tokio::test]
async fn a_refused_chunk_leaves_the_upload_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    let payload = payload();
    let chunks: Vec<_> = chunk::chunks(&payload, 0, 200).collect();
    let mut session = session(&spool, &payload).await;
    session.push(&chunks[0]).unwrap();
    for (bad, code) in [
        (chunks[0].clone(), ErrorCode::ChunkOffset),
        (
            v1::Chunk {
                digest: vec![0; 32],
                ..chunks[1].clone()
            },
            ErrorCode::BadChunk,
        ),
    ] {
        let Err(Failure::Refused(refusal)) = session.push(&bad) else {
            panic!("{code} was let through");
        };
        assert_eq!(refusal.code, code);
    }
    assert_eq!(spool.offset(&ID, 400).unwrap(), 200);
    session.push(&chunks[1]).unwrap();
    session.finish().unwrap();
}

#[tokio::test]
async fn a_file_with_rubbish_starts_over() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    fs::write(spool.path(&ID), f32::NAN.to_le_bytes()).unwrap();
    assert_eq!(session(&spool, &payload()).await.offset(), 0);
    fs::write(spool.path(&ID), [0; 500]).unwrap();
    assert_eq!(spool.offset(&ID, 400).unwrap(), 0);
    assert_eq!(session(&spool, &payload()).await.offset(), 0);
}

#[tokio::test]
async fn a_second_stream_takes_the_upload_over() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    let first = session(&spool, &payload()).await;
    let cut = first.cut();
    let holder = async move {
        cut.cancelled().await;
        drop(first);
    };
    let ((), second) = tokio::join!(holder, spool.take_turn(ID));
    assert!(spool.is_busy(&ID));
    drop(second);
    assert!(!spool.is_busy(&ID));
}

#[tokio::test]
async fn many_uploads_are_synced_together() {
    let folder = tempfile::tempdir().unwrap();
    let group = GroupSync::new(folder.path());
    let files: Vec<_> = (0..20)
        .map(|index| Arc::new(File::create(folder.path().join(index.to_string())).unwrap()))
        .collect();
    let synced = futures::future::join_all(files.into_iter().map(|file| group.sync(file))).await;
    assert!(synced.iter().all(Result::is_ok));
    assert!(group.lock().is_empty());
}

#[tokio::test]
async fn the_sweep_keeps_what_is_still_needed() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    fs::write(spool.path(&ID), b"kept").unwrap();
    fs::write(spool.path(&[8; 16]), b"left over").unwrap();
    assert_eq!(spool.sweep(&BTreeSet::from([ID])).unwrap(), 1);
    assert_eq!(fs::read(spool.path(&ID)).unwrap(), b"kept");
    spool.delete(&ID).unwrap();
    spool.delete(&ID).unwrap();
}
