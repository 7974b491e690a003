//! One file cut into three splits.

use serde::{Deserialize, Serialize};

/// How the rows of one file are shared out. A row's place depends on the seed and its texts alone: equal texts always land in
/// the same split, and new rows leave the old ones where they were.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitRule {
    /// Another seed, another cut.
    #[serde(default)]
    pub seed: u64,
    /// Share of validation rows.
    #[serde(default = "default_validation")]
    pub validation: f64,
    /// Share of test rows; the rest is for training.
    #[serde(default = "default_test")]
    pub test: f64,
}

fn default_validation() -> f64 {
    0.15
}

fn default_test() -> f64 {
    0.25
}

/// One of the three splits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Train,
    Validation,
    Test,
}

impl SplitRule {
    /// Whether both shares are above 0 and leave training rows.
    pub fn is_valid(&self) -> bool {
        self.validation > 0.0 && self.test > 0.0 && self.validation + self.test < 1.0
    }

    /// The split of a row.
    pub(super) fn part(&self, text: &str, text_b: Option<&str>) -> Part {
        let mut hasher = blake3::Hasher::new_derive_key("concord.v1 split of one file");
        hasher.update(&self.seed.to_le_bytes());
        hasher.update(text.trim().as_bytes());
        hasher.update(&[0]);
        hasher.update(text_b.unwrap_or_default().trim().as_bytes());
        let mut first = [0_u8; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        let place = (u64::from_le_bytes(first) >> 11) as f64 / (1_u64 << 53) as f64;
        if place < self.validation {
            Part::Validation
        } else if place < self.validation + self.test {
            Part::Test
        } else {
            Part::Train
        }
    }
}
