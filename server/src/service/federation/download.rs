//! An adapter's payload, piece by piece out of its file.

use std::{fs::File, io, os::unix::fs::FileExt as _, sync::Arc};

use bytes::{Bytes, BytesMut};
use concord_common::{ErrorCode, JobId, SiloId, chunk::StreamDigest, wire};
use concord_proto::v1;
use futures::{Stream, StreamExt as _, future, stream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Federation, job_of_silo, shutting_down};
use crate::{
    context::Context,
    digests::{Sender, SentFile},
    error::{Failure, refuse},
    metrics,
    service::{
        admit,
        pieces::reserve,
        transfer::{TransferGate, TransferTurn},
    },
};

type Piece = Result<v1::DownloadAdapterResponse, Status>;

/// What is to be sent, and how.
struct Download {
    context: Arc<Context>,
    file: Arc<File>,
    source: Source,
    offset: u64,
    end: u64,
    pieces: mpsc::Sender<Piece>,
    gate: Arc<TransferGate>,
    /// Held until the last piece is taken.
    _turn: TransferTurn,
}

/// Where pieces and their digests come from.
enum Source {
    /// The ones that all have in common who get the adapter from its first byte on.
    Common(Sender),
    /// Those of a silo that goes on with a download: a stream of its own.
    Rest(Box<StreamDigest>),
}

/// Waits for a turn and begins to send. If sending ends before its time, the reason is the stream's last item.
pub(super) async fn start(
    service: &Federation,
    silo_id: SiloId,
    request: &v1::DownloadAdapterRequest,
) -> Result<impl Stream<Item = Piece> + use<>, Failure> {
    let context = Arc::clone(&service.context);
    let job_id = wire::job_id(&request.job_id)?;
    let version = wire::adapter_version("version", &request.version)?;
    let (job, silo) = (&job_id, &silo_id);
    let enrollment = context.hub.watch_enrollment(silo);
    let found = context
        .datastore
        .run_read("find_version", |tx| {
            Box::pin(async move {
                job_of_silo(tx, job, silo).await?;
                Ok::<_, Failure>(tx.version(job, version).await?)
            })
        })
        .await?;
    let Some(found) = found else {
        return refuse(
            ErrorCode::UnknownVersion,
            format!("job `{job_id}` has no adapter {version}"),
        );
    };
    if request.offset > found.payload_bytes {
        let problem = format!("the adapter has {} bytes", found.payload_bytes);
        return Err(wire::invalid_field("offset", problem).into());
    }
    let turn = tokio::select! {
        turn = service.gate.enter(&silo_id) => turn?,
        () = service.shutdown.token().cancelled_owned() => return Err(shutting_down().into()),
    };
    let blobs = context.blobs.clone();
    let open = move || -> io::Result<(File, SentFile)> {
        let file = blobs.get(&version.0)?;
        let sent = SentFile::of(version, &file)?;
        Ok((file, sent))
    };
    let (file, sent) = tokio::task::spawn_blocking(open)
        .await?
        .map_err(Failure::io("cannot open an adapter"))?;
    let size = context.config.limits.chunk_size.bytes();
    let source = match request.offset {
        0 => Source::Common(context.pieces.send(sent, size)),
        _ => Source::Rest(Box::default()),
    };
    let (pieces, received) = mpsc::channel(1);
    let (fault, ending) = oneshot::channel();
    let download = Download {
        source,
        context,
        file: Arc::new(file),
        offset: request.offset,
        end: found.payload_bytes,
        pieces,
        gate: Arc::clone(&service.gate),
        _turn: turn,
    };
    let hard = service.shutdown.hard_token();
    service.shutdown.spawn(async move {
        let context = Arc::clone(&download.context);
        let begin = download.offset;
        let ended = async {
            tokio::select! {
                failure = shut_out(&context, &silo_id, enrollment) => failure,
                () = hard.cancelled() => shutting_down().into(),
            }
        };
        let (sent, result) = download.run(ended).await;
        // Before the bytes are counted: the stream does not end before the fault is told or there is none.
        match result {
            // If nobody listens any more there is nobody to tell.
            Err(failure) => drop(fault.send(Status::from(failure))),
            Ok(()) => drop(fault),
        }
        count(&context, &job_id, &silo_id, sent.saturating_sub(begin)).await;
    });
    // Apart from the pieces: a receiver that takes none must not hold the turn until it has taken the fault.
    let ending = stream::once(ending).filter_map(|fault| future::ready(fault.ok().map(Err)));
    Ok(ReceiverStream::new(received).chain(ending))
}

