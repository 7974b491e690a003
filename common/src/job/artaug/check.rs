//! What a specification of an `artaug` job must satisfy beyond its types.

use std::{collections::BTreeSet, time::Duration};

use super::{
    AdvisorSpec, ArtaugSpec, EvaluationScorer, FilterScorer, LoraMode, Precision, PromptsSpec,
    Solver, stays_below,
};
use crate::{
    code::Refusal,
    job::check::{range, refuse, require},
};

/// Longest prompt in bytes.
const MAX_PROMPT: usize = 1000;
/// Most scorers of a use.
const MAX_SCORERS: usize = 32;
/// Most pairs that an operator is asked to review in an iteration.
const MAX_REVIEW: u32 = 10_000;
/// Highest rank of the joined LoRA. At rank 8192 it is larger than any layer that it could be on, and a job would keep gigabytes of it.
const MAX_JOINED_RANK: u64 = 8192;
/// Most draws for the intervals of an arm, so that an iteration is summed up in minutes at most.
const MAX_DRAWS: u64 = 500_000_000;
/// Most pixels of a batch of images: 256 of 512 x 512.
const MAX_BATCH_PIXELS: u64 = 1 << 26;
const MAX_TIME: Duration = Duration::from_hours(30 * 24);

pub(super) fn check(spec: &ArtaugSpec) -> Result<(), Refusal> {
    named(&spec.name, "name")?;
    // TOML integers are signed, so that a larger seed could not be written back.
    require(
        i64::try_from(spec.seed).is_ok(),
        "seed",
        "must be at most 9223372036854775807",
    )?;
    below(&spec.model.folder, "model.folder")?;
    require(
        spec.model.precision != Precision::F16,
        "model.precision",
        "is \"f16\", in which small gradients vanish; say \"bf16\" or \"f32\"",
    )?;
    check_prompts(&spec.prompts, "prompts")?;
    check_prompts(&spec.held_out, "held_out")?;
    let trained: BTreeSet<&str> = spec.prompts.texts.iter().map(String::as_str).collect();
    if let Some(both) = spec
        .held_out
        .texts
        .iter()
        .find(|text| trained.contains(text.as_str()))
    {
        return Err(refuse(
            "held_out.texts",
            &format!("the prompt `{both}` is in `prompts.texts` too, so it is not held out"),
        ));
    }
    check_advisor(&spec.advisor)?;
    check_scorers(spec)?;
    check_counts(spec)?;
    check_sampler(spec)?;
    check_lora(spec)?;
    check_rest(spec)
}

fn named(text: &str, key: &str) -> Result<(), Refusal> {
    require(
        (1..=100).contains(&text.len()) && !text.chars().any(char::is_control),
        key,
        "must have 1 to 100 printable characters",
    )
}

fn below(path: &str, key: &str) -> Result<(), Refusal> {
    require(
        path.len() <= 500 && stays_below(path),
        key,
        "must be a relative path of plain names below a folder that the worker allows, without `..`",
    )
}

fn check_prompts(prompts: &PromptsSpec, key: &str) -> Result<(), Refusal> {
    let key_of = |field: &str| format!("{key}.{field}");
    require(
        prompts.texts.is_empty() == prompts.file.is_some(),
        key,
        "needs either `texts` or `file`",
    )?;
    if let Some(file) = &prompts.file {
        below(file, &key_of("file"))?;
    }
    let mut seen = BTreeSet::new();
    for text in &prompts.texts {
        require(
            (1..=MAX_PROMPT).contains(&text.len()) && !text.chars().any(char::is_control),
            &key_of("texts"),
            "each prompt must have 1 to 1000 printable characters on one line",
        )?;
        require(
            seen.insert(text),
            &key_of("texts"),
            &format!("the prompt `{text}` is there twice"),
        )?;
    }
    Ok(())
}

fn check_advisor(advisor: &AdvisorSpec) -> Result<(), Refusal> {
    match advisor {
        AdvisorSpec::Rules {
            max_regions,
            tail,
            least_excess,
            subject_below,
        } => {
            range(max_regions, 1, 16, "advisor.max_regions")?;
            range(tail, 0.0, 0.45, "advisor.tail")?;
            range(least_excess, 0.0, 100.0, "advisor.least_excess")?;
            subject_below
                .iter()
                .try_for_each(|least| range(least, -1.0, 1.0, "advisor.subject_below"))
        }
        AdvisorSpec::Chat {
            endpoint,
            model,
            boxes: _,
            max_regions,
            tries,
            temperature,
            max_tokens,
            schema: _,
            least_side,
        } => {
            named(endpoint, "advisor.endpoint")?;
            named(model, "advisor.model")?;
            range(max_regions, 1, 16, "advisor.max_regions")?;
            range(temperature, 0.0, 2.0, "advisor.temperature")?;
            check_asking([*tries, *max_tokens, *least_side].map(Some), "advisor")
        }
    }
}

