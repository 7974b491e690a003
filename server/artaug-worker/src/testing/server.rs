//! A server in memory with one job.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use concord_common::{
    Digest,
    code::{ErrorCode, Refusal},
};
use concord_proto::v1::{self, JobRelease, WorkerCommand};

use super::Overlap;
use crate::{
    brake::Stop,
    remote::{CallError, Claim, Payload, Renewed, Server},
};

/// When a worker loses its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    /// Never.
    Never,
    /// Each lease at its n-th writing call, which is not carried out.
    Before(usize),
    /// Each lease at its n-th writing call, which is carried out, but the worker does not hear of it: a kill at the worst moment.
    After(usize),
    /// One lease at the naming of the n-th result.
    AtResult(usize),
}

/// The server's side of the job.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) spec: String,
    pub(crate) lines: Vec<Vec<u8>>,
    pub(crate) objects: BTreeMap<Digest, Vec<u8>>,
    pub(crate) artefacts: BTreeMap<String, Digest>,
    pub(crate) releases: Vec<v1::ReleaseJobRequest>,
    pub(crate) words: Vec<v1::PairReview>,
    /// What a renewal is told. A job that is cancelled has ended: the first renewal hears of it, all else is refused.
    pub(crate) command: WorkerCommand,
    /// The command is this one as soon as the journal has so many lines.
    pub(crate) command_at: Option<(usize, WorkerCommand)>,
    /// How long a lease lasts, so the worker says, and how often it is renewed follows from it.
    pub(crate) lease: Duration,
    pub(crate) progress: Vec<v1::ArtaugProgress>,
    pub(crate) loss: Loss,
    /// How often a job is still given out.
    pub(crate) grants: usize,
    /// Writing calls that found no lease.
    pub(crate) fenced: usize,
    /// Calls that fail for now before one is taken.
    pub(crate) busy: usize,
    /// Calls named in these are refused for good.
    pub(crate) refused: Option<&'static str>,
    /// Calls of this name are refused with this code so many times more.
    pub(crate) faults: Option<(&'static str, ErrorCode, usize)>,
    /// Bytes of objects that it takes.
    pub(crate) most: u64,
    /// Who has to be at work while the first object is brought, if so.
    pub(crate) overlap: Option<Arc<Overlap>>,
    /// Objects that were fetched.
    pub(crate) fetched: usize,
    /// Whose worker is told to stop when an object is fetched.
    pub(crate) stop: Option<Arc<Stop>>,
    attempts: u32,
    token: Option<Vec<u8>>,
    writes: usize,
    ended: bool,
    waits_beyond: Option<u64>,
}

impl State {
    /// Bytes of all objects.
    pub(crate) fn kept(&self) -> u64 {
        self.objects.values().map(|bytes| bytes.len() as u64).sum()
    }
}

#[derive(Debug)]
pub(crate) struct FakeServer(Mutex<State>);

