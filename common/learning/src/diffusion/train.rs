//! Training steps whose whole state can be saved: parameters, moments, counters and gradients that are still being gathered.
//!
//! Differential training (ArtAug) is two fits: LoRA_1 on the first pictures X, then frozen, and LoRA_2 on the enhanced pictures X' on top of it.
//! LoRA_2 is what is kept. Nothing of that is special to the steps here: a frozen pair is simply no parameter.

use std::collections::BTreeMap;

use concord_common::seed::Seed;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::{
    denoiser::{Condition, Denoiser},
    lora::SiteList,
    params::shortened,
    seeds,
};
use crate::{
    error::LearningError,
    named::{self, HostTensor, NamedTensors, Taker},
    optimiser::{AdamW, AdamWSettings, Counters, Parameter},
};

/// How a fit goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// Learning rate after warm-up.
    pub learning_rate: f64,
    /// The optimiser's settings.
    pub adamw: AdamWSettings,
    /// Examples in a forward pass.
    pub batch: usize,
    /// Forward passes whose gradients make one step.
    pub accumulation: u32,
    /// The steps that the fit has.
    pub steps: u64,
}

/// An example: a clean, scaled latent `[1, c, h, w]` and its text.
#[derive(Debug)]
pub struct Example {
    /// The latent.
    pub latent: Tensor,
    /// One row.
    pub condition: Condition,
}

impl Recipe {
    /// What a fit's numbers depend on. The number of steps is not among it: a fit may be made longer.
    fn fingerprint(&self, told: &str) -> String {
        let AdamWSettings {
            weight_decay,
            warmup_steps,
            clip_norm,
        } = self.adamw;
        format!(
            "learning rate {:?}, weight decay {weight_decay:?}, warm-up {warmup_steps}, clip {clip_norm:?}, batch {}, accumulation {}; {told}",
            self.learning_rate, self.batch, self.accumulation
        )
    }
}

/// What stands beside the tensors of a saved state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Facts {
    step: u64,
    gathered: u32,
    counters: BTreeMap<String, Counters>,
    /// What the fit was told to be; a state of another one is refused.
    fingerprint: String,
}

/// Parameters, their optimiser and the gradients gathered since the last step.
///
/// The optimiser works on the CPU in f32 (f64 for a model in f64); where the model's leaves are elsewhere or in another kind, they are given the values
/// after every step.
#[derive(Debug)]
pub struct Trainer {
    recipe: Recipe,
    told: String,
    leaves: Vec<Tensor>,
    parameters: Vec<Parameter>,
    optimiser: AdamW,
    sums: Option<Vec<Tensor>>,
    gathered: u32,
    step: u64,
}

/// Leaves of all pairs of an adapter that are not frozen, by name.
pub fn lora_leaves(sites: SiteList<'_>, adapter: &str) -> BTreeMap<String, Tensor> {
    let mut leaves = BTreeMap::new();
    for (name, linear) in sites {
        for pair in linear.pairs() {
            if pair.adapter == adapter && !pair.frozen {
                leaves.insert(format!("{name}.down"), pair.down.shallow_clone());
                leaves.insert(format!("{name}.up"), pair.up.shallow_clone());
            }
        }
    }
    leaves
}

impl Trainer {
    /// A fit of these leaves, which share memory with the model's.
    ///
    /// # Errors
    /// [`LearningError::Config`] for no leaves, a recipe that cannot be followed, or leaves in f16: gradients that go through it fall below its
    /// smallest number and come back as zeros.
    pub fn new(leaves: BTreeMap<String, Tensor>, recipe: Recipe) -> Result<Self, LearningError> {
        if leaves.is_empty() {
            return Err(LearningError::Config(
                "there is nothing to train: every adapter is frozen".to_owned(),
            ));
        }
        let rate = recipe.learning_rate;
        if !(rate > 0.0 && rate < 1.0) || recipe.batch == 0 || recipe.accumulation == 0 {
            return Err(LearningError::Config(format!(
                "a fit needs a learning rate in 0..1, a batch and an accumulation of at least 1; these are {rate}, {} and {}",
                recipe.batch, recipe.accumulation
            )));
        }
        if let Some((name, _)) = leaves.iter().find(|(_, leaf)| leaf.kind() == Kind::Half) {
            return Err(LearningError::Config(format!(
                "{name} is in f16, in which gradients vanish; train in bf16 or f32"
            )));
        }
        let parameters = leaves
            .iter()
            .map(|(name, leaf)| {
                Ok(Parameter {
                    name: name.clone(),
                    tensor: host(&leaf.f_detach()?)?,
                    learning_rate: rate,
                })
            })
            .collect::<Result<_, LearningError>>()?;
        Ok(Self {
            leaves: leaves.into_values().collect(),
            parameters,
            optimiser: AdamW::new(recipe.adamw),
            recipe,
            told: String::new(),
            sums: None,
            gathered: 0,
            step: 0,
        })
    }

