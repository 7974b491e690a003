//! A worker's object, piece by piece out of its file.

use std::{fs::File, os::unix::fs::FileExt as _, sync::Arc, time::Duration};

use bytes::BytesMut;
use concord_common::{Digest, ErrorCode, JobId, SiloId, chunk::StreamDigest, code::Refusal, wire};
use concord_proto::v1;
use futures::{StreamExt as _, future, stream};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{BoxStream, federation::shutting_down, transfer::TransferTurn};
use crate::{context::Context, error::Failure, metrics};

/// Whose object is wanted, from which byte on.
pub(super) struct Wanted {
    pub job_id: JobId,
    pub digest: Digest,
    pub offset: u64,
    /// Size of the object, from its row.
    pub bytes: u64,
    /// Who asks, by the name in the certificate.
    pub caller: String,
}

/// `UNKNOWN_OBJECT`.
pub(super) fn unknown_object(job_id: &JobId, digest: &Digest) -> Refusal {
    Refusal::new(
        ErrorCode::UnknownObject,
        format!("job `{job_id}` has no object {digest}"),
    )
}

/// Waits for a turn to move an object.
pub(super) async fn turn(context: &Context, caller: &str) -> Result<TransferTurn, Failure> {
    // Names in certificates follow one rule, whatever the role; the gate only needs to tell callers apart.
    let caller: SiloId = caller
        .parse()
        .map_err(|error| Refusal::new(ErrorCode::InvalidRequest, format!("{error}")))?;
    let stop = context.shutdown.hard_token();
    tokio::select! {
        turn = context.objects_gate.enter(&caller) => Ok(turn?),
        () = stop.cancelled_owned() => Err(shutting_down().into()),
    }
}

/// Waits for a turn and begins to send. If sending ends before its time, the reason is the stream's last item.
pub(super) async fn send<T: Send + 'static>(
    context: &Arc<Context>,
    wanted: Wanted,
    wrap: impl Fn(v1::Chunk) -> T + Send + 'static,
) -> Result<BoxStream<T>, Failure> {
    if wanted.offset > wanted.bytes {
        let problem = format!("the object has {} bytes", wanted.bytes);
        return Err(wire::invalid_field("offset", problem).into());
    }
    let turn = turn(context, &wanted.caller).await?;
    let store = Arc::clone(&context.objects);
    let (job_id, digest) = (wanted.job_id.clone(), wanted.digest);
    let opened = tokio::task::spawn_blocking(move || store.get(&job_id, &digest)).await?;
    let file = match opened {
        Ok(file) => Arc::new(file),
        // Removed since its row was read, or lost.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(unknown_object(&wanted.job_id, &digest).into());
        }
        Err(error) => return Err(Failure::io("cannot open an object")(error)),
    };
    let (pieces, received) = mpsc::channel(1);
    let (fault, ending) = oneshot::channel();
    let (context, hard) = (Arc::clone(context), context.shutdown.hard_token());
    let tasks = context.shutdown.clone();
    tasks.spawn(async move {
        let _turn = turn;
        let (offset, end) = (wanted.offset, wanted.bytes);
        let sending = send_all(&context, &file, offset, end, &pieces, wrap);
        let sent = tokio::select! {
            sent = context.objects_gate.in_time(end - offset, sending) => sent,
            () = hard.cancelled() => Err(shutting_down().into()),
        };
        match sent {
            // If nobody listens any more there is nobody to tell.
            Err(failure) => drop(fault.send(Status::from(failure))),
            Ok(()) => drop(fault),
        }
    });
    // Apart from the pieces: a receiver that takes none must not hold the turn until it has taken the fault.
    let ending = stream::once(ending).filter_map(|fault| future::ready(fault.ok().map(Err)));
    Ok(Box::pin(ReceiverStream::new(received).chain(ending)))
}

async fn send_all<T>(
    context: &Context,
    file: &Arc<File>,
    mut offset: u64,
    end: u64,
    pieces: &mpsc::Sender<Result<T, Status>>,
    wrap: impl Fn(v1::Chunk) -> T,
) -> Result<(), Failure> {
    let limits = &context.config.limits;
    let mut digest = Box::new(StreamDigest::new());
    while offset < end {
        let length = limits.chunk_size.bytes().min(end - offset) as usize;
        let file = Arc::clone(file);
        let chunk;
        (digest, chunk) =
            tokio::task::spawn_blocking(move || read_chunk(&file, offset, length, digest))
                .await?
                .map_err(Failure::io("cannot read an object"))?;
        let Some(place) = reserve(pieces, limits.transfer_idle).await? else {
            return Ok(());
        };
        place.send(Ok(wrap(chunk)));
        offset += length as u64;
        metrics::worker_object_bytes("down", length as u64);
    }
    // The turn ends when the last piece is on its way.
    reserve(pieces, limits.transfer_idle).await?;
    Ok(())
}

/// A place for the next piece; none if the receiver is gone.
pub(super) async fn reserve<T>(
    pieces: &mpsc::Sender<T>,
    idle: Duration,
) -> Result<Option<mpsc::Permit<'_, T>>, Refusal> {
    match tokio::time::timeout(idle, pieces.reserve()).await {
        Ok(place) => Ok(place.ok()),
        Err(_) => Err(Refusal::new(
            ErrorCode::TooSlow,
            format!(
                "nothing was taken for {}; go on from the last whole chunk",
                humantime::format_duration(idle)
            ),
        )),
    }
}

fn read_chunk(
    file: &File,
    offset: u64,
    length: usize,
    mut digest: Box<StreamDigest>,
) -> std::io::Result<(Box<StreamDigest>, v1::Chunk)> {
    let mut buffer = BytesMut::zeroed(length);
    file.read_exact_at(&mut buffer, offset)?;
    let chunk = digest.chunk(offset, buffer.freeze());
    Ok((digest, chunk))
}
