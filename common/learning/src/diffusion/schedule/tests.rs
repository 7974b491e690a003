//! Agreement with the numbers of Python's `diffusers`; whole runs are compared in the pipeline's tests.

use std::fs;

use super::*;
use crate::diffusion::testing::{self, CHECKPOINTS};

fn table(name: &str) -> NoiseTable {
    let file = testing::fixture(name).join("scheduler/scheduler_config.json");
    match Objective::read(&file).unwrap() {
        Objective::Noise(table) => table,
        Objective::Flow(_) => panic!("{name} is no flow"),
    }
}

fn doubles(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(tensor.to_kind(tch::Kind::Double)).unwrap()
}

#[test]
fn the_noise_table_is_that_of_diffusers() {
    for name in CHECKPOINTS {
        let theirs = testing::results(name, "samples.safetensors")
            .tensor("sample.alphas")
            .unwrap();
        for (time, (ours, theirs)) in table(name)
            .alphas()
            .iter()
            .zip(doubles(&theirs))
            .enumerate()
        {
            assert!((ours - theirs).abs() < 2e-7, "{time}: {ours} {theirs}");
        }
    }
}

#[test]
fn samplers_visit_the_times_of_diffusers() {
    let results = testing::results("sd1", "samples.safetensors");
    for (spacing, named) in [
        (Spacing::Leading, "leading"),
        (Spacing::Trailing, "trailing"),
        (Spacing::Linspace, "linspace"),
    ] {
        for (sampler, label) in [
            (Sampler::Ddim, "ddim"),
            (Sampler::Dpm, "dpm"),
            (Sampler::Euler, "euler"),
        ] {
            let plan = table("sd1").spaced(spacing).plan(sampler, 8).unwrap();
            let theirs = results
                .tensor(&format!("sample.{label}.{named}.times"))
                .unwrap();
            for (step, theirs) in plan.steps.iter().zip(doubles(&theirs)) {
                assert!((step.time - theirs).abs() < 1e-4, "{label} {named}");
            }
        }
    }
}

/// The `scheduler_config.json` of Stable Diffusion 1.5, which has no `timestep_spacing`: what `from_config` of `diffusers` 0.42.1 makes of it.
#[test]
fn a_file_without_spacing_leaves_it_to_the_sampler() {
    let text = r#"{"_class_name":"PNDMScheduler","_diffusers_version":"0.6.0","beta_end":0.012,"beta_schedule":"scaled_linear",
        "beta_start":0.00085,"num_train_timesteps":1000,"set_alpha_to_one":false,"skip_prk_steps":true,"steps_offset":1,"trained_betas":null,
        "clip_sample":false}"#;
    let euler: Vec<f64> = (0..8)
        .map(|place| 999.0 * f64::from(7 - place) / 7.0)
        .collect();
    for class in [
        "PNDMScheduler",
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
    ] {
        let objective = Objective::parse(text.replace("PNDMScheduler", class).as_bytes()).unwrap();
        for (sampler, expected) in [
            (
                Sampler::Ddim,
                vec![876.0, 751.0, 626.0, 501.0, 376.0, 251.0, 126.0, 1.0],
            ),
            (
                Sampler::Dpm,
                vec![999.0, 874.0, 749.0, 624.0, 500.0, 375.0, 250.0, 125.0],
            ),
            (Sampler::Euler, euler.clone()),
        ] {
            let plan = objective.plan(sampler, 8).unwrap();
            for (step, theirs) in plan.steps.iter().zip(&expected) {
                let apart = (step.time - theirs).abs();
                assert!(apart < 1e-9, "{class} {sampler:?}: {}", step.time);
            }
            // Noise times this: the largest sigma, without the data's own variance beside it.
            let widest = Objective::Noise(table("sd1").spaced(Spacing::Linspace));
            let start = widest.plan(sampler, 8).unwrap().start_scale;
            assert!(
                (plan.start_scale - start).abs() < 1e-12,
                "{class} {sampler:?}"
            );
        }
    }
}

/// With as many steps as there are times, DPM-Solver++ counts one time more than there are.
#[test]
fn a_plan_that_would_visit_a_time_twice_is_refused() {
    for spacing in [Spacing::Leading, Spacing::Linspace] {
        let objective = Objective::Noise(table("sd1").spaced(spacing));
        let refusal = objective.plan(Sampler::Dpm, 1000).unwrap_err().to_string();
        assert!(refusal.contains("fewer than 1000"), "{refusal}");
    }
    for sampler in [Sampler::Ddim, Sampler::Dpm, Sampler::Euler] {
        let objective = Objective::Noise(table("sd1").spaced(Spacing::Linspace));
        let plan = objective.plan(sampler, 999).unwrap();
        let numbers = plan
            .steps
            .iter()
            .flat_map(|step| [step.keep, step.now, step.before]);
        assert!(numbers.into_iter().all(f64::is_finite), "{sampler:?}");
    }
}

