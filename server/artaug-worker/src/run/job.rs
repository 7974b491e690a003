//! One job, from its lease to its release.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, SystemTime},
};

use concord_artaug::{folder::JobFolder, ledger::forget_peak_memory, setup};
use concord_common::{Digest, JobId, error_text, job::artaug::ArtaugSpec};
use concord_proto::v1::{self, JobRelease, WorkerCommand};

use super::{PartsError, Worker, renew::renew};
use crate::{
    artefacts,
    brake::{Brake, Halt},
    desk::{Board, Desk, unkept},
    remote::{CallError, Lease},
    stages::{self, Ending, Studio},
};

/// Longest reason of a release in bytes.
const MAX_REASON: usize = 1024;
/// Most pairs that a release names.
const MAX_WAITING: usize = 10_000;
/// If the server names no duration.
const SHORT_LEASE: Duration = Duration::from_secs(30);
/// How often a release is tried: a lease that is not given back runs out.
const RELEASE_TRIES: usize = 5;

/// Works on a job until it ends, and gives it back; true if something outside held it up.
pub(super) fn work(worker: &Worker, lease: &v1::WorkerLease) -> bool {
    let brake = Arc::new(Brake::new(worker.habits.stop_within));
    worker.stop.take_up(&brake);
    forget_peak_memory();
    let board = Board::default();
    let duration = lease
        .duration
        .and_then(|duration| Duration::try_from(duration).ok())
        .unwrap_or(SHORT_LEASE);
    let held = Lease::new(
        Arc::clone(&worker.server),
        lease,
        Arc::clone(&brake),
        worker.habits.pace,
    );
    let outcome = thread::scope(|scope| {
        let renewing = thread::Builder::new()
            .name("lease".to_owned())
            .spawn_scoped(scope, || renew(&held, &board, duration));
        if let Err(error) = renewing {
            return Err(Halt::Trouble(format!("no thread can be started: {error}")));
        }
        // What a panic leaves behind is not used any more.
        let outcome = catch_unwind(AssertUnwindSafe(|| worked(worker, lease, &held, &board)));
        brake.end();
        outcome.unwrap_or_else(|_| {
            Err(Halt::Failed(
                "the worker ran into a fault of its own; its log has the details".to_owned(),
            ))
        })
    });
    worker.stop.put_down();
    // An end that was reached counts, also if a halt came at the last moment; of several halts the weightiest.
    let outcome = outcome.map_err(|halt| {
        brake.pull(halt.clone());
        brake.halt().unwrap_or(halt)
    });
    let held_up = matches!(outcome, Err(Halt::Trouble(_)));
    let is_over = matches!(
        outcome,
        Ok(Ending::Succeeded | Ending::Failed(_)) | Err(Halt::Failed(_))
    );
    // Who was told has no lease to give back.
    let cancelled = matches!(outcome, Err(Halt::Cancel))
        || (!release(worker, &held, &board, outcome) && is_cancelled(&held, &board));
    if cancelled {
        tracing::info!(job.id = %lease.job_id, "the job is cancelled; this worker's copy of it is removed");
    }
    if (is_over || cancelled)
        && let Ok(id) = lease.job_id.parse::<JobId>()
    {
        forget(&worker.habits.jobs.join(id.as_str()));
    }
    held_up
}

fn worked(
    worker: &Worker,
    lease: &v1::WorkerLease,
    held: &Lease,
    board: &Board,
) -> Result<Ending, Halt> {
    // A name with a slash or two points would lead out of the folder; such an id is none.
    let id: JobId = lease.job_id.parse().map_err(Halt::failed)?;
    let spec = ArtaugSpec::parse(&lease.spec_toml)
        .map_err(|refusal| lacking(lease, format!("this worker cannot run the job: {refusal}")))?;
    let quota = spec.limits.disk.bytes().min(worker.habits.disk);
    let short_of_disk = quota < spec.limits.disk.bytes();
    let folder = worker.habits.jobs.join(id.as_str());
    make_room(worker, &folder, quota)?;
    let lines = held.journal()?;
    let opened = JobFolder::adopt(
        &folder,
        setup::plan(&spec),
        Digest::of(lease.spec_toml.as_bytes()),
        quota,
        Arc::clone(&worker.clock),
        &lines,
    );
    let job_folder = opened.map_err(|error| unkept(error, short_of_disk))?;
    drop(lines);
    artefacts::sweep(&folder)?;
    let desk = Desk::new(
        job_folder,
        held,
        board,
        worker.clock.as_ref(),
        worker.habits.memory,
        spec.limits.time,
        short_of_disk,
    );
    desk.check()?;
    let parts = worker.workshop.parts(&spec, held.brake());
    let parts = parts.map_err(|error| match error {
        PartsError::Halt(halt) => halt,
        // That says nothing about the job, which another worker may run as it is.
        PartsError::Limit { .. } => Halt::Trouble(error_text(&error)),
        error => lacking(lease, error_text(&error)),
    })?;
    let mut studio = Studio::new(parts.engine, parts.opened, &desk, &parts.tools);
    let job = stages::Job {
        spec: &spec,
        desk: &desk,
        tools: &parts.tools,
        pace: worker.habits.pace,
        helpers: worker.habits.helpers,
        folder: &folder,
    };
    stages::guarded(&desk, || job.run(&mut studio))
}

