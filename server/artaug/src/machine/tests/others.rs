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

#[test]
fn a_control_is_compared_with_the_enhanced_model_prompt_by_prompt() {
    // Half of the judge's scores are missing, the same in all arms.
    let world = World {
        unjudged: 2,
        ..GOOD
    };
    let (machine, _) = GOOD.run(plan());
    let last = machine.history().last().unwrap();
    let score = |arm: Arm| last.arms[&arm].score;
    for arm in [Arm::PlainLora, Arm::Rewriting] {
        let behind = last.arms[&arm].behind.unwrap();
        assert!((behind.mean - (score(Arm::Enhanced) - score(arm))).abs() < 1e-9);
        assert_eq!(behind.pairs, 8);
    }
    assert!(last.arms[&Arm::Enhanced].behind.is_none());
    let (machine, _) = world.run(plan());
    let arms = &machine.history().last().unwrap().arms;
    assert!(arms[&Arm::PlainLora].behind.is_none(), "half is too few");
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
