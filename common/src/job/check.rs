//! What a specification must satisfy beyond its types.

use std::time::Duration;

use super::{AlgorithmSpec, HeadSharing, PrivateStart, TrainingSpec};
use crate::code::{ErrorCode, Refusal};

const MAX_ROUNDS: u32 = 10_000;
const MAX_TIME: Duration = Duration::from_hours(30 * 24);

pub(super) fn check(spec: &TrainingSpec) -> Result<(), Refusal> {
    check_names(spec)?;
    check_adapter(spec)?;
    check_head(spec)?;
    check_algorithm(&spec.algorithm)?;
    check_training(spec)?;
    check_rounds(spec)?;
    spec.adapter_shape()
        .layout()
        .map_err(|refusal| refuse("adapter", &refusal.message))?;
    Ok(())
}

pub(super) fn refuse(key: &str, what: &str) -> Refusal {
    Refusal::new(ErrorCode::InvalidJobSpec, format!("`{key}`: {what}"))
}

pub(super) fn require(holds: bool, key: &str, what: &str) -> Result<(), Refusal> {
    if holds {
        Ok(())
    } else {
        Err(refuse(key, what))
    }
}

pub(super) fn range<T: PartialOrd + std::fmt::Display + Copy>(
    value: &T,
    low: T,
    high: T,
    key: &str,
) -> Result<(), Refusal> {
    // Written so that NaN fails too.
    require(
        *value >= low && *value <= high,
        key,
        &format!("must be from {low} to {high}, is {value}"),
    )
}

fn check_names(spec: &TrainingSpec) -> Result<(), Refusal> {
    let named = |text: &str| (1..=100).contains(&text.len()) && !text.chars().any(char::is_control);
    require(
        named(&spec.name),
        "name",
        "must have 1 to 100 printable characters",
    )?;
    require(
        named(&spec.task),
        "task",
        "must have 1 to 100 printable characters",
    )?;
    require(
        named(&spec.backbone.name),
        "backbone.name",
        "must have 1 to 100 printable characters",
    )?;
    // TOML integers are signed, so that a larger seed could not be written back.
    require(
        i64::try_from(spec.seed).is_ok(),
        "seed",
        "must be at most 9223372036854775807",
    )
}

fn check_adapter(spec: &TrainingSpec) -> Result<(), Refusal> {
    let adapter = &spec.adapter;
    range(&spec.backbone.hidden, 1, 65_536, "backbone.hidden")?;
    range(&spec.backbone.layers, 1, 1_000, "backbone.layers")?;
    range(&adapter.bottleneck, 1, 65_536, "adapter.bottleneck")?;
    if let Some(bottleneck) = &adapter.private_bottleneck {
        range(bottleneck, 1, 65_536, "adapter.private_bottleneck")?;
    }
    if let Some(layer) = adapter
        .layers
        .iter()
        .find(|&&layer| layer >= spec.backbone.layers)
    {
        return Err(refuse(
            "adapter.layers",
            &format!(
                "the backbone's layers are 0 to {}, there is no layer {layer}",
                spec.backbone.layers - 1
            ),
        ));
    }
    range(&adapter.scale_global, -100.0, 100.0, "adapter.scale_global")?;
    range(
        &adapter.scale_private,
        -100.0,
        100.0,
        "adapter.scale_private",
    )?;
    require(
        adapter.init_up > 0.0 && adapter.init_up <= 1.0,
        "adapter.init_up",
        "must be above 0 (zero outputs make the contrastive term 0/0) and at most 1",
    )?;
    require(
        adapter.private_noise > 0.0 && adapter.private_noise <= 10.0,
        "adapter.private_noise",
        "must be above 0 (equal adapters would never separate) and at most 10",
    )?;
    require(
        adapter.private_start != PrivateStart::NearGlobal
            || adapter
                .private_bottleneck
                .is_none_or(|r| r == adapter.bottleneck),
        "adapter.private_start",
        "`near-global` needs `adapter.private_bottleneck` to equal `adapter.bottleneck`",
    )
}

