//! A job in this worker's hands: calls that are tried again while that makes sense.

use std::{
    collections::BTreeSet,
    mem,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use bytes::Bytes;
use concord_artaug::course::Worked;
use concord_common::Digest;
use concord_proto::v1;

use super::{CallError, Payload, Server};
use crate::brake::{Brake, Halt};

/// Objects that one call may name.
const MANY: usize = 1000;
/// Tries in a row that run into a fault of the server before the job is given back: some three minutes at the usual pace.
pub const FAULTS: usize = 10;

/// How long to wait between two attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// After the first failure, on average.
    pub first: Duration,
    /// At most.
    pub longest: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(500),
            longest: Duration::from_mins(1),
        }
    }
}

impl Pace {
    /// Delays that double from failure to failure, each with jitter so that workers do not come back all at once.
    pub fn delays(self) -> impl Iterator<Item = Duration> {
        ExponentialBuilder::new()
            .with_min_delay(self.first)
            .with_max_delay(self.longest)
            .with_jitter()
            .without_max_times()
            .build()
    }
}

/// A job with its server. Calls that fail for now are tried again until the brake is pulled: as long as the server is away or has no room, the
/// job waits here as well as anywhere, and that takes none of its time. A server that is there and runs into a fault again and again is
/// another matter: its operator has to hear of it, and meanwhile other jobs can go on.
pub struct Lease {
    server: Arc<dyn Server>,
    grip: v1::JobGrip,
    brake: Arc<Brake>,
    pace: Pace,
    /// Bytes that the server keeps for the job, as it last said.
    kept: Mutex<u64>,
    /// The count of the job's time, once there is one.
    worked: OnceLock<Arc<Worked>>,
    /// Objects that nothing needs any more and the server may still have.
    outdated: Mutex<Vec<Digest>>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lease({})", self.grip.job_id)
    }
}

impl Lease {
    /// A lease that the server gave.
    pub fn new(
        server: Arc<dyn Server>,
        lease: &v1::WorkerLease,
        brake: Arc<Brake>,
        pace: Pace,
    ) -> Self {
        Self {
            server,
            grip: v1::JobGrip {
                job_id: lease.job_id.clone(),
                token: lease.token.clone(),
            },
            brake,
            pace,
            kept: Mutex::default(),
            worked: OnceLock::new(),
            outdated: Mutex::default(),
        }
    }

    /// Has this count of the job's time stand still while a call waits.
    pub fn time_by(&self, worked: &Arc<Worked>) {
        self.worked.get_or_init(|| Arc::clone(worked));
    }

    /// What [`Lease::remove_outdated`] is to remove.
    pub fn note_outdated(&self, outdated: Vec<Digest>) {
        *self.outdated() = outdated;
    }

    fn outdated(&self) -> MutexGuard<'_, Vec<Digest>> {
        self.outdated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shown with every call.
    pub fn grip(&self) -> &v1::JobGrip {
        &self.grip
    }

    /// The brake of the job.
    pub fn brake(&self) -> &Brake {
        &self.brake
    }

    /// The server behind it, for calls that are not tried again.
    pub fn server(&self) -> &dyn Server {
        self.server.as_ref()
    }

