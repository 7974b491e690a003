//! A job's folder on the worker: journal, objects, manifests and metrics, kept in step with the state machine.
//!
//! - `journal.jsonl`: what happened; the only file that the job is resumed from
//! - `objects/<digest>`: images, LoRA files, checkpoints
//! - `manifest-<n>.jsonl`: iteration n, one line an item
//! - `held-out-N.jsonl`: the same for its held-out images
//! - `metrics.jsonl`, `metrics.csv`: what the iterations came to
//! - `ledger.json`: what they cost
//!
//! The server's journal is the authority and this one a copy. So an event goes in three steps: its objects to the server, then
//! [`JobFolder::stage`] and the line to the server, then [`JobFolder::commit`]. A kill between them leaves the copy behind the server's, and
//! [`JobFolder::adopt`] brings it in step.

mod retrace;
mod table;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use concord_common::{
    Clock, Digest,
    fsutil::{sweep_unfinished, write_atomic},
};

pub use self::retrace::Retrace;
use crate::{
    course::Worked,
    journal::{Entry, Journal, JournalError, Line},
    ledger::Ledger,
    machine::{Checkpoint, Event, Machine, ManifestLine, Misfit, Plan, Work},
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
    /// Objects that an event other than a checkpoint names: they stay.
    lasting: BTreeSet<Digest>,
    /// Objects that a checkpoint names: all but the newest one's go.
    passing: BTreeSet<Digest>,
    worked: Arc<Worked>,
    /// The most memory that a worker on the job has held.
    memory: Option<u64>,
    clock: Arc<dyn Clock>,
}

