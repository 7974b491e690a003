//! What a silo brings to a job: its backbones and tasks by name, and its rules. Says no with a code and a sentence that holds no
//! data and no paths.

use std::path::PathBuf;

use concord_common::{
    ErrorCode,
    code::Refusal,
    job::{AlgorithmSpec, HeadSharing, TrainingSpec},
};
use concord_learning::cache::CacheSettings;

use crate::{
    bench::BackboneInfo,
    config::{BackboneEntry, ClientConfig, PolicySection, TaskConfig},
};

/// The part of the settings that jobs touch.
#[derive(Debug, Clone)]
pub struct Profile {
    /// Frozen models.
    pub backbones: Vec<BackboneEntry>,
    /// Tasks.
    pub tasks: Vec<TaskConfig>,
    /// Rules.
    pub policy: PolicySection,
    /// The prefix cache of a trainer.
    pub cache: CacheSettings,
    /// Whether numbers go to the server.
    pub reports_metrics: bool,
    /// Whether `algorithm = "local"` is taken: in simulations only.
    pub takes_local: bool,
    /// Whether jobs that follow each other share the prepared rows and their cache: in simulations only, because a daemon's
    /// rows may have changed since.
    pub shares_rows: bool,
}

impl Profile {
    /// A daemon's.
    pub fn of(config: &ClientConfig) -> Self {
        Self {
            backbones: config.backbones.clone(),
            tasks: config.tasks.clone(),
            policy: config.policy.clone(),
            cache: config.cache.settings(),
            reports_metrics: config.egress.metrics,
            takes_local: false,
            shares_rows: false,
        }
    }

    /// Whether the silo's rules allow the job.
    ///
    /// # Errors
    /// `POLICY_REFUSED` with the rule.
    pub fn check(&self, spec: &TrainingSpec) -> Result<(), Refusal> {
        let no = |sentence: String| Err(Refusal::new(ErrorCode::PolicyRefused, sentence));
        let name = spec.algorithm.name();
        if matches!(spec.algorithm, AlgorithmSpec::Local {}) && !self.takes_local {
            return no(
                "algorithm `local` exchanges nothing and runs in a simulation only".to_owned(),
            );
        }
        if !self.policy.algorithms.is_empty() && !self.policy.algorithms.contains(name) {
            return no(format!("this silo does not take algorithm `{name}`"));
        }
        if spec.rounds.count > self.policy.max_rounds {
            return no(format!(
                "this silo takes jobs of at most {} rounds, this one has {}",
                self.policy.max_rounds, spec.rounds.count
            ));
        }
        if spec.head.sharing == HeadSharing::Shared && !self.policy.shared_head {
            return no("this silo does not let its head travel".to_owned());
        }
        Ok(())
    }

    /// The task of a job.
    ///
    /// # Errors
    /// `UNKNOWN_TASK`.
    pub fn task(&self, name: &str) -> Result<&TaskConfig, Refusal> {
        self.tasks
            .iter()
            .find(|task| task.name == name)
            .ok_or_else(|| {
                Refusal::new(
                    ErrorCode::UnknownTask,
                    format!(
                        "this silo has no task `{name}`; add a [[task]] of that name to the silo's configuration, or name another one in the job"
                    ),
                )
            })
    }

    /// The folder of a job's backbone.
    ///
    /// # Errors
    /// `UNKNOWN_BACKBONE`.
    pub fn backbone(&self, name: &str) -> Result<PathBuf, Refusal> {
        self.backbones
            .iter()
            .find(|backbone| backbone.name == name)
            .map(|backbone| backbone.path.clone())
            .ok_or_else(|| {
                Refusal::new(
                    ErrorCode::UnknownBackbone,
                    format!(
                        "this silo has no backbone `{name}`; add a [[backbone]] of that name to the silo's configuration, or name another one in the job"
                    ),
                )
            })
    }

    /// Whether the silo's backbone is the one that the job means.
    ///
    /// # Errors
    /// `BACKBONE_MISMATCH` with both sides.
    pub fn check_backbone(spec: &TrainingSpec, have: &BackboneInfo) -> Result<(), Refusal> {
        let want = &spec.backbone;
        let no = |sentence: String| Err(Refusal::new(ErrorCode::BackboneMismatch, sentence));
        if want.hidden != have.config.hidden as u64 || want.layers as usize != have.config.layers {
            return no(format!(
                "the job's backbone `{}` has width {} and {} layers, this silo's has {} and {}",
                want.name, want.hidden, want.layers, have.config.hidden, have.config.layers
            ));
        }
        match want.digest {
            Some(digest) if digest != have.digest => no(format!(
                "the job's backbone `{}` has digest {digest}, this silo's has {}",
                want.name, have.digest
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use concord_common::job::JobSpec;

    use super::*;

    fn spec(algorithm: &str, more: &str) -> TrainingSpec {
        let text = format!(
            "kind = \"federated-training\"\nname = \"j\"\ntask = \"main\"\n\
             [backbone]\nname = \"tiny\"\nhidden = 24\nlayers = 2\n[adapter]\nbottleneck = 2\n\
             [algorithm]\nname = \"{algorithm}\"\n[rounds]\ncount = 3\n{more}"
        );
        JobSpec::parse(&text).unwrap().training().clone()
    }

    fn profile(policy: PolicySection) -> Profile {
        Profile {
            backbones: Vec::new(),
            tasks: Vec::new(),
            policy,
            cache: CacheSettings::default(),
            reports_metrics: true,
            takes_local: false,
            shares_rows: false,
        }
    }

    #[test]
    fn each_rule_of_the_silo_is_a_reason_to_decline() {
        let code = |policy, spec: &TrainingSpec| profile(policy).check(spec).unwrap_err().code;
        let only_fedavg = PolicySection {
            algorithms: std::iter::once("fedavg".to_owned()).collect(),
            ..PolicySection::default()
        };
        let short = PolicySection {
            max_rounds: 2,
            ..PolicySection::default()
        };
        let own_head = PolicySection {
            shared_head: false,
            ..PolicySection::default()
        };
        let shared = spec("fedavg", "[head]\nsharing = \"shared\"\nclasses = 3");
        assert_eq!(
            code(only_fedavg.clone(), &spec("fedmcp", "")),
            ErrorCode::PolicyRefused
        );
        assert_eq!(code(short, &spec("fedmcp", "")), ErrorCode::PolicyRefused);
        assert_eq!(code(own_head, &shared), ErrorCode::PolicyRefused);
        assert_eq!(
            code(PolicySection::default(), &spec("local", "")),
            ErrorCode::PolicyRefused
        );
        assert!(profile(only_fedavg).check(&shared).is_ok());
    }

    #[test]
    fn an_unknown_task_or_backbone_is_named_with_what_to_do() {
        let profile = profile(PolicySection::default());
        let task = profile.task("main").unwrap_err();
        assert_eq!(task.code, ErrorCode::UnknownTask);
        assert!(
            task.message
                .contains("no task `main`; add a [[task]] of that name")
        );
        let backbone = profile.backbone("tiny").unwrap_err();
        assert_eq!(backbone.code, ErrorCode::UnknownBackbone);
        let what_to_do = "no backbone `tiny`; add a [[backbone]] of that name";
        assert!(backbone.message.contains(what_to_do));
    }
}
