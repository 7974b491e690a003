//! The set-up that many tests share: a silo with a contribution in its hands.

use concord_proto::v1;

use super::harness::{FakeSilo, Offer, World, constant, spec};

/// The only silo, with its contribution to the only round of a job: 1.25 everywhere, from 3 examples. `rest` as for [`spec`].
pub(crate) async fn offering(world: &World, rest: &str) -> (FakeSilo, String, Offer) {
    let mut silo = world.silo("a").await;
    let job_id = world.submit(&spec(1, 1, rest)).await;
    let offer = silo.offer(&job_id, 1, constant(1.25), 3).await;
    (silo, job_id, offer)
}

impl FakeSilo {
    /// Announces a contribution; gives the server's answer.
    pub(crate) async fn begin(&mut self, offer: &Offer) -> v1::BeginContributionResponse {
        let begun = self.client.begin_contribution(offer.begin.clone()).await;
        begun.unwrap().into_inner()
    }
}
