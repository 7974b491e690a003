//! Training the projections.

use concord_common::seed::{Rng, Seed};
use serde::{Deserialize, Serialize};
use tch::{Kind, Reduction, Tensor};

use super::{Alignment, Rows};
use crate::{
    error::LearningError,
    optimiser::{AdamW, AdamWSettings, Parameter},
    torch::{seeded, seeded_randn},
};

/// Bounds of the inverse temperature; 100 is the usual upper one.
const LEAST_SCALE: f64 = 1.0;
const MOST_SCALE: f64 = 100.0;

/// How projections are trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlignmentSettings {
    /// Values of a vector in the common space.
    pub width: usize,
    /// Updates.
    pub steps: u64,
    /// Pairs of a batch; fewer if there are fewer subjects.
    pub batch: usize,
    /// AdamW's learning rate after the warm-up; it falls to 0 along a half cosine.
    pub learning_rate: f64,
    /// AdamW's decay.
    pub weight_decay: f64,
    /// Part of the image features that is left out in each step.
    pub dropout: f64,
    /// Where all draws start.
    pub seed: u64,
}

impl Default for AlignmentSettings {
    fn default() -> Self {
        Self {
            width: 128,
            steps: 3000,
            batch: 256,
            learning_rate: 1e-3,
            weight_decay: 0.1,
            dropout: 0.5,
            seed: 1,
        }
    }
}

/// An image and a text that says what it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// What is shown; a batch holds it once.
    pub subject: usize,
    /// Row of the image's features.
    pub image: usize,
    /// Row of the text's.
    pub text: usize,
}

/// What projections are trained on.
#[derive(Debug, Clone, Copy)]
pub struct Captioned<'a> {
    /// Features of images.
    pub images: &'a Rows,
    /// Features of texts.
    pub texts: &'a Rows,
    /// Which belong together.
    pub pairs: &'a [Pair],
}

/// The trained tensors; the scale is kept as its logarithm.
struct Leaves {
    parameters: Vec<Parameter>,
}

const WEIGHT_I: usize = 0;
const BIAS_I: usize = 1;
const WEIGHT_T: usize = 2;
const BIAS_T: usize = 3;
const LOG_SCALE: usize = 4;

impl Alignment {
    /// Trains projections. Equal data and settings give equal results on one machine with one number of threads. `every` is told the step and its
    /// loss.
    ///
    /// # Errors
    /// [`LearningError::Data`] for fewer than two subjects or a pair that names a row that is not there, [`LearningError::Config`] for impossible
    /// settings, [`LearningError::Training`] if the numbers run away.
    pub fn fit(
        data: Captioned<'_>,
        settings: &AlignmentSettings,
        every: &mut dyn FnMut(u64, f64),
    ) -> Result<Self, LearningError> {
        check(&data, settings)?;
        let by_subject = by_subject(data.pairs);
        let seed = Seed(settings.seed).derive("image-text projections");
        let images = data.images.to_tensor()?;
        let texts = data.texts.to_tensor()?;
        let used = index(data.pairs.iter().map(|pair| pair.image))?;
        let seen = images.f_index_select(0, &used)?;
        let mean = seen.f_mean_dim(Some(&[0_i64][..]), false, None)?;
        // A feature that never fires must not be blown up when it does.
        let spread = seen
            .f_std_dim(Some(&[0_i64][..]), false, false)?
            .f_add_scalar(1e-2)?;
        let images = images.f_sub(&mean)?.f_div(&spread)?;

        let mut leaves = Leaves::fresh(data.images.width(), data.texts.width(), settings, seed)?;
        let mut optimiser = AdamW::new(AdamWSettings {
            weight_decay: settings.weight_decay,
            warmup_steps: 50,
            clip_norm: 1.0,
        });
        let mut rng = seed.derive("batches").rng();
        for step in 0..settings.steps {
            let chosen = draw(&mut rng, &by_subject, settings.batch);
            let seen = images.f_index_select(0, &index(chosen.iter().map(|pair| pair.image))?)?;
            let read = texts.f_index_select(0, &index(chosen.iter().map(|pair| pair.text))?)?;
            let kept = seeded(seed.derive(&format!("dropout {step}")).0, || {
                Ok(seen.f_dropout(settings.dropout, settings.dropout > 0.0)?)
            })?;
            let loss = leaves.loss(&kept, &read)?;
            let gradients = leaves.gradients(&loss)?;
            let part = step as f64 / settings.steps as f64;
            leaves.set_rate(
                settings.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * part).cos()),
            );
            optimiser.step(&mut leaves.parameters, &gradients)?;
            leaves.bound_scale()?;
            every(step, loss.f_double_value(&[])?);
        }
        leaves.finish(mean, spread)
    }
}

