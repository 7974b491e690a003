//! Turns for uploads and downloads: a bounded number at once, few of them one silo's, a bounded number waiting, each for a
//! bounded time. A turn ends in time as well: a transfer that is too slow is cut and can be resumed.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use concord_common::{ErrorCode, SiloId, code::Refusal, config::ByteSize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{config::LimitsSection, error::Failure, metrics::Level};

/// What a caller that found no place is told to wait.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Transfers of one silo that may wait.
const WAITING_PER_SILO: usize = 16;

/// The gate to transfers.
#[derive(Debug)]
pub struct TransferGate {
    turns: Arc<Semaphore>,
    waiting: Semaphore,
    silos: Mutex<HashMap<SiloId, Arc<SiloShare>>>,
    turns_per_silo: usize,
    wait: Duration,
    idle: Duration,
    min_rate: ByteSize,
}

/// What one silo may take of the gate.
#[derive(Debug)]
struct SiloShare {
    turns: Arc<Semaphore>,
    waiting: Semaphore,
}

/// The right to move a payload, for as long as it lives.
#[derive(Debug)]
pub struct TransferTurn {
    // Given back before the share, so that a share without holders is free.
    _own: OwnedSemaphorePermit,
    _permit: OwnedSemaphorePermit,
    _share: Arc<SiloShare>,
    _level: Level,
}

impl TransferGate {
    /// A gate with the configured bounds.
    pub fn new(limits: &LimitsSection) -> Self {
        Self {
            turns: Arc::new(Semaphore::new(limits.max_transfers)),
            waiting: Semaphore::new(limits.max_waiting_transfers),
            silos: Mutex::default(),
            turns_per_silo: limits.max_transfers_per_silo,
            wait: limits.transfer_wait,
            idle: limits.transfer_idle,
            min_rate: limits.min_transfer_rate,
        }
    }

    /// Waits for a turn.
    ///
    /// # Errors
    /// `BUSY` if too many wait already or the turn does not come in time.
    pub async fn enter(&self, silo: &SiloId) -> Result<TransferTurn, Refusal> {
        let busy = |message: &str| {
            Refusal::new(ErrorCode::Busy, message.to_owned()).retry_after(RETRY_AFTER)
        };
        let share = self.share(silo);
        let (own, shared) = (&share.turns, &self.turns);
        if let Ok(own) = Arc::clone(own).try_acquire_owned()
            && let Ok(permit) = Arc::clone(shared).try_acquire_owned()
        {
            return Ok(TransferTurn::new(share, own, permit));
        }
        let places = (share.waiting.try_acquire(), self.waiting.try_acquire());
        let (Ok(_own_place), Ok(_place)) = places else {
            return Err(busy("too many transfers are waiting; try again"));
        };
        let _level = Level::waiting_transfer();
        // The silo's own turn first: whoever waits for it holds none of the others'.
        let both = async {
            let own = Arc::clone(own).acquire_owned().await?;
            Ok::<_, tokio::sync::AcquireError>((own, Arc::clone(shared).acquire_owned().await?))
        };
        // The semaphores are never closed, so that only time can take the turn away.
        let Ok(Ok((own, permit))) = tokio::time::timeout(self.wait, both).await else {
            return Err(busy("the transfer's turn did not come in time; try again"));
        };
        Ok(TransferTurn::new(Arc::clone(&share), own, permit))
    }

    fn share(&self, silo: &SiloId) -> Arc<SiloShare> {
        let mut silos = self.silos.lock().unwrap_or_else(PoisonError::into_inner);
        // Here and nowhere else do entries come in, so the map stays as small as the number of silos at the gate.
        silos.retain(|_, share| Arc::strong_count(share) > 1);
        let share = silos.entry(silo.clone()).or_insert_with(|| {
            Arc::new(SiloShare {
                turns: Arc::new(Semaphore::new(self.turns_per_silo)),
                waiting: Semaphore::new(WAITING_PER_SILO),
            })
        });
        Arc::clone(share)
    }

