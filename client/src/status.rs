//! What the daemon is doing, for `concord-client status`, systemd and people: a small JSON file in the state folder.

use std::{
    fs::{File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use concord_common::{
    Clock, JobId, RoundNumber, SiloId, Timestamp, fsutil, lifecycle::Notifier, round::Outcome,
    wire::Receipt,
};
use serde::{Deserialize, Serialize};

/// The file's name in the state folder.
const FILE: &str = "status.json";
/// What a running daemon holds locked.
const LOCK: &str = "lock";

/// The daemon's state, without data, paths or secrets.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// This program's version.
    pub version: String,
    /// The daemon's process id.
    pub pid: u32,
    /// When it started, RFC 3339.
    pub started_at: String,
    /// When this was written.
    pub updated_at: String,
    /// This silo.
    pub silo: SiloId,
    /// Its server.
    pub server: String,
    /// Whether the server answered last time.
    pub connected: bool,
    /// The job it works on.
    pub work: Option<Work>,
    /// The last receipt, also of an earlier life of the daemon; `receipts.jsonl` has all of them with their signatures.
    pub last_receipt: Option<LastReceipt>,
    /// The last error, kept until the next.
    pub last_error: Option<LastError>,
}

/// A job that is worked on.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Work {
    /// Job.
    pub job: JobId,
    /// Round.
    pub round: RoundNumber,
    /// Rounds of the job.
    pub rounds: u32,
    /// `downloading`, `training`, ...
    pub doing: String,
    /// Training steps done in this round.
    pub step: u64,
    /// Training steps of this round; 0 if not known yet.
    pub steps: u64,
}

/// A receipt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastReceipt {
    /// Job.
    pub job: JobId,
    /// Round.
    pub round: RoundNumber,
    /// What became of the contribution.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// When the server recorded it.
    pub at: String,
}

/// An error.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastError {
    /// When.
    pub at: String,
    /// One sentence.
    pub message: String,
}

/// Whether a daemon wrote the status and still runs.
#[derive(Clone, PartialEq, Debug)]
pub enum Seen {
    /// No daemon has run with this state folder.
    Never,
    /// It has run and does not any more.
    Stopped(Status),
    /// It runs.
    Running(Status),
}

