//! The mix by its formula, and batches by their parts.

use std::fs;

use concord_common::seed::Seed;

use super::*;
use crate::diffusion::{
    draw::{Sampling, Wish},
    params::Compute,
    pipeline::TextToImage,
    schedule::Sampler,
    testing::{self, PLAIN},
};

fn region(left: f64, top: f64, right: f64, bottom: f64, strength: f64) -> Region {
    Region {
        left,
        top,
        right,
        bottom,
        prompt: "a bright fox".to_owned(),
        strength,
    }
}

fn model() -> (tempfile::TempDir, TextToImage) {
    let folder = testing::checkpoint("sd2", PLAIN);
    let model = TextToImage::load(folder.path(), Compute::CPU).unwrap();
    (folder, model)
}

#[test]
fn masks_are_rectangles_of_at_least_a_pixel() {
    let mask = region(0.25, 0.5, 0.75, 1.0, 1.0).mask(4, 4);
    let rows: Vec<f64> = [
        [0.0; 4],
        [0.0; 4],
        [0.0, 1.0, 1.0, 0.0],
        [0.0, 1.0, 1.0, 0.0],
    ]
    .concat();
    assert_eq!(mask, rows);
    let small = region(0.99, 0.99, 0.999, 1.0, 1.0).mask(4, 4);
    let covered: Vec<usize> = (0..16).filter(|&place| small[place] > 0.0).collect();
    assert_eq!(covered, [15]);
}

/// Rounding its edges would put a small rectangle in the second half of a pixel into the next one.
#[test]
fn a_rectangle_smaller_than_a_pixel_covers_the_pixel_that_it_lies_in() {
    for (from, to, pixel) in [
        (0.57, 0.58, 5),
        (0.51, 0.52, 5),
        (0.0, 0.01, 0),
        (0.999, 1.0, 9),
        (0.36, 0.44, 4),
    ] {
        let mask = region(from, 0.0, to, 1.0, 1.0).mask(1, 10);
        let covered: Vec<usize> = (0..10).filter(|&place| mask[place] > 0.0).collect();
        assert_eq!(covered, [pixel], "{from} to {to}");
    }
}

#[test]
fn the_blur_is_that_of_the_authors_at_their_size_and_scales() {
    let kernel = blur_kernel(128, 128);
    assert_eq!(kernel.len(), 33);
    let ratio = kernel[16] / kernel[6];
    // Ten pixels are one deviation.
    assert!((ratio - 0.5_f64.exp()).abs() < 1e-12, "{ratio}");
    assert_eq!(blur_kernel(64, 64).len(), 17);
    assert_eq!(blur_kernel(8, 8).len(), 3);
    assert_eq!(blur_kernel(2, 2).len(), 1);
}

#[test]
fn a_blur_keeps_a_full_mask_and_the_range() {
    let full = blurred(&[1.0; 20 * 12], 20, 12);
    assert!(full.iter().all(|value| (value - 1.0).abs() < 1e-12));
    let half: Vec<f64> = (0..240)
        .map(|place| f64::from(u8::from(place % 12 < 6)))
        .collect();
    let soft = blurred(&half, 20, 12);
    assert!(
        soft.iter()
            .all(|value| (-1e-12..=1.0 + 1e-12).contains(value))
    );
    assert!(soft[5] < 1.0 && soft[6] > 0.0);
    assert!(soft[0] > soft[11]);
}

/// The formula, written out for every pixel.
#[test]
fn the_mix_follows_the_formula() {
    let (_folder, model) = model();
    let regions = [
        region(0.0, 0.0, 0.5, 0.5, 1.5),
        region(0.2, 0.3, 1.0, 1.0, 0.5),
    ];
    let advice = Advice::prepare(&model, &regions, (18, 12)).unwrap();
    let whole = testing::values("whole", &[1, 4, 18, 12], 1.0, Kind::Float);
    let parts = testing::values("parts", &[2, 4, 18, 12], 1.0, Kind::Float);
    let mixed = advice.mix(&whole, &parts).unwrap();
    let blurs = regions
        .each_ref()
        .map(|region| blurred(&region.mask(18, 12), 18, 12));
    for channel in 0..4 {
        for y in 0..18_i64 {
            for x in 0..12_i64 {
                let place = (y * 12 + x) as usize;
                let mut sum = whole.double_value(&[0, channel, y, x]);
                let mut weight = 1.0;
                for (which, (region, blur)) in regions.iter().zip(&blurs).enumerate() {
                    let share = region.strength * blur[place];
                    sum += share * parts.double_value(&[which as i64, channel, y, x]);
                    weight += share;
                }
                let ours = mixed.double_value(&[0, channel, y, x]);
                assert!((ours - sum / weight).abs() < 1e-6);
            }
        }
    }
}

