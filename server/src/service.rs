//! The gRPC services: each handler checks the caller, validates, runs one decision, and maps errors.

use std::{pin::Pin, sync::Arc};

use concord_common::{ErrorCode, Role, SiloId, code::Refusal, tls::require_role};
use futures::Stream;
use tonic::{Request, Status};

use crate::{context::Context, decide, error::Failure};

pub mod federation;
mod notice;
pub mod operator;
mod pieces;
mod refused;
pub mod transfer;
mod upload;
mod view;
pub mod worker;

#[cfg(test)]
pub(crate) use upload::{
    conclude as conclude_upload, record as record_upload, throw_away as throw_upload_away,
};

/// A silo's last call is written down again after this time.
const SEEN_EVERY: std::time::Duration = std::time::Duration::from_mins(1);

/// The operator that calls.
///
/// # Errors
/// `WRONG_ROLE` if it is none.
pub(crate) fn operator_of<T>(request: &Request<T>) -> Result<String, Failure> {
    Ok(caller_of(request, Role::Operator)?)
}

/// The worker that calls.
///
/// # Errors
/// `WRONG_ROLE` if it is none.
pub(crate) fn worker_of<T>(request: &Request<T>) -> Result<String, Failure> {
    Ok(caller_of(request, Role::Worker)?)
}

/// A stream of answers.
type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The name of a caller with this role.
fn caller_of<T>(request: &Request<T>, role: Role) -> Result<String, Refusal> {
    match require_role(request, role) {
        Ok(peer) => Ok(peer.id.name),
        Err(refusal) => {
            refused::log(request, &refusal);
            Err(refusal)
        }
    }
}

/// The silo that calls, if it may take part. A new silo is written down.
///
/// # Errors
/// `WRONG_ROLE` if the caller is no silo, `NOT_ENROLLED` if it is pending, suspended or revoked.
pub(crate) async fn silo_of<T>(
    context: &Arc<Context>,
    request: &Request<T>,
) -> Result<SiloId, Failure> {
    let name = caller_of(request, Role::Silo)?;
    let silo_id: SiloId = name
        .parse()
        .map_err(|error| Refusal::new(ErrorCode::InvalidRequest, format!("{error}")))?;
    let admitted = admit(context, &silo_id).await;
    if let Err(Failure::Refused(refusal)) = &admitted {
        refused::log(request, refusal);
    }
    admitted.map(|()| silo_id)
}

/// Lets a silo in if it is enrolled.
async fn admit(context: &Arc<Context>, silo_id: &SiloId) -> Result<(), Failure> {
    let now = context.now();
    let known = context
        .datastore
        .read_statement("check_enrollment", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.silo(silo_id).await?) })
        })
        .await?;
    let first = context.config.enrollment.first();
    let enrollment = known.as_ref().map_or(first, |silo| silo.enrollment);
    if known
        .as_ref()
        .is_none_or(|silo| now.since(silo.last_seen) >= SEEN_EVERY)
    {
        let (shared, silo_id, is_new) = (Arc::clone(context), silo_id.clone(), known.is_none());
        let seen = async move {
            let silo_id = &silo_id;
            shared
                .datastore
                .run_tx_unsynced("see_silo", |tx| {
                    Box::pin(
                        async move { Ok::<_, Failure>(tx.see_silo(silo_id, first, now).await?) },
                    )
                })
                .await?;
            if is_new {
                tracing::info!(silo.id = %silo_id, enrollment = enrollment.as_str_name(), "a new silo called");
                shared.hub.roster_changed();
            }
            Ok(())
        };
        context.to_the_end(seen).await?;
    }
    decide::enrolled(silo_id, enrollment)
}
