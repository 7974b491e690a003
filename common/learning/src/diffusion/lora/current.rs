//! The one way to the model of a job's iteration.

use std::path::Path;

use super::{Lora, attach, known};
use crate::{
    diffusion::{denoiser::Denoiser, params::Compute, pipeline::TextToImage, unet::UNet},
    error::LearningError,
};

/// Name of the adapter on its way into the weights.
const JOINED: &str = "joined";

/// The base model from its folder with everything that was learned so far, joined into one set by [`Lora::sum`], merged into its weights.
///
/// The model always comes about in this way, whether a job was interrupted or not: from the files of the base and the bytes of the joined set alone.
/// Merging what an iteration learned into the model that the iteration before left would give weights whose last bits tell how often the job was
/// taken up again; [`Linear::merge`](crate::diffusion::linear::Linear::merge) refuses a second change.
///
/// The base of every changed weight is taken from its file, so that a model in half precision is rounded once, with its change: half precision has 8 or 11
/// digits, and what an iteration learned is often less than the last of them.
///
/// # Errors
/// Those of [`TextToImage::load`]; [`LearningError::Config`] if a pair fits no layer of the UNet.
pub fn current(
    folder: &Path,
    joined: Option<&Lora>,
    compute: Compute,
) -> Result<TextToImage, LearningError> {
    let mut model = TextToImage::load(folder, compute)?;
    if let Some(joined) = joined {
        // On the CPU and in f32, as it was read.
        attach(model.sites(), JOINED, joined, 1.0, Compute::CPU)?;
        let stored = UNet::stored(&folder.join("unet"))?;
        let mut count = 0;
        for (_, linear) in model.sites() {
            if linear.pairs().iter().any(|pair| pair.adapter == JOINED) {
                let base = stored.tensor(&format!("{}.weight", linear.name()))?;
                count += usize::from(linear.merge_onto(JOINED, &base)?);
            }
        }
        known(count, JOINED)?;
    }
    Ok(model)
}

#[cfg(test)]
mod tests {
    use concord_common::seed::Seed;
    use tch::Kind;

    use super::*;
    use crate::diffusion::{
        lora::{self, Placement, merge},
        testing::{self, PLAIN},
        train::lora_leaves,
    };

    /// What an iteration learned, as it comes back from its bytes.
    fn learned(model: &mut TextToImage, adapter: &str) -> Lora {
        let seed = Seed(5).derive(adapter);
        lora::attach_fresh(
            model.sites(),
            adapter,
            Placement::All,
            2,
            seed,
            Compute::CPU,
        )
        .unwrap();
        for (name, leaf) in lora_leaves(model.sites(), adapter) {
            let shape: Vec<usize> = leaf.size().iter().map(|&size| size as usize).collect();
            let values = testing::values(&format!("{adapter}{name}"), &shape, 0.2, Kind::Float);
            tch::no_grad(|| leaf.shallow_clone().copy_(&values));
        }
        let lora = lora::extract(model.sites(), adapter).unwrap();
        lora::detach(model.sites(), adapter).unwrap();
        let bytes = lora.to_bytes().unwrap();
        let read = Lora::from_bytes(&bytes).unwrap();
        assert_eq!(read.to_bytes().unwrap(), bytes);
        read
    }

    #[test]
    fn the_model_of_an_iteration_comes_from_the_base_and_the_joined_bytes_alone() {
        let folder = testing::checkpoint("sd2", PLAIN);
        let mut model = current(folder.path(), None, Compute::CPU).unwrap();
        let base = model.digest().unwrap();
        let (one, two) = (learned(&mut model, "one"), learned(&mut model, "two"));
        assert_eq!(model.digest().unwrap(), base);
        let joined = Lora::sum(&[(&one, 1.0), (&two, 1.0)]).unwrap();
        let stored = joined.to_bytes().unwrap();
        let again = Lora::from_bytes(&stored).unwrap();
        let straight = current(folder.path(), Some(&joined), Compute::CPU).unwrap();
        let resumed = current(folder.path(), Some(&again), Compute::CPU).unwrap();
        assert_ne!(straight.digest().unwrap(), base);
        assert_eq!(straight.digest().unwrap(), resumed.digest().unwrap());

        // Attached, the two compute what the merged model computes.
        for (adapter, lora) in [("one", &one), ("two", &two)] {
            attach(model.sites(), adapter, lora, 1.0, Compute::CPU).unwrap();
        }
        let sample = testing::values("input.sample", &[1, 4, 18, 12], 1.7, Kind::Float);
        let times = tch::Tensor::from_slice(&[500.0_f64]);
        let condition = model.condition(&["a fox"]).unwrap();
        let output = |model: &TextToImage| model.predict(&sample, &times, &condition).unwrap();
        let apart = testing::apart(&output(&model), &output(&straight));
        assert!(apart < 1e-4, "{apart}");
    }