const PROMPTS: [&str; 2] = ["a red fox", "the snow"];
const NEGATIVE: &str = "a dark night";

/// Two regions for each of two pictures: no text, rectangle or strength comes twice.
fn advised() -> [[Region; 2]; 2] {
    let told = |prompt: &str, region: Region| Region {
        prompt: prompt.to_owned(),
        ..region
    };
    [
        [
            told("a bright fox", region(0.0, 0.0, 0.5, 0.5, 1.5)),
            told("two old trees", region(0.2, 0.3, 1.0, 1.0, 0.5)),
        ],
        [
            told("cold light", region(0.5, 0.0, 1.0, 0.6, 2.0)),
            told("the blue sky", region(0.0, 0.4, 0.7, 1.0, 0.8)),
        ],
    ]
}

/// A model of flow matching, in f64.
fn flow_model() -> (tempfile::TempDir, TextToImage) {
    let folder = testing::checkpoint("sd2", PLAIN);
    fs::write(
        folder.path().join("scheduler/scheduler_config.json"),
        r#"{"_class_name":"FlowMatchEulerDiscreteScheduler","num_train_timesteps":1000,"shift":3.0}"#,
    )
    .unwrap();
    let model = TextToImage::load(folder.path(), testing::compute(Kind::Double)).unwrap();
    (folder, model)
}

/// What the model says to noise, which a flow has at time 1000, if it is told one text.
fn answer(model: &TextToImage, noise: &Tensor, text: &str) -> Tensor {
    let times = Tensor::from_slice(&[1000.0_f64]);
    let condition = model.condition(&[text]).unwrap();
    model.predict(noise, &times, &condition).unwrap()
}

/// One picture from one text at a time: the mix, then guidance, then the only step of a flow, which goes from noise to data at once.
fn by_hand(
    model: &TextToImage,
    noise: &Tensor,
    prompt: &str,
    regions: &[Region],
    guidance: f64,
) -> Tensor {
    let mut sum = answer(model, noise, prompt);
    let mut weight = Tensor::ones_like(&sum);
    for region in regions {
        let blur = blurred(&region.mask(18, 12), 18, 12);
        let share = Tensor::from_slice(&blur).view([1, 1, 18, 12]) * region.strength;
        sum += answer(model, noise, &region.prompt) * &share;
        weight += share;
    }
    let mix = sum / weight;
    let negative = answer(model, noise, NEGATIVE);
    noise - (&negative + (mix - &negative) * guidance)
}

/// Each region's text meets its own rectangle, strength and picture.
#[test]
fn a_batch_of_advised_pictures_is_what_the_formula_gives_text_by_text() {
    let (_folder, model) = flow_model();
    let plan = model.objective().plan(Sampler::Euler, 1).unwrap();
    let noise = testing::values("input.noise", &[2, 4, 18, 12], 1.7, Kind::Double);
    let regions = advised();
    let advice = regions
        .each_ref()
        .map(|regions| Advice::prepare(&model, regions, (18, 12)).unwrap());
    let orders: Vec<Order<'_>> = (0..)
        .zip(&advice)
        .map(|(prompt, advice)| Order {
            prompt,
            advice: Some(advice),
        })
        .collect();
    // Two pictures and four regions; with guidance the two negatives besides.
    for (guidance, rows) in [(1.0, 6), (3.0, 8)] {
        let texts = Texts {
            positive: model.condition(&PROMPTS).unwrap(),
            negative: model.condition(&[NEGATIVE]).unwrap(),
            guidance,
        };
        let alone: Vec<Tensor> = (0..)
            .zip(PROMPTS)
            .zip(&regions)
            .map(|((picture, prompt), regions)| {
                let noise = noise.narrow(0, picture, 1);
                by_hand(&model, &noise, prompt, regions, guidance)
            })
            .collect();
        let expected = Tensor::cat(&alone, 0);
        // Row by row there are as many passes as rows.
        for (most_rows, passes) in [(i64::MAX, 1), (1, rows)] {
            let mut told = 0;
            let drawn = generate_in_pieces(
                &model,
                &plan,
                &noise,
                &orders,
                &texts,
                most_rows,
                &mut |_| {
                    told += 1;
                    Ok(())
                },
            )
            .unwrap();
            let apart = testing::apart(&drawn, &expected);
            assert!(apart < 1e-9, "guidance {guidance}: {apart}");
            assert_eq!(told, passes, "guidance {guidance}");
        }
    }
    // No two texts are answered alike: an exchange of any two would have shown.
    let first = noise.narrow(0, 0, 1);
    let answers: Vec<Tensor> = regions
        .as_flattened()
        .iter()
        .map(|region| region.prompt.as_str())
        .chain(PROMPTS)
        .map(|text| answer(&model, &first, text))
        .collect();
    for (place, one) in answers.iter().enumerate() {
        for other in &answers[..place] {
            assert!(testing::apart(one, other) > 1e-4);
        }
    }
}