/// How a model behind an endpoint is asked, be it for advice or for a score: tries, tokens of an answer, shorter side of the image.
fn check_asking(
    [tries, max_tokens, least_side]: [Option<u32>; 3],
    key: &str,
) -> Result<(), Refusal> {
    for (value, field, low, high) in [
        (tries, "tries", 1, 10),
        (max_tokens, "max_tokens", 16, 32_768),
        (least_side, "least_side", 1, 2048),
    ] {
        if let Some(value) = value {
            range(&value, low, high, &format!("{key}.{field}"))?;
        }
    }
    Ok(())
}

fn check_scorers(spec: &ArtaugSpec) -> Result<(), Refusal> {
    let scorers = &spec.scorers;
    require(
        !scorers.filter.is_empty(),
        "scorers.filter",
        "needs at least one scorer",
    )?;
    require(
        !scorers.evaluation.is_empty(),
        "scorers.evaluation",
        "needs at least one scorer",
    )?;
    for (count, key) in [
        (scorers.filter.len(), "scorers.filter"),
        (scorers.evaluation.len(), "scorers.evaluation"),
    ] {
        require(count <= MAX_SCORERS, key, "has more than 32 scorers")?;
    }
    let mut names = BTreeSet::new();
    let mut models = BTreeSet::new();
    for scorer in &scorers.filter {
        require(
            names.insert(scorer.name()),
            "scorers.filter",
            &format!("the name `{}` is there twice", scorer.name()),
        )?;
        range(
            &scorer.least_gain(),
            -100.0,
            100.0,
            "scorers.filter.least_gain",
        )?;
        if let FilterScorer::Chat {
            name,
            endpoint,
            model,
            criterion,
            tries,
            max_tokens,
            schema: _,
            least_side,
            least_gain: _,
        } = scorer
        {
            check_chat([name, endpoint, model], criterion, "scorers.filter")?;
            check_asking([*tries, *max_tokens, *least_side], "scorers.filter")?;
            models.insert((endpoint, model));
        }
    }
    for scorer in &scorers.evaluation {
        require(
            names.insert(scorer.name()),
            "scorers.evaluation",
            &format!(
                "the name `{}` is there twice; a scorer that the filter uses cannot judge the result",
                scorer.name()
            ),
        )?;
        if let EvaluationScorer::Chat {
            name,
            endpoint,
            model,
            criterion,
            tries,
            max_tokens,
            schema: _,
            least_side,
        } = scorer
        {
            check_chat([name, endpoint, model], criterion, "scorers.evaluation")?;
            check_asking([*tries, *max_tokens, *least_side], "scorers.evaluation")?;
            require(
                !models.contains(&(endpoint, model)),
                "scorers.evaluation",
                &format!("the filter asks the model `{model}` too, so it cannot judge the result"),
            )?;
        }
    }
    require(
        scorers
            .evaluation
            .iter()
            .any(|scorer| scorer.name() == scorers.judge()),
        "scorers.judge",
        "must be the name of a scorer in `scorers.evaluation`",
    )
}

fn check_chat(names: [&String; 3], criterion: &str, key: &str) -> Result<(), Refusal> {
    for (name, field) in names.into_iter().zip(["name", "endpoint", "model"]) {
        named(name, &format!("{key}.{field}"))?;
    }
    let own = ["photometry", "colour", "alignment", "brisque", "statistics"];
    require(
        !own.contains(&names[0].as_str()),
        &format!("{key}.name"),
        "is that of a built-in scorer",
    )?;
    require(
        (1..=500).contains(&criterion.len()) && !criterion.chars().any(char::is_control),
        &format!("{key}.criterion"),
        "must have 1 to 500 printable characters",
    )
}

fn check_counts(spec: &ArtaugSpec) -> Result<(), Refusal> {
    let counts = &spec.counts;
    range(&counts.iterations, 1, 100, "counts.iterations")?;
    range(&counts.pairs, 2, 50_000, "counts.pairs")?;
    range(&counts.kept, 1, counts.pairs, "counts.kept")?;
    range(&counts.least_kept, 1, counts.kept, "counts.least_kept")?;
    require(
        !spec.review || counts.kept <= MAX_REVIEW,
        "counts.kept",
        "must be at most 10000 with `review`",
    )?;
    range(&counts.held_out, 2, 10_000, "counts.held_out")
}

/// Whether a job may ask for batches of so many images of this width and height.
pub fn batch_fits(batch: u32, [width, height]: [u32; 2]) -> bool {
    u64::from(width) * u64::from(height) <= MAX_BATCH_PIXELS / u64::from(batch.max(1))
}