    #[test]
    fn a_second_change_is_not_merged_onto_the_first() {
        let folder = testing::checkpoint("sd2", PLAIN);
        let mut model = current(folder.path(), None, Compute::CPU).unwrap();
        let (one, two) = (learned(&mut model, "one"), learned(&mut model, "two"));
        let mut model = current(folder.path(), Some(&one), Compute::CPU).unwrap();
        attach(model.sites(), "two", &two, 1.0, Compute::CPU).unwrap();
        let refusal = merge(model.sites(), "two").unwrap_err().to_string();
        assert!(refusal.contains("load the model again"), "{refusal}");
    }

    /// Base and change are added in f32 and rounded once: what is too small beside a rounded base may still show in the sum.
    #[test]
    fn a_model_in_half_precision_is_rounded_once() {
        let folder = testing::checkpoint("sd2", PLAIN);
        let mut exact = current(folder.path(), None, Compute::CPU).unwrap();
        let one = learned(&mut exact, "one");
        let small = Lora::sum(&[(&one, 1.0 / 64.0)]).unwrap();
        let half = testing::compute(Kind::BFloat16);
        let loaded = current(folder.path(), None, half).unwrap();
        let (mut changed, mut rounded_twice) = (0, 0);
        for lora in [&one, &small] {
            let merged = current(folder.path(), Some(lora), half).unwrap();
            for (name, pair) in &lora.pairs {
                let name = format!("{}.weight", name.strip_prefix("unet.").unwrap());
                let base = &exact.unet().tensors()[&name];
                let change = (pair.up.matmul(&pair.down) * pair.scale).view_as(base);
                let expected = (base + &change).to_kind(Kind::BFloat16);
                let after = &merged.unet().tensors()[&name];
                assert!(testing::same(after, &expected), "{name}");
                let before = &loaded.unet().tensors()[&name];
                changed += usize::from(!testing::same(after, before));
                let twice = (before.to_kind(Kind::Float) + change).to_kind(Kind::BFloat16);
                rounded_twice += usize::from(!testing::same(&twice, &expected));
            }
        }
        assert_eq!(changed, 2 * one.pairs.len());
        assert!(rounded_twice > 0);
        let exact = current(folder.path(), Some(&one), Compute::CPU).unwrap();
        let merged = current(folder.path(), Some(&one), half).unwrap();
        for (name, weight) in merged.weights() {
            let expected = exact.weights()[&name].to_kind(Kind::BFloat16);
            assert!(testing::same(&weight, &expected), "{name}");
        }
    }

    #[test]
    fn bytes_that_are_no_lora_of_the_model_are_refused_by_name() {
        let folder = testing::checkpoint("sd2", PLAIN);
        let mut model = current(folder.path(), None, Compute::CPU).unwrap();
        let mut one = learned(&mut model, "one");
        let bytes = one.to_bytes().unwrap();
        let empty = crate::named::NamedTensors::new();
        let other = crate::named::to_safetensors(&empty, "{}").unwrap();
        for (bytes, named) in [
            (&bytes[..bytes.len() - 1], "not a whole"),
            (b"", "not a whole"),
            (&other, "no LoRA of this version"),
        ] {
            let refusal = Lora::from_bytes(bytes).unwrap_err();
            assert!(matches!(refusal, LearningError::State(_)), "{refusal}");
            assert!(refusal.to_string().contains(named), "{refusal}");
        }
        let (_, pair) = one.pairs.pop_first().unwrap();
        one.pairs.insert("unet.nowhere".to_owned(), pair);
        let refusal = current(folder.path(), Some(&one), Compute::CPU).unwrap_err();
        assert!(refusal.to_string().contains("unet.nowhere"), "{refusal}");
    }
}