#[test]
fn a_drawing_at_guidance_one_says_that_no_negative_went_through_the_model() {
    let (_folder, model) = model();
    let wishes: Vec<Wish> = PROMPTS
        .into_iter()
        .zip(advised())
        .map(|(prompt, regions)| Wish {
            prompt: prompt.to_owned(),
            seed: Seed(1),
            regions: Vec::from(regions),
        })
        .collect();
    for (guidance, rows) in [(1.0, 6), (3.0, 8)] {
        let sampling = Sampling {
            sampler: Sampler::Ddim,
            steps: 3,
            guidance,
            negative: NEGATIVE.to_owned(),
            size: Some([24, 32]),
        };
        let easel = sampling.ready(&model).unwrap();
        let drawn = easel.draw(&model, &wishes, &mut |_| Ok(())).unwrap();
        assert_eq!(drawn.rows, 3 * rows, "guidance {guidance}");
    }
}

#[test]
fn regions_outside_the_picture_or_without_weight_are_refused() {
    let (_folder, model) = model();
    for bad in [
        region(-0.1, 0.0, 0.5, 0.5, 1.0),
        region(0.5, 0.0, 0.5, 0.5, 1.0),
        region(0.0, 0.0, 0.5, 1.5, 1.0),
        region(0.0, f64::NAN, 0.5, 0.5, 1.0),
        region(0.0, 0.0, 0.5, 0.5, 0.0),
        region(0.0, 0.0, 0.5, 0.5, f64::INFINITY),
    ] {
        assert!(matches!(
            Advice::prepare(&model, &[bad], (18, 12)),
            Err(LearningError::Data(_))
        ));
    }
    assert!(Advice::prepare(&model, &[], (18, 12)).is_err());
    let many = vec![region(0.0, 0.0, 1.0, 1.0, 1.0); MOST_REGIONS + 1];
    assert!(Advice::prepare(&model, &many, (18, 12)).is_err());
}

/// A batch with and without advice gives what each picture gives alone.
#[test]
fn pictures_of_a_batch_do_not_touch_each_other() {
    let (_folder, model) = model();
    let plan = model.objective().plan(Sampler::Ddim, 3).unwrap();
    let noise = testing::values("input.noise", &[2, 4, 18, 12], 1.7, Kind::Float);
    let texts = Texts {
        positive: model.condition(&["a red fox", "the snow"]).unwrap(),
        negative: model.condition(&[""]).unwrap(),
        guidance: 4.0,
    };
    let advice = Advice::prepare(&model, &[region(0.0, 0.0, 0.6, 1.0, 1.0)], (18, 12)).unwrap();
    let run = |noise: &Tensor, orders: &[Order<'_>]| {
        generate(&model, &plan, noise, orders, &texts, &mut |_| Ok(())).unwrap()
    };
    let advised = |prompt| Order {
        prompt,
        advice: Some(&advice),
    };
    let plain = |prompt| Order {
        prompt,
        advice: None,
    };
    let both = run(&noise, &[plain(1), advised(0)]);
    let first = run(&noise.narrow(0, 0, 1), &[plain(1)]);
    let second = run(&noise.narrow(0, 1, 1), &[advised(0)]);
    let apart = testing::apart(&both, &Tensor::cat(&[&first, &second], 0));
    assert!(apart < 1e-4, "{apart}");
    let without = run(&noise.narrow(0, 1, 1), &[plain(0)]);
    assert!(testing::apart(&second, &without) > 1e-2);
}