fn check_sampler(spec: &ArtaugSpec) -> Result<(), Refusal> {
    let sampler = &spec.sampler;
    // DPM-Solver++ counts one of a model's 1000 times more than it visits.
    let most = match sampler.kind {
        Solver::DpmSolver => 999,
        Solver::Ddim | Solver::Euler => 1000,
    };
    range(&sampler.steps, 1, most, "sampler.steps")?;
    range(&sampler.guidance, 1.0, 50.0, "sampler.guidance")?;
    require(
        sampler.negative_prompt.len() <= MAX_PROMPT
            && !sampler.negative_prompt.chars().any(char::is_control),
        "sampler.negative_prompt",
        "must have at most 1000 printable characters on one line",
    )?;
    require(
        sampler.negative_prompt.is_empty() || sampler.guidance > 1.0,
        "sampler.negative_prompt",
        "has no effect while `sampler.guidance` is 1; say more guidance, or leave it out",
    )?;
    for side in sampler.size.iter().flatten() {
        range(side, 8, 2048, "sampler.size")?;
        require(
            side.is_multiple_of(8),
            "sampler.size",
            "must be multiples of 8, the pixels of a latent cell",
        )?;
    }
    range(&sampler.batch, 1, 1024, "sampler.batch")?;
    require(
        sampler
            .size
            .is_none_or(|size| batch_fits(sampler.batch, size)),
        "sampler.batch",
        "must be lower for images of this `sampler.size`: a batch has at most 67108864 pixels",
    )?;
    require(
        sampler.region_strength > 0.0 && sampler.region_strength <= 100.0,
        "sampler.region_strength",
        "must be above 0 and at most 100",
    )
}

fn check_lora(spec: &ArtaugSpec) -> Result<(), Refusal> {
    let lora = &spec.lora;
    range(&lora.rank, 1, 1024, "lora.rank")?;
    range(&lora.first_steps, 1, 1_000_000, "lora.first_steps")?;
    range(&lora.second_steps, 1, 1_000_000, "lora.second_steps")?;
    require(
        lora.learning_rate > 0.0 && lora.learning_rate < 1.0,
        "lora.learning_rate",
        "must be above 0 and below 1",
    )?;
    range(&lora.weight_decay, 0.0, 10.0, "lora.weight_decay")?;
    range(&lora.clip_norm, 0.0, 1e6, "lora.clip_norm")?;
    range(&lora.batch, 1, 1024, "lora.batch")?;
    range(&lora.accumulation, 1, 1024, "lora.accumulation")?;
    range(
        &lora.checkpoint_every,
        1,
        1_000_000,
        "lora.checkpoint_every",
    )?;
    range(&lora.sample_every, 0, 1_000_000, "lora.sample_every")?;
    require(
        lora.mode == LoraMode::Joint || lora.batch == 1,
        "lora.batch",
        "must be 1 with `lora.mode = \"per-pair\"`, which trains on one image at a time",
    )?;
    let (times, whose) = match lora.mode {
        LoraMode::Joint => (1, String::new()),
        LoraMode::PerPair => (
            u64::from(spec.counts.kept),
            format!(" of {} pairs", spec.counts.kept),
        ),
    };
    let joined = u64::from(lora.rank) * times * u64::from(spec.counts.iterations);
    require(
        joined <= MAX_JOINED_RANK,
        "lora.rank",
        &format!(
            "gives the joined LoRA rank {joined} after {} iterations{whose}, at most {MAX_JOINED_RANK} is allowed; lower `lora.rank`, \
             `counts.iterations` or, with `per-pair`, `counts.kept`",
            spec.counts.iterations
        ),
    )?;
    match &lora.reduced_rank {
        Some(rank) => range(rank, 1, 4096, "lora.reduced_rank"),
        None => Ok(()),
    }
}

fn check_rest(spec: &ArtaugSpec) -> Result<(), Refusal> {
    let (evaluation, limits) = (&spec.evaluation, &spec.limits);
    range(&evaluation.confidence, 0.5, 0.9999, "evaluation.confidence")?;
    range(
        &evaluation.resamples,
        100,
        1_000_000,
        "evaluation.resamples",
    )?;
    // The raw gain is over all pairs, each evaluation scorer's gain over all held-out images.
    let scorers = spec.scorers.evaluation.len() as u64;
    let compared = (u64::from(spec.counts.held_out) * scorers).max(u64::from(spec.counts.pairs));
    let draws = u64::from(evaluation.resamples) * compared;
    require(
        draws <= MAX_DRAWS,
        "evaluation.resamples",
        &format!(
            "is drawn for {compared} scores (`counts.pairs`, or `counts.held_out` times the evaluation scorers), which is {draws} draws, and at most \
             {MAX_DRAWS} are allowed; lower one of them"
        ),
    )?;
    range(&evaluation.tie, 0.0, 1e6, "evaluation.tie")?;
    range(&limits.alignment_loss, 0.0, 2.0, "limits.alignment_loss")?;
    range(&limits.least_diversity, 0.0, 1.0, "limits.least_diversity")?;
    require(
        limits.time >= Duration::from_secs(1) && limits.time <= MAX_TIME,
        "limits.time",
        "must be from 1s to 30days",
    )?;
    range(&limits.disk.bytes(), 1 << 20, 1 << 50, "limits.disk")?;
    match &limits.threads {
        Some(threads) => range(threads, 1, 1024, "limits.threads"),
        None => Ok(()),
    }
}