    /// Bytes that the server keeps for the job, as it last said.
    pub fn kept(&self) -> u64 {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call<T>(
        &self,
        what: &str,
        call: impl Fn(&dyn Server) -> Result<T, CallError>,
    ) -> Result<T, Halt> {
        let mut delays = self.pace.delays();
        let (mut faults, mut wait) = (0, None);
        loop {
            // Nothing is written any more once the lease is lost, even if the server would take it.
            self.brake.check_now()?;
            let error = match call(self.server.as_ref()) {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let halt = match error {
                CallError::Unavailable {
                    reason,
                    retry_after,
                    is_fault,
                } => {
                    faults = if is_fault { faults + 1 } else { 0 };
                    if faults < FAULTS {
                        wait = wait.or_else(|| self.worked.get().map(|worked| worked.wait()));
                        let own = delays.next().unwrap_or(self.pace.longest);
                        let delay = own.max(retry_after.unwrap_or_default().min(self.pace.longest));
                        tracing::warn!(job.id = %self.grip.job_id, call = what, reason, ?delay, "the server cannot be asked; trying again");
                        self.pause(delay)?;
                        continue;
                    }
                    Halt::Trouble(format!(
                        "{what}: the server ran into a fault {FAULTS} times in a row: {reason}"
                    ))
                }
                CallError::LeaseLost(reason) => Halt::Lost(reason),
                // Whoever claims the job next begins from the server's lines.
                CallError::Conflict(reason) => Halt::Trouble(reason),
                CallError::Refused(refusal) => {
                    Halt::Failed(format!("the server refused {what}: {refusal}"))
                }
                // Another worker, of another version or with a sound disk, may get on.
                error @ (CallError::Protocol(_) | CallError::File { .. }) => {
                    Halt::Trouble(format!("{what}: {error}"))
                }
            };
            self.brake.pull(halt.clone());
            return Err(halt);
        }
    }

    /// Waits before another attempt. Whoever is told to stop meanwhile does not wait for a server that is away.
    fn pause(&self, delay: Duration) -> Result<(), Halt> {
        self.brake.wait(delay)
    }

    fn note_kept(&self, bytes: u64) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = bytes;
    }

    /// The whole journal.
    ///
    /// # Errors
    /// As all calls: the halt that follows.
    pub fn journal(&self) -> Result<Vec<Vec<u8>>, Halt> {
        self.call("reading the journal", |server| {
            server.read_journal(&self.grip, 0)
        })
    }

    /// Adds a line, which is then durable. An attempt whose answer was lost is no harm: the server compares.
    ///
    /// # Errors
    /// As all calls.
    pub fn append(&self, first: u64, lines: &[Vec<u8>]) -> Result<(), Halt> {
        let next = self.call("adding to the journal", |server| {
            server.append(&self.grip, first, lines)
        })?;
        let expected = first + lines.len() as u64;
        if next == expected {
            return Ok(());
        }
        // More lines than this worker wrote: someone else writes.
        let halt = Halt::Lost(format!(
            "the server's journal has {next} lines where {expected} were expected"
        ));
        self.brake.pull(halt.clone());
        Err(halt)
    }

    /// Those of the objects that the server does not have.
    ///
    /// # Errors
    /// As all calls.
    pub fn missing(&self, digests: &[Digest]) -> Result<Vec<Digest>, Halt> {
        let mut missing = Vec::new();
        for some in digests.chunks(MANY) {
            missing.extend(self.call("asking for missing objects", |server| {
                server.find_missing(&self.grip, some)
            })?);
        }
        Ok(missing)
    }

    /// Brings objects to the server, those only that it does not have.
    ///
    /// # Errors
    /// As all calls.
    pub fn put(&self, objects: &[(Digest, Payload)]) -> Result<(), Halt> {
        for some in objects.chunks(MANY) {
            let digests: Vec<Digest> = some.iter().map(|(digest, _)| *digest).collect();
            let missing = self.missing(&digests)?;
            for (digest, payload) in some {
                if missing.contains(digest) {
                    let kept = self.call(&format!("sending the object {digest}"), |server| {
                        server.put_object(&self.grip, *digest, payload)
                    })?;
                    self.note_kept(kept);
                }
            }
        }
        Ok(())
    }

    /// The bytes of an object; none if the server does not have it, or has it damaged. A damaged one is removed there, so that it is missed and
    /// can be brought anew.
    ///
    /// # Errors
    /// As all calls.
    pub fn get(&self, digest: Digest) -> Result<Option<Bytes>, Halt> {
        if !self.missing(&[digest])?.is_empty() {
            return Ok(None);
        }
        let bytes = self.call(&format!("fetching the object {digest}"), |server| {
            server.get_object(&self.grip, digest)
        })?;
        if Digest::of(&bytes) == digest {
            Ok(Some(bytes.into()))
        } else {
            tracing::error!(job.id = %self.grip.job_id, object = %digest, "the server's object is damaged; it is removed");
            self.remove(&[digest])?;
            Ok(None)
        }
    }

    /// Removes objects that nothing needs any more.
    ///
    /// # Errors
    /// As all calls.
    pub fn remove(&self, digests: &[Digest]) -> Result<(), Halt> {
        for some in digests.chunks(MANY) {
            let kept = self.call("removing objects", |server| {
                server.remove_objects(&self.grip, some)
            })?;
            self.note_kept(kept);
        }
        Ok(())
    }

    /// Removes what was noted as outdated, as far as the server has it. To be called before something new is brought: it may take the room.
    ///
    /// # Errors
    /// As all calls.
    pub fn remove_outdated(&self) -> Result<(), Halt> {
        let outdated = mem::take(&mut *self.outdated());
        let missing: BTreeSet<Digest> = self.missing(&outdated)?.into_iter().collect();
        let left: Vec<Digest> = outdated
            .into_iter()
            .filter(|digest| !missing.contains(digest))
            .collect();
        if !left.is_empty() {
            tracing::info!(job.id = %self.grip.job_id, objects = left.len(), "outdated checkpoints removed from the server");
        }
        self.remove(&left)
    }

    /// Bytes that the server keeps for the job now.
    ///
    /// # Errors
    /// As all calls.
    pub fn ask_kept(&self) -> Result<u64, Halt> {
        // Whoever removes nothing is told what is left.
        let kept = self.call("asking for the bytes kept", |server| {
            server.remove_objects(&self.grip, &[])
        })?;
        self.note_kept(kept);
        Ok(kept)
    }

    /// All words on pairs.
    ///
    /// # Errors
    /// As all calls.
    pub fn reviews(&self) -> Result<Vec<v1::PairReview>, Halt> {
        let mut words: Vec<v1::PairReview> = Vec::new();
        loop {
            let after = words.last().map_or(0, |word| word.number);
            let more = self.call("reading reviews", |server| {
                server.reviews(&self.grip, after)
            })?;
            // A server that gives the same again would keep us here for ever.
            if more.is_empty() || more.iter().any(|word| word.number <= after) {
                return Ok(words);
            }
            words.extend(more);
        }
    }

    /// Brings a result to the server under a name.
    ///
    /// # Errors
    /// As all calls.
    pub fn put_artefact(&self, name: &str, digest: Digest, payload: Payload) -> Result<(), Halt> {
        self.remove_outdated()?;
        self.put(&[(digest, payload)])?;
        self.call("naming a result", |server| {
            server.put_artefact(&self.grip, name, digest)
        })
    }
}