/// Two pictures, their negatives and one region are five rows: in one pass, or in passes of two, two and one.
#[test]
fn a_batch_in_pieces_gives_what_it_gives_whole() {
    let (_folder, model) = model();
    let plan = model.objective().plan(Sampler::Ddim, 3).unwrap();
    let noise = testing::values("input.noise", &[2, 4, 18, 12], 1.7, Kind::Float);
    let texts = Texts {
        positive: model.condition(&["a red fox", "the snow"]).unwrap(),
        negative: model.condition(&[""]).unwrap(),
        guidance: 4.0,
    };
    let advice = Advice::prepare(&model, &[region(0.0, 0.0, 0.6, 1.0, 1.0)], (18, 12)).unwrap();
    let orders = [None, Some(&advice)].map(|advice| Order { prompt: 0, advice });
    let run = |most_rows| {
        generate_in_pieces(
            &model,
            &plan,
            &noise,
            &orders,
            &texts,
            most_rows,
            &mut |_| Ok(()),
        )
    };
    let whole = run(i64::MAX).unwrap();
    assert!(testing::same(&run(5).unwrap(), &whole));
    for most_rows in [1, 2, 3] {
        let pieces = run(most_rows).unwrap();
        let apart = testing::apart(&pieces, &whole);
        assert!(apart < 1e-4, "{most_rows}: {apart}");
        assert!(testing::same(&run(most_rows).unwrap(), &pieces));
    }
    assert!(matches!(run(0), Err(LearningError::Config(_))));
}

/// Advice that repeats the picture's own prompt over all of it changes nothing, whatever its weight: a mean of equals.
#[test]
fn advice_that_repeats_the_prompt_changes_nothing() {
    let (_folder, model) = model();
    let plan = model.objective().plan(Sampler::Dpm, 3).unwrap();
    let noise = testing::values("input.noise", &[1, 4, 18, 12], 1.7, Kind::Float);
    let texts = Texts {
        positive: model.condition(&["a bright fox"]).unwrap(),
        negative: model.condition(&[""]).unwrap(),
        guidance: 4.0,
    };
    let advice = Advice::prepare(&model, &[region(0.0, 0.0, 1.0, 1.0, 3.0)], (18, 12)).unwrap();
    let run = |advice| {
        let order = Order { prompt: 0, advice };
        generate(&model, &plan, &noise, &[order], &texts, &mut |_| Ok(())).unwrap()
    };
    let apart = testing::apart(&run(None), &run(Some(&advice)));
    assert!(apart < 1e-4, "{apart}");
}

#[test]
fn a_run_can_be_stopped_between_steps() {
    let (_folder, model) = model();
    let plan = model.objective().plan(Sampler::Euler, 5).unwrap();
    let noise = testing::values("input.noise", &[1, 4, 18, 12], 1.7, Kind::Float);
    let texts = Texts {
        positive: model.condition(&["a fox"]).unwrap(),
        negative: model.condition(&[""]).unwrap(),
        guidance: 1.0,
    };
    let order = Order {
        prompt: 0,
        advice: None,
    };
    let mut steps = Vec::new();
    let stopped = generate(&model, &plan, &noise, &[order], &texts, &mut |done| {
        steps.push(done);
        if done == 2 {
            return Err(LearningError::Cancelled);
        }
        Ok(())
    });
    assert!(matches!(stopped, Err(LearningError::Cancelled)));
    assert_eq!(steps, [1, 2]);
}

/// Two guided pictures are four rows: two passes a step.
#[test]
fn a_run_in_pieces_can_be_stopped_within_a_step() {
    let (_folder, model) = model();
    let plan = model.objective().plan(Sampler::Euler, 5).unwrap();
    let noise = testing::values("input.noise", &[2, 4, 18, 12], 1.7, Kind::Float);
    let texts = Texts {
        positive: model.condition(&["a fox"]).unwrap(),
        negative: model.condition(&[""]).unwrap(),
        guidance: 2.0,
    };
    let orders = [0, 0].map(|prompt| Order {
        prompt,
        advice: None,
    });
    let mut told = Vec::new();
    let mut after_pass = |done| {
        told.push(done);
        if told.len() == 5 {
            return Err(LearningError::Cancelled);
        }
        Ok(())
    };
    let stopped = generate_in_pieces(&model, &plan, &noise, &orders, &texts, 3, &mut after_pass);
    assert!(matches!(stopped, Err(LearningError::Cancelled)));
    assert_eq!(told, [0, 1, 1, 2, 2]);
}