impl FakeServer {
    pub(crate) fn new(spec: &str) -> Self {
        Self(Mutex::new(State {
            spec: spec.to_owned(),
            lines: Vec::new(),
            objects: BTreeMap::new(),
            artefacts: BTreeMap::new(),
            releases: Vec::new(),
            words: Vec::new(),
            command: WorkerCommand::GoOn,
            command_at: None,
            lease: Duration::from_millis(3),
            progress: Vec::new(),
            loss: Loss::Never,
            grants: usize::MAX,
            fenced: 0,
            busy: 0,
            refused: None,
            faults: None,
            most: u64::MAX,
            overlap: None,
            fetched: 0,
            stop: None,
            attempts: 0,
            token: None,
            writes: 0,
            ended: false,
            waits_beyond: None,
        }))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a worker has the job, so that no other could begin.
    pub(crate) fn is_held(&self) -> bool {
        self.state().token.is_some()
    }

    /// The last release.
    pub(crate) fn released(&self) -> (JobRelease, String) {
        let state = self.state();
        let last = state.releases.last().expect("nothing was released");
        (last.release(), last.reason.clone())
    }

    /// Names and bytes of the results.
    pub(crate) fn results(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.state();
        let bytes = |digest: &Digest| state.objects[digest].clone();
        state
            .artefacts
            .iter()
            .map(|(name, digest)| (name.clone(), bytes(digest)))
            .collect()
    }

    /// Those that hold no times and no costs.
    pub(crate) fn lasting_results(&self) -> BTreeMap<String, Vec<u8>> {
        let mut results = self.results();
        results.retain(|name, _| {
            name.starts_with("lora/")
                || name.starts_with("fused/")
                || name.starts_with("losses/")
                || name.starts_with("metrics.")
        });
        results
    }

    /// The next claim gets the job again, as after `concord job resume`.
    pub(crate) fn resume(&self) {
        let mut state = self.state();
        state.command = WorkerCommand::GoOn;
        state.command_at = None;
    }

    fn held(&self, grip: &v1::JobGrip, call: &str) -> Result<MutexGuard<'_, State>, CallError> {
        let mut state = self.state();
        if state.busy > 0 {
            state.busy -= 1;
            return Err(CallError::Unavailable {
                reason: "busy".to_owned(),
                retry_after: None,
                is_fault: false,
            });
        }
        let is_cancelled = state.command == WorkerCommand::Cancel && call != "renew";
        if grip.job_id != "job-1" || state.token.as_ref() != Some(&grip.token) || is_cancelled {
            return Err(lost());
        }
        if state.refused == Some(call) {
            let refusal = Refusal::new(ErrorCode::InvalidRequest, format!("no {call}"));
            return Err(CallError::from_refusal(refusal));
        }
        if let Some((name, code, left)) = &mut state.faults
            && *name == call
            && *left > 0
        {
            *left -= 1;
            let refusal = Refusal::new(*code, format!("no {call} now"));
            return Err(CallError::from_refusal(refusal));
        }
        Ok(state)
    }

    /// Carries out a writing call under the lease.
    fn write<T>(
        &self,
        grip: &v1::JobGrip,
        call: &str,
        act: impl FnOnce(&mut State) -> T,
    ) -> Result<T, CallError> {
        let mut state = self.held(grip, call).inspect_err(|error| {
            if matches!(error, CallError::LeaseLost(_)) {
                self.state().fenced += 1;
            }
        })?;
        let is_result = call == "put_artefact";
        // Results are brought from the first on by every lease, so they have a loss of their own.
        let over = state
            .lines
            .last()
            .is_some_and(|line| String::from_utf8_lossy(line).contains("\"decision\":\"stop\""));
        let (at, carried_out) = match state.loss {
            Loss::Before(at) if !is_result && !over => (at, false),
            Loss::After(at) if !is_result && !over => (at, true),
            Loss::AtResult(at) if is_result => (at, true),
            _ => return Ok(act(&mut state)),
        };
        state.writes += 1;
        if state.writes < at {
            return Ok(act(&mut state));
        }
        if is_result {
            state.loss = Loss::Never;
        }
        state.token = None;
        if carried_out {
            act(&mut state);
        }
        Err(lost())
    }
}

fn lost() -> CallError {
    CallError::LeaseLost("the lease has run out".to_owned())
}

impl Server for FakeServer {
    fn claim(&self) -> Result<Claim, CallError> {
        let mut state = self.state();
        let held_back = matches!(state.command, WorkerCommand::Pause | WorkerCommand::Cancel)
            || state
                .waits_beyond
                .is_some_and(|beyond| state.words.iter().all(|word| word.number <= beyond));
        if state.ended || held_back || state.grants == 0 {
            return Ok(Claim::Nothing(Duration::ZERO));
        }
        state.grants -= 1;
        state.attempts += 1;
        state.writes = 0;
        let token = vec![state.attempts as u8; 16];
        state.token = Some(token.clone());
        Ok(Claim::Job(v1::WorkerLease {
            job_id: "job-1".to_owned(),
            token,
            duration: prost_types::Duration::try_from(state.lease).ok(),
            spec_toml: state.spec.clone(),
            attempt: state.attempts,
            journal_lines: state.lines.len() as u64,
        }))
    }

    fn renew(
        &self,
        grip: &v1::JobGrip,
        progress: &v1::ArtaugProgress,
    ) -> Result<Renewed, CallError> {
        let mut state = self.held(grip, "renew")?;
        state.progress.push(progress.clone());
        if state.command == WorkerCommand::Cancel {
            state.token = None;
        }
        Ok(Renewed {
            command: state.command,
            reviews: state.words.len() as u64,
        })
    }

