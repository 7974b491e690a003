//! Whether the files of a job are what its rows say, when a driver takes the job up. A power cut may have left a file with other
//! bytes than were written, or with none, where nothing waits for the disk (`durability = "process"`).

use std::{fs::File, io, sync::Arc};

use concord_common::{
    Digest, ErrorCode, JobId, RoundNumber, SiloId,
    code::Refusal,
    round::{Event, Outcome},
};

use super::{aggregate::delete_files, redraw};
use crate::{context::Context, datastore::JobRecord, decide, error::Failure, spool::UploadId};

/// A counted contribution whose bytes are still needed.
struct Counted {
    silo_id: SiloId,
    upload_id: UploadId,
    digest: Digest,
}

/// Hashes the job's newest adapter and the counted contributions of its round. A damaged contribution is taken out of the
/// round; a damaged adapter is drawn again if it is the first.
///
/// # Errors
/// A refusal if the job cannot go on: its newest adapter is damaged. Or a fault of the server, to be tried again.
pub(crate) async fn verify(context: &Arc<Context>, job_id: &JobId) -> Result<(), Failure> {
    let (job, counted) = context
        .datastore
        .run_read("list_counted", |tx| {
            Box::pin(async move {
                let job = decide::job(tx, job_id).await?;
                let number = RoundNumber(job.round);
                let silos = tx.round_silos(job_id, number).await?;
                let counted: Vec<Counted> = silos
                    .into_iter()
                    .filter(|silo| silo.outcome == Some(Outcome::Accepted))
                    .filter_map(|silo| {
                        Some(Counted {
                            silo_id: silo.silo_id,
                            upload_id: silo.upload_id?,
                            digest: silo.digest?,
                        })
                    })
                    .collect();
                Ok::<_, Failure>((job, counted))
            })
        })
        .await?;
    if job.has_ended() {
        return Ok(());
    }
    verify_adapter(context, &job).await?;
    let number = RoundNumber(job.round);
    for part in counted {
        let path = context.spool.path(&part.upload_id);
        let found = context
            .long_work(move || hash(File::open(path)))
            .await?
            .map_err(Failure::io("cannot read a contribution"))?;
        if found != Some(part.digest) {
            lose(context, job_id, number, part).await?;
        }
    }
    Ok(())
}

/// The digest of a file's content; none if there is no such file.
fn hash(file: io::Result<File>) -> io::Result<Option<Digest>> {
    let mut file = match file {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&mut file)?;
    Ok(Some(Digest::from(hasher.finalize())))
}

async fn verify_adapter(context: &Arc<Context>, job: &JobRecord) -> Result<(), Failure> {
    let Some(version) = job.adapter_version else {
        return Ok(());
    };
    let blobs = context.blobs.clone();
    let found = context
        .long_work(move || hash(blobs.get(&version.0)))
        .await?
        .map_err(Failure::io("cannot read an adapter"))?;
    if found == Some(version.0) {
        return Ok(());
    }
    let job_id = &job.job_id;
    tracing::error!(job.id = %job_id, %version, "an adapter's file was damaged");
    if redraw(context, job).await? == version {
        tracing::warn!(job.id = %job_id, %version, "the job's first adapter was drawn again");
        return Ok(());
    }
    Err(Refusal::new(
        ErrorCode::Internal,
        format!(
            "adapter {version}, from which the job was to go on, was damaged on the server's disk; submit the job again, and \
             consider `durability = \"power\"`"
        ),
    )
    .into())
}

/// Takes a contribution whose bytes are damaged out of its round.
async fn lose(
    context: &Arc<Context>,
    job_id: &JobId,
    number: RoundNumber,
    part: Counted,
) -> Result<(), Failure> {
    let (now, signer) = (context.now(), &context.signer);
    let Counted {
        silo_id, upload_id, ..
    } = &part;
    let change = context
        .datastore
        .run_tx("lose_contribution", |tx| {
            Box::pin(async move {
                let recorded = tx.round_silo(job_id, number, silo_id).await?;
                // Its round may have ended meanwhile, and the file been deleted for that.
                if recorded.and_then(|silo| silo.upload_id) != Some(*upload_id) {
                    return Ok(None);
                }
                let silo = silo_id.clone();
                let event = Event::Lost { silo };
                let change = decide::apply(tx, signer, job_id, number, event, None, now).await?;
                Ok::<_, Failure>(Some(change))
            })
        })
        .await?;
    let Some(change) = change else {
        return Ok(());
    };
    tracing::error!(
        job.id = %job_id, round.id = %number, silo.id = %silo_id,
        "a counted contribution was damaged on the disk; the round goes on without it"
    );
    change.announce(job_id, &context.hub);
    delete_files(context, vec![part.upload_id]).await;
    Ok(())
}