/// An event that fits, with its line, not yet recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct Staged {
    /// The line, to be kept elsewhere first.
    pub line: Line,
    event: Event,
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
    /// Opens a job's folder, or makes it, as a copy of a journal that the server keeps: `lines` are all of it, without newlines. Where the
    /// folder's own journal differs, the server's wins. Objects that it does not name are removed, and what a kill left of a write. A job
    /// without lines has not begun: record [`Machine::beginning`] first.
    ///
    /// # Errors
    /// If another process works on it, the lines belong to another specification or cannot be read, or the file system refuses.
    pub fn adopt(
        folder: &Path,
        plan: Plan,
        specification: Digest,
        quota: u64,
        clock: Arc<dyn Clock>,
        lines: &[Vec<u8>],
    ) -> Result<Self, FolderError> {
        let failed = |source| io_error(folder, source);
        std::fs::create_dir_all(folder).map_err(failed)?;
        let journal = Journal::adopt::<Event>(&folder.join("journal.jsonl"), lines)?;
        // Only now: the journal is locked, so nobody else writes here.
        sweep_unfinished(folder).map_err(failed)?;
        let machine = Machine::new(plan, specification);
        Self::replayed(folder, journal, machine, quota, clock)
    }

    fn replayed(
        folder: &Path,
        (journal, entries): (Journal, Vec<Entry<Event>>),
        machine: Machine,
        quota: u64,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, FolderError> {
        let before = entries.last().map_or(0, |entry| entry.worked);
        let memory = entries.iter().filter_map(|entry| entry.memory).max();
        let mut opened = Self {
            folder: folder.to_owned(),
            journal,
            machine,
            store: Store::open(&folder.join("objects"), quota)?,
            ledger: Ledger::default(),
            lasting: BTreeSet::new(),
            passing: BTreeSet::new(),
            worked: Arc::new(Worked::resumed(
                Duration::from_millis(before),
                Arc::clone(&clock),
            )),
            memory,
            clock,
        };
        for (index, entry) in entries.into_iter().enumerate() {
            if matches!(entry.event, Event::Decided { .. }) {
                // A folder that has only now got the journal lacks the manifests of the iterations before.
                opened.write_manifest()?;
            }
            opened.note(&entry.event);
            opened
                .machine
                .apply(entry.event)
                .map_err(|misfit| FolderError::Replay {
                    line: index + 1,
                    misfit,
                })?;
        }
        let checkpoint = opened.checkpoint();
        let lasting = &opened.lasting;
        let swept = opened
            .store
            .sweep(|digest| lasting.contains(&digest) || checkpoint.contains(&digest))?;
        if swept > 0 {
            tracing::info!(objects = swept, "objects that nothing needs removed");
        }
        // A crash may have come between a line of the journal and the files made from it.
        opened.write_metrics()?;
        match opened.machine.work() {
            Work::Items { .. } => {}
            Work::Review(_) => {
                opened.write_manifest()?;
                opened.rest();
            }
            _ => opened.write_manifest()?,
        }
        Ok(opened)
    }

    /// Takes in what an event costs and names.
    fn note(&mut self, event: &Event) {
        self.ledger.take(event);
        if matches!(event, Event::Checkpointed { .. }) {
            self.passing.extend(event.objects());
        } else {
            self.lasting.extend(event.objects());
        }
    }

    /// The state.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The objects.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The objects, to add some. An object must be kept before the event that names it is recorded; others are removed when the job is
    /// opened again.
    pub fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    /// What the job has cost.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Time worked on the job up to now; see [`Worked`].
    pub fn worked(&self) -> Duration {
        self.worked.total()
    }

    /// The same as it goes on, for whoever has to wait.
    pub fn time_worked(&self) -> &Arc<Worked> {
        &self.worked
    }

    /// Notes the most memory that this worker has held since it has the job, in bytes; the next line of the journal keeps it.
    pub fn note_memory(&mut self, bytes: u64) {
        self.memory = self.memory.max(Some(bytes));
    }

    /// The most memory that a worker on the job has held, in bytes; none if nobody measured.
    pub fn peak_memory(&self) -> Option<u64> {
        self.memory
    }

    /// Stops the count of [`JobFolder::worked`], for a pause; recording goes on with it. A review stops it by itself.
    pub fn rest(&self) {
        self.worked.rest();
    }

    /// The manifest of a finished iteration, or of the one under way once it is filtered.
    ///
    /// # Errors
    /// If it is not there or cannot be read.
    pub fn manifest(&self, iteration: u32) -> Result<Vec<ManifestLine>, FolderError> {
        let path = self.folder.join(manifest_name(iteration));
        let failed = |source| io_error(&path, source);
        let text = std::fs::read_to_string(&path).map_err(failed)?;
        text.lines()
            .map(|line| serde_json::from_str(line).map_err(|error| failed(error.into())))
            .collect()
    }

    /// Goes through what happened once more, to make lost objects again.
    ///
    /// # Errors
    /// If the journal cannot be read.
    pub fn retrace(&self) -> Result<Retrace, FolderError> {
        let (plan, specification) = (self.machine.plan(), self.machine.specification());
        let machine = Machine::new(plan.clone(), specification);
        Ok(Retrace::new(machine, self.journal.entries::<Event>()?))
    }

    /// The objects that the journal names, without checkpoints.
    pub fn lasting(&self) -> impl Iterator<Item = Digest> + '_ {
        self.lasting.iter().copied()
    }

    /// The objects that checkpoints named and that nothing needs any more. Here they are gone; of a job that was killed between a line and
    /// the removal that follows it, the server may still have some.
    pub fn outdated(&self) -> Vec<Digest> {
        let needed = self.checkpoint();
        let passing = self.passing.difference(&needed).copied();
        passing
            .filter(|object| !self.lasting.contains(object))
            .collect()
    }

    /// Checks that an event fits and gives the line that records it; nothing is changed.
    ///
    /// # Errors
    /// If it does not fit, or is too long for a line.
    pub fn stage(&self, event: &Event) -> Result<Staged, FolderError> {
        self.machine.check(event)?;
        Ok(Staged {
            line: self
                .journal
                .line(event, self.clock.now(), self.worked(), self.memory)?,
            event: event.clone(),
        })
    }

    /// Records a staged event and gives the objects that nothing needs any more; here they are removed already. Nothing may be recorded
    /// between the two calls.
    ///
    /// # Errors
    /// If another line came between, or the file system refuses; the job must then be opened again.
    pub fn commit(&mut self, staged: Staged) -> Result<Vec<Digest>, FolderError> {
        let Staged { line, event } = staged;
        self.machine.check(&event)?;
        self.journal.append(&line)?;
        let old = if is_of_training(&event) {
            self.checkpoint()
        } else {
            BTreeSet::new()
        };
        if matches!(event, Event::Decided { .. }) {
            self.write_manifest()?;
        }
        self.note(&event);
        self.machine.apply(event.clone())?;
        self.worked.go_on();
        match event {
            Event::Filtered { .. } => self.write_manifest()?,
            Event::Decided { .. } => self.write_metrics()?,
            _ => {}
        }
        if let Event::Filtered { .. } | Event::Reviewed { .. } = event {
            if matches!(self.machine.work(), Work::Review(_)) {
                self.rest();
            } else {
                // Once after the last word of a review: rewriting for each would be work without end.
                self.write_manifest()?;
            }
        }
        if old.is_empty() {
            return Ok(Vec::new());
        }
        let needed = self.checkpoint();
        let unneeded: Vec<Digest> = old
            .into_iter()
            .filter(|object| !needed.contains(object) && !self.lasting.contains(object))
            .collect();
        for object in &unneeded {
            self.store.remove(*object)?;
        }
        Ok(unneeded)
    }

    /// The objects of the training under way: its state and what it has finished.
    fn checkpoint(&self) -> BTreeSet<Digest> {
        let checkpoint = self.machine.checkpoint();
        checkpoint
            .into_iter()
            .flat_map(Checkpoint::objects)
            .collect()
    }

    fn write_manifest(&self) -> Result<(), FolderError> {
        let name = manifest_name(self.machine.iteration());
        self.write_lines(&name, self.machine.manifest())?;
        let mut held_out = self.machine.held_out().peekable();
        if held_out.peek().is_none() {
            return Ok(());
        }
        let name = format!("held-out-{}.jsonl", self.machine.iteration());
        self.write_lines(&name, held_out)
    }

    fn write_metrics(&self) -> Result<(), FolderError> {
        let history = self.machine.history();
        self.write_lines("metrics.jsonl", history.iter())?;
        self.write_lines("ledger.json", std::iter::once(&self.ledger))?;
        self.write("metrics.csv", table::table(history).as_bytes())
    }

    fn write_lines<T: serde::Serialize>(
        &self,
        name: &str,
        lines: impl Iterator<Item = T>,
    ) -> Result<(), FolderError> {
        let mut text = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut text, &line)
                .map_err(|error| io_error(&self.folder.join(name), error.into()))?;
            text.push(b'\n');
        }
        self.write(name, &text)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FolderError> {
        let path = self.folder.join(name);
        if std::fs::read(&path).is_ok_and(|kept| kept == bytes) {
            return Ok(());
        }
        write_atomic(&path, bytes, 0o600).map_err(|source| io_error(&path, source))
    }
}

fn io_error(path: &Path, source: io::Error) -> FolderError {
    FolderError::Io {
        path: path.to_owned(),
        source,
    }
}

fn manifest_name(iteration: u32) -> String {
    format!("manifest-{iteration}.jsonl")
}

/// Whether an event puts a checkpoint out of use.
fn is_of_training(event: &Event) -> bool {
    matches!(
        event,
        Event::Checkpointed { .. } | Event::Trained { .. } | Event::Decided { .. }
    )
}
