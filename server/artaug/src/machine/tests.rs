mod fitting;
mod others;

use proptest::prelude::*;

use super::{
    testing::{GOOD, World, began, plan, specification},
    *,
};

fn last_stop(world: World) -> (u32, StopReason, usize) {
    let (machine, _) = world.run(plan());
    match &machine.history().last().unwrap().decision {
        Decision::Stop { keep, reason } => (*keep, reason.clone(), machine.history().len()),
        Decision::Continue => panic!("went on"),
    }
}

#[test]
fn a_good_model_improves_to_the_maximum() {
    let (machine, journal) = GOOD.run(plan());
    let history = machine.history();
    assert_eq!(history.len(), 3);
    assert_eq!(history[0].decision, Decision::Continue);
    assert_eq!(
        history[2].decision,
        Decision::Stop {
            keep: 3,
            reason: StopReason::Maximum
        }
    );
    assert_eq!(machine.stage(), Stage::Done);
    for summary in history {
        assert_eq!(summary.kept, 3);
        let rejected: Vec<(&str, usize)> = summary
            .rejected
            .iter()
            .map(|(code, count)| (code.as_str(), *count))
            .collect();
        assert_eq!(
            rejected,
            [("no-advice", 1), ("no-regions", 1), ("unchanged", 1)]
        );
        let enhanced = &summary.arms[&Arm::Enhanced];
        assert!(enhanced.gain.is_gain() && enhanced.wins.rate() > 0.99);
        assert_eq!(summary.arms[&Arm::PlainLora].wins.ties, 8);
        assert_eq!(summary.arms[&Arm::Base].gain.mean, 0.0);
    }
    // The base and the rewritten prompts are generated once, the others in each iteration.
    let evaluated = journal
        .iter()
        .filter(|event| matches!(event, Event::Evaluated { .. }))
        .count();
    assert_eq!(evaluated, 8 * (2 + 2 * 3));
}

#[test]
fn the_stages_come_in_the_order_of_the_method() {
    let mut machine = Machine::new(
        Plan {
            review: true,
            ..plan()
        },
        specification(),
    );
    machine.apply(began()).unwrap();
    let mut stages = vec![machine.stage()];
    while machine.iteration() == 1 {
        for event in GOOD.act(&machine) {
            machine.apply(event).unwrap();
            if *stages.last().unwrap() != machine.stage() {
                stages.push(machine.stage());
            }
        }
    }
    assert_eq!(
        stages,
        [
            Stage::Generate,
            Stage::Advise,
            Stage::Regenerate,
            Stage::Score,
            Stage::Filter,
            Stage::Review,
            Stage::TrainFirst,
            Stage::TrainSecond,
            Stage::TrainControl,
            Stage::Fuse,
            Stage::Evaluate,
            Stage::Decide,
            Stage::Generate,
        ]
    );
}

#[test]
fn a_raw_gain_that_may_be_nothing_stops_before_training() {
    let (keep, reason, iterations) = last_stop(World { raw: -0.05, ..GOOD });
    assert!(
        matches!(reason, StopReason::NoRawGain { gain: Some(_) }),
        "{reason}"
    );
    assert_eq!((keep, iterations), (0, 1));
    let (machine, journal) = World { raw: -0.05, ..GOOD }.run(plan());
    assert!(
        !journal
            .iter()
            .any(|event| matches!(event, Event::Trained { .. }))
    );
    assert_eq!(machine.history()[0].arms, BTreeMap::new());
}

#[test]
fn too_few_kept_pairs_stop() {
    let (machine, _) = GOOD.run(Plan {
        stop: StopRules {
            least_kept: 4,
            ..plan().stop
        },
        ..plan()
    });
    assert!(matches!(
        machine.history()[0].decision,
        Decision::Stop {
            keep: 0,
            reason: StopReason::FewPairs { kept: 3, least: 4 }
        }
    ));
}

#[test]
fn lost_alignment_rolls_back_to_the_iteration_before() {
    let (keep, reason, iterations) = last_stop(World {
        fit: -0.015,
        ..GOOD
    });
    assert!(matches!(reason, StopReason::Alignment { .. }), "{reason}");
    assert_eq!((keep, iterations), (1, 2));
    assert!(reason.rolls_back());
}

#[test]
fn lost_diversity_rolls_back() {
    let (keep, reason, iterations) = last_stop(World {
        diversity: -0.025,
        ..GOOD
    });
    assert!(matches!(reason, StopReason::Diversity { .. }), "{reason}");
    assert_eq!((keep, iterations), (2, 3));
}

#[test]
fn a_filter_that_is_pleased_alone_is_reward_hacking() {
    let (keep, reason, _) = last_stop(World {
        judge: -0.05,
        ..GOOD
    });
    assert!(
        matches!(reason, StopReason::RewardHacking { .. }),
        "{reason}"
    );
    assert_eq!(keep, 0);
}