    /// Tells the fit what else its numbers depend on (data, seed, threads, ...), in words. It is saved with the state, beside the recipe, and a
    /// state that was told something else is refused.
    #[must_use]
    pub fn told(mut self, fingerprint: impl Into<String>) -> Self {
        self.told = fingerprint.into();
        self
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Whether all steps are done.
    pub fn done(&self) -> bool {
        self.step >= self.recipe.steps
    }

    /// The leaves, in the order of gradients.
    pub fn leaves(&self) -> Vec<&Tensor> {
        self.leaves.iter().collect()
    }

    /// Forgets the gradients that were gathered since the last step. Their passes are made again, and come out the same.
    pub fn back_to_step(&mut self) {
        self.sums = None;
        self.gathered = 0;
    }

    /// Gives leaves that do not share the parameters' memory their values.
    fn spread(&mut self) -> Result<(), LearningError> {
        for (leaf, parameter) in self.leaves.iter_mut().zip(&self.parameters) {
            if leaf.device() != Device::Cpu || leaf.kind() != parameter.tensor.kind() {
                leaf.f_copy_(&parameter.tensor)?;
            }
        }
        Ok(())
    }

    /// One forward and backward pass over examples that this fit's seed, step and pass draw, and, when enough are gathered, one step of the
    /// optimiser. Gives the loss of the pass.
    ///
    /// # Errors
    /// [`LearningError::Training`] if loss or gradients are not finite or a leaf gets none, [`LearningError::Data`] for no examples.
    pub fn pass(
        &mut self,
        model: &dyn Denoiser,
        examples: &[Example],
        seed: Seed,
    ) -> Result<f64, LearningError> {
        let here = seed.derive(&format!("step {} pass {}", self.step, self.gathered));
        let batch = draw(model, examples, self.recipe.batch, here)?;
        let pair = model.training_pair(&batch.clean, &batch.noise, &batch.times)?;
        let mut loss = 0.0;
        let mut share = 1.0;
        let target = pair.target.f_detach()?;
        let gradients = model.predict_and_pull(
            &pair.noisy,
            &pair.times,
            &batch.condition,
            &self.leaves(),
            &mut |output| {
                // The mean squared error, and its derivative 2 (output - target) / count. The division comes after the way back, in the
                // optimiser's kind: before it, it would push small gradients out of a half-precision model's numbers.
                let apart = output.f_sub(&target)?;
                share = 1.0 / apart.numel() as f64;
                loss = apart
                    .f_square()?
                    .f_mean(Kind::Double)?
                    .f_double_value(&[])?;
                Ok(apart.f_mul_scalar(2.0)?)
            },
        )?;
        if !loss.is_finite() {
            return Err(LearningError::Training(format!(
                "the loss of step {} is not finite; lower the learning rate",
                self.step
            )));
        }
        self.gather_scaled(gradients, share)?;
        Ok(loss)
    }

    /// Adds the gradients of a pass, in the order of [`Trainer::leaves`]; the last of an accumulation takes the optimiser's step.
    ///
    /// # Errors
    /// [`LearningError::Training`] if they are not finite, not as many as the leaves, or a leaf has none: what the loss does not depend on would never be
    /// trained, without a word. Nothing has been changed then.
    pub fn gather(&mut self, gradients: Vec<Tensor>) -> Result<(), LearningError> {
        self.gather_scaled(gradients, 1.0)
    }

    fn gather_scaled(&mut self, gradients: Vec<Tensor>, share: f64) -> Result<(), LearningError> {
        let _frozen = tch::no_grad_guard();
        self.check_gradients(&gradients)?;
        let part = share / f64::from(self.recipe.accumulation);
        let mut sums = match self.sums.take() {
            Some(sums) => sums,
            None => self
                .parameters
                .iter()
                .map(|parameter| parameter.tensor.f_zeros_like())
                .collect::<Result<_, _>>()?,
        };
        for (sum, gradient) in sums.iter_mut().zip(gradients) {
            let _ = sum.f_add_(&host(&gradient)?.f_mul_scalar(part)?)?;
        }
        self.gathered += 1;
        if self.gathered < self.recipe.accumulation {
            self.sums = Some(sums);
            return Ok(());
        }
        self.optimiser.step(&mut self.parameters, &sums)?;
        self.spread()?;
        self.gathered = 0;
        self.step += 1;
        Ok(())
    }

    fn check_gradients(&self, gradients: &[Tensor]) -> Result<(), LearningError> {
        if gradients.len() != self.parameters.len() {
            return Err(LearningError::Training(format!(
                "{} gradients for {} leaves",
                gradients.len(),
                self.parameters.len()
            )));
        }
        let without: Vec<String> = self
            .parameters
            .iter()
            .zip(gradients)
            .filter(|(_, gradient)| !gradient.defined())
            .map(|(parameter, _)| parameter.name.clone())
            .collect();
        if without.is_empty() {
            return Ok(());
        }
        Err(LearningError::Training(format!(
            "the loss does not depend on {} leaves (a text encoder is trained only with texts that are encoded anew, with gradients, for every pass): {}",
            without.len(),
            shortened(&without)
        )))
    }

    /// The whole state. Equal states give equal bytes.
    ///
    /// # Errors
    /// [`LearningError::State`] if it cannot be written.
    pub fn save(&self) -> Result<Vec<u8>, LearningError> {
        let mut tensors = self.optimiser.moments("moments.")?;
        for (place, parameter) in self.parameters.iter().enumerate() {
            let name = &parameter.name;
            tensors.insert(
                format!("parameters.{name}"),
                HostTensor::from_tensor(&parameter.tensor)?,
            );
            if let Some(sums) = &self.sums {
                tensors.insert(
                    format!("gathered.{name}"),
                    HostTensor::from_tensor(&sums[place])?,
                );
            }
        }
        let facts = Facts {
            step: self.step,
            gathered: self.gathered,
            counters: self.optimiser.counters(),
            fingerprint: self.recipe.fingerprint(&self.told),
        };
        let facts = serde_json::to_string(&facts)
            .map_err(|error| LearningError::State(error.to_string()))?;
        named::to_safetensors(&tensors, &facts)
    }

    /// Goes on from a saved state of the same fit: the leaves are overwritten in place.
    ///
    /// # Errors
    /// [`LearningError::State`] that names what is missing, left over or of another shape, or what the fit was told that this one was not; the leaves
    /// may have been overwritten then.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), LearningError> {
        let _frozen = tch::no_grad_guard();
        let (tensors, facts): (NamedTensors, String) = named::from_safetensors(bytes)?;
        let facts: Facts = serde_json::from_str(&facts)
            .map_err(|error| LearningError::State(format!("a fit's facts: {error}")))?;
        let ours = self.recipe.fingerprint(&self.told);
        if facts.fingerprint != ours {
            return Err(LearningError::State(format!(
                "it belongs to another fit: it says `{}`, this one is `{ours}`; go back to those settings or begin anew",
                facts.fingerprint
            )));
        }
        let mut taker = Taker::new("a fit", tensors);
        let shapes: BTreeMap<String, Vec<usize>> = self
            .parameters
            .iter()
            .map(|parameter| {
                let shape = parameter.tensor.size();
                (
                    parameter.name.clone(),
                    shape.into_iter().map(|size| size as usize).collect(),
                )
            })
            .collect();
        let kind = self.parameters[0].tensor.kind();
        let mut sums = (facts.gathered > 0).then(Vec::new);
        for parameter in &mut self.parameters {
            let shape = &shapes[&parameter.name];
            let value = taker.tensor(&format!("parameters.{}", parameter.name), shape, kind)?;
            parameter.tensor.f_copy_(&value)?;
            if let Some(sums) = &mut sums {
                let sum = taker.tensor(&format!("gathered.{}", parameter.name), shape, kind)?;
                sums.push(sum);
            }
        }
        self.optimiser = AdamW::restore(
            self.recipe.adamw,
            &facts.counters,
            "moments.",
            &mut taker,
            kind,
            |name| shapes.get(name).cloned(),
        )?;
        taker.finish()?;
        self.spread()?;
        self.sums = sums;
        self.gathered = facts.gathered;
        self.step = facts.step;
        Ok(())
    }
}

