//! Sums of low-rank changes, and the best change of a lower rank.

use std::collections::{BTreeMap, BTreeSet};

use tch::{Kind, Tensor};

use super::{Lora, Pair};
use crate::error::LearningError;

impl Lora {
    /// The weighted sum of several sets, exact: A's rows and B's columns side by side, so that ranks add up. With weights 1 / N this is the mean.
    ///
    /// Weight and scale go to B; the sum's scale is 1 (alpha = the total rank).
    ///
    /// # Errors
    /// [`LearningError::Torch`] if two pairs of one layer have unlike shapes.
    pub fn sum(parts: &[(&Self, f64)]) -> Result<Self, LearningError> {
        let names: BTreeSet<&String> = parts
            .iter()
            .flat_map(|(lora, _)| lora.pairs.keys())
            .collect();
        let mut pairs = BTreeMap::new();
        for name in names {
            let mut downs = Vec::new();
            let mut ups = Vec::new();
            for (lora, weight) in parts {
                if let Some(pair) = lora.pairs.get(name) {
                    downs.push(pair.down.shallow_clone());
                    ups.push(pair.up.f_mul_scalar(pair.scale * weight)?);
                }
            }
            pairs.insert(
                name.clone(),
                Pair {
                    down: Tensor::f_cat(&downs, 0)?,
                    up: Tensor::f_cat(&ups, 1)?,
                    scale: 1.0,
                },
            );
        }
        Ok(Self { pairs })
    }

    /// The nearest set of at most this rank (Eckart and Young 1936): a truncated singular value decomposition of every B A, worked out on the small
    /// factors of their QR decompositions. Singular values are shared out evenly. Also gives the part of the squared norm that was lost.
    ///
    /// All pairs have one rank: those of smaller layers are filled up with zeros, since not every reader of files takes unequal ranks.
    ///
    /// # Errors
    /// [`LearningError::Config`] for rank 0, [`LearningError::Torch`] if a decomposition fails.
    pub fn truncated(&self, rank: i64) -> Result<(Self, f64), LearningError> {
        if rank < 1 {
            return Err(LearningError::Config(
                "a LoRA cannot be cut to rank 0".to_owned(),
            ));
        }
        let (mut all, mut lost) = (0.0, 0.0);
        let mut pairs = BTreeMap::new();
        for (name, pair) in &self.pairs {
            let down = pair.down.f_to_kind(Kind::Double)?;
            let up = pair.up.f_to_kind(Kind::Double)?.f_mul_scalar(pair.scale)?;
            let (left, inner_left) = Tensor::f_linalg_qr(&up, "reduced")?;
            let (right, inner_right) =
                Tensor::f_linalg_qr(&down.f_transpose(0, 1)?.f_contiguous()?, "reduced")?;
            let core = inner_left.f_matmul(&inner_right.f_transpose(0, 1)?)?;
            // `svd` rather than `linalg_svd`: the binding of the latter insists on the name of a CUDA driver.
            let (u, s, v) = core.f_svd(true, true)?;
            let kept = rank.min(s.size()[0]);
            let squares = s.f_square()?;
            let total = squares.f_sum(Kind::Double)?.f_double_value(&[])?;
            let held = squares
                .f_narrow(0, 0, kept)?
                .f_sum(Kind::Double)?
                .f_double_value(&[])?;
            all += total;
            lost += (total - held).max(0.0);
            let roots = s.f_narrow(0, 0, kept)?.f_sqrt()?;
            let up = left
                .f_matmul(&u.f_narrow(1, 0, kept)?)?
                .f_mul(&roots.f_unsqueeze(0)?)?;
            let down = v
                .f_narrow(1, 0, kept)?
                .f_transpose(0, 1)?
                .f_matmul(&right.f_transpose(0, 1)?)?
                .f_mul(&roots.f_unsqueeze(1)?)?;
            pairs.insert(
                name.clone(),
                Pair {
                    down: down.f_to_kind(Kind::Float)?.f_contiguous()?,
                    up: up.f_to_kind(Kind::Float)?.f_contiguous()?,
                    scale: 1.0,
                },
            );
        }
        let part = if all > 0.0 { lost / all } else { 0.0 };
        let mut cut = Self { pairs };
        let rank = cut.rank();
        for pair in cut.pairs.values_mut() {
            let missing = rank - pair.down.size()[0];
            if missing > 0 {
                pair.down = pair.down.f_constant_pad_nd([0, 0, 0, missing])?;
                pair.up = pair.up.f_constant_pad_nd([0, missing])?;
            }
        }
        Ok((cut, part))
    }

    /// The whole change of a layer's weight, `[outputs, inputs]` in f64.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the product cannot be formed.
    pub fn change(&self, name: &str) -> Result<Option<Tensor>, LearningError> {
        self.pairs
            .get(name)
            .map(|pair| {
                Ok(pair
                    .up
                    .f_to_kind(Kind::Double)?
                    .f_matmul(&pair.down.f_to_kind(Kind::Double)?)?
                    .f_mul_scalar(pair.scale)?)
            })
            .transpose()
    }

    /// The largest rank of a pair; 0 without pairs.
    pub fn rank(&self) -> i64 {
        self.pairs
            .values()
            .map(|pair| pair.down.size()[0])
            .max()
            .unwrap_or(0)
    }
}
