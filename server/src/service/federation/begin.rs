//! The header of a contribution: everything that can be checked before a byte of it is sent.

use std::sync::Arc;

use concord_common::{
    Digest, ErrorCode, JobId, RoundNumber, SiloId,
    adapter::AdapterVersion,
    chunk::Expected,
    code::Refusal,
    round::{Contribution, Event, Round},
    wire,
};
use concord_proto::v1;

use super::{job_of_silo, unknown_round};
use crate::{
    context::Context,
    datastore::{LeaseRecord, RoundSiloRecord, Tx, UploadRecord},
    decide::{self, Change},
    error::{Failure, refuse},
    service::upload::{decode_receipt, reject},
    specs::KnownSpec,
    spool::UploadId,
};

/// What the transaction decided.
enum Begun {
    /// It is recorded: here is the receipt.
    Recorded(v1::Receipt),
    /// It comes too late and is recorded as discarded, with its bytes unseen.
    Discarded(Box<Change>),
    /// Its bytes may come.
    Upload {
        upload: UploadRecord,
        replaced: Option<UploadId>,
    },
}

/// A header whose fields are well-formed.
struct Header<'a> {
    job_id: JobId,
    round: RoundNumber,
    silo_id: &'a SiloId,
    lease_token: &'a [u8],
    layout: &'a v1::AdapterLayout,
    base: AdapterVersion,
    digest: Digest,
    payload_bytes: u64,
    examples: u64,
}

impl<'a> Header<'a> {
    fn read(
        silo_id: &'a SiloId,
        request: &'a v1::BeginContributionRequest,
    ) -> Result<Self, Refusal> {
        Ok(Self {
            job_id: wire::job_id(&request.job_id)?,
            round: wire::round_number(request.round)?,
            silo_id,
            lease_token: &request.lease_token,
            layout: wire::required("layout", request.layout.as_ref())?,
            base: wire::adapter_version("base_version", &request.base_version)?,
            digest: wire::digest("payload_digest", &request.payload_digest)?,
            payload_bytes: request.payload_bytes,
            examples: request.examples,
        })
    }
}

/// Answers a header. For [`Context::to_the_end`].
pub(crate) async fn begin(
    context: Arc<Context>,
    silo_id: SiloId,
    request: v1::BeginContributionRequest,
) -> Result<v1::BeginContributionResponse, Failure> {
    let (context, silo_id) = (&context, &silo_id);
    let header = &Header::read(silo_id, &request)?;
    let fresh = context.ids.token();
    let begun = context
        .datastore
        .run_tx_unsynced("begin_contribution", |tx| {
            Box::pin(decide_begin(tx, context, header, fresh))
        })
        .await;
    let begun = match begun {
        Err(Failure::Refused(refusal)) => {
            reject(context, &header.job_id, header.round, silo_id, &refusal).await;
            return Err(refusal.into());
        }
        other => other?,
    };
    // A receipt is a promise; an announced upload is none.
    if !matches!(begun, Begun::Upload { .. }) {
        context.datastore.sync().await?;
    }
    match begun {
        Begun::Recorded(receipt) => Ok(v1::BeginContributionResponse {
            receipt: Some(receipt),
            ..Default::default()
        }),
        Begun::Discarded(change) => {
            change.announce(&header.job_id, &context.hub);
            let receipt = change
                .record
                .as_ref()
                .and_then(|record| record.receipt.as_deref());
            Ok(v1::BeginContributionResponse {
                receipt: receipt.map(decode_receipt).transpose()?,
                ..Default::default()
            })
        }
        Begun::Upload { upload, replaced } => start_upload(context, &upload, replaced).await,
    }
}

/// Makes sure that nobody else writes to the upload, and says where to go on.
async fn start_upload(
    context: &Arc<Context>,
    upload: &UploadRecord,
    replaced: Option<UploadId>,
) -> Result<v1::BeginContributionResponse, Failure> {
    let spool = Arc::clone(&context.spool);
    if let Some(old) = replaced {
        drop(spool.take_turn(old).await);
    }
    let (id, bytes) = (upload.upload_id, upload.payload_bytes);
    let turn = spool.take_turn(id).await;
    let offset = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        if let Some(old) = replaced {
            spool.delete(&old)?;
        }
        spool.offset(&id, bytes)
    })
    .await?
    .map_err(Failure::io("cannot look at an upload"))?;
    Ok(v1::BeginContributionResponse {
        upload_id: id.to_vec(),
        offset,
        receipt: None,
    })
}

