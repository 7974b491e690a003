//! Who must be told when something was committed: silos that watch for rounds, operators that watch a job, and the driver.
//!
//! Only the fact of a change travels, through `watch` channels that remember one: a slow watcher misses nothing but
//! intermediate states, and nothing piles up.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
};

use concord_common::{JobId, SiloId};
use tokio::sync::{Notify, watch};

/// The switchboard.
#[derive(Debug, Default)]
pub struct Hub {
    silos: Board<SiloId>,
    enrollments: Board<SiloId>,
    jobs: Board<JobId>,
    due: Board<JobId>,
    queue: Notify,
    work: watch::Sender<()>,
}

impl Hub {
    /// Changes that concern a silo, from now on.
    pub fn watch_silo(&self, silo: &SiloId) -> watch::Receiver<()> {
        self.silos.watch(silo)
    }

    /// Changes of a silo's enrollment, from now on.
    pub fn watch_enrollment(&self, silo: &SiloId) -> watch::Receiver<()> {
        self.enrollments.watch(silo)
    }

    /// Changes of a job, from now on.
    pub fn watch_job(&self, job: &JobId) -> watch::Receiver<()> {
        self.jobs.watch(job)
    }

    /// Changes of a job after which its driver has something to look at, from now on.
    pub fn watch_due(&self, job: &JobId) -> watch::Receiver<()> {
        self.due.watch(job)
    }

    /// True while someone watches for a silo.
    pub fn is_connected(&self, silo: &SiloId) -> bool {
        self.silos.is_watched(silo)
    }

    /// Something changed that this silo should see.
    pub fn silo_changed(&self, silo: &SiloId) {
        self.silos.bump(|watched| watched == silo);
    }

    /// An operator changed the silo's enrollment.
    pub fn enrollment_changed(&self, silo: &SiloId) {
        self.enrollments.bump(|watched| watched == silo);
        self.silo_changed(silo);
    }

    /// A round opened or ended, or a job ended: every silo should look.
    pub fn rounds_changed(&self) {
        self.silos.bump(|_| true);
    }

    /// Something changed in a job.
    pub fn job_changed(&self, job: &JobId) {
        self.jobs.bump(|watched| watched == job);
    }

    /// There may be something to do in a job.
    pub fn job_due(&self, job: &JobId) {
        self.due.bump(|watched| watched == job);
    }

    /// A silo came or may take part again: jobs that wait for silos should look.
    pub fn roster_changed(&self) {
        self.due.bump(|_| true);
    }

    /// Changes after which there may be work for a worker, from now on.
    pub fn watch_workers(&self) -> watch::Receiver<()> {
        self.work.subscribe()
    }

    /// Number of those who watch for work.
    #[cfg(test)]
    pub(crate) fn workers_watching(&self) -> usize {
        self.work.receiver_count()
    }

    /// A job that workers run was queued, given back, or may go on.
    pub fn workers_changed(&self) {
        self.work.send_replace(());
    }

    /// A job was queued.
    pub fn queue_changed(&self) {
        self.queue.notify_one();
    }

    /// Waits until a job was queued since the last call.
    pub async fn queue_change(&self) {
        self.queue.notified().await;
    }
}

/// Watchers by what they watch.
#[derive(Debug)]
struct Board<K>(Mutex<HashMap<K, watch::Sender<()>>>);

impl<K> Default for Board<K> {
    fn default() -> Self {
        Self(Mutex::new(HashMap::new()))
    }
}

impl<K: Clone + Eq + Hash> Board<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, watch::Sender<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, key: &K) -> watch::Receiver<()> {
        let mut senders = self.lock();
        // Here and nowhere else do entries come in, so the map stays as small as the number of watchers.
        senders.retain(|_, sender| sender.receiver_count() > 0);
        senders
            .entry(key.clone())
            .or_insert_with(|| watch::Sender::new(()))
            .subscribe()
    }

    fn is_watched(&self, key: &K) -> bool {
        self.lock()
            .get(key)
            .is_some_and(|sender| sender.receiver_count() > 0)
    }

    fn bump(&self, which: impl Fn(&K) -> bool) {
        for (_, sender) in self.lock().iter().filter(|(key, _)| which(key)) {
            sender.send_replace(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_reaches_those_who_watch_and_is_remembered_once() {
        let hub = Hub::default();
        let (a, b): (SiloId, SiloId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let mut at_a = hub.watch_silo(&a);
        let at_b = hub.watch_silo(&b);
        hub.silo_changed(&a);
        hub.silo_changed(&a);
        assert!(at_a.has_changed().unwrap());
        assert!(!at_b.has_changed().unwrap());
        at_a.mark_unchanged();
        assert!(!at_a.has_changed().unwrap());
        hub.rounds_changed();
        assert!(at_b.has_changed().unwrap());
    }

    #[test]
    fn a_silo_is_connected_while_it_watches() {
        let hub = Hub::default();
        let silo: SiloId = "a".parse().unwrap();
        assert!(!hub.is_connected(&silo));
        let watching = hub.watch_silo(&silo);
        assert!(hub.is_connected(&silo));
        drop(watching);
        assert!(!hub.is_connected(&silo));
    }
}
