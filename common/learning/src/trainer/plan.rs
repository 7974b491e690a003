//! What a round of each algorithm consists of: decided from the specification alone.

use concord_common::job::{
    AlgorithmSpec, CkaEstimator, HeadSharing, PrivateStart, Regulariser, TrainingSpec,
};

use crate::error::LearningError;

/// Which adapters a forward pass has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Adapters {
    Both,
    GlobalAlone,
    PrivateAlone,
}

impl Adapters {
    pub(super) fn global(self) -> bool {
        self != Self::PrivateAlone
    }

    pub(super) fn private(self) -> bool {
        self != Self::GlobalAlone
    }
}

/// Which head a forward pass has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum HeadUse {
    /// The silo's own.
    Own,
    /// The silo's second one, for the global path of Ditto.
    Path,
    /// The one that travels.
    Shared,
}

/// The contrastive term between the adapters.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Contrast {
    pub(super) mu: f64,
    pub(super) tau: f64,
    pub(super) estimator: CkaEstimator,
}

/// MOON's term.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Moon {
    pub(super) mu: f64,
    pub(super) tau: f64,
}

/// A pull towards what the round began with: strength/2 · ‖w − w^t‖² over the phase's adapter.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Pull {
    pub(super) strength: f64,
    /// Over the head too, where the head travels.
    pub(super) head: bool,
}

/// What is added to the task loss.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(super) struct Terms {
    pub(super) pull: Option<Pull>,
    /// Weight of the task loss of the global adapter alone.
    pub(super) global_loss: Option<f64>,
    pub(super) moon: Option<Moon>,
    /// Present with mu = 0 too: the similarities are then measured and nothing else.
    pub(super) contrast: Option<Contrast>,
}

/// Some epochs with one objective.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Phase {
    /// For progress and errors.
    pub(super) name: &'static str,
    pub(super) epochs: u32,
    pub(super) adapters: Adapters,
    pub(super) head: HeadUse,
    pub(super) trains_adapters: bool,
    pub(super) trains_head: bool,
    pub(super) terms: Terms,
}

/// Where the private adapter comes from when the silo begins.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Start {
    Independent,
    Near { noise: f64 },
    Copy,
}

/// A round, and what the silo keeps between rounds.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Plan {
    /// In this order.
    pub(super) phases: Vec<Phase>,
    /// Bottleneck and start of the private adapter, if there is one.
    pub(super) private: Option<(u64, Start)>,
    /// The personal model's adapters and head.
    pub(super) personal: (Adapters, HeadUse),
    /// A second head for the global path.
    pub(super) path_head: bool,
    /// The previous round's local model is kept.
    pub(super) keeps_previous: bool,
}

impl Plan {
    /// The plan of a job.
    ///
    /// # Errors
    /// [`LearningError::Config`] for settings that an algorithm cannot work with.
    pub(super) fn of(spec: &TrainingSpec) -> Result<Self, LearningError> {
        let epochs = spec.training.epochs;
        let shared = spec.head.sharing == HeadSharing::Shared;
        let common_head = if shared {
            HeadUse::Shared
        } else {
            HeadUse::Own
        };
        let joint = |name, adapters, head, terms| Phase {
            name,
            epochs,
            adapters,
            head,
            trains_adapters: true,
            trains_head: true,
            terms,
        };
        let global = |terms| Self {
            phases: vec![joint("train", Adapters::GlobalAlone, common_head, terms)],
            private: None,
            personal: (Adapters::GlobalAlone, common_head),
            path_head: false,
            keeps_previous: false,
        };
        Ok(match spec.algorithm {
            AlgorithmSpec::Local {} => Self {
                phases: vec![joint(
                    "train",
                    Adapters::PrivateAlone,
                    HeadUse::Own,
                    Terms::default(),
                )],
                private: Some(local_start(spec)),
                personal: (Adapters::PrivateAlone, HeadUse::Own),
                path_head: false,
                keeps_previous: false,
            },
            AlgorithmSpec::Fedavg {} => global(Terms::default()),
            AlgorithmSpec::Fedprox { mu } => global(Terms {
                pull: Some(Pull {
                    strength: mu,
                    head: true,
                }),
                ..Terms::default()
            }),
            AlgorithmSpec::Moon { mu, tau } => Self {
                keeps_previous: true,
                ..global(Terms {
                    moon: Some(Moon { mu, tau }),
                    ..Terms::default()
                })
            },
            AlgorithmSpec::Ditto { lambda } => Self::ditto(spec, lambda, shared, joint)?,
            AlgorithmSpec::Fedrep { head_epochs } => {
                if shared {
                    return Err(LearningError::Config(
                        "fedrep trains a head of the silo's own; set `head.sharing = \"private\"`"
                            .to_owned(),
                    ));
                }
                let rest = joint(
                    "representation",
                    Adapters::GlobalAlone,
                    HeadUse::Own,
                    Terms::default(),
                );
                Self {
                    phases: fedrep_phases(head_epochs, rest),
                    ..global(Terms::default())
                }
            }
            AlgorithmSpec::Fedmcp {
                mu,
                tau,
                alpha,
                regulariser,
                cka,
            } => {
                let contrast = Contrast {
                    mu,
                    tau,
                    estimator: cka,
                };
                let terms = fedmcp_terms(contrast, alpha, regulariser);
                Self {
                    phases: vec![joint("train", Adapters::Both, common_head, terms)],
                    private: Some((private_bottleneck(spec), fedmcp_start(spec))),
                    personal: (Adapters::Both, common_head),
                    path_head: false,
                    keeps_previous: false,
                }
            }
        })
    }

