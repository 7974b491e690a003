//! For tests: a job whose server has the lines of the folder's own journal.

use super::*;
use crate::machine::Ingredients;

impl JobFolder {
    /// Takes a job up as a worker does, or begins it. A torn last line never reached the server.
    pub(crate) fn open(
        folder: &Path,
        plan: Plan,
        specification: Digest,
        quota: u64,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, FolderError> {
        let journal = std::fs::read(folder.join("journal.jsonl")).unwrap_or_default();
        let mut lines: Vec<Vec<u8>> = journal
            .split(|byte| *byte == b'\n')
            .map(<[u8]>::to_vec)
            .collect();
        lines.pop();
        let mut opened = Self::adopt(folder, plan, specification, quota, clock, &lines)?;
        if !opened.machine.has_begun() {
            opened.record(&opened.machine.beginning(Ingredients::default()))?;
        }
        Ok(opened)
    }

    /// Records what was done.
    pub(crate) fn record(&mut self, event: &Event) -> Result<(), FolderError> {
        let staged = self.stage(event)?;
        self.commit(staged).map(|_| ())
    }
}
