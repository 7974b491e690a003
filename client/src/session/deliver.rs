//! From the checked update to the receipt in the silo's file.

use std::sync::Arc;

use concord_common::{ErrorCode, JobId, RoundNumber, round::Outcome, wire::SignedReceipt};

use super::{Session, SessionError, blocking, is_over, lease::Lease};
use crate::{
    coordinator::{CallError, Claim, Coordinator},
    egress::{Assignment, Cleared},
    patience::{Halt, patiently},
    receipts::KeptReceipt,
    transfer::Delivery,
};

impl<C: Coordinator> Session<C> {
    /// Sends an update until the server has signed for it, and keeps the receipt.
    pub(super) async fn deliver(
        &self,
        cleared: &Cleared,
        lease: &Lease,
    ) -> Result<SignedReceipt, SessionError> {
        let delivery = Delivery {
            stop: &lease.end,
            ..self.delivery()
        };
        let receipt = match delivery.deliver(cleared, lease.token()).await {
            Ok(receipt) => receipt,
            Err(error) => self.recorded(cleared, lease, error.into()).await?,
        };
        self.keep(&receipt).await?;
        Ok(receipt)
    }

    /// The round may close between the server's record and the arrival of its receipt; then the work counts, and the receipt is
    /// there for whoever asks.
    async fn recorded(
        &self,
        cleared: &Cleared,
        lease: &Lease,
        error: SessionError,
    ) -> Result<SignedReceipt, SessionError> {
        let went_on = match &error {
            SessionError::Stopped => lease.refusal().is_some() && !self.stop.is_cancelled(),
            SessionError::Call(CallError::Refused(refusal)) => is_over(refusal.code),
            _ => false,
        };
        if went_on && let Some(receipt) = self.delivery().recorded(cleared, &lease.token()).await? {
            tracing::info!(job.id = %cleared.job(), round = %cleared.round(), "the round went on, and the server had recorded the contribution before");
            return Ok(receipt);
        }
        Err(error)
    }

    /// Fetches the receipt of a round that the server says is answered, if the update is still in the outbox: the daemon was
    /// killed before the receipt came. `None` if there is nothing to fetch.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn receipt(
        &self,
        job: &JobId,
        round: RoundNumber,
    ) -> Result<Option<SignedReceipt>, SessionError> {
        let claimed = patiently("claim lease", self.pace, &self.stop, || {
            self.coordinator.claim(job, round)
        })
        .await;
        let claim = match claimed {
            Ok(claim) => claim,
            Err(Halt::Call(CallError::Refused(_))) => return Ok(None),
            Err(halt) => return Err(halt.into()),
        };
        let assigned = assignment(job, round, &claim);
        let gate = Arc::clone(&self.gate);
        let pending = blocking(move || gate.pending(&assigned))
            .await?
            .map_err(SessionError::Egress)?;
        let Some(cleared) = pending else {
            return Ok(None);
        };
        let receipt = self.delivery().recorded(&cleared, &claim.token).await?;
        if let Some(receipt) = &receipt {
            self.keep(receipt).await?;
        }
        Ok(receipt)
    }

    fn delivery(&self) -> Delivery<'_, C> {
        Delivery {
            coordinator: self.coordinator.as_ref(),
            gate: &self.gate,
            silo: &self.silo,
            receipt_key: &self.receipt_key,
            pace: self.pace,
            stop: &self.stop,
        }
    }

    /// The receipt goes to the disk before a useless update leaves the outbox: a kill in between makes the server give it again. An
    /// accepted one stays, see [`crate::session`].
    async fn keep(&self, signed: &SignedReceipt) -> Result<(), SessionError> {
        let line = KeptReceipt::new(signed, &self.receipt_key, self.clock.now());
        let (receipts, gate) = (Arc::clone(&self.receipts), Arc::clone(&self.gate));
        let job = signed.receipt.job.clone();
        let counts = signed.receipt.outcome == Outcome::Accepted;
        blocking(move || {
            receipts
                .keep(line)
                .map_err(|source| SessionError::Receipts {
                    path: receipts.path().to_path_buf(),
                    source,
                })?;
            if counts {
                return Ok(());
            }
            gate.done(&job).map_err(SessionError::Egress)
        })
        .await??;
        self.board.receipt(&signed.receipt);
        let (job, round) = (&signed.receipt.job, signed.receipt.round);
        match signed.receipt.outcome {
            Outcome::Accepted => {
                tracing::info!(job.id = %job, %round, "contribution accepted");
            }
            other => {
                let reason = other.reason().map(ErrorCode::as_str);
                tracing::warn!(job.id = %job, %round, outcome = other.as_str(), reason, "contribution does not count");
            }
        }
        Ok(())
    }
}

/// What a claim lets out.
pub(super) fn assignment(job: &JobId, round: RoundNumber, claim: &Claim) -> Assignment {
    Assignment {
        job: job.clone(),
        round,
        layout: claim.layout.clone(),
        base: claim.base,
        max_update_norm: claim.spec.limits.max_update_norm,
        max_examples: claim.spec.limits.max_examples,
    }
}