    fn ditto(
        spec: &TrainingSpec,
        lambda: f64,
        shared: bool,
        joint: impl Fn(&'static str, Adapters, HeadUse, Terms) -> Phase,
    ) -> Result<Self, LearningError> {
        if private_bottleneck(spec) != spec.adapter.bottleneck {
            return Err(LearningError::Config(
                "ditto pulls the personal adapter towards the global one, so both need one size: remove `adapter.private_bottleneck`"
                    .to_owned(),
            ));
        }
        let path = if shared {
            HeadUse::Shared
        } else {
            HeadUse::Path
        };
        let pull = Terms {
            pull: Some(Pull {
                strength: lambda,
                head: true,
            }),
            ..Terms::default()
        };
        Ok(Self {
            phases: vec![
                joint("global", Adapters::GlobalAlone, path, Terms::default()),
                joint("personal", Adapters::PrivateAlone, HeadUse::Own, pull),
            ],
            private: Some((spec.adapter.bottleneck, Start::Copy)),
            personal: (Adapters::PrivateAlone, HeadUse::Own),
            path_head: !shared,
            keeps_previous: false,
        })
    }

    /// Whether the personal model's head or a phase's is the silo's own.
    pub(super) fn own_head(&self) -> bool {
        self.personal.1 == HeadUse::Own
    }

    /// Fewest training rows that the plan can work with.
    pub(super) fn least_rows(&self) -> usize {
        let contrastive = self.phases.iter().any(|phase| {
            phase
                .terms
                .contrast
                .is_some_and(|contrast| contrast.mu > 0.0)
        });
        if contrastive {
            crate::loss::MIN_ROWS
        } else {
            1
        }
    }
}

/// The head with the rest frozen, then the rest with the head frozen.
fn fedrep_phases(head_epochs: u32, rest: Phase) -> Vec<Phase> {
    let head = Phase {
        name: "head",
        epochs: head_epochs,
        trains_adapters: false,
        ..rest
    };
    let rest = Phase {
        trains_head: false,
        ..rest
    };
    vec![head, rest]
}

/// L_con and, with alpha above 0, R_g.
fn fedmcp_terms(contrast: Contrast, alpha: f64, regulariser: Regulariser) -> Terms {
    let distance = alpha > 0.0 && regulariser == Regulariser::Distance;
    let global_loss = alpha > 0.0 && regulariser == Regulariser::GlobalLoss;
    Terms {
        contrast: Some(contrast),
        pull: distance.then_some(Pull {
            strength: alpha,
            head: false,
        }),
        global_loss: global_loss.then_some(alpha),
        ..Terms::default()
    }
}

fn private_bottleneck(spec: &TrainingSpec) -> u64 {
    spec.adapter
        .private_bottleneck
        .unwrap_or(spec.adapter.bottleneck)
}

fn fedmcp_start(spec: &TrainingSpec) -> Start {
    match spec.adapter.private_start {
        PrivateStart::Independent => Start::Independent,
        PrivateStart::NearGlobal => Start::Near {
            noise: spec.adapter.private_noise,
        },
    }
}

/// Local starts from the same weights as FedAvg, unless it is given another size (a parameter-matched control).
fn local_start(spec: &TrainingSpec) -> (u64, Start) {
    let bottleneck = private_bottleneck(spec);
    if bottleneck == spec.adapter.bottleneck {
        (bottleneck, Start::Copy)
    } else {
        (bottleneck, Start::Independent)
    }
}
