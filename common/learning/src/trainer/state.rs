//! What a trainer is saved as and goes on from.

use std::collections::BTreeMap;

use concord_common::Digest;
use serde::{Deserialize, Serialize};

use super::{LocalTrainer, optimiser_settings, personal::Personal};
use crate::{
    error::LearningError,
    model::{ModelFacts, PersonalModel, json, parsed},
    named::{NamedTensors, Taker, from_safetensors, to_safetensors},
    optimiser::{AdamW, Counters},
};

const FORMAT: u32 = 1;

/// A trainer between rounds: private adapter, heads, gate, MOON's previous model, optimiser, best model. All of it is private.
#[derive(Clone, PartialEq, Debug)]
pub struct SavedState {
    facts: StateFacts,
    tensors: NamedTensors,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFacts {
    format: u32,
    silo: String,
    /// Of the job's specification.
    spec: Digest,
    /// Of the backbone's weights file.
    backbone: Digest,
    last_round: u32,
    /// Whether a first global adapter has been seen.
    begun: bool,
    counters: BTreeMap<String, Counters>,
    best: Option<ModelFacts>,
}

impl SavedState {
    /// Last round that went into it; 0 for none.
    pub fn last_round(&self) -> u32 {
        self.facts.last_round
    }

    /// BLAKE3 of the backbone that it belongs to.
    pub fn backbone(&self) -> &Digest {
        &self.facts.backbone
    }

    /// The state as one safetensors file; equal states give equal bytes.
    ///
    /// # Errors
    /// [`LearningError::State`] if it cannot be written.
    pub fn to_bytes(&self) -> Result<Vec<u8>, LearningError> {
        to_safetensors(&self.tensors, &json(&self.facts)?)
    }

    /// The reverse of [`SavedState::to_bytes`].
    ///
    /// # Errors
    /// [`LearningError::State`] if the bytes are no state of this version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, LearningError> {
        let (tensors, text) = from_safetensors(bytes)?;
        let facts: StateFacts = parsed("the state's facts", &text)?;
        if facts.format != FORMAT {
            return Err(LearningError::State(format!(
                "it has format {}, this program reads {FORMAT}",
                facts.format
            )));
        }
        Ok(Self { facts, tensors })
    }
}

impl LocalTrainer {
    /// Everything that training goes on from.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if a tensor cannot be copied.
    pub fn save_state(&self) -> Result<SavedState, LearningError> {
        let mut tensors = NamedTensors::new();
        if let Some(personal) = &self.personal {
            tensors.extend(personal.to_host()?);
        }
        tensors.extend(self.optimiser.moments("adam.")?);
        if let Some(best) = &self.best {
            tensors.extend(
                best.tensors
                    .iter()
                    .map(|(name, tensor)| (format!("best.{name}"), tensor.clone())),
            );
        }
        Ok(SavedState {
            facts: StateFacts {
                format: FORMAT,
                silo: self.silo.to_string(),
                spec: self.spec_digest,
                backbone: *self.backbone.digest(),
                last_round: self.last_round,
                begun: self.personal.is_some(),
                counters: self.optimiser.counters(),
                best: self.best.as_ref().map(|model| model.facts.clone()),
            },
            tensors,
        })
    }

    pub(super) fn restore(&mut self, saved: SavedState) -> Result<(), LearningError> {
        let SavedState { facts, tensors } = saved;
        for (what, same) in [
            ("silo", facts.silo == self.silo.as_str()),
            ("specification", facts.spec == self.spec_digest),
            ("backbone", facts.backbone == *self.backbone.digest()),
        ] {
            if !same {
                return Err(LearningError::State(format!(
                    "it belongs to another {what}"
                )));
            }
        }
        let mut taker = Taker::new("the trainer's state", tensors);
        let best_tensors = taker.section("best.");
        let personal = facts
            .begun
            .then(|| Personal::from_host(&self.plan, &self.sizes, &mut taker))
            .transpose()?;
        let shapes: BTreeMap<String, Vec<usize>> = personal
            .iter()
            .flat_map(Personal::named)
            .map(|(name, tensor)| {
                (
                    name,
                    tensor
                        .size()
                        .into_iter()
                        .map(|size| size as usize)
                        .collect(),
                )
            })
            .collect();
        let optimiser = AdamW::restore(
            optimiser_settings(&self.spec),
            &facts.counters,
            "adam.",
            &mut taker,
            self.sizes.kind,
            |name| shapes.get(name).cloned(),
        )?;
        taker.finish()?;
        let best = facts.best.map(|facts| PersonalModel {
            facts,
            tensors: best_tensors,
        });
        if let Some(best) = &best {
            best.load(self.sizes.kind)?;
        }
        self.personal = personal;
        self.optimiser = optimiser;
        self.best = best;
        self.last_round = facts.last_round;
        Ok(())
    }
}