#[test]
fn twenty_steps_of_ddim_go_from_951_to_1() {
    let plan = table("sd1").plan(Sampler::Ddim, 20).unwrap();
    let times: Vec<i64> = plan.steps.iter().map(|step| step.time as i64).collect();
    assert_eq!(times[..2], [951, 901]);
    assert_eq!(times[19], 1);
}

#[test]
fn a_flow_has_the_sigmas_of_diffusers() {
    let theirs = testing::results("sd1", "samples.safetensors")
        .tensor("sample.flow.sigmas")
        .unwrap();
    let flow = Flow::new(1000, 3.0).unwrap();
    for (ours, theirs) in flow.sigmas(9).into_iter().zip(doubles(&theirs)) {
        assert!((ours - theirs).abs() < 1e-6, "{ours} {theirs}");
    }
    assert!((flow.shifted(0.5) - 0.75).abs() < 1e-15);
}

/// x <- x + (s' - s) v(x, 1000 s) from one part of noise to the next, written down once more beside the plan, with the parts of `diffusers`.
#[test]
fn a_flow_is_sampled_along_what_the_model_says_at_the_time_that_it_is_told() {
    let sigmas = testing::results("sd1", "samples.safetensors")
        .tensor("sample.flow.sigmas")
        .unwrap();
    let sigmas = doubles(&sigmas);
    let plan = Objective::Flow(Flow::new(1000, 3.0).unwrap())
        .plan(Sampler::Euler, sigmas.len() - 1)
        .unwrap();
    let noise = testing::values("noise", &[1, 2, 3, 3], 1.7, tch::Kind::Double);
    let velocity = |x: &Tensor, time: f64| (x * 0.7 - 0.2).sin() + time / 500.0;
    let mut walk = Walk::start(&plan, &noise).unwrap();
    let mut sample = noise.copy();
    for pair in sigmas.windows(2) {
        let (read, time) = walk.next(&plan).unwrap().unwrap();
        assert!((time - 1000.0 * pair[0]).abs() < 1e-3, "{time}");
        assert!(testing::apart(&read, &sample) < 1e-6);
        walk.advance(&plan, &velocity(&read, time)).unwrap();
        let said = velocity(&sample, 1000.0 * pair[0]);
        sample = &sample + said * (pair[1] - pair[0]);
        assert!(testing::apart(&walk.sample, &sample) < 1e-6);
    }
    assert!(walk.next(&plan).unwrap().is_none());
    // A model that says what training shows it, noise less data, leads to the data.
    let clean = testing::values("clean", &[1, 2, 3, 3], 1.0, tch::Kind::Double);
    let mut walk = Walk::start(&plan, &noise).unwrap();
    while walk.next(&plan).unwrap().is_some() {
        walk.advance(&plan, &(&noise - &clean)).unwrap();
    }
    assert!(testing::apart(&walk.sample, &clean) < 1e-12);
}

/// With a model that is always right every sampler ends at the clean sample, whatever it starts from.
#[test]
fn a_perfect_model_is_led_to_the_clean_sample() {
    let clean = testing::values("clean", &[1, 2, 3, 3], 1.0, tch::Kind::Double);
    let noise = testing::values("noise", &[1, 2, 3, 3], 1.7, tch::Kind::Double);
    let flow = Objective::Flow(Flow::new(1000, 3.0).unwrap());
    let mut objectives = vec![("flow".to_owned(), flow)];
    for name in CHECKPOINTS {
        for spacing in [Spacing::Leading, Spacing::Trailing, Spacing::Linspace] {
            let objective = Objective::Noise(table(name).spaced(spacing));
            objectives.push((format!("{name} {spacing:?}"), objective));
        }
    }
    for (named, objective) in &objectives {
        for sampler in [Sampler::Ddim, Sampler::Dpm, Sampler::Euler] {
            // There DDIM, as diffusers has it, steps to other times than it visits next.
            if sampler == Sampler::Ddim && named.ends_with("Linspace") {
                continue;
            }
            let plan = objective.plan(sampler, 7).unwrap();
            let mut walk = Walk::start(&plan, &noise).unwrap();
            while walk.next(&plan).unwrap().is_some() {
                let step = &plan.steps[walk.done];
                // What the model must say for the estimate to be the clean sample.
                let output = (&clean - &walk.sample * step.x0_sample) / step.x0_output;
                walk.advance(&plan, &output).unwrap();
            }
            let apart = testing::apart(&walk.sample, &clean);
            // DDIM stops at the first entry of the table, which has a little noise.
            let bound = if sampler == Sampler::Ddim { 0.06 } else { 1e-9 };
            assert!(apart < bound, "{named} {sampler:?}: {apart}");
            assert!(walk.advance(&plan, &clean).is_err());
        }
    }
}

