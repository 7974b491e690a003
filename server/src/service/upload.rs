//! The bytes of a contribution, from the stream to the receipt.

use std::{sync::Arc, time::Duration};

use concord_common::{
    ErrorCode, JobId, RoundNumber, SiloId,
    chunk::{Expected, MAX_CHUNK_BYTES},
    code::Refusal,
    round::{Contribution, Event},
    wire,
};
use concord_proto::v1;
use prost::Message as _;
use tonic::Streaming;

use super::transfer::TransferGate;
use crate::{
    context::Context,
    datastore::{DatastoreError, UploadRecord},
    decide::{self, Change},
    error::{Failure, refuse},
    metrics,
    spool::{Session, UploadId},
};

/// Receives an upload to its end and records the contribution.
pub(super) async fn receive(
    context: &Arc<Context>,
    gate: &TransferGate,
    silo_id: &SiloId,
    mut stream: Streaming<v1::UploadContributionRequest>,
) -> Result<v1::Receipt, Failure> {
    // Before the turn, and before a byte is read: who has announced nothing takes nobody's turn, and those who wait for
    // theirs take no memory.
    let announced = announced(context, silo_id).await?;
    if announced.is_empty() {
        return no_such_upload();
    }
    let turn = gate.enter(silo_id).await?;
    let idle = context.config.limits.transfer_idle;
    let Some(first) = next_message(&mut stream, idle).await? else {
        return refuse(
            ErrorCode::Truncated,
            "the stream ended before its first message",
        );
    };
    let upload_id: UploadId = first
        .upload_id
        .as_slice()
        .try_into()
        .map_err(|_| wire::invalid_field("upload_id", "must have 16 bytes"))?;
    let Some(upload) = announced
        .into_iter()
        .find(|upload| upload.upload_id == upload_id)
    else {
        return no_such_upload();
    };
    let moving = take_in(context, &upload, first, &mut stream, idle);
    let session = match gate.in_time(upload.payload_bytes, moving).await {
        Err(Failure::Refused(refusal)) if spoils_upload(refusal.code) => {
            let spoiled = throw_away(Arc::clone(context), upload, refusal.clone());
            context.to_the_end(spoiled).await?;
            return Err(refusal.into());
        }
        other => other?,
    };
    // The disk may be slow; the next transfer need not wait for it.
    drop(turn);
    let concluded = conclude(Arc::clone(context), upload, session);
    context.to_the_end(concluded).await
}

/// What follows the last byte: sync, transaction, announcements. For [`Context::to_the_end`].
pub(crate) async fn conclude(
    context: Arc<Context>,
    upload: UploadRecord,
    session: Session,
) -> Result<v1::Receipt, Failure> {
    if let Err(failure) = context.spool.sync(&session).await {
        // Under the session's turn, so that nobody goes on with the file in between.
        give_up(&context, &upload, &failure).await;
        return Err(failure);
    }
    let change = record(&context, &upload).await?;
    drop(session);
    finish(&context, &upload, &change).await
}

/// Forgets an upload that the disk did not confirm. The kernel drops what it could not write and tells of it once: another sync
/// of the same file would succeed although the bytes are not there. So all of them have to come anew.
async fn give_up(context: &Arc<Context>, upload: &UploadRecord, failure: &Failure) {
    tracing::error!(
        job.id = %upload.job_id, round.id = %upload.round, silo.id = %upload.silo_id, error = %failure,
        "an upload is not on the disk; it has to come anew"
    );
    // Either is enough: without the row nothing refers to the file, and without the file the upload begins at its first byte.
    if let Err(error) = delete_file(context, upload.upload_id).await {
        tracing::error!(%error, "cannot delete an upload that is not on the disk");
    }
    if let Err(error) = forget(context, upload).await {
        tracing::error!(%error, "cannot forget an upload that is not on the disk");
    }
}

/// Forgets an upload that no further byte can mend, and notes it in the round. For [`Context::to_the_end`].
pub(crate) async fn throw_away(
    context: Arc<Context>,
    upload: UploadRecord,
    refusal: Refusal,
) -> Result<(), Failure> {
    // Another call may go on with the upload meanwhile, and would make the file anew, without a row.
    let turn = context.spool.take_turn(upload.upload_id).await;
    forget(&context, &upload).await?;
    drop(turn);
    reject(
        &context,
        &upload.job_id,
        upload.round,
        &upload.silo_id,
        &refusal,
    )
    .await;
    Ok(())
}

