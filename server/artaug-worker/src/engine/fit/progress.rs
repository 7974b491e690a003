//! How far a fit is, and the saved state that tells it.

use std::collections::BTreeMap;

use bytes::Bytes;
use concord_artaug::engine::{EngineError, Kept};
use concord_common::Digest;
use concord_learning::diffusion::lora::Lora;

use crate::engine::{
    container::{What, pack, unpack},
    unusable,
};

/// Sections of a saved state.
const FINGERPRINT: &str = "fit";
const LOSSES: &str = "losses";
const TRAINER: &str = "trainer";
const FINISHED: &str = "finished";

/// How far a fit is.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) finished: Finished,
    /// Losses of all steps so far, over all groups.
    pub(super) losses: Vec<f64>,
    /// How many of them an earlier state told of.
    reported: usize,
    /// The trainer's state in the group that comes next, if it has begun.
    pub(super) trainer: Option<Vec<u8>>,
}

/// `LoRA` files of the finished groups, in order. A state holds a digest of them and not the files, which would be written again and again.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) files: Vec<Bytes>,
    /// Follows from all files and their order.
    digest: Digest,
}

impl Default for Finished {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            digest: Digest::of(b"no group"),
        }
    }
}

impl Finished {
    pub(super) fn push(&mut self, file: Bytes) {
        let chained = [self.digest, Digest::of(&file)].map(|digest| *digest.as_bytes());
        self.digest = Digest::of(chained.as_flattened());
        self.files.push(file);
    }
}

impl Progress {
    /// The mean of the losses that no state has told of yet.
    pub(super) fn unreported(&self) -> f64 {
        let new = &self.losses[self.reported..];
        new.iter().sum::<f64>() / new.len() as f64
    }

    /// A state that was kept has told of all losses so far.
    pub(super) fn report(&mut self) {
        self.reported = self.losses.len();
    }

    /// The state to keep, with the trainer's own.
    pub(super) fn write(
        &self,
        fingerprint: &str,
        trainer: Vec<u8>,
    ) -> Result<Vec<u8>, EngineError> {
        let losses: Vec<u8> = self
            .losses
            .iter()
            .flat_map(|loss| loss.to_le_bytes())
            .collect();
        let finished = self.finished.digest.to_vec();
        let sections = BTreeMap::from([
            (FINGERPRINT.to_owned(), fingerprint.as_bytes().to_vec()),
            (LOSSES.to_owned(), losses),
            (TRAINER.to_owned(), trainer),
            (FINISHED.to_owned(), finished),
        ]);
        pack(What::Fit, &sections)
    }

    /// A saved state, if it is one of this fit, which has so many groups.
    pub(super) fn read(
        kept: Kept<'_>,
        fingerprint: &str,
        groups: usize,
    ) -> Result<Self, EngineError> {
        let complain = |reason: &str| {
            EngineError::Unusable(format!("a saved state of a fit cannot be used: {reason}"))
        };
        let mut sections = unpack(What::Fit, kept.state)?;
        let mut take = |name: &str| {
            sections
                .remove(name)
                .ok_or_else(|| complain(&format!("it has no section {name:?}")))
        };
        let told = take(FINGERPRINT)?;
        if told != fingerprint.as_bytes() {
            return Err(complain(&format!(
                "it is of another fit: it says `{}`, this one is `{fingerprint}`",
                String::from_utf8_lossy(&told)
            )));
        }
        let losses = take(LOSSES)?;
        let (losses, rest) = losses.as_chunks::<8>();
        if !rest.is_empty() {
            return Err(complain("its losses are cut short"));
        }
        let trainer = Some(take(TRAINER)?);
        let digest = take(FINISHED)?;
        if let Some(name) = sections.keys().next() {
            return Err(complain(&format!("it has a section {name:?}")));
        }
        let mut finished = Finished::default();
        for file in kept.finished {
            finished.push(file.clone());
        }
        if finished.files.len() >= groups || digest != finished.digest.as_bytes() {
            return Err(complain(
                "the finished pairs that are given with it are not those it was saved with",
            ));
        }
        for lora in &finished.files {
            Lora::from_bytes(lora).map_err(unusable)?;
        }
        Ok(Self {
            finished,
            reported: losses.len(),
            losses: losses
                .iter()
                .map(|bytes| f64::from_le_bytes(*bytes))
                .collect(),
            trainer,
        })
    }
}
