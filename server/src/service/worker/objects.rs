//! The objects of a job in a worker's hands, and the names of its results.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use concord_common::{Digest, ErrorCode, JobId, chunk::MAX_CHUNK_BYTES, code::Refusal, wire};
use concord_proto::v1::{self, put_object_request::Part};
use tonic::Streaming;

use super::{Grip, check, within_bounds};
use crate::{
    context::Context,
    datastore::Tx,
    decide::workers,
    error::{Failure, refuse},
    metrics,
    objects::{ObjectWriter, WholeObject},
    service::{
        BoxStream,
        pieces::{self, Wanted, unknown_object},
    },
};

/// Most named results of a job.
const MAX_ARTEFACTS: u64 = 4096;

/// Those of the objects that the server does not have, or whose file is lost.
pub(super) async fn missing(
    context: &Arc<Context>,
    grip: &Grip,
    digests: BTreeSet<Digest>,
) -> Result<Vec<Vec<u8>>, Failure> {
    let (now, wanted) = (context.now(), &digests);
    let found = context
        .datastore
        .run_read("find_objects", |tx| {
            Box::pin(async move {
                workers::gripped(tx, grip, now).await?;
                let mut found = Vec::new();
                for digest in wanted {
                    found.push((*digest, tx.object(&grip.job_id, digest).await?));
                }
                Ok::<_, Failure>(found)
            })
        })
        .await?;
    let (store, job_id) = (Arc::clone(&context.objects), grip.job_id.clone());
    let looking = move || {
        let mut missing = Vec::new();
        for (digest, bytes) in found {
            let is_there = match bytes {
                Some(bytes) => store.has(&job_id, &digest, bytes)?,
                None => false,
            };
            if !is_there {
                missing.push(digest.to_vec());
            }
        }
        Ok(missing)
    };
    tokio::task::spawn_blocking(looking)
        .await?
        .map_err(Failure::io("cannot look at an object"))
}

/// What a worker announces.
#[derive(Clone)]
struct Announced {
    grip: Grip,
    digest: Digest,
    bytes: u64,
}

/// Receives an object to its end and keeps it; gives the bytes that the job keeps.
pub(super) async fn put(
    context: &Arc<Context>,
    worker: String,
    mut stream: Streaming<v1::PutObjectRequest>,
) -> Result<u64, Failure> {
    let idle = context.config.limits.transfer_idle;
    let announced = match next_part(&mut stream, idle).await? {
        Some(Part::Header(header)) => Announced {
            digest: wire::digest("digest", &header.digest)?,
            bytes: header.bytes,
            grip: check::grip(header.grip, worker)?,
        },
        Some(Part::Chunk(_)) => {
            return Err(wire::invalid_field("header", "must come first").into());
        }
        None => return truncated(),
    };
    if let Some(kept) = is_kept(context, &announced).await? {
        return Ok(kept);
    }
    let turn = pieces::turn(context, &announced.grip.worker).await?;
    let (store, job_id) = (Arc::clone(&context.objects), announced.grip.job_id.clone());
    let writer = tokio::task::spawn_blocking(move || store.create(&job_id))
        .await?
        .map_err(Failure::io("cannot begin an object"))?;
    let taking = take_in(writer, announced.bytes, &mut stream, idle);
    let writer = context
        .objects_gate
        .in_time(announced.bytes, taking)
        .await?;
    if writer.digest() != announced.digest {
        return refuse(
            ErrorCode::DigestMismatch,
            format!(
                "the object has the digest {}, not {}",
                writer.digest(),
                announced.digest
            ),
        );
    }
    // The disk may be slow; the next transfer need not wait for it.
    drop(turn);
    let whole = tokio::task::spawn_blocking(move || writer.sync())
        .await?
        .map_err(Failure::io("cannot keep an object"))?;
    let kept = keep(Arc::clone(context), announced, whole);
    context.to_the_end(kept).await
}

/// Looks before a byte is taken: gives the bytes that the job keeps if the object is there already.
async fn is_kept(context: &Arc<Context>, announced: &Announced) -> Result<Option<u64>, Failure> {
    let (now, most) = (context.now(), context.config.workers.max_total_disk);
    let (kept, is_known) = context
        .datastore
        .run_read("find_object", |tx| {
            Box::pin(async move {
                let Announced {
                    grip,
                    digest,
                    bytes,
                } = announced;
                let record = workers::gripped(tx, grip, now).await?;
                match tx.object(&grip.job_id, digest).await? {
                    Some(known) if known != *bytes => {
                        let problem = format!("the object {digest} has {known} bytes");
                        Err(wire::invalid_field("bytes", problem).into())
                    }
                    Some(_) => Ok((record.kept_bytes(), true)),
                    None => {
                        within_bounds(tx, &record, *bytes, most).await?;
                        Ok::<_, Failure>((record.kept_bytes(), false))
                    }
                }
            })
        })
        .await?;
    let (store, announced) = (Arc::clone(&context.objects), announced.clone());
    let is_there = tokio::task::spawn_blocking(move || {
        store.has(&announced.grip.job_id, &announced.digest, announced.bytes)
    })
    .await?
    .map_err(Failure::io("cannot look at an object"))?;
    Ok((is_known && is_there).then_some(kept))
}

