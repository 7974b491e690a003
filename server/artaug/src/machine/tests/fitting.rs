//! Which events fit, and what belongs together: batches, the control's chain, steps, kept items.

use super::*;

#[test]
fn a_partly_recorded_batch_is_given_out_whole() {
    let mut machine = Machine::new(plan(), specification());
    machine.apply(began()).unwrap();
    let events = GOOD.act(&machine);
    for event in &events[..2] {
        machine.apply(event.clone()).unwrap();
    }
    let group = |members: &[u32], missing: &[u32]| Group {
        members: members.to_vec(),
        missing: missing.to_vec(),
    };
    let Work::Items {
        generate, advise, ..
    } = machine.work()
    else {
        panic!("{:?}", machine.work())
    };
    assert_eq!(
        generate,
        [group(&[0, 1, 2, 3], &[2, 3]), group(&[4, 5], &[4, 5])]
    );
    assert_eq!(advise, [0, 1]);
    for event in &events[2..] {
        machine.apply(event.clone()).unwrap();
    }
    // A regenerate group is known once its whole batch has been advised; without regions there is none.
    let advised = GOOD.act(&machine);
    for event in [&advised[..3], &advised[4..]].concat() {
        machine.apply(event).unwrap();
    }
    assert!(
        matches!(machine.work(), Work::Items { regenerate, .. } if regenerate.is_empty()),
        "{:?}",
        machine.work()
    );
    machine.apply(advised[3].clone()).unwrap();
    let enhanced = GOOD.act(&machine);
    machine.apply(enhanced[1].clone()).unwrap();
    let Work::Items { regenerate, .. } = machine.work() else {
        panic!("{:?}", machine.work())
    };
    assert_eq!(regenerate, [group(&[0, 1, 2, 3], &[0, 2, 3])]);
    assert_eq!(machine.regenerated_with(2), [0, 1, 2, 3]);
    assert_eq!(machine.regenerated_with(5), Vec::<u32>::new());
    assert_eq!(machine.batch_of(5, 6), [4, 5]);
}

#[test]
fn an_enhanced_image_before_all_advice_of_its_batch_is_refused() {
    let mut machine = Machine::new(plan(), specification());
    machine.apply(began()).unwrap();
    for event in GOOD.act(&machine) {
        machine.apply(event).unwrap();
    }
    machine.apply(GOOD.act(&machine).swap_remove(0)).unwrap();
    let early = Event::Regenerated {
        iteration: 1,
        item: 0,
        result: Regenerated {
            image: Digest::of(b"early"),
            cut: 0,
            forwards: 1,
            seconds: 1.0,
        },
    };
    assert!(machine.check(&early).is_err());
}

#[test]
fn the_control_has_a_chain_of_its_own() {
    let (machine, journal) = GOOD.run(plan());
    let mut replayed = Machine::new(plan(), specification());
    let mut controls = Vec::new();
    for event in journal {
        if let Event::Trained {
            training: Training::Control,
            result,
            ..
        } = &event
        {
            let on = testing::learned(&replayed, Training::Control);
            assert_eq!(result.lora, testing::object(&on));
            controls.push(replayed.control());
            assert_ne!(replayed.control(), replayed.current().or(Some(result.lora)));
        }
        replayed.apply(event).unwrap();
    }
    let chain: Vec<Option<Digest>> = machine
        .made()
        .iter()
        .map(|made| made.fused.as_ref().unwrap().control)
        .collect();
    assert_eq!(controls, [None, chain[0], chain[1]]);
    assert_eq!(machine.lora_of(Arm::PlainLora), chain[2]);
    assert_eq!(
        machine.lora_of(Arm::Enhanced),
        Some(machine.result_lora().unwrap().merged)
    );
    assert_eq!(machine.lora_of(Arm::Base), None);
    assert_eq!(machine.evaluated_result().count(), 8);
}

#[test]
fn without_control_arms_none_is_trained_joined_or_drawn() {
    let alone = Plan {
        control: false,
        ..plan()
    };
    let (machine, journal) = GOOD.run(alone);
    let arms: std::collections::BTreeSet<Arm> = journal
        .iter()
        .filter_map(|event| match event {
            Event::Evaluated { arm, .. } => Some(*arm),
            _ => None,
        })
        .collect();
    assert_eq!(arms, [Arm::Base, Arm::Enhanced].into());
    let is_control = |event: &Event| matches!(event, Event::Trained { training, .. } if *training == Training::Control);
    assert!(!journal.iter().any(is_control));
    let fused = machine.made().iter().map(|made| made.fused.as_ref());
    assert!(fused.flatten().all(|fused| fused.control.is_none()));
    assert!(machine.result_lora().is_some());
}