/// A job that this worker is not set up for. One that has been begun goes on elsewhere, or here once the settings are mended: what is done is
/// not thrown away. One that has not ends at once with the reason, which is most often a slip in the job.
fn lacking(lease: &v1::WorkerLease, reason: String) -> Halt {
    if lease.journal_lines > 0 {
        Halt::Trouble(reason)
    } else {
        Halt::Failed(reason)
    }
}

/// Whether an operator has cancelled a job that is not this worker's any more, as the server says. It refuses all that is done on an ended job with
/// these words; only a renewal is told the reason, and with that the server lets the next job begin, without waiting until the lease has run out.
fn is_cancelled(held: &Lease, board: &Board) -> bool {
    let renewed = held.server().renew(held.grip(), &board.progress());
    renewed.is_ok_and(|renewed| renewed.command == WorkerCommand::Cancel)
}

/// Gives a job back; false if the server says that it is not this worker's to give.
fn release(worker: &Worker, held: &Lease, board: &Board, outcome: Result<Ending, Halt>) -> bool {
    let held_up = matches!(outcome, Err(Halt::Trouble(_)));
    let mut request = v1::ReleaseJobRequest {
        grip: Some(held.grip().clone()),
        progress: Some(board.progress()),
        ..v1::ReleaseJobRequest::default()
    };
    let (kind, reason) = match outcome {
        Ok(Ending::Succeeded) => (JobRelease::Succeeded, String::new()),
        Ok(Ending::Failed(reason)) | Err(Halt::Failed(reason)) => (JobRelease::Failed, reason),
        Ok(Ending::Waits {
            reviews,
            mut waiting,
        }) => {
            waiting.truncate(MAX_WAITING);
            request.reviews = reviews;
            request.waiting = waiting;
            (JobRelease::WaitsForReview, String::new())
        }
        Err(Halt::Pause) => (JobRelease::Paused, String::new()),
        Err(Halt::Stop) => (JobRelease::Stopped, String::new()),
        Err(Halt::Trouble(reason)) => (JobRelease::Stopped, reason),
        Err(halt @ (Halt::Cancel | Halt::Lost(_))) => {
            tracing::warn!(job.id = %held.grip().job_id, reason = %halt, "the job is not this worker's any more; nothing more is written");
            return false;
        }
    };
    let reason = one_line(&reason);
    request.reason.clone_from(&reason);
    request.set_release(kind);
    if kind == JobRelease::Failed {
        tracing::error!(job.id = %held.grip().job_id, reason, "the job failed");
    } else if held_up {
        tracing::error!(job.id = %held.grip().job_id, reason, "the job is held up here; it is given back and tried again");
    } else {
        tracing::info!(job.id = %held.grip().job_id, release = kind.as_str_name(), reason, "job given back");
    }
    let mut delays = worker.habits.pace.delays();
    for _ in 0..RELEASE_TRIES {
        match worker.server.release(&request) {
            Ok(()) => return true,
            Err(CallError::Unavailable { reason, .. }) => {
                tracing::warn!(reason, "the job cannot be given back now");
            }
            Err(error) => {
                tracing::warn!(%error, "the server does not take the job back");
                return !matches!(error, CallError::LeaseLost(_));
            }
        }
        if worker.stop.wait(delays.next().unwrap_or_default()) {
            break;
        }
    }
    // The lease runs out.
    true
}

/// A sentence for operators: errors of libraries can have several lines.
fn one_line(text: &str) -> String {
    let plain: String = text
        .chars()
        .map(|character| {
            if character.is_control() {
                ' '
            } else {
                character
            }
        })
        .collect();
    let mut line = plain.split_whitespace().collect::<Vec<_>>().join(" ");
    line.truncate(line.floor_char_boundary(MAX_REASON));
    line
}

/// Removes a job's folder; one that stays is found by [`make_room`].
fn forget(folder: &Path) {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, folder = %folder.display(), "a job's folder cannot be removed");
        }
        _ => {}
    }
}

/// Removes folders of other jobs, the longest unused first, until a job that may take `quota` has room. The server has all that is in them.
fn make_room(worker: &Worker, own: &Path, quota: u64) -> Result<(), Halt> {
    let jobs = &worker.habits.jobs;
    let failed = |error: io::Error| Halt::Trouble(format!("{}: {error}", jobs.display()));
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(jobs)
        .map_err(failed)?;
    let mut others: Vec<(SystemTime, PathBuf, u64)> = Vec::new();
    for entry in fs::read_dir(jobs).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if path == own {
            continue;
        }
        let used = fs::metadata(path.join("journal.jsonl"))
            .or_else(|_| entry.metadata())
            .and_then(|metadata| metadata.modified())
            .unwrap_or(SystemTime::UNIX_EPOCH);
        let bytes = size_of(&path).unwrap_or(u64::MAX);
        others.push((used, path, bytes));
    }
    others.sort();
    let mut held = others
        .iter()
        .fold(quota, |sum, (_, _, bytes)| sum.saturating_add(*bytes));
    for (_, path, _) in others {
        if held <= worker.habits.disk {
            break;
        }
        tracing::info!(folder = %path.display(), "the copy of another job makes room");
        forget(&path);
        held = size_of(jobs).unwrap_or(0).saturating_add(quota);
    }
    Ok(())
}

/// Bytes of the files below a folder.
fn size_of(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() {
            size_of(&entry.path())?
        } else {
            metadata.len()
        };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_one_line_of_bounded_length() {
        assert_eq!(one_line("a\n  b\tc\u{1b}[2J"), "a b c [2J");
        let long = one_line(&"\u{e4}".repeat(2000));
        assert_eq!((long.len(), long.chars().count()), (1024, 512));
    }
}