/// The uploads that a silo has announced.
async fn announced(context: &Context, silo_id: &SiloId) -> Result<Vec<UploadRecord>, Failure> {
    context
        .datastore
        .read_statement("list_announced_uploads", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.uploads_of(silo_id).await?) })
        })
        .await
}

/// Renews the upload's row and says what its payload must be.
async fn renew(context: &Context, upload: &UploadRecord) -> Result<Expected, Failure> {
    let (now, upload_id) = (context.now(), &upload.upload_id);
    let there = context
        .datastore
        .run_statement_unsynced("resume_upload", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.touch_upload(upload_id, now).await?) })
        })
        .await?;
    if !there {
        return no_such_upload();
    }
    let known = if let Some(known) = context.specs.known(&upload.job_id) {
        known
    } else {
        let job = context
            .datastore
            .read_statement("find_job", |tx| Box::pin(decide::job(tx, &upload.job_id)))
            .await?;
        context.specs.of(&job)?
    };
    Ok(Expected {
        layout: known.layout.clone(),
        digest: upload.payload_digest,
        max_norm: known.spec.limits.max_update_norm,
    })
}

fn no_such_upload<T>() -> Result<T, Failure> {
    refuse(
        ErrorCode::UnknownUpload,
        "there is no such upload, or it has expired or was replaced; begin the contribution again",
    )
}

/// Moves the stream's bytes into the file until the payload is whole.
async fn take_in(
    context: &Arc<Context>,
    upload: &UploadRecord,
    first: v1::UploadContributionRequest,
    stream: &mut Streaming<v1::UploadContributionRequest>,
    idle: Duration,
) -> Result<Session, Failure> {
    let spool = Arc::clone(&context.spool);
    let turn = spool.take_turn(upload.upload_id).await;
    let cut = turn.cut();
    // Under the spool's turn: whoever deletes the file waits for it, so that none is made anew after that.
    let expected = renew(context, upload).await?;
    let mut session = tokio::task::spawn_blocking(move || spool.resume(turn, expected))
        .await?
        .map_err(Failure::io("cannot go on with an upload"))?;
    // A payload that is whole already needs no chunk.
    let mut next = first.chunk;
    loop {
        let message = async {
            tokio::select! {
                message = next_message(stream, idle) => message,
                () = cut.cancelled() => refuse(ErrorCode::Busy, "another call goes on with this upload"),
            }
        };
        // The next chunk comes in while this one is taken in.
        let message = match next {
            None => message.await?,
            Some(chunk) => {
                let (pushed, message) = tokio::try_join!(push(session, chunk), message)?;
                session = pushed;
                message
            }
        };
        match message {
            None => break,
            Some(message) => next = Some(wire::required("chunk", message.chunk)?),
        }
    }
    session.finish()?;
    Ok(session)
}

/// Hands a chunk to a worker thread, which checks it and writes it to the file.
async fn push(mut session: Session, chunk: v1::Chunk) -> Result<Session, Failure> {
    let bytes = chunk.data.len() as u64;
    let (session, pushed) = tokio::task::spawn_blocking(move || {
        let pushed = session.push(&chunk);
        (session, pushed)
    })
    .await?;
    pushed?;
    metrics::transfer_bytes("up", bytes);
    Ok(session)
}

async fn next_message(
    stream: &mut Streaming<v1::UploadContributionRequest>,
    idle: Duration,
) -> Result<Option<v1::UploadContributionRequest>, Failure> {
    match tokio::time::timeout(idle, stream.message()).await {
        Ok(Ok(message)) => Ok(message),
        Ok(Err(status)) if status.code() == tonic::Code::OutOfRange => refuse(
            ErrorCode::BadChunk,
            format!("a chunk has 1 to {MAX_CHUNK_BYTES} bytes, this one has more"),
        ),
        Ok(Err(status)) => {
            tracing::debug!(%status, "an upload broke off");
            refuse(
                ErrorCode::Truncated,
                "the stream broke off; begin again and go on from there",
            )
        }
        Err(_) => refuse(
            ErrorCode::TooSlow,
            format!(
                "nothing came for {}; begin again and go on from there",
                humantime::format_duration(idle)
            ),
        ),
    }
}

