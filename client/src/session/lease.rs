//! The lease on a round, kept while it is worked on.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use concord_common::{JobId, RoundNumber, code::Refusal};
use tokio_util::sync::CancellationToken;

use super::{Session, is_over};
use crate::{
    coordinator::{CallError, Claim, Coordinator},
    patience::{Halt, patiently, pause},
};

impl<C: Coordinator> Session<C> {
    /// Keeps the lease until the work is done or the server says that the round goes on without this silo.
    pub(super) async fn renew(&self, job: &JobId, round: RoundNumber, lease: &Lease) {
        loop {
            if pause(lease.duration / 2, &lease.done).await.is_err() {
                return;
            }
            let renewed = tokio::select! {
                () = lease.done.cancelled() => return,
                renewed = patiently("renew lease", self.pace, &lease.end, || self.coordinator.claim(job, round)) => renewed,
            };
            match renewed {
                Ok(claim) => lease.renewed(claim.token),
                Err(Halt::Call(CallError::Refused(refusal))) if is_over(refusal.code) => {
                    tracing::warn!(%refusal, job.id = %job, %round, "the round goes on without this silo");
                    lease.lost(refusal);
                    return;
                }
                // Without the log nothing of this round can leave: the work ends, and the next call says why.
                Err(Halt::Call(CallError::Egress(error))) => {
                    tracing::error!(%error, job.id = %job, "the lease could not be renewed");
                    lease.end.cancel();
                    return;
                }
                Err(Halt::Call(error)) => {
                    tracing::warn!(%error, job.id = %job, "the lease could not be renewed");
                }
                Err(Halt::Stopped) => return,
            }
        }
    }
}

/// A lease while it is worked on.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) duration: Duration,
    pub(super) token: Mutex<Vec<u8>>,
    pub(super) refusal: Mutex<Option<Refusal>>,
    /// Ends the work: the daemon stops, or the lease is lost.
    pub(super) end: CancellationToken,
    /// Ends the renewing.
    pub(super) done: CancellationToken,
}

impl Lease {
    pub(super) fn new(claim: &Claim, end: CancellationToken) -> Self {
        Self {
            duration: claim.duration,
            token: Mutex::new(claim.token.clone()),
            refusal: Mutex::new(None),
            done: end.child_token(),
            end,
        }
    }

    pub(super) fn token(&self) -> Vec<u8> {
        self.token
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn renewed(&self, token: Vec<u8>) {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }

    pub(super) fn lost(&self, refusal: Refusal) {
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(refusal);
        self.end.cancel();
    }

    pub(super) fn refusal(&self) -> Option<Refusal> {
        self.refusal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
