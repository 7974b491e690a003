use super::*;

#[test]
fn evaluation_scorers_that_decide_nothing_are_compared_too() {
    let (machine, _) = GOOD.run(plan());
    let last = machine.history().last().unwrap();
    for (arm, result) in &last.arms {
        let names: Vec<&String> = result.others.keys().collect();
        assert_eq!(names, ["second"], "{arm:?}");
        assert_eq!(result.others["second"].gain.pairs, 4);
    }
    let [base, enhanced] = [Arm::Base, Arm::Enhanced].map(|arm| &last.arms[&arm].others["second"]);
    assert_eq!((base.score, base.gain.mean), (3.0, 0.0));
    assert_eq!((enhanced.score, enhanced.gain.mean), (0.0, -3.0));
}

/// The judge of a held-out image of an arm: of its own at odd items, and missing where it is told so.
fn judged(event: Event, arms: [Arm; 2], missing: [u32; 2]) -> Event {
    let Event::Evaluated {
        iteration,
        arm,
        item,
        mut result,
    } = event
    else {
        return event;
    };
    let place = arms.iter().position(|other| *other == arm);
    let is_missing = place.is_some_and(|place| missing[place] == item);
    result.scores = result
        .scores
        .iter()
        .filter(|(name, _)| *name != "judge" || !is_missing)
        .map(|(name, score)| (name.to_owned(), score))
        .collect();
    Event::Evaluated {
        iteration,
        arm,
        item,
        result,
    }
}

#[test]
fn a_control_is_compared_with_the_enhanced_model_prompt_by_prompt() {
    let arms = [Arm::Enhanced, Arm::PlainLora];
    let plan = Plan {
        held_out: 40,
        ..plan()
    };
    let mut machine = Machine::new(plan, specification());
    machine.apply(began()).unwrap();
    while machine.work() != Work::Done {
        for event in GOOD.act(&machine) {
            machine.apply(judged(event, arms, [3, 8])).unwrap();
        }
    }
    let last = machine.history().last().unwrap();
    let behind = last.arms[&Arm::PlainLora].behind.unwrap();
    assert_eq!(behind.pairs, 38);
    let score = |arm, item| machine.evaluated_item(arm, item)?.scores.get("judge");
    let both = (0..40).filter_map(|item| Some(score(arms[0], item)? - score(arms[1], item)?));
    let sum: f64 = both.sum();
    assert!((behind.mean - sum / 38.0).abs() < 1e-9);
    // The difference of the means is another number: each is over other prompts.
    let means = arms.map(|arm| last.arms[&arm].score);
    assert!((behind.mean - (means[0] - means[1])).abs() > 1e-6);
    assert!(last.arms[&Arm::Rewriting].behind.is_some());
    assert!(last.arms[&Arm::Enhanced].behind.is_none());
}

#[test]
fn a_control_is_not_compared_by_a_few_prompts() {
    let world = World {
        unjudged: 2,
        ..GOOD
    };
    let (machine, _) = world.run(plan());
    let arms = &machine.history().last().unwrap().arms;
    assert!(arms[&Arm::PlainLora].behind.is_none());
}

/// The same prompt for all of a few items, in pairs and held-out images.
fn repeated(event: Event) -> Event {
    match event {
        Event::Generated {
            iteration,
            item,
            mut result,
        } => {
            result.prompt = format!("prompt {}", item % 2);
            Event::Generated {
                iteration,
                item,
                result,
            }
        }
        Event::Evaluated {
            iteration,
            arm,
            item,
            mut result,
        } => {
            result.prompt = format!("held out {}", item % 2);
            Event::Evaluated {
                iteration,
                arm,
                item,
                result,
            }
        }
        event => event,
    }
}

#[test]
fn intervals_know_which_images_are_of_the_same_prompt() {
    let widths = |change: fn(Event) -> Event| {
        let mut machine = Machine::new(plan(), specification());
        machine.apply(began()).unwrap();
        while machine.history().is_empty() {
            for event in GOOD.act(&machine) {
                let changed = match change(event) {
                    // The raw gain follows from what was recorded.
                    Event::Filtered { .. } => machine.filtered(),
                    event => event,
                };
                machine.apply(changed).unwrap();
            }
        }
        let first = &machine.history()[0];
        let width = |interval: Interval| interval.high - interval.low;
        let gain = first.arms[&Arm::Enhanced].gain;
        (width(first.raw_gain.unwrap()), width(gain))
    };
    let (raw, gain) = widths(|event| event);
    let (raw_of_two, gain_of_two) = widths(repeated);
    assert!(raw_of_two >= raw && gain_of_two >= gain);
    assert!((raw_of_two, gain_of_two) != (raw, gain));
}

#[test]
fn an_arm_that_the_time_ran_out_for_does_not_count_with_its_first_prompts() {
    let mut machine = Machine::new(plan(), specification());
    machine.apply(began()).unwrap();
    let drawn = |machine: &Machine, arm| machine.evaluated(arm).count();
    'job: while machine.iteration() == 1 {
        for event in GOOD.act(&machine) {
            machine.apply(event).unwrap();
            if drawn(&machine, Arm::PlainLora) == 4 {
                break 'job;
            }
        }
    }
    let limit = std::time::Duration::from_mins(1);
    machine.apply(machine.out_of_time(limit)).unwrap();
    let arms = &machine.history().last().unwrap().arms;
    assert!(!arms.contains_key(&Arm::PlainLora), "{arms:?}");
    assert!(arms.contains_key(&Arm::Enhanced));
}