/// Moves the stream's bytes into the file until the object is whole.
async fn take_in(
    mut writer: ObjectWriter,
    bytes: u64,
    stream: &mut Streaming<v1::PutObjectRequest>,
    idle: Duration,
) -> Result<ObjectWriter, Failure> {
    while let Some(part) = next_part(stream, idle).await? {
        let Part::Chunk(chunk) = part else {
            return Err(wire::invalid_field("header", "must come once").into());
        };
        check_chunk(&chunk, writer.bytes(), bytes)?;
        let length = chunk.data.len() as u64;
        writer = tokio::task::spawn_blocking(move || write(writer, &chunk)).await??;
        metrics::worker_object_bytes("up", length);
    }
    if writer.bytes() < bytes {
        return truncated();
    }
    Ok(writer)
}

/// Where a chunk lies and how large it is; its digest is looked at where it is written.
fn check_chunk(chunk: &v1::Chunk, offset: u64, bytes: u64) -> Result<(), Refusal> {
    let length = chunk.data.len();
    if !(1..=MAX_CHUNK_BYTES).contains(&length) {
        return Err(Refusal::new(
            ErrorCode::BadChunk,
            format!("a chunk has 1 to {MAX_CHUNK_BYTES} bytes, this one {length}"),
        ));
    }
    if chunk.offset != offset {
        return Err(Refusal::new(
            ErrorCode::ChunkOffset,
            format!(
                "the next chunk begins at byte {offset}, not {}",
                chunk.offset
            ),
        ));
    }
    if offset + length as u64 > bytes {
        return Err(Refusal::new(
            ErrorCode::PayloadSize,
            format!("the object was announced with {bytes} bytes, and more came"),
        ));
    }
    Ok(())
}

/// Writes a chunk and checks its digest, which is the object's until here; blocking.
fn write(mut writer: ObjectWriter, chunk: &v1::Chunk) -> Result<ObjectWriter, Failure> {
    writer
        .write(&chunk.data)
        .map_err(Failure::io("cannot write an object"))?;
    if chunk.digest != writer.digest().as_bytes() {
        return refuse(
            ErrorCode::BadChunk,
            format!("the chunk at byte {} is damaged", chunk.offset),
        );
    }
    Ok(writer)
}

/// Gives the object its name and then its row. For [`Context::to_the_end`].
async fn keep(
    context: Arc<Context>,
    announced: Announced,
    whole: WholeObject,
) -> Result<u64, Failure> {
    let _change = context.objects.change().await;
    tokio::task::spawn_blocking(move || whole.finish())
        .await?
        .map_err(Failure::io("cannot keep an object"))?;
    let (now, object) = (context.now(), &announced);
    let most = context.config.workers.max_total_disk;
    let noted = context
        .datastore
        .run_tx("put_object", |tx| {
            Box::pin(async move {
                let Announced {
                    grip,
                    digest,
                    bytes,
                } = object;
                let record = workers::gripped(tx, grip, now).await?;
                if tx.object(&grip.job_id, digest).await?.is_some() {
                    return Ok(record.kept_bytes());
                }
                within_bounds(tx, &record, *bytes, most).await?;
                tx.put_object(&grip.job_id, digest, *bytes).await?;
                Ok::<_, Failure>(record.kept_bytes() + bytes)
            })
        })
        .await;
    if noted.is_err() {
        // Without its row the file is nobody's; with one it was there before.
        forget_file(&context, &announced).await;
    }
    noted
}

/// Deletes the file of an object that has no row. What cannot be deleted now goes at the next start.
async fn forget_file(context: &Arc<Context>, announced: &Announced) {
    let (job_id, digest) = (&announced.grip.job_id, &announced.digest);
    let known = context
        .datastore
        .run_read("find_object", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.object(job_id, digest).await?) })
        })
        .await;
    if !matches!(known, Ok(None)) {
        return;
    }
    let (store, announced) = (Arc::clone(&context.objects), announced.clone());
    let deleted = tokio::task::spawn_blocking(move || {
        store.delete(&announced.grip.job_id, &announced.digest)
    });
    if let Ok(Err(error)) = deleted.await {
        tracing::warn!(%error, "cannot delete an object that nobody refers to");
    }
}

async fn next_part(
    stream: &mut Streaming<v1::PutObjectRequest>,
    idle: Duration,
) -> Result<Option<Part>, Failure> {
    match tokio::time::timeout(idle, stream.message()).await {
        Ok(Ok(None)) => Ok(None),
        Ok(Ok(Some(message))) => Ok(Some(wire::required("part", message.part)?)),
        Ok(Err(status)) if status.code() == tonic::Code::OutOfRange => refuse(
            ErrorCode::BadChunk,
            format!("a chunk has 1 to {MAX_CHUNK_BYTES} bytes, this one has more"),
        ),
        Ok(Err(status)) => {
            tracing::debug!(%status, "an object broke off");
            truncated()
        }
        Err(_) => refuse(
            ErrorCode::TooSlow,
            format!(
                "nothing came for {}; send the object again",
                humantime::format_duration(idle)
            ),
        ),
    }
}

