//! A made-up model for tests: the events that a worker would write, without any engine.

use concord_common::seed::Seed;

use super::*;
use crate::{
    advisor::{Advice, Region, RegionPrompt},
    region::Area,
    scorer::Scores,
};

pub(crate) fn plan() -> Plan {
    Plan {
        iterations: 3,
        pairs: 6,
        held_out: 8,
        review: false,
        control: true,
        filter: FilterRules {
            least_gain: [("light".to_owned(), 0.05)].into(),
            most_kept: 3,
        },
        stop: StopRules {
            judge: "judge".to_owned(),
            tie: 1e-9,
            alignment: Some("fit".to_owned()),
            alignment_loss: 0.02,
            least_diversity: 0.8,
            least_kept: 1,
        },
        bootstrap: Bootstrap {
            confidence: 0.95,
            resamples: 200,
            seed: Seed(1),
        },
    }
}

pub(crate) fn specification() -> Digest {
    Digest::of(b"specification")
}

fn object(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

/// How a made-up model behaves; all numbers are gains an iteration.
#[derive(Clone, Copy)]
pub(crate) struct World {
    pub(crate) raw: f64,
    pub(crate) judge: f64,
    pub(crate) filter: f64,
    pub(crate) fit: f64,
    pub(crate) diversity: f64,
}

pub(crate) const GOOD: World = World {
    raw: 0.3,
    judge: 0.2,
    filter: 0.2,
    fit: 0.0,
    diversity: -0.01,
};

fn noise(what: &str, item: u32) -> f64 {
    Seed(3).derive(&format!("{what} {item}")).rng().uniform() * 0.1
}

fn light(value: f64) -> Scores<crate::scorer::ForFilter> {
    [("light".to_owned(), value)].into_iter().collect()
}

fn advice(item: u32) -> Advised {
    let region = Region {
        area: Area::WHOLE,
        prompt: RegionPrompt::new("well lit").unwrap(),
        confidence: 0.5,
    };
    Advised {
        advisor: "rules".to_owned(),
        // Item 4 needs nothing, item 5 got no usable answer.
        advice: Advice {
            regions: if item >= 4 { vec![] } else { vec![region] },
            ..Advice::default()
        },
        error: (item == 5).then(|| "no usable answer".to_owned()),
        seconds: 0.1,
    }
}

impl World {
    /// The events that a worker would write for the work at hand.
    pub(crate) fn act(self, machine: &Machine) -> Vec<Event> {
        let iteration = machine.iteration();
        let train = |training, step| Event::Checkpointed {
            iteration,
            training,
            result: Checkpoint {
                step,
                state: object(&format!("state {iteration} {training:?} {step}")),
                loss: 0.5,
            },
        };
        match machine.work() {
            items @ Work::Items { .. } => self.act_on_items(iteration, items),
            Work::Filter => vec![machine.filtered()],
            Work::Review(open) => open
                .into_iter()
                .map(|item| Event::Reviewed {
                    iteration,
                    item,
                    accepted: item != 1,
                })
                .collect(),
            Work::Train(training, from) if from.as_ref().is_none_or(|from| from.step < 20) => {
                vec![train(training, from.map_or(10, |from| from.step + 10))]
            }
            Work::Train(training, _) => vec![Event::Trained {
                iteration,
                training,
                result: Trained {
                    lora: object(&format!("lora {iteration} {training:?}")),
                    losses: object("losses"),
                    steps: 25,
                    final_loss: 0.1,
                    seconds: 3.0,
                },
            }],
            Work::Fuse => vec![Event::Fused {
                iteration,
                result: Fused {
                    merged: object(&format!("merged {iteration}")),
                    reduced: None,
                },
            }],
            Work::Evaluate(arm, left) => left
                .into_iter()
                .map(|item| {
                    let steps = if arm == Arm::Enhanced {
                        f64::from(iteration)
                    } else {
                        0.0
                    };
                    Event::Evaluated {
                        iteration,
                        arm,
                        item,
                        result: Evaluated {
                            prompt: format!("held out {item}"),
                            image: object(&format!("{arm:?} {iteration} {item}")),
                            scores: [
                                (
                                    "judge".to_owned(),
                                    noise("judge", item)
                                        + steps * (self.judge + noise("step", item)),
                                ),
                                ("fit".to_owned(), steps * self.fit),
                            ]
                            .into_iter()
                            .collect(),
                            filter_scores: light(
                                noise("filter", item) + steps * (self.filter + noise("more", item)),
                            ),
                        },
                    }
                })
                .collect(),
            Work::Diversity(arm) => {
                let steps = if arm == Arm::Enhanced {
                    f64::from(iteration)
                } else {
                    0.0
                };
                vec![Event::Diversity {
                    iteration,
                    arm,
                    value: 0.3 + steps * self.diversity,
                }]
            }
            Work::Decide => vec![machine.decided()],
            Work::Done => vec![],
        }
    }

    fn act_on_items(self, iteration: u32, work: Work) -> Vec<Event> {
        let Work::Items {
            generate,
            advise,
            regenerate,
            score,
        } = work
        else {
            return Vec::new();
        };

        let image = |text: &str, item: u32| object(&format!("{text} {iteration} {item}"));
        let mut events = Vec::new();
        events.extend(generate.into_iter().map(|item| Event::Generated {
            iteration,
            item,
            result: Generated {
                prompt: format!("prompt {item}"),
                seed: u64::from(item),
                image: image("base", item),
                forwards: 20,
                seconds: 0.5,
            },
        }));
        events.extend(advise.into_iter().map(|item| Event::Advised {
            iteration,
            item,
            result: advice(item),
        }));
        events.extend(regenerate.into_iter().map(|item| Event::Regenerated {
            iteration,
            item,
            result: Regenerated {
                // Item 3 comes out as it was.
                image: image(if item == 3 { "base" } else { "enhanced" }, item),
                forwards: 40,
                seconds: 1.0,
            },
        }));
        events.extend(score.into_iter().map(|item| {
            let base = noise("base", item);
            Event::Scored {
                iteration,
                item,
                result: Scored {
                    base: light(base),
                    enhanced: light(base + self.raw + noise("gain", item)),
                },
            }
        }));
        events
    }

    pub(crate) fn run(self, plan: Plan) -> (Machine, Vec<Event>) {
        self.go_on(Machine::new(plan, specification()), Vec::new())
    }

    pub(crate) fn go_on(
        self,
        mut machine: Machine,
        mut journal: Vec<Event>,
    ) -> (Machine, Vec<Event>) {
        if !machine.has_begun() {
            let began = began();
            machine.apply(began.clone()).unwrap();
            journal.push(began);
        }
        while machine.work() != Work::Done {
            for event in self.act(&machine) {
                machine.apply(event.clone()).unwrap();
                journal.push(event);
            }
        }
        (machine, journal)
    }
}

pub(crate) fn began() -> Event {
    Event::Began {
        specification: specification(),
        version: "0.1.0".to_owned(),
    }
}