impl Download {
    /// Sends until the end, until `ended`, or until the receiver is gone or does not take anything for too long; gives the byte
    /// it came to.
    async fn run(mut self, ended: impl Future<Output = Failure>) -> (u64, Result<(), Failure>) {
        let (gate, left) = (Arc::clone(&self.gate), self.end - self.offset);
        let result = tokio::select! {
            sent = gate.in_time(left, self.send_all()) => sent,
            failure = ended => Err(failure),
        };
        (self.offset, result)
    }

    async fn send_all(&mut self) -> Result<(), Failure> {
        let size = self.context.config.limits.chunk_size.bytes();
        let idle = self.context.config.limits.transfer_idle;
        while self.offset < self.end {
            let length = size.min(self.end - self.offset);
            let chunk = self.next(length).await?;
            let Some(place) = reserve(&self.pieces, idle).await? else {
                return Ok(());
            };
            place.send(Ok(v1::DownloadAdapterResponse { chunk: Some(chunk) }));
            self.offset += length;
            metrics::transfer_bytes("down", length);
        }
        // The turn ends when the last piece is on its way.
        reserve(&self.pieces, idle).await?;
        Ok(())
    }

    /// The chunk with the next `length` bytes, read and hashed on a worker thread.
    async fn next(&mut self, length: u64) -> Result<v1::Chunk, Failure> {
        let (file, offset) = (Arc::clone(&self.file), self.offset);
        match &mut self.source {
            Source::Common(adapter) => {
                let pieces = Arc::clone(adapter.pieces());
                let read = on_worker(move || {
                    let data = read(&file, offset, length)?;
                    let digest = pieces.digest(offset, &data);
                    // A stream takes the pieces in their order, and each is hashed before it is taken.
                    let digest = digest.ok_or_else(|| io::Error::other("a piece was left out"))?;
                    let digest = digest.to_vec();
                    Ok(v1::Chunk {
                        offset,
                        data,
                        digest,
                    })
                });
                let piece = adapter.piece(offset);
                Ok(piece.get_or_try_init(|| read).await?.clone())
            }
            Source::Rest(running) => {
                let mut digest = std::mem::take(running);
                let (digest, chunk) = on_worker(move || {
                    let chunk = digest.chunk(offset, read(&file, offset, length)?);
                    Ok((digest, chunk))
                })
                .await?;
                *running = digest;
                Ok(chunk)
            }
        }
    }
}

/// Ends when the silo may not take part any more, with what it is told. An enrollment may have changed while the download
/// waited for its turn, so that the first look is at once.
async fn shut_out(
    context: &Arc<Context>,
    silo_id: &SiloId,
    mut enrollment: watch::Receiver<()>,
) -> Failure {
    loop {
        enrollment.mark_unchanged();
        if let Err(failure) = admit(context, silo_id).await {
            return failure;
        }
        // The hub lives in the context, so that the sender cannot be gone.
        let _ = enrollment.changed().await;
    }
}

async fn on_worker<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await?
        .map_err(Failure::io("cannot read an adapter"))
}

fn read(file: &File, offset: u64, length: u64) -> io::Result<Bytes> {
    let mut buffer = BytesMut::zeroed(length as usize);
    file.read_exact_at(&mut buffer, offset)?;
    Ok(buffer.freeze())
}

async fn count(context: &Context, job_id: &JobId, silo_id: &SiloId, bytes: u64) {
    if bytes == 0 {
        return;
    }
    let counted = context
        .datastore
        .run_statement_unsynced("count_download", |tx| {
            Box::pin(
                async move { Ok::<_, Failure>(tx.count_bytes(job_id, silo_id, 0, bytes).await?) },
            )
        })
        .await;
    if let Err(error) = counted {
        tracing::warn!(%error, "cannot count a download");
    }
}