fn truncated<T>() -> Result<T, Failure> {
    refuse(
        ErrorCode::Truncated,
        "the stream ended before the object did; send it again",
    )
}

/// Sends an object from an offset on.
pub(super) async fn get(
    context: &Arc<Context>,
    grip: Grip,
    digest: Digest,
    offset: u64,
) -> Result<BoxStream<v1::GetObjectResponse>, Failure> {
    let (now, held) = (context.now(), &grip);
    let found = context
        .datastore
        .run_read("find_object", |tx| {
            Box::pin(async move {
                workers::gripped(tx, held, now).await?;
                Ok::<_, Failure>(tx.object(&held.job_id, &digest).await?)
            })
        })
        .await?;
    let Some(bytes) = found else {
        return Err(unknown_object(&grip.job_id, &digest).into());
    };
    let wanted = Wanted {
        job_id: grip.job_id,
        digest,
        offset,
        bytes,
        caller: grip.worker,
    };
    pieces::send(context, wanted, |chunk| v1::GetObjectResponse {
        chunk: Some(chunk),
    })
    .await
}

/// Forgets objects and deletes their files; results stay. Gives the bytes that the job keeps. For [`Context::to_the_end`].
pub(super) async fn remove(
    context: Arc<Context>,
    grip: Grip,
    digests: BTreeSet<Digest>,
) -> Result<u64, Failure> {
    let _change = context.objects.change().await;
    let (now, held, unwanted) = (context.now(), &grip, &digests);
    let (gone, kept) = context
        .datastore
        .run_tx("remove_objects", |tx| {
            Box::pin(async move {
                workers::gripped(tx, held, now).await?;
                let mut gone = Vec::new();
                for digest in unwanted {
                    if tx.delete_object(&held.job_id, digest).await? {
                        gone.push(*digest);
                    }
                }
                let record = workers::gripped(tx, held, now).await?;
                Ok::<_, Failure>((gone, record.kept_bytes()))
            })
        })
        .await?;
    delete_files(&context, grip.job_id, gone).await?;
    Ok(kept)
}

/// Deletes the files of objects that have no row any more.
async fn delete_files(
    context: &Arc<Context>,
    job_id: JobId,
    gone: Vec<Digest>,
) -> Result<(), Failure> {
    let store = Arc::clone(&context.objects);
    tokio::task::spawn_blocking(move || {
        for digest in gone {
            if let Err(error) = store.delete(&job_id, &digest) {
                tracing::warn!(job.id = %job_id, %error, "cannot delete an object; the next start does");
            }
        }
    })
    .await?;
    Ok(())
}

/// Names an object as a result. The one that had the name before is deleted if nothing needs it any more. For
/// [`Context::to_the_end`].
pub(super) async fn name(
    context: Arc<Context>,
    grip: Grip,
    name: String,
    digest: Digest,
) -> Result<(), Failure> {
    let _change = context.objects.change().await;
    let (now, held, name) = (context.now(), &grip, name.as_str());
    // Before the transaction: a journal may be long.
    let before = context
        .datastore
        .run_read("find_artefact", |tx| {
            Box::pin(async move {
                let job_id = &held.job_id;
                let before = tx.artefact(job_id, name).await?;
                match before.filter(|before| *before != digest) {
                    Some(before) if !tx.journal_names(job_id, &before).await? => Ok(Some(before)),
                    _ => Ok::<_, Failure>(None),
                }
            })
        })
        .await?;
    let gone = context
        .datastore
        .run_tx("put_artefact", |tx| {
            Box::pin(async move {
                let job_id = &held.job_id;
                workers::gripped(tx, held, now).await?;
                if tx.object(job_id, &digest).await?.is_none() {
                    return Err(unknown_object(job_id, &digest).into());
                }
                has_room(tx, job_id, name).await?;
                tx.put_artefact(job_id, name, &digest).await?;
                match before {
                    Some(before) if tx.delete_object(job_id, &before).await? => Ok(vec![before]),
                    _ => Ok::<_, Failure>(Vec::new()),
                }
            })
        })
        .await?;
    delete_files(&context, grip.job_id, gone).await
}

/// Whether a job may have a result of this name beside the others.
async fn has_room(tx: &mut Tx<'_>, job_id: &JobId, name: &str) -> Result<(), Failure> {
    let (is_named, count) = tx.count_artefacts(job_id, name).await?;
    if !is_named && count >= MAX_ARTEFACTS {
        return refuse(
            ErrorCode::QuotaExceeded,
            format!("a job has at most {MAX_ARTEFACTS} named results"),
        );
    }
    if let Some(other) = tx.clashing_artefact(job_id, name).await? {
        let problem = format!(
            "cannot be a file beside the artefact `{other}`: one of them is a folder of the other"
        );
        return Err(wire::invalid_field("name", problem).into());
    }
    Ok(())
}