#[test]
fn joined_lora_without_the_control_is_refused_if_control_arms_run() {
    let mut machine = Machine::new(plan(), specification());
    machine.apply(began()).unwrap();
    while machine.stage() != Stage::Fuse {
        machine.apply(GOOD.act(&machine).swap_remove(0)).unwrap();
    }
    let mut event = GOOD.act(&machine).swap_remove(0);
    if let Event::Fused { result, .. } = &mut event {
        result.control = None;
    }
    assert!(machine.check(&event).is_err());
}

#[test]
fn a_training_for_each_pair_counts_the_steps_of_all() {
    let each = Plan {
        per_pair: true,
        ..plan()
    };
    let (machine, journal) = GOOD.run(each);
    let steps: Vec<u64> = journal
        .iter()
        .filter_map(|event| match event {
            Event::Trained { result, .. } => Some(result.steps),
            _ => None,
        })
        .collect();
    assert_eq!(machine.made().len(), 3);
    assert_eq!(steps, [75; 9]);
}

#[test]
fn a_training_with_other_steps_than_planned_is_refused() {
    let mut machine = Machine::new(plan(), specification());
    machine.apply(began()).unwrap();
    while machine.stage() != Stage::TrainFirst {
        machine.apply(GOOD.act(&machine).swap_remove(0)).unwrap();
    }
    let checkpoint = |step| Event::Checkpointed {
        iteration: 1,
        training: Training::First,
        result: Checkpoint {
            step,
            state: Digest::of(b"state"),
            before: 0,
            finished: Vec::new(),
            loss: 1.0,
            seconds: 1.0,
        },
    };
    assert!(machine.check(&checkpoint(26)).is_err());
    assert!(machine.check(&checkpoint(25)).is_ok());
}

#[test]
fn a_checkpoint_names_each_finished_pair_once() {
    let each = Plan {
        per_pair: true,
        ..plan()
    };
    let mut machine = Machine::new(each, specification());
    machine.apply(began()).unwrap();
    while machine.stage() != Stage::TrainFirst {
        machine.apply(GOOD.act(&machine).swap_remove(0)).unwrap();
    }
    assert_eq!(machine.kept().len(), 3);
    let [one, two, other] = [b"1", b"2", b"3"].map(|name| Digest::of(name));
    let checkpoint = |step, before, finished: &[Digest]| Event::Checkpointed {
        iteration: 1,
        training: Training::First,
        result: Checkpoint {
            step,
            state: Digest::of(b"state"),
            before,
            finished: finished.to_vec(),
            loss: 1.0,
            seconds: 1.0,
        },
    };
    let named = |machine: &Machine| machine.checkpoint().unwrap().finished.clone();
    assert!(machine.check(&checkpoint(30, 1, &[one])).is_err());
    machine.apply(checkpoint(30, 0, &[one])).unwrap();
    machine.apply(checkpoint(40, 1, &[])).unwrap();
    assert_eq!(named(&machine), [one]);
    assert!(machine.check(&checkpoint(60, 2, &[])).is_err());
    assert!(machine.check(&checkpoint(60, 1, &[two, other])).is_err());
    machine.apply(checkpoint(60, 1, &[two])).unwrap();
    assert_eq!(named(&machine), [one, two]);
    let work = machine.work();
    let Work::Train(Training::First, Some(from)) = work else {
        panic!("{work:?}")
    };
    assert_eq!((from.before, from.finished), (0, vec![one, two]));
    // A worker that had to begin anew, and for which the second came out otherwise.
    machine.apply(checkpoint(70, 1, &[other])).unwrap();
    assert_eq!(named(&machine), [one, other]);
}

#[test]
fn the_kept_items_must_be_those_of_the_filter() {
    let mut machine = Machine::new(plan(), specification());
    machine.apply(began()).unwrap();
    while machine.stage() != Stage::Filter {
        machine.apply(GOOD.act(&machine).swap_remove(0)).unwrap();
    }
    let mut event = machine.filtered();
    if let Event::Filtered { kept, .. } = &mut event {
        assert_eq!(*kept, [0, 1, 2]);
        kept.pop();
    }
    assert!(machine.check(&event).is_err());
    machine.apply(machine.filtered()).unwrap();
    assert_eq!(machine.kept(), [0, 1, 2]);
}
