//! Saying no to a job, and what is no reason to.

use std::sync::Arc;

use concord_common::{ErrorCode, JobId, code::Refusal};
use concord_learning::LearningError;

use super::{Session, SessionError, blocking};
use crate::{
    coordinator::{CallError, Coordinator},
    egress::EgressError,
    patience::{Halt, patiently},
    vault::VaultError,
};

/// Codes by which the server refuses an update for what it is: the same bytes would be refused again. Faults of the way there
/// (`TRUNCATED`, `CHUNK_OFFSET`, `UNKNOWN_UPLOAD`) are not among them.
pub(super) fn is_about_the_update(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::InvalidRequest
            | ErrorCode::WrongBaseVersion
            | ErrorCode::TensorCount
            | ErrorCode::TensorName
            | ErrorCode::TensorOrder
            | ErrorCode::TensorShape
            | ErrorCode::TensorDtype
            | ErrorCode::NotFinite
            | ErrorCode::NormTooLarge
            | ErrorCode::PayloadSize
            | ErrorCode::DigestMismatch
            | ErrorCode::BadChunk
            | ErrorCode::BadWeight
    )
}

/// What the server is told when a silo cannot go on with a job. `None` for what may pass, such as a full disk or a server that
/// is away: the server never asks again after a no, so that is tried again instead.
fn verdict(error: &SessionError) -> Option<Refusal> {
    let failed = |sentence: &str| Some(Refusal::new(ErrorCode::SiloFailed, sentence));
    match error {
        SessionError::Declined(refusal) => Some(refusal.clone()),
        SessionError::Egress(EgressError::Held(refusal)) => failed(&format!(
            "this silo's egress gate held the update back ({})",
            refusal.code
        )),
        SessionError::Egress(EgressError::Budget { .. }) => Some(Refusal::new(
            ErrorCode::PolicyRefused,
            "this silo's byte budget for the job is used up",
        )),
        SessionError::Call(CallError::Refused(refusal)) if is_about_the_update(refusal.code) => {
            failed(&format!(
                "the server refused this silo's update ({})",
                refusal.code
            ))
        }
        SessionError::Vault(
            VaultError::Torn { .. }
            | VaultError::Altered { .. }
            | VaultError::Foreign { .. }
            | VaultError::Unreadable { .. },
        ) => failed("this silo's vault for the job cannot be used; its log has the reason"),
        SessionError::Learning(LearningError::Io { .. } | LearningError::Stopped(_)) => None,
        SessionError::Learning(LearningError::Config(_) | LearningError::Payload(_)) => {
            failed("this silo cannot train with the job's settings; its log has the reason")
        }
        SessionError::Learning(LearningError::Data(_) | LearningError::Tokenizer { .. }) => {
            Some(Refusal::new(
                ErrorCode::BadData,
                "this silo's data cannot be used for the job; its log has the reason",
            ))
        }
        SessionError::Learning(_) => failed("training failed in this silo; its log has the reason"),
        _ => None,
    }
}

impl SessionError {
    /// Whether the same work, tried again, would fail again until somebody mends something.
    pub fn is_lasting(&self) -> bool {
        verdict(self).is_some()
    }

    /// Whether the fault lies with this machine, not with the server or the way there.
    fn is_local(&self) -> bool {
        matches!(
            self,
            Self::Vault(_)
                | Self::Egress(_)
                | Self::Learning(_)
                | Self::Data(_)
                | Self::Receipts { .. }
                | Self::Worker(_)
        )
    }
}

impl<C: Coordinator> Session<C> {
    /// Tells the server when this silo cannot go on with a job, lets go of it, and gives back what the caller is to know.
    pub(super) async fn decline_for(&self, job: &JobId, error: SessionError) -> SessionError {
        let Some(refusal) = verdict(&error) else {
            if error.is_local() {
                tracing::error!(%error, job.id = %job, "a fault of this machine stops the work on the job; it is tried again after a pause and nothing is lost");
            }
            return error;
        };
        tracing::error!(%error, job.id = %job, code = %refusal.code, "declining the job");
        let told = async {
            self.decline(job, &refusal).await?;
            self.forget(job).await
        };
        match told.await {
            Ok(()) => SessionError::Declined(refusal),
            Err(other) => other,
        }
    }

    async fn decline(&self, job: &JobId, refusal: &Refusal) -> Result<(), SessionError> {
        let (gate, of, why) = (Arc::clone(&self.gate), job.clone(), refusal.clone());
        let cleared = blocking(move || gate.decline(&of, &why))
            .await?
            .map_err(SessionError::Egress)?;
        let answer = patiently("decline job", self.pace, &self.stop, || {
            self.coordinator.decline(&cleared)
        })
        .await;
        match answer {
            Err(Halt::Call(CallError::Refused(refusal))) => {
                tracing::warn!(%refusal, job.id = %job, "the server does not take the no");
                Ok(())
            }
            answer => Ok(answer?),
        }
    }
}