fn check_head(spec: &TrainingSpec) -> Result<(), Refusal> {
    match (spec.head.sharing, spec.head.classes) {
        (HeadSharing::Shared, None) => Err(refuse(
            "head.classes",
            "a shared head needs its number of outputs",
        )),
        (HeadSharing::Private, Some(_)) => Err(refuse(
            "head.classes",
            "only a shared head has it; private heads take their classes from the silo's data",
        )),
        (HeadSharing::Shared, Some(classes)) => range(&classes, 1, 100_000, "head.classes"),
        (HeadSharing::Private, None) => Ok(()),
    }
}

fn check_algorithm(algorithm: &AlgorithmSpec) -> Result<(), Refusal> {
    let strength = |value: &f64, key: &str| range(value, 0.0, 1_000.0, key);
    let temperature = |value: &f64| range(value, 1e-3, 1_000.0, "algorithm.tau");
    match algorithm {
        AlgorithmSpec::Local {} | AlgorithmSpec::Fedavg {} => Ok(()),
        AlgorithmSpec::Fedprox { mu } => strength(mu, "algorithm.mu"),
        AlgorithmSpec::Moon { mu, tau } => {
            strength(mu, "algorithm.mu")?;
            temperature(tau)
        }
        AlgorithmSpec::Ditto { lambda } => strength(lambda, "algorithm.lambda"),
        AlgorithmSpec::Fedrep { head_epochs } => {
            range(head_epochs, 1, 1_000, "algorithm.head_epochs")
        }
        AlgorithmSpec::Fedmcp { mu, tau, alpha, .. } => {
            strength(mu, "algorithm.mu")?;
            strength(alpha, "algorithm.alpha")?;
            temperature(tau)
        }
    }
}

fn check_training(spec: &TrainingSpec) -> Result<(), Refusal> {
    let training = &spec.training;
    range(&training.epochs, 1, 1_000, "training.epochs")?;
    range(&training.batch_size, 1, 65_536, "training.batch_size")?;
    let contrastive = matches!(spec.algorithm, AlgorithmSpec::Fedmcp { mu, .. } if mu > 0.0);
    require(
        !contrastive || training.batch_size >= 4,
        "training.batch_size",
        "fedmcp needs at least 4 rows for its similarity estimate",
    )?;
    for (value, key) in [
        (training.learning_rate, "training.learning_rate"),
        (training.head_learning_rate, "training.head_learning_rate"),
    ] {
        require(
            value > 0.0 && value <= 10.0,
            key,
            "must be above 0 and at most 10",
        )?;
    }
    range(&training.weight_decay, 0.0, 10.0, "training.weight_decay")?;
    range(&training.clip_norm, 0.0, 1e6, "training.clip_norm")?;
    range(&training.max_length, 4, 8_192, "training.max_length")?;
    require(
        training.max_examples != Some(0),
        "training.max_examples",
        "must be at least 1",
    )
}

fn check_rounds(spec: &TrainingSpec) -> Result<(), Refusal> {
    let rounds = &spec.rounds;
    range(&rounds.count, 1, MAX_ROUNDS, "rounds.count")?;
    range(&rounds.min_silos, 1, 100_000, "rounds.min_silos")?;
    if let Some(max) = rounds.max_silos {
        range(&max, rounds.min_silos, 100_000, "rounds.max_silos")?;
    }
    require(
        spec.silos.is_empty() || spec.silos.len() >= rounds.min_silos as usize,
        "rounds.min_silos",
        "is larger than the number of silos in `silos`",
    )?;
    require(
        rounds.max_time >= Duration::from_secs(1) && rounds.max_time <= MAX_TIME,
        "rounds.max_time",
        "must be from 1s to 30days",
    )?;
    require(
        rounds.min_time <= rounds.max_time,
        "rounds.min_time",
        "must not be longer than `rounds.max_time`",
    )?;
    let limits = &spec.limits;
    range(
        &limits.max_examples,
        1,
        i64::MAX as u64,
        "limits.max_examples",
    )?;
    require(
        limits
            .max_update_norm
            .is_none_or(|norm| norm > 0.0 && norm.is_finite()),
        "limits.max_update_norm",
        "must be above 0",
    )
}
