//! A job's folder on the worker: journal, objects, manifests and metrics, kept in step with the state machine.
//!
//! - `journal.jsonl`: what happened; the only file that the job is resumed from
//! - `objects/<digest>`: images, LoRA files, checkpoints
//! - `manifest-<n>.jsonl`: iteration n, one line an item
//! - `metrics.jsonl`, `metrics.csv`: what the iterations came to

use std::{
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use concord_common::{Clock, Digest, fsutil::write_atomic};

use crate::{
    gallery::arm_name,
    journal::{Journal, JournalError},
    ledger::Ledger,
    machine::{Event, Machine, Misfit, Plan, Summary, Work},
    store::{Store, StoreError},
};

/// An open job.
#[derive(Debug)]
pub struct JobFolder {
    folder: PathBuf,
    journal: Journal,
    machine: Machine,
    store: Store,
    ledger: Ledger,
    clock: Arc<dyn Clock>,
}

/// Why a job cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The objects.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An event at the wrong time.
    #[error(transparent)]
    Misfit(#[from] Misfit),
    /// A line of the journal that does not belong there.
    #[error(
        "line {line} of the journal: {misfit}; the folder belongs to another job or is damaged"
    )]
    Replay {
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        misfit: Misfit,
    },
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl JobFolder {
    /// Opens a job's folder, or begins it. What the journal holds is taken in again.
    ///
    /// # Errors
    /// If another process works on it, it belongs to another specification, is damaged, or the file system refuses.
    pub fn open(
        folder: &Path,
        plan: Plan,
        specification: Digest,
        quota: u64,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, FolderError> {
        std::fs::create_dir_all(folder).map_err(|source| FolderError::Io {
            path: folder.to_owned(),
            source,
        })?;
        let (journal, entries) = Journal::open::<Event>(&folder.join("journal.jsonl"))?;
        let mut machine = Machine::new(plan, specification);
        let mut ledger = Ledger::default();
        for (index, entry) in entries.into_iter().enumerate() {
            ledger.take(&entry.event);
            machine
                .apply(entry.event)
                .map_err(|misfit| FolderError::Replay {
                    line: index + 1,
                    misfit,
                })?;
        }
        let mut opened = Self {
            folder: folder.to_owned(),
            journal,
            machine,
            store: Store::open(&folder.join("objects"), quota)?,
            ledger,
            clock,
        };
        if !opened.machine.has_begun() {
            opened.record(&Event::Began {
                specification,
                version: env!("CARGO_PKG_VERSION").to_owned(),
            })?;
        }
        // A crash may have come between a line of the journal and the files made from it.
        opened.write_metrics()?;
        if matches!(opened.machine.work(), Work::Items { .. }) {
            return Ok(opened);
        }
        opened.write_manifest()?;
        Ok(opened)
    }

    /// The state.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The objects.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The objects, to add some. An object must be kept before the event that names it is recorded.
    pub fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    /// What the job has cost.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Records what was done: when this returns, it is on the disk and need not be done again.
    ///
    /// # Errors
    /// If it does not fit, or cannot be written; the job must then be opened again.
    pub fn record(&mut self, event: &Event) -> Result<(), FolderError> {
        let outdated = self.outdated_checkpoint(event);
        self.machine.apply(event.clone())?;
        self.journal.append(event, self.clock.now())?;
        self.ledger.take(event);
        if let Some(state) = outdated {
            self.store.remove(state)?;
        }
        match event {
            Event::Filtered { .. } => self.write_manifest(),
            // The last decision of a review; rewriting for each would be work without end.
            Event::Reviewed { .. } if !matches!(self.machine.work(), Work::Review(_)) => {
                self.write_manifest()
            }
            Event::Decided { .. } => self.write_metrics(),
            _ => Ok(()),
        }
    }

    /// The state that nothing needs once `event` is recorded.
    fn outdated_checkpoint(&self, event: &Event) -> Option<Digest> {
        let (Event::Checkpointed { .. } | Event::Trained { .. }) = event else {
            return None;
        };
        let newer = match event {
            Event::Checkpointed { result, .. } => Some(result.state),
            _ => None,
        };
        match self.machine.work() {
            Work::Train(_, Some(checkpoint)) if Some(checkpoint.state) != newer => {
                Some(checkpoint.state)
            }
            _ => None,
        }
    }

    fn write_manifest(&self) -> Result<(), FolderError> {
        let name = format!("manifest-{}.jsonl", self.machine.iteration());
        self.write_lines(&name, self.machine.manifest())
    }

    fn write_metrics(&self) -> Result<(), FolderError> {
        let history = self.machine.history();
        self.write_lines("metrics.jsonl", history.iter())?;
        self.write("metrics.csv", table(history).as_bytes())
    }

    fn write_lines<T: serde::Serialize>(
        &self,
        name: &str,
        lines: impl Iterator<Item = T>,
    ) -> Result<(), FolderError> {
        let mut text = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut text, &line).map_err(|error| FolderError::Io {
                path: self.folder.join(name),
                source: error.into(),
            })?;
            text.push(b'\n');
        }
        self.write(name, &text)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FolderError> {
        let path = self.folder.join(name);
        write_atomic(&path, bytes, 0o600).map_err(|source| FolderError::Io { path, source })
    }
}