#[test]
fn training_pairs_hold_a_time_for_each_sample() {
    let clean = testing::values("clean", &[2, 1, 2, 2], 1.0, tch::Kind::Double);
    let noise = testing::values("noise", &[2, 1, 2, 2], 1.0, tch::Kind::Double);
    for name in CHECKPOINTS {
        let table = table(name);
        let alphas = table.alphas().to_vec();
        let objective = Objective::Noise(table);
        let times = [0.25, 0.9].map(|place| objective.training_time(place));
        assert_eq!(times.map(|time| time.time as i64), [250, 900]);
        let pair = training_pair(&clean, &noise, &times).unwrap();
        for (row, time) in [250, 900].into_iter().enumerate() {
            let (a, s) = (alphas[time].sqrt(), (1.0 - alphas[time]).sqrt());
            let (x, z) = (clean.get(row as i64), noise.get(row as i64));
            let target = if name == "sd1" {
                z.copy()
            } else {
                &z * a - &x * s
            };
            assert!(testing::apart(&pair.noisy.get(row as i64), &(x * a + z * s)) < 1e-12);
            assert!(testing::apart(&pair.target.get(row as i64), &target) < 1e-12);
        }
        assert!(training_pair(&clean, &noise, &times[..1]).is_err());
    }
}

/// x_s = (1 - s) x0 + s z and the target z - x0, with s' = 3 s / (1 + 2 s).
#[test]
fn flow_matching_pairs_lie_on_straight_lines() {
    let clean = testing::values("clean", &[1, 1, 2, 2], 1.0, tch::Kind::Double);
    let noise = testing::values("noise", &[1, 1, 2, 2], 1.0, tch::Kind::Double);
    let objective = Objective::Flow(Flow::new(1000, 3.0).unwrap());
    let pair = training_pair(&clean, &noise, &[objective.training_time(0.25)]).unwrap();
    assert!(testing::apart(&pair.noisy, &(&clean * 0.5 + &noise * 0.5)) < 1e-12);
    assert!(testing::apart(&pair.target, &(&noise - &clean)) < 1e-12);
    assert!((pair.times.double_value(&[0]) - 500.0).abs() < 1e-9);
}

#[test]
fn schedules_that_are_not_built_are_refused() {
    let file = testing::fixture("sd1").join("scheduler/scheduler_config.json");
    let text = fs::read_to_string(file).unwrap();
    for (from, to, complaint) in [
        (
            "\"clip_sample\":false",
            "\"clip_sample\":true",
            "clip_sample",
        ),
        ("\"clip_sample\":", "\"clipping\":", "clip_sample"),
        ("scaled_linear", "squaredcos_cap_v2", "beta_schedule"),
        ("\"epsilon\"", "\"sample\"", "sample"),
        ("0.00085", "-1", "beta_start"),
        ("1000", "1000000000", "num_train_timesteps"),
        ("\"steps_offset\":1", "\"steps_offset\":-7", "steps_offset"),
        ("DDIMScheduler", "Model", "no scheduler"),
    ] {
        let changed = text.replace(from, to);
        assert_ne!(changed, text, "{from}");
        let refusal = Objective::parse(changed.as_bytes()).unwrap_err();
        assert!(refusal.contains(complaint), "{refusal}");
    }
    // As DPMSolverMultistepScheduler of `diffusers` writes it: no JSON, strictly.
    let dpm = text
        .replace("DDIMScheduler", "DPMSolverMultistepScheduler")
        .replace(
            "\"clip_sample\":false",
            "\"lambda_min_clipped\": -Infinity, \"solver_type\":\"midpoint\", \"use_flow_sigmas\":false",
        );
    assert_eq!(
        Objective::parse(dpm.as_bytes()).unwrap(),
        Objective::Noise(table("sd1"))
    );
    for (from, to, complaint) in [
        ("-Infinity", "-5.1", "lambda_min_clipped"),
        ("midpoint", "heun", "solver_type"),
        (
            "\"use_flow_sigmas\":false",
            "\"use_flow_sigmas\":true",
            "use_flow_sigmas",
        ),
    ] {
        let changed = dpm.replace(from, to);
        assert_ne!(changed, dpm, "{from}");
        let refusal = Objective::parse(changed.as_bytes()).unwrap_err();
        assert!(refusal.contains(complaint), "{refusal}");
    }
    for steps in [0, 1001] {
        assert!(
            Objective::Noise(table("sd1"))
                .plan(Sampler::Ddim, steps)
                .is_err()
        );
    }
}
