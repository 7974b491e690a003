//! A second denoiser, of another family: what draws, mixes regions and trains must not know which model it is.

use concord_common::{Digest, seed::Seed};
use tch::{Kind, Tensor};

use super::*;
use crate::{
    diffusion::{
        draw::{Picture, Sampling, Wish},
        linear::Shape,
        lora::{self, Placement},
        params::Params,
        region::Region,
        schedule::{Flow, Sampler},
        train::{Example, Recipe, Trainer, lora_leaves},
        unet::pull_through,
    },
    optimiser::AdamWSettings,
};

const SIDE: i64 = 4;
const CHANNELS: i64 = 3;
const WIDTH: i64 = 8;

/// A transformer in miniature: each pixel is a token, which is told of the time, of its text's mean and of its text's own vector; flow matching.
struct Tokens {
    objective: Objective,
    to_in: Linear,
    to_out: Linear,
}

/// Pixels are latents.
struct Identity;

impl LatentCodec for Identity {
    fn factor(&self) -> i64 {
        1
    }

    fn channels(&self) -> i64 {
        CHANNELS
    }

    fn encode(&self, images: &Tensor) -> Result<Tensor, LearningError> {
        Ok(images.shallow_clone())
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor, LearningError> {
        Ok(latents.shallow_clone())
    }
}

fn model() -> Tokens {
    let mut params = Params::fresh(Seed(1), Compute::CPU);
    let mut linear =
        |name: &str, sides| Linear::take(&mut params, name, sides, true, Shape::Matrix).unwrap();
    Tokens {
        objective: Objective::Flow(Flow::new(1000, 3.0).unwrap()),
        to_in: linear("blocks.0.attn.to_q", (CHANNELS, WIDTH)),
        to_out: linear("blocks.0.attn.to_out.0", (WIDTH, CHANNELS)),
    }
}

impl Denoiser for Tokens {
    fn compute(&self) -> Compute {
        Compute::CPU
    }

    fn objective(&self) -> &Objective {
        &self.objective
    }

    fn codec(&self) -> &dyn LatentCodec {
        &Identity
    }

    fn native_size(&self) -> [i64; 3] {
        [CHANNELS, SIDE, SIDE]
    }

    fn condition(&self, prompts: &[&str]) -> Result<Condition, LearningError> {
        let numbers = |salt: i64| -> Vec<f32> {
            prompts
                .iter()
                .flat_map(|prompt| {
                    let sum: i64 = prompt.bytes().map(i64::from).sum();
                    (0..WIDTH).map(move |place| ((sum + salt + place) % 7) as f32 / 7.0)
                })
                .collect()
        };
        let n = prompts.len() as i64;
        Ok(Condition {
            context: Tensor::f_from_slice(&numbers(0))?.f_view([n, 1, WIDTH])?,
            pooled: Some(Tensor::f_from_slice(&numbers(3))?.f_view([n, WIDTH])?),
        })
    }

    fn cuts(&self, _prompt: &str) -> Result<bool, LearningError> {
        Ok(false)
    }

    fn predict(
        &self,
        samples: &Tensor,
        times: &Tensor,
        condition: &Condition,
    ) -> Result<Tensor, LearningError> {
        let pooled = condition.pooled.as_ref().unwrap();
        let n = samples.size()[0];
        let told = condition
            .context
            .f_mean_dim(1_i64, false, Kind::Float)?
            .f_add(pooled)?
            .f_add(
                &times
                    .f_to_kind(Kind::Float)?
                    .f_view([n, 1])?
                    .f_div_scalar(1000.0)?,
            )?;
        let tokens = samples.f_flatten(2, 3)?.f_transpose(1, 2)?;
        let hidden = self
            .to_in
            .run(&tokens)?
            .f_add(&told.f_unsqueeze(1)?)?
            .f_tanh()?;
        Ok(self
            .to_out
            .run(&hidden)?
            .f_transpose(1, 2)?
            .f_reshape(samples.size())?)
    }