/// True for faults of the payload itself: going on with the upload cannot mend them.
fn spoils_upload(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::NotFinite
            | ErrorCode::NormTooLarge
            | ErrorCode::PayloadSize
            | ErrorCode::DigestMismatch
    )
}

/// Throws an upload away.
async fn forget(context: &Arc<Context>, upload: &UploadRecord) -> Result<(), Failure> {
    let id = &upload.upload_id;
    context
        .datastore
        .run_tx("forget_upload", |tx| {
            Box::pin(async move {
                tx.delete_upload(id).await?;
                Ok::<_, Failure>(())
            })
        })
        .await?;
    delete_file(context, *id).await
}

async fn delete_file(context: &Arc<Context>, id: UploadId) -> Result<(), Failure> {
    let spool = Arc::clone(&context.spool);
    tokio::task::spawn_blocking(move || spool.delete(&id))
        .await?
        .map_err(Failure::io("cannot delete an upload"))
}

/// The one transaction that makes a contribution count, or discards it.
pub(crate) async fn record(context: &Context, upload: &UploadRecord) -> Result<Change, Failure> {
    let (now, signer) = (context.now(), &context.signer);
    context
        .datastore
        .run_tx("record_contribution", |tx| {
            Box::pin(async move {
                let event = Event::Contributed(Contribution {
                    silo: upload.silo_id.clone(),
                    digest: upload.payload_digest,
                    examples: upload.examples,
                });
                let id = upload.upload_id;
                let (job_id, silo_id) = (&upload.job_id, &upload.silo_id);
                // Another contribution may have been announced in its place meanwhile, and then its bytes are deleted.
                if !tx.delete_upload(&id).await? {
                    return no_such_upload();
                }
                let change =
                    decide::apply(tx, signer, job_id, upload.round, event, Some(id), now).await?;
                tx.count_bytes(job_id, silo_id, upload.payload_bytes, 0)
                    .await?;
                Ok::<_, Failure>(change)
            })
        })
        .await
}

/// Tells everybody, and deletes the bytes of what does not count.
async fn finish(
    context: &Arc<Context>,
    upload: &UploadRecord,
    change: &Change,
) -> Result<v1::Receipt, Failure> {
    change.announce(&upload.job_id, &context.hub);
    let record = change.record.as_ref();
    let counts = record.is_some_and(|record| record.upload_id == Some(upload.upload_id));
    if !counts {
        delete_file(context, upload.upload_id).await?;
    }
    let Some(receipt) = record.and_then(|record| record.receipt.as_deref()) else {
        return refuse(ErrorCode::Internal, "the contribution has no receipt");
    };
    decode_receipt(receipt)
}

/// A receipt as it is stored.
pub(super) fn decode_receipt(bytes: &[u8]) -> Result<v1::Receipt, Failure> {
    v1::Receipt::decode(bytes).map_err(|error| {
        DatastoreError::BadValue {
            column: "receipt",
            what: error.to_string(),
        }
        .into()
    })
}

/// Notes in the round that a silo's contribution did not pass, if it is the contribution that is at fault and not its
/// transport. The round goes on, and the silo may send a better one.
pub(super) async fn reject(
    context: &Context,
    job_id: &JobId,
    round: RoundNumber,
    silo_id: &SiloId,
    refusal: &Refusal,
) {
    let code = refusal.code;
    let at_fault = spoils_upload(code)
        || matches!(
            code,
            ErrorCode::WrongBaseVersion
                | ErrorCode::TensorCount
                | ErrorCode::TensorName
                | ErrorCode::TensorOrder
                | ErrorCode::TensorShape
                | ErrorCode::TensorDtype
                | ErrorCode::BadWeight
        );
    if !at_fault {
        return;
    }
    tracing::info!(job.id = %job_id, round.id = %round, silo.id = %silo_id, code = %code, "contribution rejected");
    let (now, signer) = (context.now(), &context.signer);
    let noted = context
        .datastore
        .run_tx("reject_contribution", |tx| {
            let event = Event::Rejected {
                silo: silo_id.clone(),
                code,
            };
            Box::pin(decide::apply(tx, signer, job_id, round, event, None, now))
        })
        .await;
    match noted {
        Ok(change) => change.announce(job_id, &context.hub),
        Err(error) => tracing::warn!(%error, "cannot note a rejected contribution"),
    }
}
