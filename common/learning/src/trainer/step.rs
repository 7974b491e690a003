//! One step: forward, loss, backward, update.

use tch::Tensor;

use super::{
    Averaged, LocalTrainer,
    plan::{Adapters, Contrast, HeadUse, Moon, Phase, Pull},
};
use crate::{
    adapter::{Adapter, Sharing},
    data::Split,
    error::LearningError,
    fusion::{LayerViews, Parts},
    loss::{BatchTargets, MIN_ROWS, cka, contrast, half_squared_distance, moon, task_loss},
    network::represent,
    optimiser::Parameter,
    task::Inputs,
};

/// The numbers of one step.
#[derive(Debug, Default)]
pub(super) struct StepReport {
    /// All terms together.
    pub(super) loss: f64,
    terms: Vec<(&'static str, f64)>,
}

impl StepReport {
    pub(super) fn numbers(&self) -> impl Iterator<Item = (&'static str, f64)> {
        std::iter::once(("loss", self.loss)).chain(self.terms.iter().copied())
    }

    fn note(&mut self, name: &'static str, value: &Tensor) -> Result<(), LearningError> {
        self.terms.push((name, value.f_double_value(&[])?));
        Ok(())
    }
}

/// A forward pass.
struct Pass {
    /// `[n, d]`
    pooled: Tensor,
    /// `[n, outputs]`
    logits: Tensor,
    views: Vec<LayerViews>,
}

impl LocalTrainer {
    /// Makes exactly the phase's tensors leaves with a gradient.
    pub(super) fn set_trained(
        &self,
        phase: &Phase,
        averaged: &Averaged,
    ) -> Result<(), LearningError> {
        let all = averaged
            .adapter
            .named()
            .into_iter()
            .chain(averaged.head.iter().flat_map(|head| head.linear.named("")))
            .chain(self.personal().named());
        for (_, tensor) in all {
            let _ = tensor.f_set_requires_grad(false)?;
        }
        for parameter in self.parameters(phase, averaged)? {
            let _ = parameter.tensor.f_set_requires_grad(true)?;
        }
        Ok(())
    }

    /// What a phase trains, in a fixed order.
    fn parameters(
        &self,
        phase: &Phase,
        averaged: &Averaged,
    ) -> Result<Vec<Parameter>, LearningError> {
        let training = &self.spec.training;
        let mut parameters = Vec::new();
        let mut add = |prefix: &str, named: Vec<(String, &Tensor)>, learning_rate: f64| {
            parameters.extend(named.into_iter().map(|(name, tensor)| Parameter {
                name: format!("{prefix}{name}"),
                tensor: tensor.shallow_clone(),
                learning_rate,
            }));
        };
        let personal = self.personal();
        if phase.trains_adapters && phase.adapters.global() {
            add("global.", averaged.adapter.named(), training.learning_rate);
        }
        if phase.trains_adapters && phase.adapters.private() {
            if let Some(private) = &personal.private {
                add("private.", private.named(), training.learning_rate);
            }
            if phase.adapters == Adapters::Both
                && let Some(gate) = &personal.gate
            {
                add("", vec![("gate".to_owned(), gate)], training.learning_rate);
            }
        }
        if phase.trains_head {
            let prefix = match phase.head {
                HeadUse::Own => "head.",
                HeadUse::Path => "path_head.",
                HeadUse::Shared => "global.head.",
            };
            let head = self.head(averaged, phase.head)?;
            add(prefix, head.named("").into(), training.head_learning_rate);
        }
        Ok(parameters)
    }