#[test]
fn a_model_that_got_worse_is_rolled_back() {
    let (keep, reason, _) = last_stop(World {
        judge: -0.5,
        ..GOOD
    });
    assert!(matches!(reason, StopReason::Worse { .. }), "{reason}");
    assert_eq!(keep, 0);
}

#[test]
fn a_missing_judge_stops_rather_than_passes() {
    let (machine, _) = GOOD.run(Plan {
        stop: StopRules {
            judge: "nobody".to_owned(),
            ..plan().stop
        },
        ..plan()
    });
    assert!(matches!(
        &machine.history()[0].decision,
        Decision::Stop { keep: 0, reason: StopReason::NoEvaluation { what } } if what.contains("`nobody` is there for 0 of 8")
    ));
}

#[test]
fn the_review_takes_pairs_out() {
    let (machine, _) = GOOD.run(Plan {
        review: true,
        ..plan()
    });
    let first = &machine.history()[0];
    assert_eq!((first.kept, first.rejected["review"]), (2, 1));
}

#[test]
fn a_review_that_leaves_nothing_stops() {
    let mut machine = Machine::new(
        Plan {
            review: true,
            ..plan()
        },
        specification(),
    );
    machine.apply(began()).unwrap();
    while machine.history().is_empty() {
        for mut event in GOOD.act(&machine) {
            if let Event::Reviewed { accepted, .. } = &mut event {
                *accepted = false;
            }
            machine.apply(event).unwrap();
        }
    }
    assert!(matches!(
        machine.history()[0].decision,
        Decision::Stop {
            reason: StopReason::FewPairs { kept: 0, .. },
            ..
        }
    ));
}

#[test]
fn the_manifest_has_a_line_for_every_item_with_all_that_is_known() {
    let mut machine = Machine::new(plan(), specification());
    machine.apply(began()).unwrap();
    while machine.stage() < Stage::TrainFirst {
        for event in GOOD.act(&machine) {
            machine.apply(event).unwrap();
        }
    }
    let lines: Vec<ManifestLine> = machine.manifest().collect();
    assert_eq!(lines.len(), 6);
    assert!(
        lines
            .iter()
            .all(|line| line.base.is_some() && line.advice.is_some() && line.verdict.is_some())
    );
    assert_eq!(
        lines[5].advice.as_ref().unwrap().error.as_deref(),
        Some("no usable answer")
    );
    assert!(lines[0].scores.is_some() && lines[3].scores.is_none() && lines[4].enhanced.is_none());
    let text = serde_json::to_string(&lines[0]).unwrap();
    assert_eq!(
        serde_json::from_str::<ManifestLine>(&text).unwrap(),
        lines[0]
    );
}

#[test]
fn a_journal_of_another_job_is_refused() {
    let mut machine = Machine::new(plan(), Digest::of(b"another"));
    assert!(
        machine
            .apply(began())
            .unwrap_err()
            .what
            .contains("another specification")
    );
    let event = GOOD
        .act(&Machine::new(plan(), specification()))
        .swap_remove(0);
    assert!(machine.apply(event).is_err());
}

#[test]
fn a_number_that_is_none_does_not_get_into_the_journal() {
    let mut machine = Machine::new(plan(), specification());
    machine.apply(began()).unwrap();
    let mut event = GOOD.act(&machine).swap_remove(0);
    if let Event::Generated { result, .. } = &mut event {
        result.seconds = f64::NAN;
    }
    assert!(machine.apply(event).unwrap_err().what.contains("finite"));
}

#[test]
fn every_event_survives_its_line() {
    let (_, journal) = GOOD.run(Plan {
        review: true,
        ..plan()
    });
    for event in journal {
        let line = serde_json::to_string(&event).unwrap();
        assert!(line.contains(&format!("\"event\":\"{}\"", event.name())));
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
    }
}

#[test]
fn the_same_event_twice_is_refused() {
    let (_, journal) = GOOD.run(Plan {
        review: true,
        ..plan()
    });
    let mut machine = Machine::new(
        Plan {
            review: true,
            ..plan()
        },
        specification(),
    );
    for event in journal {
        machine.apply(event.clone()).unwrap();
        let state = machine.clone();
        assert!(machine.apply(event.clone()).is_err(), "{event:?}");
        assert_eq!(machine, state);
    }
}

#[test]
fn a_few_missing_scores_of_the_judge_are_left_out_and_counted() {
    let many = Plan {
        held_out: 40,
        ..plan()
    };
    // 3 of 40 and 6 of 40 prompts without a score.
    let (machine, _) = World {
        unjudged: 14,
        ..GOOD
    }
    .run(many.clone());
    let last = machine.history().last().unwrap();
    assert!(matches!(
        last.decision,
        Decision::Stop {
            keep: 3,
            reason: StopReason::Maximum
        }
    ));
    let enhanced = &last.arms[&Arm::Enhanced];
    assert_eq!((enhanced.left_out, enhanced.gain.pairs), (3, 37));
    assert_eq!(enhanced.wins.wins, 37);
    let (machine, _) = World {
        unjudged: 7,
        ..GOOD
    }
    .run(many);
    let Decision::Stop { keep: 0, reason } = &machine.history()[0].decision else {
        panic!("kept")
    };
    assert!(
        reason.is_failure() && reason.to_string().contains("34 of 40"),
        "{reason}"
    );
    assert_eq!(machine.history()[0].arms[&Arm::Enhanced].left_out, 6);
}

