//! Turns for uploads and downloads: a bounded number at once, a bounded number waiting, each for a bounded time.

use std::{sync::Arc, time::Duration};

use concord_common::{ErrorCode, code::Refusal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{config::LimitsSection, metrics::Level};

/// What a caller that found no place is told to wait.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// The gate to transfers.
#[derive(Debug)]
pub struct TransferGate {
    turns: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    wait: Duration,
}

/// The right to move a payload, for as long as it lives.
#[derive(Debug)]
pub struct TransferTurn {
    _permit: OwnedSemaphorePermit,
    _level: Level,
}

impl TransferGate {
    /// A gate with the configured bounds.
    pub fn new(limits: &LimitsSection) -> Self {
        Self {
            turns: Arc::new(Semaphore::new(limits.max_transfers)),
            waiting: Arc::new(Semaphore::new(limits.max_waiting_transfers)),
            wait: limits.transfer_wait,
        }
    }

    /// Waits for a turn.
    ///
    /// # Errors
    /// `BUSY` if too many wait already or the turn does not come in time.
    pub async fn enter(&self) -> Result<TransferTurn, Refusal> {
        let busy = |message: &str| {
            Refusal::new(ErrorCode::Busy, message.to_owned()).retry_after(RETRY_AFTER)
        };
        let permit = if let Ok(permit) = Arc::clone(&self.turns).try_acquire_owned() {
            permit
        } else {
            let Ok(_place) = self.waiting.try_acquire() else {
                return Err(busy("too many transfers are waiting; try again"));
            };
            let _level = Level::waiting_transfer();
            let turn = Arc::clone(&self.turns).acquire_owned();
            // The semaphore is never closed, so that only time can take the turn away.
            match tokio::time::timeout(self.wait, turn).await {
                Ok(Ok(permit)) => permit,
                _ => return Err(busy("the transfer's turn did not come in time; try again")),
            }
        };
        Ok(TransferTurn {
            _permit: permit,
            _level: Level::transfer(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(max_transfers: usize, max_waiting_transfers: usize) -> TransferGate {
        TransferGate::new(&LimitsSection {
            max_transfers,
            max_waiting_transfers,
            ..LimitsSection::default()
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_transfer_waits_for_its_turn() {
        let gate = gate(1, 1);
        let first = gate.enter().await.unwrap();
        let (second, ()) = tokio::join!(gate.enter(), async { drop(first) });
        assert!(second.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_gate_says_busy_and_when_to_come_back() {
        let full = gate(1, 0);
        let _first = full.enter().await.unwrap();
        let refusal = full.enter().await.unwrap_err();
        assert_eq!(refusal.code, ErrorCode::Busy);
        assert!(refusal.retry_after.is_some());

        let slow = gate(1, 1);
        let _first = slow.enter().await.unwrap();
        assert_eq!(slow.enter().await.unwrap_err().code, ErrorCode::Busy);
    }
}