    /// Trains on some rows.
    pub(super) fn step(
        &mut self,
        phase: &Phase,
        averaged: &Averaged,
        received: &Averaged,
        rows: &[usize],
    ) -> Result<StepReport, LearningError> {
        let inputs = self.task.inputs(&self.backbone, Split::Train, rows)?;
        let targets = self
            .task
            .batch_targets(Split::Train, rows, self.sizes.kind)?;
        let (loss, mut report) = self.objective(phase, averaged, received, &inputs, &targets)?;
        report.loss = loss.f_double_value(&[])?;
        if !report.loss.is_finite() {
            return Err(LearningError::Training(format!(
                "the loss is {} on {}; lower the learning rate",
                report.loss,
                listed(rows)
            )));
        }
        let mut parameters = self.parameters(phase, averaged)?;
        let leaves: Vec<&Tensor> = parameters
            .iter()
            .map(|parameter| &parameter.tensor)
            .collect();
        let gradients = Tensor::f_run_backward(&[&loss], &leaves, false, false)?;
        let norm =
            self.optimiser
                .step(&mut parameters, &gradients)
                .map_err(|error| match error {
                    LearningError::Training(reason) => {
                        LearningError::Training(format!("{}: {reason}", listed(rows)))
                    }
                    other => other,
                })?;
        report.terms.push(("gradient_norm", norm));
        Ok(report)
    }

    /// The phase's loss on a batch, with its graph.
    fn objective(
        &self,
        phase: &Phase,
        averaged: &Averaged,
        received: &Averaged,
        inputs: &Inputs,
        targets: &BatchTargets,
    ) -> Result<(Tensor, StepReport), LearningError> {
        let mut report = StepReport::default();
        let pass = self.forward(phase, averaged, received, inputs)?;
        let mut loss = task_loss(&pass.logits, targets)?;
        report.note("task_loss", &loss)?;
        if let Some(strength) = phase.terms.global_loss {
            let term = self.global_only_loss(phase, averaged, inputs, targets)?;
            report.note("global_loss", &term)?;
            loss = loss.f_add(&term.f_mul_scalar(strength)?)?;
        }
        if let Some(pull) = phase.terms.pull
            && pull.strength > 0.0
        {
            let term = self.distance(phase, pull, averaged, received)?;
            report.note("regulariser", &term)?;
            loss = loss.f_add(&term.f_mul_scalar(pull.strength)?)?;
        }
        if let Some(term) = self.moon_term(phase, received, inputs, &pass.pooled)? {
            let (Moon { mu, .. }, term) = term;
            report.note("contrastive", &term)?;
            loss = loss.f_add(&term.f_mul_scalar(mu)?)?;
        }
        if let Some(settings) = phase.terms.contrast
            && let Some(term) = contrastive(settings, &pass.views, &mut report)?
        {
            loss = loss.f_add(&term.f_mul_scalar(settings.mu)?)?;
        }
        Ok((loss, report))
    }

    fn forward(
        &self,
        phase: &Phase,
        averaged: &Averaged,
        received: &Averaged,
        inputs: &Inputs,
    ) -> Result<Pass, LearningError> {
        // If only the head is trained, nothing below it needs a graph.
        let below = (!phase.trains_adapters).then(tch::no_grad_guard);
        let parts = self.parts(averaged, phase.adapters);
        let stacks = parts.stack(self.rule)?;
        // Fewer rows can only be a split that is smaller than that, with mu = 0.
        let watched = phase.terms.contrast.is_some() && inputs.mask.size()[0] >= MIN_ROWS as i64;
        let (pooled, views) = represent(
            &self.backbone,
            self.spec.head.pool,
            &stacks,
            watched.then_some((parts, &received.adapter)),
            inputs,
        )?;
        drop(below);
        let logits = self
            .head(averaged, phase.head)?
            .forward(&pooled, self.task.problem().outputs())?;
        Ok(Pass {
            pooled,
            logits,
            views,
        })
    }

    /// The task loss of h' = h + s_g A_g(h) under the same head.
    fn global_only_loss(
        &self,
        phase: &Phase,
        averaged: &Averaged,
        inputs: &Inputs,
        targets: &BatchTargets,
    ) -> Result<Tensor, LearningError> {
        let pooled = self.representation(&averaged.adapter, inputs)?;
        let logits = self
            .head(averaged, phase.head)?
            .forward(&pooled, self.task.problem().outputs())?;
        task_loss(&logits, targets)
    }

