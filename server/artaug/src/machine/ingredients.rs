//! What a job is made from beside its specification.

use std::collections::BTreeMap;

use concord_common::Digest;
use serde::{Deserialize, Serialize};

/// Digests of what a job is made from beside its specification, by name: the model's files, prompts, data. The first line of the journal
/// holds them; a worker that goes on with the job must have the same, or its images and adapters would come from two sources.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ingredients(BTreeMap<String, Digest>);

impl Ingredients {
    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds one.
    pub fn add(&mut self, name: &str, digest: Digest) {
        self.0.insert(name.to_owned(), digest);
    }

    /// Adds one that is made of several texts, in their order.
    pub fn add_texts<'a>(&mut self, name: &str, texts: impl IntoIterator<Item = &'a str>) {
        let mut hasher = blake3::Hasher::new_derive_key("concord.v1 artaug ingredient");
        for text in texts {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        self.add(name, hasher.finalize().into());
    }

    /// The names of these under which `found` has something else, or nothing. What only `found` has is of no account: another version may
    /// know more names, and a journal may know none.
    pub fn differing(&self, found: &Self) -> Vec<String> {
        self.0
            .iter()
            .filter(|(name, digest)| found.0.get(*name) != Some(digest))
            .map(|(name, _)| name.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Event, Machine, testing};

    fn made_of(prompts: &[&str]) -> Ingredients {
        let mut ingredients = Ingredients::default();
        ingredients.add_texts("prompts", prompts.iter().copied());
        ingredients.add("model", Digest::of(b"model"));
        ingredients
    }

    #[test]
    fn what_differs_is_named() {
        let first = made_of(&["a", "bc"]);
        assert!(first.differing(&made_of(&["a", "bc"])).is_empty());
        assert_eq!(first.differing(&made_of(&["ab", "c"])), ["prompts"]);
        assert_eq!(first.differing(&made_of(&["bc", "a"])), ["prompts"]);
        assert_eq!(
            first.differing(&Ingredients::default()),
            ["model", "prompts"]
        );
        assert!(Ingredients::default().differing(&first).is_empty());
    }

    #[test]
    fn a_job_knows_from_its_first_line_what_it_is_made_from() {
        let mut machine = Machine::new(testing::plan(), testing::specification());
        let began = machine.beginning(made_of(&["a"]));
        let line = serde_json::to_string(&began).unwrap();
        machine
            .apply(serde_json::from_str::<Event>(&line).unwrap())
            .unwrap();
        assert_eq!(machine.ingredients(), &made_of(&["a"]));
        // A line from before there were any.
        let old = serde_json::to_string(&testing::began()).unwrap();
        assert!(!old.contains("ingredients"), "{old}");
        assert_eq!(
            serde_json::from_str::<Event>(&old).unwrap(),
            testing::began()
        );
    }
}