    fn read_journal(&self, grip: &v1::JobGrip, first: u64) -> Result<Vec<Vec<u8>>, CallError> {
        let state = self.held(grip, "read_journal")?;
        Ok(state.lines[first as usize..].to_vec())
    }

    fn append(&self, grip: &v1::JobGrip, first: u64, lines: &[Vec<u8>]) -> Result<u64, CallError> {
        self.write(grip, "append", |state| {
            let first = first as usize;
            assert!(first <= state.lines.len(), "a gap in the journal");
            for (number, line) in lines.iter().enumerate() {
                match state.lines.get(first + number) {
                    Some(known) => assert_eq!(known, line, "another line"),
                    None => state.lines.push(line.clone()),
                }
            }
            if let Some((lines, command)) = state.command_at
                && state.lines.len() >= lines
            {
                state.command = command;
            }
            state.lines.len() as u64
        })
    }

    fn find_missing(
        &self,
        grip: &v1::JobGrip,
        digests: &[Digest],
    ) -> Result<Vec<Digest>, CallError> {
        let state = self.held(grip, "find_missing")?;
        let missing = |digest: &&Digest| !state.objects.contains_key(digest);
        Ok(digests.iter().filter(missing).copied().collect())
    }

    fn put_object(
        &self,
        grip: &v1::JobGrip,
        digest: Digest,
        payload: &Payload,
    ) -> Result<u64, CallError> {
        let bytes = match payload {
            Payload::Bytes(bytes) => bytes.to_vec(),
            Payload::File(path, length) => {
                let bytes = std::fs::read(path).unwrap();
                assert_eq!(bytes.len() as u64, *length);
                bytes
            }
        };
        assert_eq!(Digest::of(&bytes), digest);
        let overlap = self.state().overlap.clone();
        if let Some(overlap) = overlap {
            overlap.writing();
        }
        let is_full = {
            let state = self.state();
            state.kept() + bytes.len() as u64 > state.most
        };
        if is_full {
            let refusal = Refusal::new(ErrorCode::QuotaExceeded, "limits.disk");
            return Err(CallError::from_refusal(refusal));
        }
        self.write(grip, "put_object", |state| {
            state.objects.insert(digest, bytes);
            state.kept()
        })
    }

    fn get_object(&self, grip: &v1::JobGrip, digest: Digest) -> Result<Vec<u8>, CallError> {
        let mut state = self.held(grip, "get_object")?;
        state.fetched += 1;
        if let Some(stop) = &state.stop {
            stop.tell();
        }
        Ok(state.objects[&digest].clone())
    }

    fn remove_objects(&self, grip: &v1::JobGrip, digests: &[Digest]) -> Result<u64, CallError> {
        self.write(grip, "remove_objects", |state| {
            for digest in digests {
                state.objects.remove(digest);
            }
            state.kept()
        })
    }

    fn reviews(&self, grip: &v1::JobGrip, after: u64) -> Result<Vec<v1::PairReview>, CallError> {
        let state = self.held(grip, "reviews")?;
        let newer = |word: &&v1::PairReview| word.number > after;
        // Two at a time, so that asking again is tested.
        Ok(state.words.iter().filter(newer).take(2).copied().collect())
    }

    fn put_artefact(
        &self,
        grip: &v1::JobGrip,
        name: &str,
        digest: Digest,
    ) -> Result<(), CallError> {
        self.write(grip, "put_artefact", |state| {
            assert!(state.objects.contains_key(&digest), "{name} has no object");
            state.artefacts.insert(name.to_owned(), digest);
        })
    }

    fn release(&self, request: &v1::ReleaseJobRequest) -> Result<(), CallError> {
        let grip = request.grip.clone().unwrap();
        let mut state = self.held(&grip, "release")?;
        state.token = None;
        match request.release() {
            JobRelease::Succeeded | JobRelease::Failed => state.ended = true,
            JobRelease::WaitsForReview => state.waits_beyond = Some(request.reviews),
            _ => {}
        }
        state.releases.push(request.clone());
        Ok(())
    }
}