    /// The pooled last hidden states under one adapter alone, `[n, d]`.
    fn representation<S: Sharing>(
        &self,
        adapter: &Adapter<S>,
        inputs: &Inputs,
    ) -> Result<Tensor, LearningError> {
        let stacks = Parts::alone(adapter).stack(self.rule)?;
        let pool = self.spec.head.pool;
        Ok(represent(&self.backbone, pool, &stacks, None, inputs)?.0)
    }

    /// ½‖w − w^t‖² over the phase's adapter: the private one where it stands alone (Ditto), otherwise the global one.
    fn distance(
        &self,
        phase: &Phase,
        pull: Pull,
        averaged: &Averaged,
        received: &Averaged,
    ) -> Result<Tensor, LearningError> {
        let moving = match (&self.personal().private, phase.adapters) {
            (Some(private), Adapters::PrivateAlone) => private.named(),
            _ => averaged.adapter.named(),
        };
        let anchors = received.adapter.named();
        let mut pairs: Vec<(&Tensor, &Tensor)> = moving
            .into_iter()
            .zip(&anchors)
            .map(|((_, tensor), (_, anchor))| (tensor, *anchor))
            .collect();
        if pull.head
            && let Some(anchor) = &received.head
        {
            let head = self.head(averaged, phase.head)?;
            pairs.push((&head.weight, &anchor.linear.weight));
            pairs.push((&head.bias, &anchor.linear.bias));
        }
        half_squared_distance(&pairs)
    }

    /// MOON's term; none before there is a previous model, where it would be log 2 with a gradient of 0.
    fn moon_term(
        &self,
        phase: &Phase,
        received: &Averaged,
        inputs: &Inputs,
        z: &Tensor,
    ) -> Result<Option<(Moon, Tensor)>, LearningError> {
        let (Some(settings), Some(previous)) = (phase.terms.moon, &self.personal().previous) else {
            return Ok(None);
        };
        if settings.mu == 0.0 {
            return Ok(None);
        }
        let (z_global, z_previous) = {
            let _frozen = tch::no_grad_guard();
            (
                self.representation(&received.adapter, inputs)?,
                self.representation(previous, inputs)?,
            )
        };
        let term = moon(z, &z_global, &z_previous, settings.tau)?;
        Ok(Some((settings, term)))
    }
}

/// A batch's rows for an error: their range, and the first of them, as they are counted in the training split.
fn listed(rows: &[usize]) -> String {
    const SHOWN: usize = 8;
    let mut sorted = rows.to_vec();
    sorted.sort_unstable();
    let (Some(first), Some(last)) = (sorted.first(), sorted.last()) else {
        return "a batch without rows".to_owned();
    };
    let mut shown: Vec<String> = sorted.iter().take(SHOWN).map(usize::to_string).collect();
    if sorted.len() > SHOWN {
        shown.push("...".to_owned());
    }
    format!(
        "{} training rows from {first} to {last} (counted from 0: {})",
        sorted.len(),
        shown.join(", ")
    )
}

/// L_con, noting s+ and s−; with mu = 0 only these are taken.
fn contrastive(
    settings: Contrast,
    views: &[LayerViews],
    report: &mut StepReport,
) -> Result<Option<Tensor>, LearningError> {
    if views.is_empty() {
        return Ok(None);
    }
    let _measured = (settings.mu == 0.0).then(tch::no_grad_guard);
    let similarities = |other: fn(&LayerViews) -> &Tensor| {
        views
            .iter()
            .map(|view| cka(&view.global, other(view), settings.estimator))
            .collect::<Result<Vec<_>, _>>()
            .and_then(|layers| Ok(Tensor::f_stack(&layers, 0)?))
    };
    let pull = similarities(|view| &view.received)?;
    let push = similarities(|view| &view.private)?;
    let mean = |layers: &Tensor| layers.f_mean(layers.kind());
    report.note("cka_pull", &mean(&pull)?)?;
    report.note("cka_push", &mean(&push)?)?;
    let term = mean(&contrast(&pull, &push, settings.tau)?)?;
    report.note("contrastive", &term)?;
    Ok((settings.mu > 0.0).then_some(term))
}
