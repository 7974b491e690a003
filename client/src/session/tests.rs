use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use concord_common::{
    Digest,
    adapter::AdapterVersion,
    code::Refusal,
    round::{Outcome, RoundPhase, job::JobState},
    wire::SignedReceipt,
};

use super::*;
use crate::{
    coordinator::{
        Notice,
        memory::{Federation, MemoryCoordinator},
    },
    egress::Outlet,
    testing::{Call, Fault, Faulty, Home, federation, job, reported, spec},
    vault::Record,
};

mod ends;
mod faults;
mod lives;
mod refusals;
mod rounds;

const ONE: RoundNumber = RoundNumber(1);

/// Two silos and a job for both.
struct Pair {
    north: Home,
    south: Home,
    federation: Arc<Federation>,
}

impl Pair {
    fn new(spec_toml: &str) -> Self {
        Self {
            north: Home::new("north"),
            south: Home::new("south"),
            federation: federation(spec_toml, &["north", "south"]),
        }
    }

    fn faulty(&self) -> Faulty {
        Faulty::new(self.federation.coordinator(self.north.silo.clone()))
    }

    /// North's session on a server that misbehaves.
    fn north_on(&self, server: &Faulty) -> Session<Faulty> {
        self.north
            .session(server.clone(), &self.federation.receipt_key())
    }

    async fn notice(&self, home: &Home) -> Notice {
        let coordinator = self.federation.coordinator(home.silo.clone());
        coordinator.poll().await.unwrap().remove(0)
    }
}

fn accepted(outcome: RoundOutcome) -> SignedReceipt {
    match outcome {
        RoundOutcome::Answered(receipt) if receipt.receipt.outcome == Outcome::Accepted => *receipt,
        other => panic!("{other:?}"),
    }
}

fn declined(outcome: Result<RoundOutcome, SessionError>) -> Refusal {
    match outcome {
        Err(SessionError::Declined(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

/// The adapters that a whole undisturbed job gives.
async fn undisturbed(spec_toml: &str) -> Vec<AdapterVersion> {
    let pair = Pair::new(spec_toml);
    let sessions = [
        pair.north.join(&pair.federation),
        pair.south.join(&pair.federation),
    ];
    work_to_the_end(&pair, &sessions).await;
    pair.federation.versions()
}

async fn work_to_the_end(pair: &Pair, sessions: &[Session<MemoryCoordinator>; 2]) {
    while !pair.federation.outcome().0.is_over() {
        for session in sessions {
            let notice = session.coordinator.poll().await.unwrap().remove(0);
            if notice.wants_work() {
                accepted(
                    session
                        .round(&notice.job, notice.round.unwrap())
                        .await
                        .unwrap(),
                );
            }
        }
    }
}