#[test]
fn a_dead_scorer_fails_the_job_and_is_not_taken_for_no_gain() {
    let (keep, reason, iterations) = last_stop(World {
        unscored: 1,
        ..GOOD
    });
    assert_eq!(
        reason,
        StopReason::NoPairs {
            pairs: 6,
            advised: 5,
            changed: 3,
            scored: 0
        }
    );
    assert!(reason.is_failure() && (keep, iterations) == (0, 1));
}

#[test]
fn a_dead_advisor_fails_the_job_and_an_advisor_with_nothing_to_say_ends_it() {
    let ends = |error: Option<&str>| {
        let mut machine = Machine::new(plan(), specification());
        machine.apply(began()).unwrap();
        while machine.history().is_empty() {
            for mut event in GOOD.act(&machine) {
                if let Event::Advised { result, .. } = &mut event {
                    result.advice.regions.clear();
                    result.error = error.map(str::to_owned);
                }
                machine.apply(event).unwrap();
            }
        }
        machine.history()[0].decision.clone()
    };
    let Decision::Stop { reason, .. } = ends(Some("refused")) else {
        panic!("went on")
    };
    assert!(
        matches!(reason, StopReason::NoPairs { advised: 0, .. }),
        "{reason}"
    );
    let Decision::Stop { reason, .. } = ends(None) else {
        panic!("went on")
    };
    assert_eq!(reason, StopReason::NoRawGain { gain: None });
    assert!(!reason.is_failure());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_job_interrupted_anywhere_ends_the_same(cut in 0_usize..400, judge in -0.1_f64..0.3, fit in -0.02_f64..0.01) {
        let world = World { judge, fit, ..GOOD };
        let plan = Plan { review: true, ..plan() };
        let (uninterrupted, journal) = world.run(plan.clone());
        let left: Vec<Event> = journal.iter().take(cut).cloned().collect();
        let mut machine = Machine::new(plan, specification());
        for event in &left {
            machine.apply(event.clone()).unwrap();
        }
        let (resumed, again) = world.go_on(machine, left);
        prop_assert_eq!(resumed, uninterrupted);
        prop_assert_eq!(again.len(), journal.len());
    }
}

#[test]
fn progress_counts_the_stage_under_way() {
    let mut machine = Machine::new(
        Plan {
            review: true,
            ..plan()
        },
        specification(),
    );
    machine.apply(began()).unwrap();
    let mut seen = Vec::new();
    while machine.work() != Work::Done && machine.iteration() == 1 {
        for event in GOOD.act(&machine) {
            machine.apply(event).unwrap();
            let progress = machine.progress();
            assert!(
                progress.total == 0 || progress.done <= progress.total,
                "{progress:?}"
            );
            seen.push((progress.stage, progress.done, progress.total));
        }
    }
    for expected in [
        (Stage::Generate, 1, 6),
        (Stage::Advise, 5, 6),
        (Stage::Review, 1, 3),
        (Stage::Review, 2, 3),
        (Stage::TrainFirst, 20, 25),
        (Stage::Evaluate, 9, 32),
        (Stage::Decide, 0, 1),
    ] {
        assert!(seen.contains(&expected), "{expected:?}: {seen:?}");
    }
}

#[test]
fn the_pace_gives_rate_and_remaining_time_of_a_stage() {
    let at = |stage, done| Progress {
        iteration: 1,
        iterations: 3,
        stage,
        done,
        total: 100,
    };
    let mut pace = Pace::default();
    let second = |n: i64| concord_common::Timestamp(n * 1000);
    assert_eq!(pace.note(&at(Stage::Generate, 10), second(0)), None);
    assert_eq!(pace.note(&at(Stage::Generate, 10), second(5)), None);
    let estimate = pace.note(&at(Stage::Generate, 30), second(10)).unwrap();
    assert_eq!(
        (estimate.per_second, estimate.remaining.unwrap().as_secs()),
        (2.0, 35)
    );
    assert_eq!(pace.note(&at(Stage::Advise, 50), second(11)), None);
    let unknown = Progress {
        total: 0,
        ..at(Stage::Advise, 60)
    };
    assert_eq!(pace.note(&unknown, second(21)).unwrap().remaining, None);
}

#[test]
fn a_large_job_is_taken_in_again_quickly() {
    let plan = Plan {
        pairs: 20_000,
        ..plan()
    };
    let mut machine = Machine::new(plan, specification());
    machine.apply(began()).unwrap();
    let start = std::time::Instant::now();
    while machine.stage() < Stage::Filter {
        for event in GOOD.act(&machine) {
            machine.apply(event).unwrap();
        }
    }
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}
