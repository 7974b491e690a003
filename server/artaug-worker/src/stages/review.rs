//! Operators' words on the kept pairs.

use std::collections::BTreeMap;

use concord_artaug::machine::{Event, Machine, Work};

use super::{Ending, Job};
use crate::{artefacts, brake::Halt, desk::Done};

/// Takes in the words that there are on the pairs that wait for one. None if the job goes on without more of them; else how the work ends for now.
pub(super) fn read(job: &Job<'_>, open: &[u32]) -> Result<Option<Ending>, Halt> {
    let desk = job.desk;
    let iteration = desk.look(Machine::iteration);
    let words = desk.lease().reviews()?;
    let last = words.iter().map(|word| word.number).max();
    // In their order, so that the last word on a pair holds.
    let mut said: BTreeMap<u32, bool> = BTreeMap::new();
    for word in &words {
        if word.iteration == iteration && open.contains(&word.item) {
            said.insert(word.item, word.accepted);
        }
    }
    for (item, accepted) in &said {
        desk.record(vec![Done::plain(Event::Reviewed {
            iteration,
            item: *item,
            accepted: *accepted,
        })])?;
        // With too few pairs left the others' words mean nothing any more.
        if !desk.look(|machine| matches!(machine.work(), Work::Review(_))) {
            return Ok(None);
        }
    }
    let waiting: Vec<u32> = open
        .iter()
        .copied()
        .filter(|item| !said.contains_key(item))
        .collect();
    if waiting.is_empty() {
        return Ok(None);
    }
    // The page shows what there is; it is the same whenever it is made.
    artefacts::for_review(job)?;
    desk.rest();
    Ok(Some(Ending::Waits {
        reviews: last.unwrap_or(0),
        waiting,
    }))
}
