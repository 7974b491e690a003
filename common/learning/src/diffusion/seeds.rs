//! Seeds of every draw of a job, each from its place alone: a run that is taken up again needs no generator's state.

use concord_common::seed::Seed;
use tch::Tensor;

use super::params::Compute;
use crate::{error::LearningError, torch};

/// Where in a job something is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    /// The job's iteration, from 0.
    pub iteration: u32,
    /// The stage's name.
    pub stage: &'a str,
    /// The item: a prompt, a picture, an example.
    pub item: u64,
    /// The step within the item.
    pub step: u64,
}

impl Place<'_> {
    /// The seed of this place in a job with that seed.
    pub fn seed(&self, job: Seed) -> Seed {
        let Self {
            iteration,
            stage,
            item,
            step,
        } = self;
        job.derive(&format!(
            "artaug iteration {iteration} stage {stage} item {item} step {step}"
        ))
    }
}

/// Standard normal noise for one latent each, from a seed each, `[n, c, h, w]`: a sample's noise does not depend on its batch.
///
/// # Errors
/// [`LearningError::Data`] for no seeds.
pub fn noise(
    seeds: &[Seed],
    [channels, height, width]: [i64; 3],
    compute: Compute,
) -> Result<Tensor, LearningError> {
    if seeds.is_empty() {
        return Err(LearningError::Data(
            "noise needs at least one seed".to_owned(),
        ));
    }
    let drawn = seeds
        .iter()
        .map(|seed| torch::seeded_randn(seed.0, &[channels, height, width], tch::Kind::Float))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Tensor::f_stack(&drawn, 0)?
        .f_to_kind(compute.kind)?
        .f_to_device(compute.device)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::testing;

    const PLACE: Place<'static> = Place {
        iteration: 1,
        stage: "generate",
        item: 7,
        step: 0,
    };

    #[test]
    fn every_place_has_a_seed_of_its_own() {
        let job = Seed(3);
        let others = [
            Place {
                iteration: 2,
                ..PLACE
            },
            Place {
                stage: "regenerate",
                ..PLACE
            },
            Place { item: 8, ..PLACE },
            Place { step: 1, ..PLACE },
        ];
        for other in others {
            assert_ne!(other.seed(job), PLACE.seed(job));
        }
        assert_ne!(PLACE.seed(Seed(4)), PLACE.seed(job));
        assert_eq!(PLACE.seed(job), PLACE.seed(job));
    }

    #[test]
    fn noise_does_not_depend_on_the_batch() {
        let (a, b) = (Seed(1), Seed(2));
        let both = noise(&[a, b], [4, 3, 5], Compute::CPU).unwrap();
        let one = noise(&[b], [4, 3, 5], Compute::CPU).unwrap();
        assert!(testing::same(&both.narrow(0, 1, 1), &one));
        assert!(testing::apart(&both.narrow(0, 0, 1), &one) > 0.1);
    }
}