/// A daemon's hold on its state folder: two with one folder would tear it apart. The system lets go of it when the process ends,
/// however it ends.
#[derive(Debug)]
pub struct DaemonLock(#[expect(dead_code, reason = "held, not read")] File);

impl DaemonLock {
    /// Takes hold of a state folder; `None` while another process has it.
    ///
    /// # Errors
    /// If the lock file cannot be made or locked.
    pub fn take(state_folder: &Path) -> io::Result<Option<Self>> {
        let file = File::create(state_folder.join(LOCK))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Whether a daemon has hold of a state folder.
    ///
    /// # Errors
    /// If the lock file is there and cannot be looked at.
    pub fn is_held(state_folder: &Path) -> io::Result<bool> {
        let file = match File::open(state_folder.join(LOCK)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// Reads the status from a state folder. Whether the daemon runs is told by its lock: its process id may be another's by now.
///
/// # Errors
/// If the file cannot be read or is no status, or the lock cannot be looked at.
pub fn read(state_folder: &Path) -> io::Result<Seen> {
    let bytes = match std::fs::read(state_folder.join(FILE)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Seen::Never),
        Err(error) => return Err(error),
    };
    let status: Status = serde_json::from_slice(&bytes)?;
    if DaemonLock::is_held(state_folder)? {
        Ok(Seen::Running(status))
    } else {
        Ok(Seen::Stopped(status))
    }
}

/// The status as the daemon keeps it.
#[derive(Debug)]
pub struct StatusBoard {
    path: PathBuf,
    clock: Arc<dyn Clock>,
    notifier: Option<Arc<Notifier>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    status: Status,
    written: Timestamp,
}

/// Steps are written at most this often, in milliseconds.
const STEP_MILLIS: u64 = 1_000;

impl StatusBoard {
    /// A board of its own for this process. The service manager's status line follows it.
    pub fn new(
        state_folder: &Path,
        silo: SiloId,
        server: String,
        clock: Arc<dyn Clock>,
        notifier: Option<Arc<Notifier>>,
    ) -> Self {
        let now = clock.now();
        let status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_at: now.to_string(),
            updated_at: now.to_string(),
            silo,
            server,
            connected: false,
            work: None,
            last_receipt: None,
            last_error: None,
        };
        Self {
            path: state_folder.join(FILE),
            clock,
            notifier,
            state: Mutex::new(State {
                status,
                written: now,
            }),
        }
    }

    /// The present status.
    pub fn status(&self) -> Status {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .status
            .clone()
    }

    /// Notes whether the server answers.
    pub fn connected(&self, connected: bool) {
        self.change(|status| {
            let changed = status.connected != connected;
            status.connected = connected;
            changed
        });
    }

    /// Notes what is being done; `None` for nothing.
    pub fn work(&self, work: Option<Work>) {
        self.change(|status| {
            status.work = work;
            true
        });
    }

    /// Notes a step of the present work.
    pub fn step(&self, step: u64, steps: u64) {
        let now = self.clock.now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let due = now.since(state.written).as_millis() as u64 >= STEP_MILLIS;
        if let Some(work) = &mut state.status.work {
            work.step = step;
            work.steps = steps;
            if due || step == steps {
                self.write(&mut state, now);
            }
        }
    }

    /// Notes a receipt.
    pub fn receipt(&self, receipt: &Receipt) {
        self.change(|status| {
            status.last_receipt = Some(LastReceipt {
                job: receipt.job.clone(),
                round: receipt.round,
                outcome: receipt.outcome,
                at: receipt.recorded_at.to_string(),
            });
            true
        });
    }

    /// Notes an error.
    pub fn error(&self, message: &str) {
        let at = self.clock.now().to_string();
        self.change(|status| {
            status.last_error = Some(LastError {
                at,
                message: message.to_owned(),
            });
            true
        });
    }

    fn change(&self, apply: impl FnOnce(&mut Status) -> bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if apply(&mut state.status) {
            self.write(&mut state, self.clock.now());
        }
    }

    /// A status that cannot be written must not stop the work.
    fn write(&self, state: &mut State, now: Timestamp) {
        state.written = now;
        state.status.updated_at = now.to_string();
        let written = serde_json::to_vec_pretty(&state.status)
            .map_err(io::Error::from)
            .and_then(|bytes| fsutil::write_atomic(&self.path, &bytes, 0o600));
        if let Err(error) = written {
            tracing::warn!(%error, "cannot write the status file");
        }
        if let Some(notifier) = &self.notifier {
            notifier.status(&state.status.line());
        }
    }
}

impl Status {
    /// One line for the service manager.
    pub fn line(&self) -> String {
        let connection = if self.connected {
            "connected"
        } else {
            "not connected"
        };
        match &self.work {
            None => format!("{connection}, waiting for work"),
            Some(work) if work.steps > 0 => format!(
                "{connection}, job {} round {}/{}: {} {}/{}",
                work.job, work.round, work.rounds, work.doing, work.step, work.steps
            ),
            Some(work) => format!(
                "{connection}, job {} round {}/{}: {}",
                work.job, work.round, work.rounds, work.doing
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use concord_common::clock::MockClock;

    use super::*;

    fn board(folder: &Path) -> (Arc<MockClock>, StatusBoard) {
        let clock = Arc::new(MockClock::new(Timestamp(1_700_000_000_000)));
        let board = StatusBoard::new(
            folder,
            "clinic-a".parse().unwrap(),
            "https://localhost:7443".to_owned(),
            Arc::clone(&clock) as Arc<dyn Clock>,
            None,
        );
        (clock, board)
    }

    fn training() -> Work {
        Work {
            job: "job-1".parse().unwrap(),
            round: RoundNumber(2),
            rounds: 5,
            doing: "training".to_owned(),
            step: 0,
            steps: 0,
        }
    }

    #[test]
    fn a_running_daemon_is_told_from_a_stopped_one_and_from_none() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), Seen::Never);
        let lock = DaemonLock::take(folder.path()).unwrap();
        assert!(lock.is_some());
        let (_, board) = board(folder.path());
        board.connected(true);
        assert_eq!(read(folder.path()).unwrap(), Seen::Running(board.status()));
        // This process goes on, as another one with the daemon's old id would.
        drop(lock);
        assert_eq!(read(folder.path()).unwrap(), Seen::Stopped(board.status()));
    }

    #[test]
    fn a_state_folder_is_one_daemons_until_it_lets_go() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!DaemonLock::is_held(folder.path()).unwrap());
        let first = DaemonLock::take(folder.path()).unwrap();
        assert!(first.is_some());
        assert!(DaemonLock::take(folder.path()).unwrap().is_none());
        assert!(DaemonLock::is_held(folder.path()).unwrap());
        drop(first);
        assert!(!DaemonLock::is_held(folder.path()).unwrap());
        assert!(DaemonLock::take(folder.path()).unwrap().is_some());
    }

    #[test]
    fn steps_are_written_once_a_second_and_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let (clock, board) = board(folder.path());
        let _lock = DaemonLock::take(folder.path()).unwrap().unwrap();
        let written = || match read(folder.path()).unwrap() {
            Seen::Running(status) => status.work.unwrap().step,
            other => panic!("{other:?}"),
        };
        board.work(Some(training()));
        board.step(1, 10);
        assert_eq!(written(), 0);
        clock.advance(Duration::from_secs(1));
        board.step(2, 10);
        assert_eq!(written(), 2);
        board.step(10, 10);
        assert_eq!(written(), 10);
        assert_eq!(
            board.status().line(),
            "not connected, job job-1 round 2/5: training 10/10"
        );
    }
}
