//! The gRPC services: each handler checks the caller, validates, runs one decision, and maps errors.

use concord_common::{ErrorCode, Role, SiloId, code::Refusal, tls::require_role};
use tonic::Request;

use crate::{
    context::Context,
    datastore::Enrollment,
    error::{Failure, refuse},
};

pub mod federation;
mod notice;
pub mod operator;
pub mod transfer;
mod upload;
mod view;

#[cfg(test)]
pub(crate) use upload::record as record_upload;

/// A silo's last call is written down again after this time.
const SEEN_EVERY: std::time::Duration = std::time::Duration::from_mins(1);

/// The operator that calls.
///
/// # Errors
/// `WRONG_ROLE` if it is none.
pub(crate) fn operator_of<T>(request: &Request<T>) -> Result<String, Failure> {
    Ok(require_role(request, Role::Operator)?.id.name)
}

/// The silo that calls, if it may take part. A new silo is written down.
///
/// # Errors
/// `WRONG_ROLE` if the caller is no silo, `NOT_ENROLLED` if it is pending, suspended or revoked.
pub(crate) async fn silo_of<T>(context: &Context, request: &Request<T>) -> Result<SiloId, Failure> {
    let name = require_role(request, Role::Silo)?.id.name;
    let silo_id: SiloId = name
        .parse()
        .map_err(|error| Refusal::new(ErrorCode::InvalidRequest, format!("{error}")))?;
    admit(context, &silo_id).await?;
    Ok(silo_id)
}

/// Lets a silo in if it is enrolled.
async fn admit(context: &Context, silo_id: &SiloId) -> Result<(), Failure> {
    let now = context.now();
    let known = context
        .datastore
        .run_read("check_enrollment", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.silo(silo_id).await?) })
        })
        .await?;
    let first = context.config.enrollment.first();
    let enrollment = known.as_ref().map_or(first, |silo| silo.enrollment);
    if known
        .as_ref()
        .is_none_or(|silo| now.since(silo.last_seen) >= SEEN_EVERY)
    {
        context
            .datastore
            .run_tx("see_silo", |tx| {
                Box::pin(async move { Ok::<_, Failure>(tx.see_silo(silo_id, first, now).await?) })
            })
            .await?;
    }
    if known.is_none() {
        tracing::info!(silo.id = %silo_id, enrollment = enrollment.as_str_name(), "a new silo called");
        context.hub.roster_changed();
    }
    let state = match enrollment {
        Enrollment::Active => return Ok(()),
        Enrollment::Suspended => "suspended",
        Enrollment::Revoked => "revoked",
        Enrollment::Pending | Enrollment::Unspecified => "waiting for an operator's approval",
    };
    refuse(
        ErrorCode::NotEnrolled,
        format!("silo `{silo_id}` is {state}; ask the federation's operator"),
    )
}