    fn predict_and_pull(
        &self,
        samples: &Tensor,
        times: &Tensor,
        condition: &Condition,
        leaves: &[&Tensor],
        output_gradient: &mut dyn FnMut(&Tensor) -> Result<Tensor, LearningError>,
    ) -> Result<Vec<Tensor>, LearningError> {
        let output = self.predict(samples, times, condition)?;
        pull_through(&[&output], &[&output_gradient(&output.detach())?], leaves)
    }

    fn digest(&self) -> Result<Digest, LearningError> {
        Ok(Digest::of(b"tokens"))
    }

    fn set_checkpointing(&mut self, _on: bool) {}

    fn sites(&mut self) -> Vec<(String, &mut Linear)> {
        vec![
            ("transformer.blocks.0.attn.to_q".to_owned(), &mut self.to_in),
            (
                "transformer.blocks.0.attn.to_out.0".to_owned(),
                &mut self.to_out,
            ),
        ]
    }
}

fn wish(prompt: &str, seed: u64, region: Option<&str>) -> Wish {
    Wish {
        prompt: prompt.to_owned(),
        seed: Seed(seed),
        regions: region
            .map(|prompt| Region {
                left: 0.0,
                top: 0.0,
                right: 0.5,
                bottom: 1.0,
                prompt: prompt.to_owned(),
                strength: 2.0,
            })
            .into_iter()
            .collect(),
    }
}

#[test]
fn a_model_of_another_family_draws_with_regions_and_learns() {
    let mut model = model();
    let sampling = Sampling {
        sampler: Sampler::Euler,
        steps: 4,
        guidance: 2.0,
        negative: String::new(),
        size: None,
    };
    let easel = sampling.ready(&model).unwrap();
    let draw = |model: &Tokens, wishes: &[Wish]| {
        easel.draw(model, wishes, &mut |_| Ok(())).unwrap().pictures
    };
    let plain = draw(&model, &[wish("a fox", 1, None), wish("the snow", 2, None)]);
    let mixed = draw(
        &model,
        &[wish("a fox", 1, Some("bright")), wish("the snow", 2, None)],
    );
    assert_ne!(plain[0], mixed[0]);
    assert_eq!(plain[1], mixed[1]);

    let wanted = Picture {
        width: SIDE as u32,
        height: SIDE as u32,
        pixels: vec![250; (SIDE * SIDE * CHANNELS) as usize],
    };
    let example = Example::of(&model, "a fox", &wanted).unwrap();
    lora::attach_fresh(
        model.sites(),
        "new",
        Placement::Attention,
        2,
        Seed(3),
        Compute::CPU,
    )
    .unwrap();
    let recipe = Recipe {
        learning_rate: 0.05,
        adamw: AdamWSettings {
            weight_decay: 0.0,
            warmup_steps: 0,
            clip_norm: 1.0,
        },
        batch: 4,
        accumulation: 1,
        steps: 60,
    };
    let mut trainer = Trainer::new(lora_leaves(model.sites(), "new"), recipe).unwrap();
    let mut losses = Vec::new();
    while !trainer.done() {
        losses.push(
            trainer
                .pass(&model, std::slice::from_ref(&example), Seed(4))
                .unwrap(),
        );
    }
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..10]), mean(&losses[50..]));
    assert!(last < 0.8 * first, "{first} -> {last}");
    let learned = draw(&model, &[wish("a fox", 1, None)]);
    let light = |picture: &Picture| {
        picture
            .pixels
            .iter()
            .map(|&value| u64::from(value))
            .sum::<u64>()
    };
    assert!(light(&learned[0]) > light(&plain[0]));
}

#[test]
fn texts_with_and_without_a_vector_of_their_own_do_not_share_a_pass() {
    let model = model();
    let with = model.condition(&["a fox"]).unwrap();
    let without = Condition::of(with.context.shallow_clone());
    assert!(Condition::stack(&[&with, &without]).is_err());
    let both = Condition::stack(&[&with, &with]).unwrap();
    assert_eq!(both.rows(&[1]).unwrap().pooled.unwrap().size(), [1, WIDTH]);
}