impl Leaves {
    fn fresh(
        image: usize,
        text: usize,
        settings: &AlignmentSettings,
        seed: Seed,
    ) -> Result<Self, LearningError> {
        let width = settings.width as i64;
        let matrix = |name: &str, inner: usize| -> Result<Tensor, LearningError> {
            let drawn = seeded_randn(seed.derive(name).0, &[width, inner as i64], Kind::Float)?;
            Ok(drawn.f_mul_scalar((1.0 / inner as f64).sqrt())?)
        };
        let zeros = || Tensor::f_zeros([width], (Kind::Float, tch::Device::Cpu));
        let leaves = [
            ("image.weight", matrix("image", image)?),
            ("image.bias", zeros()?),
            ("text.weight", matrix("text", text)?),
            ("text.bias", zeros()?),
            ("scale", Tensor::f_from_slice(&[10.0_f32.ln()])?),
        ];
        Ok(Self {
            parameters: leaves
                .into_iter()
                .map(|(name, tensor)| Parameter {
                    name: name.to_owned(),
                    tensor: tensor.set_requires_grad(true),
                    learning_rate: settings.learning_rate,
                })
                .collect(),
        })
    }

    fn at(&self, place: usize) -> &Tensor {
        &self.parameters[place].tensor
    }

    fn loss(&self, images: &Tensor, texts: &Tensor) -> Result<Tensor, LearningError> {
        let images = super::unit(&images.f_linear(self.at(WEIGHT_I), Some(self.at(BIAS_I)))?)?;
        let texts = super::unit(&texts.f_linear(self.at(WEIGHT_T), Some(self.at(BIAS_T)))?)?;
        let scores = images
            .f_matmul(&texts.f_transpose(0, 1)?)?
            .f_mul(&self.at(LOG_SCALE).f_exp()?)?;
        let own = Tensor::f_arange(scores.size()[0], (Kind::Int64, scores.device()))?;
        let entropy = |scores: &Tensor| {
            scores.f_cross_entropy_loss(&own, None::<Tensor>, Reduction::Mean, -100, 0.0)
        };
        let back = entropy(&scores.f_transpose(0, 1)?)?;
        Ok(entropy(&scores)?.f_add(&back)?.f_mul_scalar(0.5)?)
    }

    fn gradients(&self, loss: &Tensor) -> Result<Vec<Tensor>, LearningError> {
        let leaves: Vec<&Tensor> = self.parameters.iter().map(|leaf| &leaf.tensor).collect();
        Ok(Tensor::f_run_backward(&[loss], &leaves, false, false)?)
    }

    fn set_rate(&mut self, rate: f64) {
        for leaf in &mut self.parameters {
            leaf.learning_rate = rate;
        }
    }

    fn bound_scale(&mut self) -> Result<(), LearningError> {
        let _frozen = tch::no_grad_guard();
        let scale = &mut self.parameters[LOG_SCALE].tensor;
        let _ = scale.f_clamp_(LEAST_SCALE.ln(), MOST_SCALE.ln())?;
        Ok(())
    }

    fn finish(self, mean: Tensor, spread: Tensor) -> Result<Alignment, LearningError> {
        let _frozen = tch::no_grad_guard();
        let done = |place: usize| self.at(place).f_detach();
        Ok(Alignment {
            mean,
            spread,
            image: (done(WEIGHT_I)?, done(BIAS_I)?),
            text: (done(WEIGHT_T)?, done(BIAS_T)?),
            scale: self.at(LOG_SCALE).f_exp()?.f_double_value(&[0])?,
        })
    }
}

fn check(data: &Captioned<'_>, settings: &AlignmentSettings) -> Result<(), LearningError> {
    let refuse = |what: &str| Err(LearningError::Config(what.to_owned()));
    if settings.width == 0 || settings.batch < 2 || settings.steps == 0 {
        return refuse("projections need a width, at least one step and batches of two or more");
    }
    if !(settings.learning_rate > 0.0 && settings.learning_rate < 1.0) {
        return refuse("the learning rate of projections is not in 0..1");
    }
    if !(0.0..1.0).contains(&settings.dropout) || !(0.0..=10.0).contains(&settings.weight_decay) {
        return refuse("dropout is not in 0..1 or the decay not in 0..=10");
    }
    let (images, texts) = (data.images.len(), data.texts.len());
    for pair in data.pairs {
        if pair.image >= images || pair.text >= texts {
            return Err(LearningError::Data(format!(
                "a pair of image {} and text {}, where there are {images} and {texts}",
                pair.image, pair.text
            )));
        }
    }
    if by_subject(data.pairs).len() < 2 {
        return Err(LearningError::Data(
            "projections are trained on two subjects at least".to_owned(),
        ));
    }
    Ok(())
}

fn by_subject(pairs: &[Pair]) -> Vec<Vec<Pair>> {
    let mut groups: std::collections::BTreeMap<usize, Vec<Pair>> =
        std::collections::BTreeMap::new();
    for pair in pairs {
        groups.entry(pair.subject).or_default().push(*pair);
    }
    groups.into_values().collect()
}

/// A pair each of some subjects.
fn draw(rng: &mut Rng, by_subject: &[Vec<Pair>], batch: usize) -> Vec<Pair> {
    let mut order: Vec<usize> = (0..by_subject.len()).collect();
    rng.shuffle(&mut order);
    order
        .into_iter()
        .take(batch)
        .map(|subject| {
            let pairs = &by_subject[subject];
            pairs[rng.below(pairs.len() as u64) as usize]
        })
        .collect()
}

fn index(rows: impl Iterator<Item = usize>) -> Result<Tensor, LearningError> {
    let rows: Vec<i64> = rows.map(|row| row as i64).collect();
    Ok(Tensor::f_from_slice(&rows)?)
}