/// One row for every arm of every iteration.
fn table(history: &[Summary]) -> String {
    let mut text =
        "iteration,arm,score,gain,gain_low,gain_high,pairs,win_rate,alignment,diversity,raw_gain,kept\n".to_owned();
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.6}"));
    for summary in history {
        let raw_gain = number(summary.raw_gain.map(|gain| gain.mean));
        for (arm, result) in &summary.arms {
            let _ = writeln!(
                text,
                "{},{},{:.6},{:.6},{:.6},{:.6},{},{:.4},{},{},{raw_gain},{}",
                summary.iteration,
                arm_name(*arm),
                result.score,
                result.gain.mean,
                result.gain.low,
                result.gain.high,
                result.gain.pairs,
                result.wins.rate(),
                number(result.alignment),
                number(result.diversity),
                summary.kept,
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use concord_common::{Timestamp, clock::MockClock};

    use super::*;
    use crate::machine::{Checkpoint, ManifestLine, Stage, Training, testing};

    fn open(folder: &Path) -> Result<JobFolder, FolderError> {
        let clock = Arc::new(MockClock::new(Timestamp(5)));
        JobFolder::open(
            folder,
            testing::plan(),
            testing::specification(),
            1 << 20,
            clock,
        )
    }

    /// Records events until `stop` says so or the job is over.
    fn go_on(job: &mut JobFolder, stop: impl Fn(&Machine) -> bool) {
        while job.machine().work() != Work::Done {
            for event in testing::GOOD.act(job.machine()) {
                job.record(&event).unwrap();
                if stop(job.machine()) {
                    return;
                }
            }
        }
    }

    fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.metadata().unwrap().is_file())
            .map(|entry| {
                (
                    entry.file_name().into_string().unwrap(),
                    std::fs::read(entry.path()).unwrap(),
                )
            })
            .collect();
        files.sort();
        files
    }

    #[test]
    fn a_job_killed_after_every_event_ends_in_the_same_files() {
        let (once, often) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        go_on(&mut open(once.path()).unwrap(), |_| false);
        loop {
            let mut job = open(often.path()).unwrap();
            if job.machine().work() == Work::Done {
                break;
            }
            go_on(&mut job, |_| true);
        }
        assert_eq!(files(once.path()), files(often.path()));
        let names: Vec<String> = files(once.path())
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(
            names,
            [
                "journal.jsonl",
                "manifest-1.jsonl",
                "manifest-2.jsonl",
                "manifest-3.jsonl",
                "metrics.csv",
                "metrics.jsonl"
            ]
        );
    }

    #[test]
    fn a_torn_last_line_costs_one_event() {
        let folder = tempfile::tempdir().unwrap();
        let mut job = open(folder.path()).unwrap();
        go_on(&mut job, |machine| machine.stage() == Stage::TrainFirst);
        drop(job);
        let path = folder.path().join("journal.jsonl");
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        let mut job = open(folder.path()).unwrap();
        assert_eq!(job.machine().stage(), Stage::Filter);
        go_on(&mut job, |machine| machine.stage() == Stage::TrainFirst);
        drop(job);
        assert_eq!(std::fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn the_manifest_lines_of_an_iteration_are_complete() {
        let folder = tempfile::tempdir().unwrap();
        go_on(&mut open(folder.path()).unwrap(), |machine| {
            machine.stage() == Stage::TrainFirst
        });
        let text = std::fs::read_to_string(folder.path().join("manifest-1.jsonl")).unwrap();
        let lines: Vec<ManifestLine> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 6);
        assert!(lines.iter().all(|line| line.verdict.is_some()));
    }

    #[test]
    fn only_the_newest_checkpoint_is_kept_and_none_after_the_training() {
        let folder = tempfile::tempdir().unwrap();
        let mut job = open(folder.path()).unwrap();
        go_on(&mut job, |machine| machine.stage() == Stage::TrainFirst);
        let mut states = Vec::new();
        for step in [10, 20] {
            let state = job
                .store_mut()
                .put(format!("state {step}").as_bytes())
                .unwrap();
            states.push(state);
            let result = Checkpoint {
                step,
                state,
                loss: 1.0,
            };
            job.record(&Event::Checkpointed {
                iteration: 1,
                training: Training::First,
                result,
            })
            .unwrap();
        }
        assert!(job.store().get(states[0]).is_err() && job.store().get(states[1]).is_ok());
        for event in testing::GOOD.act(job.machine()) {
            job.record(&event).unwrap();
        }
        assert!(job.store().get(states[1]).is_err());
        assert_eq!(job.machine().stage(), Stage::TrainSecond);
    }

    #[test]
    fn the_folder_of_another_job_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        drop(open(folder.path()).unwrap());
        let clock = Arc::new(MockClock::new(Timestamp(5)));
        let error = JobFolder::open(
            folder.path(),
            testing::plan(),
            Digest::of(b"other"),
            1,
            clock,
        )
        .unwrap_err();
        assert!(error.to_string().contains("line 1"), "{error}");
    }

    #[test]
    fn two_workers_do_not_share_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let _job = open(folder.path()).unwrap();
        assert!(matches!(
            open(folder.path()),
            Err(FolderError::Journal(JournalError::InUse(_)))
        ));
    }

    #[test]
    fn the_table_has_a_row_for_every_arm() {
        let folder = tempfile::tempdir().unwrap();
        go_on(&mut open(folder.path()).unwrap(), |_| false);
        let table = std::fs::read_to_string(folder.path().join("metrics.csv")).unwrap();
        assert_eq!(table.lines().count(), 1 + 3 * 4);
        assert!(
            table.lines().all(|line| line.split(',').count() == 12),
            "{table}"
        );
    }
}