async fn decide_begin(
    tx: &mut Tx<'_>,
    context: &Context,
    header: &Header<'_>,
    fresh: UploadId,
) -> Result<Begun, Failure> {
    let (job_id, number, silo_id) = (&header.job_id, header.round, header.silo_id);
    let round = tx.round_machine(job_id, number).await?;
    let asked = round
        .as_ref()
        .is_some_and(|round| round.spec().cohort.contains(silo_id));
    let job = if asked {
        decide::job(tx, job_id).await?
    } else {
        job_of_silo(tx, job_id, silo_id).await?
    };
    let Some(round) = round else {
        return unknown_round(job_id, number);
    };
    if round.record(silo_id).is_some()
        && let Some(recorded) = tx.round_silo(job_id, number, silo_id).await?
        && let Some(receipt) = recorded_receipt(&recorded, header)?
    {
        return Ok(Begun::Recorded(receipt));
    }
    let now = context.now();
    let lease = tx.lease(job_id, number, silo_id).await?;
    let held = lease.filter(|lease| lease.token == *header.lease_token);
    if !round.phase().is_open() {
        require_lease(held.as_ref(), header)?;
        let event = Event::Contributed(contribution(header));
        let change = decide::apply(tx, &context.signer, job_id, number, event, None, now).await?;
        return Ok(Begun::Discarded(Box::new(change)));
    }
    let unexpired = held.filter(|lease| lease.expires_at > now);
    require_lease(unexpired.as_ref(), header)?;
    check_header(&*context.specs.of(&job)?, &round, header)?;
    place(tx, context, header, fresh).await
}

fn contribution(header: &Header<'_>) -> Contribution {
    Contribution {
        silo: header.silo_id.clone(),
        digest: header.digest,
        examples: header.examples,
    }
}

/// The receipt of this very contribution; a refusal if another one is recorded.
fn recorded_receipt(
    recorded: &RoundSiloRecord,
    header: &Header<'_>,
) -> Result<Option<v1::Receipt>, Failure> {
    let (Some(digest), Some(receipt)) = (recorded.digest, &recorded.receipt) else {
        return Ok(None);
    };
    if digest == header.digest {
        return Ok(Some(decode_receipt(receipt)?));
    }
    refuse(
        ErrorCode::DuplicateContribution,
        format!(
            "another contribution of silo `{}` to round {} is already recorded (payload {}); send the same one or none",
            header.silo_id,
            header.round,
            digest.short()
        ),
    )
}

fn require_lease(held: Option<&LeaseRecord>, header: &Header<'_>) -> Result<(), Failure> {
    if held.is_some() {
        return Ok(());
    }
    refuse(
        ErrorCode::LeaseLost,
        format!(
            "the lease on round {} is not held with this token or has run out; claim it again",
            header.round
        ),
    )
}

/// Checks what the header says about the payload against the round and the job.
fn check_header(known: &KnownSpec, round: &Round, header: &Header<'_>) -> Result<(), Failure> {
    let base = round.spec().base;
    if header.base != base {
        return refuse(
            ErrorCode::WrongBaseVersion,
            format!(
                "the contribution is a delta to adapter {}, round {} starts from {}; download that one",
                header.base.0.short(),
                header.round,
                base.0.short()
            ),
        );
    }
    known.layout.check_same(header.layout)?;
    let most = known.spec.limits.max_examples;
    if header.examples == 0 || header.examples > most {
        return refuse(
            ErrorCode::BadWeight,
            format!(
                "the contribution says {} examples; this job takes 1 to {most}",
                header.examples
            ),
        );
    }
    let expected = Expected {
        layout: known.layout.clone(),
        digest: header.digest,
        max_norm: None,
    };
    Ok(expected.check_size(header.payload_bytes)?)
}

/// Finds or makes the upload's row.
async fn place(
    tx: &mut Tx<'_>,
    context: &Context,
    header: &Header<'_>,
    fresh: UploadId,
) -> Result<Begun, Failure> {
    let now = context.now();
    let upload = UploadRecord {
        upload_id: fresh,
        job_id: header.job_id.clone(),
        round: header.round,
        silo_id: header.silo_id.clone(),
        payload_digest: header.digest,
        payload_bytes: header.payload_bytes,
        examples: header.examples,
        touched_at: now,
    };
    let old = tx
        .upload_of(&header.job_id, header.round, header.silo_id)
        .await?;
    if let Some(old) = &old
        && old.payload_digest == upload.payload_digest
        && old.examples == upload.examples
    {
        tx.touch_upload(&old.upload_id, now).await?;
        return Ok(Begun::Upload {
            upload: old.clone(),
            replaced: None,
        });
    }
    let replaced = old.map(|old| old.upload_id);
    if let Some(old) = &replaced {
        tx.delete_upload(old).await?;
    }
    let (uploads, bytes) = tx.upload_load().await?;
    let spool = &context.config.spool;
    if uploads >= spool.max_uploads || bytes + upload.payload_bytes > spool.max_bytes.bytes() {
        return Err(Refusal::new(
            ErrorCode::Busy,
            "too many uploads are in progress; try again",
        )
        .retry_after(std::time::Duration::from_secs(5))
        .into());
    }
    tx.insert_upload(&upload).await?;
    Ok(Begun::Upload { upload, replaced })
}
