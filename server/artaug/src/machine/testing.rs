//! A made-up model for tests: the events that a worker would write, without any engine. As with a real one, every image depends
//! on which others are computed with it, and what is trained depends on every image and on the model that it starts from.

use concord_common::seed::Seed;

use super::*;
use crate::{
    advisor::{Advice, Region, RegionPrompt, Usage},
    photometry::Nearest,
    region::Area,
    scorer::Scores,
};

pub(crate) fn plan() -> Plan {
    Plan {
        iterations: 3,
        pairs: 6,
        held_out: 8,
        batch: 4,
        first_steps: 25,
        second_steps: 25,
        per_pair: false,
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

pub(crate) fn object(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

/// The bytes of an image by the model with a `LoRA`.
pub(crate) fn drawn(what: &str, lora: Option<Digest>, item: u32, members: &[u32]) -> String {
    format!("{what} {lora:?} {item} of {members:?}")
}

/// The bytes that a training of the work at hand gives.
pub(crate) fn learned(machine: &Machine, training: Training) -> String {
    let images: Vec<Option<Digest>> = machine
        .kept()
        .into_iter()
        .map(|item| match training {
            Training::First => machine.generated(item).map(|made| made.image),
            _ => machine.regenerated(item).map(|made| made.image),
        })
        .collect();
    let (on, below) = match training {
        Training::First => (machine.current(), None),
        Training::Second => (machine.current(), machine.trained(Training::First)),
        Training::Control => (machine.control(), None),
    };
    format!("{training:?} on {on:?} and {below:?} of {images:?}")
}

/// The bytes of joined `LoRA`: those before and the new one.
pub(crate) fn joined(before: Option<Digest>, new: Option<&Trained>) -> String {
    format!("{before:?} and {:?}", new.map(|trained| trained.lora))
}

/// How a made-up model behaves; all numbers are gains an iteration.
#[derive(Clone, Copy)]
pub(crate) struct World {
    pub(crate) raw: f64,
    pub(crate) judge: f64,
    pub(crate) filter: f64,
    pub(crate) fit: f64,
    pub(crate) diversity: f64,
    /// Every n-th held-out image has no judging score; 0 for none.
    pub(crate) unjudged: u32,
    /// Every n-th pair has no filter score; 0 for none.
    pub(crate) unscored: u32,
}

pub(crate) const GOOD: World = World {
    raw: 0.3,
    judge: 0.2,
    filter: 0.2,
    fit: 0.0,
    diversity: -0.01,
    unjudged: 0,
    unscored: 0,
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
        match machine.work() {
            items @ Work::Items { .. } => self.act_on_items(machine, items),
            Work::Filter => vec![machine.filtered()],
            Work::Review(open) => open
                .into_iter()
                .map(|item| Event::Reviewed {
                    iteration,
                    item,
                    accepted: item != 1,
                })
                .collect(),
            Work::Train(training, from) => vec![train(machine, training, from)],
            Work::Fuse => {
                let control = machine.trained(Training::Control);
                vec![Event::Fused {
                    iteration,
                    result: Fused {
                        merged: object(&joined(
                            machine.current(),
                            machine.trained(Training::Second),
                        )),
                        reduced: None,
                        control: control.map(|made| object(&joined(machine.control(), Some(made)))),
                    },
                }]
            }
            Work::Evaluate(arm, left) => left
                .iter()
                .flat_map(|group| group.missing.iter().map(move |item| (group, *item)))
                .map(|(group, item)| self.evaluate(machine, arm, group, item))
                .collect(),
            Work::Diversity(arm) => vec![Event::Diversity {
                iteration,
                arm,
                value: 0.3 + steps(machine, arm) * self.diversity,
                nearest: matches!(arm, Arm::Enhanced | Arm::PlainLora).then_some(Nearest {
                    arm: 0.1,
                    base: 0.2,
                    near: 0.3,
                }),
            }],
            Work::Decide => vec![machine.decided()],
            Work::Done => vec![],
        }
    }

    fn evaluate(self, machine: &Machine, arm: Arm, group: &Group, item: u32) -> Event {
        let steps = steps(machine, arm);
        let judge = noise("judge", item) + steps * (self.judge + noise("step", item));
        let mut scores: Scores<_> = [("fit".to_owned(), steps * self.fit)].into_iter().collect();
        if self.unjudged == 0 || !item.is_multiple_of(self.unjudged) {
            scores.insert("judge", judge);
        }
        // Half of the prompts have a second opinion.
        if item.is_multiple_of(2) {
            scores.insert("second", f64::from(item) - steps);
        }
        let image = drawn(
            &format!("{arm:?}"),
            machine.lora_of(arm),
            item,
            &group.members,
        );
        Event::Evaluated {
            iteration: machine.iteration(),
            arm,
            item,
            result: Evaluated {
                prompt: format!("held out {item}"),
                seed: Some(u64::from(item)),
                image: object(&image),
                // Some rewritten prompts are too long.
                cut: usize::from(arm == Arm::Rewriting && item < 3),
                scores,
                filter_scores: light(
                    noise("filter", item) + steps * (self.filter + noise("more", item)),
                ),
                failures: vec![],
                advice: (arm == Arm::Rewriting).then(|| advice(0)),
                forwards: 20,
                seconds: 0.5,
                usage: Usage::default(),
            },
        }
    }

    fn act_on_items(self, machine: &Machine, work: Work) -> Vec<Event> {
        let Work::Items {
            generate,
            advise,
            regenerate,
            score,
        } = work
        else {
            return Vec::new();
        };
        let iteration = machine.iteration();
        let each = |groups: Vec<Group>| {
            groups.into_iter().flat_map(|group| {
                let Group { members, missing } = group;
                missing.into_iter().map(move |item| (members.clone(), item))
            })
        };
        let image = |what: &str, item: u32, members: &[u32]| {
            object(&drawn(what, machine.current(), item, members))
        };
        let mut events = Vec::new();
        events.extend(each(generate).map(|(members, item)| Event::Generated {
            iteration,
            item,
            result: Generated {
                prompt: format!("prompt {item}"),
                seed: u64::from(item),
                image: image("base", item, &members),
                cut: 0,
                forwards: 20,
                seconds: 0.5,
            },
        }));
        events.extend(advise.into_iter().map(|item| Event::Advised {
            iteration,
            item,
            result: advice(item),
        }));
        events.extend(each(regenerate).map(|(members, item)| {
            // Item 3 comes out as it was.
            let same = machine.generated(item).unwrap().image;
            Event::Regenerated {
                iteration,
                item,
                result: Regenerated {
                    image: if item == 3 {
                        same
                    } else {
                        image("enhanced", item, &members)
                    },
                    cut: 0,
                    forwards: 40,
                    seconds: 1.0,
                },
            }
        }));
        events.extend(score.into_iter().map(|item| {
            let base = noise("base", item);
            let mut result = Scored {
                base: light(base),
                enhanced: light(base + self.raw + noise("gain", item)),
                ..Scored::default()
            };
            if self.unscored != 0 && item.is_multiple_of(self.unscored) {
                result.enhanced = Scores::default();
            }
            Event::Scored {
                iteration,
                item,
                result,
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

/// Iterations behind an arm, as far as the made-up scores count them.
fn steps(machine: &Machine, arm: Arm) -> f64 {
    if arm == Arm::Enhanced {
        f64::from(machine.iteration())
    } else {
        0.0
    }
}

/// The next checkpoint of a training, or its end.
fn train(machine: &Machine, training: Training, from: Option<Checkpoint>) -> Event {
    let iteration = machine.iteration();
    let steps = machine.steps_of(training);
    let next = from.map_or(0, |from| from.step) + 10;
    let learned = learned(machine, training);
    if next < steps {
        return Event::Checkpointed {
            iteration,
            training,
            result: Checkpoint {
                step: next,
                state: object(&format!("{next} steps of {learned}")),
                before: 0,
                finished: Vec::new(),
                loss: 0.5,
                seconds: 1.0,
            },
        };
    }
    Event::Trained {
        iteration,
        training,
        result: Trained {
            lora: object(&learned),
            losses: object("losses"),
            steps,
            final_loss: 0.1,
            seconds: 3.0,
        },
    }
}

pub(crate) fn began() -> Event {
    Machine::new(plan(), specification()).beginning(Ingredients::default())
}
