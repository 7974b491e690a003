//! From a journal's first line to its last, once more.

use std::{collections::BTreeSet, iter::Enumerate, vec};

use concord_common::Digest;

use super::FolderError;
use crate::{
    journal::Entry,
    machine::{Event, Machine},
};

/// A way through a job's journal, see [`super::JobFolder::retrace`].
#[derive(Debug)]
pub struct Retrace {
    machine: Machine,
    entries: Enumerate<vec::IntoIter<Entry<Event>>>,
    /// The event that was reached last, with its line from 1. It is applied when the way goes on.
    reached: Option<(usize, Event)>,
}

impl Retrace {
    pub(super) fn new(machine: Machine, entries: Vec<Entry<Event>>) -> Self {
        Self {
            machine,
            entries: entries.into_iter().enumerate(),
            reached: None,
        }
    }

    /// Goes on to the next event that made one of these objects, and gives it with the state that the job was in before: the same work done again makes
    /// the same object, with all members of its batch. None at the end.
    ///
    /// # Errors
    /// If a line does not fit.
    pub fn next_of(
        &mut self,
        objects: &BTreeSet<Digest>,
    ) -> Result<Option<(&Machine, &Event)>, FolderError> {
        loop {
            if let Some((line, event)) = self.reached.take() {
                self.machine
                    .apply(event)
                    .map_err(|misfit| FolderError::Replay { line, misfit })?;
            }
            let Some((index, entry)) = self.entries.next() else {
                return Ok(None);
            };
            let made = entry.event.objects();
            self.reached = Some((index + 1, entry.event));
            if made.iter().any(|object| objects.contains(object)) {
                break;
            }
        }
        let reached = self.reached.as_ref();
        Ok(reached.map(|(_, event)| (&self.machine, event)))
    }
}
