//! Taking a job up: whether this silo can and will do it, and its trainer.

use concord_common::{Digest, ErrorCode, JobId, code::Refusal, job::TrainingSpec};

use concord_learning::LearningError;

use super::{Session, SessionError, Taken, blocking, error::may_pass};
use crate::{
    bench::TrainerParts,
    coordinator::Coordinator,
    data::DataError,
    profile::Profile,
    vault::{Binding, Record},
};

impl<C: Coordinator> Session<C> {
    /// Checks that this silo can and will do the job, and has its trainer at hand, from the vault if there is a state.
    pub(super) async fn take_up(
        &self,
        job: &JobId,
        spec: &TrainingSpec,
        spec_toml: &str,
    ) -> Result<Taken, SessionError> {
        let key = self.key(job);
        self.bench.keep_only(&key).await?;
        let declined = SessionError::Declined;
        self.profile.check(spec).map_err(declined)?;
        let task = self.profile.task(&spec.task).map_err(declined)?.clone();
        let folder = self
            .profile
            .backbone(&spec.backbone.name)
            .map_err(declined)?;
        let backbone = self
            .bench
            .backbone(&folder)
            .await
            .map_err(|error| match error {
                LearningError::Io { ref source, .. } if may_pass(source) => error.into(),
                LearningError::Stopped(_) => error.into(),
                error => no_backbone(&error),
            })?;
        Profile::check_backbone(spec, &backbone).map_err(declined)?;
        let binding = Binding {
            job: job.clone(),
            silo: self.silo.clone(),
            backbone: backbone.digest,
            spec: Digest::of(spec_toml.as_bytes()),
        };
        let (vault, bound) = (self.vault.clone(), binding.clone());
        let saved = blocking(move || vault.load(&bound, Record::State)).await??;
        let trained = saved.as_ref().map_or(0, |(header, _)| header.round.0);
        // A trainer that is not where the vault is was left by work that broke off before the vault was saved.
        if self.bench.last_round(&key).await? != Some(trained) {
            let loaded = blocking({
                let task = task.clone();
                move || crate::data::load_splits(&task)
            })
            .await?;
            let loaded = loaded.map_err(|error| match error {
                DataError::Io { ref source, .. } if may_pass(source) => SessionError::Data(error),
                error => {
                    tracing::error!(%error, task = %task.name, "the task's data cannot be used");
                    SessionError::Declined(Refusal::new(
                        ErrorCode::BadData,
                        format!(
                            "this silo's data for task `{}` cannot be used; its log has the reason",
                            spec.task
                        ),
                    ))
                }
            })?;
            for place in &loaded.first_skipped {
                tracing::warn!(task = %task.name, row = %place, skipped = loaded.skipped, "bad row skipped");
            }
            let parts = TrainerParts {
                spec: spec.clone(),
                backbone: folder,
                data: loaded.data,
                cache: self.profile.cache.clone(),
                share: self.profile.shares_rows,
                saved: saved.map(|(_, body)| body),
            };
            // The one file that is read here is the backbone's tokenizer.
            let opened = self.bench.open(&key, parts).await;
            opened.map_err(|error| match error {
                LearningError::Io { ref source, .. } if !may_pass(source) => no_backbone(&error),
                error => error.into(),
            })?;
        }
        Ok(Taken {
            key,
            binding,
            task: task.name,
            spec_toml: spec_toml.to_owned(),
            trained,
        })
    }
}

/// The no to a job whose backbone cannot be loaded. The reason, which may hold a path, stays in this silo's log.
fn no_backbone(error: &LearningError) -> SessionError {
    tracing::error!(%error, "the backbone cannot be loaded");
    SessionError::Declined(Refusal::new(
        ErrorCode::BackboneMismatch,
        "this silo's backbone cannot be loaded; its log has the reason",
    ))
}