/// The same tensor on the CPU in f32, or f64 where it is that; itself where it is there already.
fn host(tensor: &Tensor) -> Result<Tensor, LearningError> {
    let kind = match tensor.kind() {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    };
    Ok(tensor.f_to_device(Device::Cpu)?.f_to_kind(kind)?)
}

/// What a pass runs on.
struct Drawn {
    clean: Tensor,
    noise: Tensor,
    times: Vec<super::schedule::TrainingTime>,
    condition: Condition,
}

/// Draws examples with noise and times. Times are spread evenly over the batch with one random shift, which leaves less to chance.
fn draw(
    model: &dyn Denoiser,
    examples: &[Example],
    batch: usize,
    seed: Seed,
) -> Result<Drawn, LearningError> {
    if examples.is_empty() {
        return Err(LearningError::Data(
            "there is no example to train on".to_owned(),
        ));
    }
    let mut rng = seed.rng();
    let places: Vec<usize> = (0..batch)
        .map(|_| rng.below(examples.len() as u64) as usize)
        .collect();
    let shift = rng.uniform();
    let times = (0..batch)
        .map(|row| {
            let place = (row as f64 + shift) / batch as f64;
            model.objective().training_time(place)
        })
        .collect();
    let latents: Vec<&Tensor> = places
        .iter()
        .map(|&place| &examples[place].latent)
        .collect();
    let conditions: Vec<&Condition> = places
        .iter()
        .map(|&place| &examples[place].condition)
        .collect();
    let clean = Tensor::f_cat(&latents, 0)?;
    let (_, c, h, w) = clean.size4()?;
    let rows: Vec<Seed> = (0..batch)
        .map(|row| seed.derive(&format!("noise {row}")))
        .collect();
    Ok(Drawn {
        noise: seeds::noise(&rows, [c, h, w], model.compute())?,
        clean,
        times,
        condition: Condition::stack(&conditions)?,
    })
}

#[cfg(test)]
mod tests;
