//! An operator's word on whether a silo may take part.

use std::sync::Arc;

use concord_common::{
    ErrorCode, JobId, RoundNumber, SiloId, Timestamp,
    job::FEDERATED,
    round::{Event, job::JobState},
    wire::{self, ReceiptSigner},
};
use concord_proto::v1;

use super::super::view;
use crate::{
    context::Context,
    datastore::{Enrollment, SiloRecord, Tx},
    decide::{self, Change},
    error::{Failure, refuse},
};

/// What the transaction decided.
struct Decided {
    silo: SiloRecord,
    before: Enrollment,
    changes: Vec<(JobId, Change)>,
}

/// Changes a silo's enrollment and tells everybody who has to know: its stream, and the jobs that ask it or wait for silos.
pub(super) async fn set(
    context: Arc<Context>,
    operator: String,
    request: v1::SetEnrollmentRequest,
) -> Result<v1::SetEnrollmentResponse, Failure> {
    let silo_id = &wire::silo_id(&request.silo_id)?;
    let wanted = request.enrollment();
    if matches!(wanted, Enrollment::Unspecified | Enrollment::Pending) {
        let problem = "must be active, suspended or revoked";
        return Err(wire::invalid_field("enrollment", problem).into());
    }
    let (now, signer) = (context.now(), &context.signer);
    let decided = context
        .datastore
        .run_tx("set_enrollment", |tx| {
            Box::pin(change(tx, signer, silo_id, wanted, now))
        })
        .await?;
    let Decided {
        silo,
        before,
        changes,
    } = decided;
    if before != wanted {
        tracing::info!(
            silo.id = %silo_id, operator, before = name(before), after = name(wanted), "enrollment changed"
        );
        for (job_id, change) in &changes {
            change.announce(job_id, &context.hub);
        }
        context.hub.enrollment_changed(silo_id);
        context.hub.roster_changed();
    }
    Ok(v1::SetEnrollmentResponse {
        silo: Some(view::silo(&silo, context.hub.is_connected(silo_id))),
        before: before as i32,
    })
}

async fn change(
    tx: &mut Tx<'_>,
    signer: &ReceiptSigner,
    silo_id: &SiloId,
    wanted: Enrollment,
    now: Timestamp,
) -> Result<Decided, Failure> {
    let Some(mut silo) = tx.silo(silo_id).await? else {
        return refuse(
            ErrorCode::UnknownSilo,
            format!("no silo `{silo_id}` has called this server yet; look at the list of silos"),
        );
    };
    let before = silo.enrollment;
    let mut changes = Vec::new();
    if before != wanted {
        if !may_become(before, wanted) {
            let (before, wanted) = (name(before), name(wanted));
            return refuse(
                ErrorCode::WrongEnrollment,
                format!("silo `{silo_id}` is {before} and cannot become {wanted}"),
            );
        }
        tx.set_enrollment(silo_id, wanted).await?;
        silo.enrollment = wanted;
        if wanted == Enrollment::Revoked {
            changes = stop_waiting(tx, signer, silo_id, now).await?;
        }
    }
    Ok(Decided {
        silo,
        before,
        changes,
    })
}

/// Whether an enrollment can go from one state to another. From revoked there is no way back: the silo's certificate is good
/// until it ends, and whoever made revoking necessary may hold it.
fn may_become(before: Enrollment, wanted: Enrollment) -> bool {
    use Enrollment::{Active, Pending, Revoked, Suspended};
    matches!(
        (before, wanted),
        (Pending | Suspended, Active)
            | (Active, Suspended)
            | (Pending | Active | Suspended, Revoked)
    )
}

/// A revoked silo cannot answer any more: its part in running jobs ends as if it had declined them. What it contributed
/// before was acknowledged and stays counted.
async fn stop_waiting(
    tx: &mut Tx<'_>,
    signer: &ReceiptSigner,
    silo_id: &SiloId,
    now: Timestamp,
) -> Result<Vec<(JobId, Change)>, Failure> {
    let code = ErrorCode::NotEnrolled;
    let mut changes = Vec::new();
    for job in tx.jobs_in_state(JobState::Running, FEDERATED).await? {
        let job_id = job.job_id;
        let parts = tx.job_silos(&job_id).await?;
        let asked = parts.iter().find(|part| part.silo_id == *silo_id);
        if asked.is_none_or(|part| part.declined.is_some()) {
            continue;
        }
        tx.decline_job(&job_id, silo_id, code, "revoked by an operator")
            .await?;
        let number = RoundNumber(job.round);
        let Some(round) = tx.round_machine(&job_id, number).await? else {
            continue;
        };
        if round.awaited().any(|awaited| awaited == silo_id) {
            let event = Event::Declined {
                silo: silo_id.clone(),
                code,
            };
            let change = decide::apply(tx, signer, &job_id, number, event, None, now).await?;
            changes.push((job_id, change));
        }
    }
    Ok(changes)
}

/// `ENROLLMENT_ACTIVE` as `active`.
fn name(enrollment: Enrollment) -> String {
    let name = enrollment.as_str_name();
    name.strip_prefix("ENROLLMENT_")
        .unwrap_or(name)
        .to_lowercase()
}