    /// Carries out the transfer of so many bytes, if it is not too slow.
    ///
    /// # Errors
    /// The transfer's, or `TOO_SLOW`.
    pub async fn in_time<T>(
        &self,
        bytes: u64,
        transfer: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let seconds = bytes / self.min_rate.bytes().max(1);
        let deadline = self.idle.saturating_add(Duration::from_secs(seconds));
        let moved = tokio::time::timeout(deadline, transfer).await;
        moved.unwrap_or_else(|_| {
            let (bound, rate) = (humantime::format_duration(deadline), self.min_rate);
            let message = format!(
                "the transfer took longer than {bound}, which is {rate} a second; begin again and go on from there"
            );
            Err(Refusal::new(ErrorCode::TooSlow, message).into())
        })
    }
}

impl TransferTurn {
    fn new(share: Arc<SiloShare>, own: OwnedSemaphorePermit, permit: OwnedSemaphorePermit) -> Self {
        Self {
            _own: own,
            _permit: permit,
            _share: share,
            _level: Level::transfer(),
        }
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

    fn silo(name: &str) -> SiloId {
        name.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_transfer_waits_for_its_turn() {
        let gate = gate(1, 1);
        let first = gate.enter(&silo("a")).await.unwrap();
        let waiting = silo("b");
        let (second, ()) = tokio::join!(gate.enter(&waiting), async { drop(first) });
        assert!(second.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_gate_says_busy_and_when_to_come_back() {
        let full = gate(1, 0);
        let _first = full.enter(&silo("a")).await.unwrap();
        let refusal = full.enter(&silo("b")).await.unwrap_err();
        assert_eq!(refusal.code, ErrorCode::Busy);
        assert!(refusal.retry_after.is_some());

        let slow = gate(1, 1);
        let _first = slow.enter(&silo("a")).await.unwrap();
        let refusal = slow.enter(&silo("b")).await.unwrap_err();
        assert_eq!(refusal.code, ErrorCode::Busy);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silo_holds_no_more_than_its_share_and_the_others_pass() {
        let gate = gate(4, 1024);
        let (greedy, honest) = (silo("greedy"), silo("honest"));
        let turns = [
            gate.enter(&greedy).await.unwrap(),
            gate.enter(&greedy).await.unwrap(),
        ];
        // All the others of the greedy silo wait, and no more of them than may wait.
        let mut waiting: Vec<_> = (0..=WAITING_PER_SILO)
            .map(|_| Box::pin(gate.enter(&greedy)))
            .collect();
        for (index, turn) in waiting.iter_mut().enumerate() {
            match futures::poll!(turn.as_mut()) {
                std::task::Poll::Pending => assert!(index < WAITING_PER_SILO),
                std::task::Poll::Ready(turn) => {
                    assert_eq!(index, WAITING_PER_SILO);
                    assert_eq!(turn.unwrap_err().code, ErrorCode::Busy);
                }
            }
        }
        for _ in 0..2 {
            gate.enter(&honest).await.unwrap();
        }
        drop(turns);
        waiting.remove(0).await.unwrap();
        drop(waiting);
        // Who is gone is forgotten.
        let _turn = gate.enter(&honest).await.unwrap();
        assert_eq!(gate.silos.lock().unwrap().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_transfer_has_the_time_that_its_size_needs_at_the_least_rate() {
        let gate = TransferGate::new(&LimitsSection {
            transfer_idle: Duration::from_secs(30),
            min_transfer_rate: ByteSize(1000),
            ..LimitsSection::default()
        });
        let last = |seconds| async move {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            Ok(seconds)
        };
        assert_eq!(gate.in_time(10_000, last(39)).await.unwrap(), 39);
        let Err(Failure::Refused(refusal)) = gate.in_time(10_000, last(41)).await else {
            panic!("a slow transfer was let through");
        };
        assert_eq!(refusal.code, ErrorCode::TooSlow);
    }
}
