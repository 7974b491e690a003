//! The model card that stands beside a job's results: what was done, with what, from which seeds, and what came out, also if that is
//! nothing.

use std::fmt::Write as _;

use concord_common::{Digest, job::artaug::ArtaugSpec};

use crate::{
    folder::JobFolder,
    gallery::{arm_name, interval, nearest, other_scores},
    machine::{Arm, Decision, Machine, StopReason, Summary},
};

/// What a card says beside the job's own record.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CardFacts {
    /// Digests of the base model's files, by name.
    pub base_files: Vec<(String, Digest)>,
    /// Digests of the other files that images, scores and adapters depend on, by name: drawings, trained models.
    pub data_files: Vec<(String, Digest)>,
    /// Licences of the base model and its data, one sentence each.
    pub licences: Vec<String>,
    /// Names and versions of what took part: worker, libraries, advisor, scorers, judge.
    pub versions: Vec<(String, String)>,
    /// What is small or planted about the set-up, one sentence each.
    pub limits: Vec<String>,
    /// Digests of the results, by name.
    pub results: Vec<(String, Digest)>,
}

/// What the alignment of a job means whose filter chooses pairs by it.
pub(crate) const FILTER_SEES_GUARD: &str = "The filter sees the guard too: pairs were chosen by their alignment as well, so the alignment of the \
     arms is a limit that was kept and no independent judgement.";

/// The card as Markdown.
pub fn model_card(spec: &ArtaugSpec, job: &JobFolder, facts: &CardFacts) -> String {
    let machine = job.machine();
    let history = machine.history();
    let mut card = String::new();
    let _ = writeln!(card, "# {}\n", plain(&spec.name));
    let _ = writeln!(
        card,
        "A LoRA for `{}`, made by a Concord ArtAug job (after arXiv 2412.12888): the model drew, an understanding model said what would look \
         better where, the model drew again with that advice, and the difference was trained into it.\n",
        code(&spec.model.folder)
    );
    result(&mut card, machine);
    section(&mut card, "What is small or planted", &facts.limits);
    held_out(&mut card, spec, history);
    if machine.plan().filter_sees_guard() {
        let _ = writeln!(card, "{}\n", plain(FILTER_SEES_GUARD));
    }
    iterations(&mut card, history);
    settings(&mut card, spec, machine.specification());
    digests(&mut card, "Base model", &facts.base_files);
    digests(&mut card, "Data and trained models", &facts.data_files);
    digests(&mut card, "Results", &facts.results);
    table(&mut card, "Versions", ["what", "version"], &facts.versions);
    table(
        &mut card,
        "Cost",
        ["what", "amount"],
        &job.ledger().lines(job.peak_memory(), job.worked()),
    );
    section(&mut card, "Licences", &facts.licences);
    card
}

fn result(card: &mut String, machine: &Machine) {
    let history = machine.history();
    let Some(Decision::Stop { reason, .. }) = history.last().map(|last| &last.decision) else {
        // It stays as it is if the job fails or is cancelled later.
        let _ = writeln!(
            card,
            "The job was not over when this was written, after {} of at most {} iterations; `concord job show` says what became of it.\n",
            history.len(),
            machine.plan().iterations
        );
        return;
    };
    let sentence = match machine.result() {
        Some(0) | None => {
            "**The result is the base model: no iteration was found to help.**".to_owned()
        }
        Some(kept) => format!("The result is the model after iteration {kept}."),
    };
    let failed = if reason.is_failure() {
        " The job counts as failed."
    } else {
        ""
    };
    let _ = writeln!(
        card,
        "{sentence} The job ended because {}.{failed}\n",
        plain(&because(reason))
    );
}

fn because(reason: &StopReason) -> String {
    match reason {
        StopReason::Maximum => "it had done all its iterations".to_owned(),
        other => other.to_string(),
    }
}

fn held_out(card: &mut String, spec: &ArtaugSpec, history: &[Summary]) {
    if history.iter().all(|summary| summary.arms.is_empty()) {
        card.push_str("## Held-out prompts\n\nNothing was evaluated.\n\n");
        return;
    }
    let _ = writeln!(
        card,
        "## Held-out prompts\n\n{} images an arm, none of their prompts trained on, equal seeds, solver and steps in all arms; prompt rewriting needs the base's image \
         and an answer about it first. The judge is `{}`, which the filter does not use. Gains are over the base, with a {:.0} % interval from {} paired bootstrap samples; a win is a higher score \
         (differences up to {} are ties and count half).\n",
        spec.counts.held_out,
        code(spec.scorers.judge()),
        100.0 * spec.evaluation.confidence,
        spec.evaluation.resamples,
        spec.evaluation.tie,
    );
    card.push_str("| iteration | arm | score | gain | interval | win rate | ties | left out | alignment | diversity | nearest X' (the base's; near) |\n|---|---|---|---|---|---|---|---|---|---|---|\n");
    let number = |value: Option<f64>| {
        value.map_or_else(|| "not measured".to_owned(), |value| format!("{value:.3}"))
    };
    for summary in history {
        for (arm, outcome) in &summary.arms {
            let _ = writeln!(
                card,
                "| {} | {} | {:.3} | {:+.3} | {:+.3} to {:+.3} | {:.0} % | {} | {} | {} | {} | {} |",
                summary.iteration,
                arm_name(*arm),
                outcome.score,
                outcome.gain.mean,
                outcome.gain.low,
                outcome.gain.high,
                100.0 * outcome.wins.rate(),
                outcome.wins.ties,
                outcome.left_out,
                number(outcome.alignment),
                number(outcome.diversity),
                nearest(outcome.nearest),
            );
        }
    }
    card.push('\n');
    let others = other_scores(history);
    if !others.is_empty() {
        card.push_str("Evaluation scorers that decide nothing:\n\n| iteration | arm | scorer | score | gain (interval) | prompts |\n|---|---|---|---|---|---|\n");
        for [iteration, arm, name, score, gain, prompts] in others {
            let _ = writeln!(
                card,
                "| {iteration} | {arm} | {} | {score} | {gain} | {prompts} |",
                code(&name)
            );
        }
        card.push('\n');
    }
    cut_prompts(card, spec, history);
    card.push_str(&controls(history));
}

/// Which arms were asked with more words than the model reads.
fn cut_prompts(card: &mut String, spec: &ArtaugSpec, history: &[Summary]) {
    for summary in history {
        for (arm, outcome) in summary.arms.iter().filter(|(_, outcome)| outcome.cut > 0) {
            let _ = writeln!(
                card,
                "In iteration {}, {} of the {} prompts of the arm {} were longer than the model's text encoder reads: their ends had no effect.\n",
                summary.iteration,
                outcome.cut,
                spec.counts.held_out,
                arm_name(*arm),
            );
        }
    }
}

/// What the control arms say of the last evaluated iteration, in words that do not say more than the numbers.
fn controls(history: &[Summary]) -> String {
    let with = |wanted: &[Arm]| {
        let mut summaries = history.iter().rev();
        summaries.find(|summary| wanted.iter().all(|arm| summary.arms.contains_key(arm)))
    };
    let Some(Summary {
        iteration, arms, ..
    }) = with(&[Arm::Enhanced, Arm::PlainLora, Arm::Rewriting])
    else {
        return if with(&[Arm::Enhanced]).is_some() {
            "Control arms were not all evaluated, so it is not shown that the differential step is what helps.\n\n".to_owned()
        } else {
            String::new()
        };
    };
    let [plain, rewriting] = [Arm::PlainLora, Arm::Rewriting].map(|arm| arms[&arm].behind);
    let (Some(plain), Some(rewriting)) = (plain, rewriting) else {
        return "Too few held-out prompts have a score under the enhanced model and under both control arms, so it is not shown that the \
                differential step is what helps.\n\n"
            .to_owned();
    };
    let verdict = if plain.low > 0.0 && rewriting.low > 0.0 {
        "Both control arms (plain LoRA on the same enhanced images without the differential step, in a chain of its own; prompt \
         rewriting alone) are below the enhanced model"
    } else if plain.mean > 0.0 && rewriting.mean > 0.0 {
        "Both control arms (plain LoRA on the same enhanced images, and prompt rewriting alone) are below the enhanced model on average, at \
         least one of them not by more than chance would allow"
    } else {
        "**A control arm (plain LoRA on the same enhanced images, or prompt rewriting alone) is not below the enhanced model: the \
         differential step is not shown to be what helps**"
    };
    format!(
        "In iteration {iteration}, the last that was evaluated with all arms: {verdict}. The enhanced model's score less theirs, prompt by prompt: plain LoRA {}, prompt rewriting {}.\n\n",
        interval(&plain),
        interval(&rewriting)
    )
}

fn iterations(card: &mut String, history: &[Summary]) {
    card.push_str(
        "## Iterations\n\nThe raw gain is that of the enhanced images over the base images of all pairs that were advised on, changed and \
         have every filter score, before the filter, in spreads of the base scores.\n\n\
         | iteration | raw gain | interval | kept | rejected | unusable answers | then |\n|---|---|---|---|---|---|---|\n",
    );
    for summary in history {
        let (gain, interval) = summary.raw_gain.map_or_else(
            || ("none".to_owned(), "none".to_owned()),
            |gain| {
                (
                    format!("{:+.3}", gain.mean),
                    format!("{:+.3} to {:+.3}", gain.low, gain.high),
                )
            },
        );
        let rejected: Vec<String> = summary
            .rejected
            .iter()
            .map(|(reason, count)| format!("{count} {reason}"))
            .collect();
        let then = match &summary.decision {
            Decision::Continue => "the next iteration".to_owned(),
            Decision::Stop { keep, reason } => {
                format!("stop, keeping iteration {keep}: {}", because(reason))
            }
        };
        let _ = writeln!(
            card,
            "| {} | {gain} | {interval} | {} | {} | {} | {} |",
            summary.iteration,
            summary.kept,
            plain(&rejected.join(", ")),
            summary.rejected_replies,
            plain(&then)
        );
    }
    card.push('\n');
}

fn settings(card: &mut String, spec: &ArtaugSpec, specification: Digest) {
    let text = spec
        .to_toml()
        .unwrap_or_else(|refusal| format!("# cannot be written: {}", refusal.message));
    // A fence longer than any run of backticks inside.
    let longest = text
        .split(|character| character != '`')
        .map(str::len)
        .max()
        .unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    let _ = writeln!(
        card,
        "## Settings\n\nAll seeds derive from `seed = {}`: for each iteration, stage, item and step. Digest of the specification: `{specification}`.\n\n\
         {fence}toml\n{}\n{fence}\n",
        spec.seed,
        text.trim_end()
    );
}

fn digests(card: &mut String, title: &str, files: &[(String, Digest)]) {
    let rows: Vec<(String, String)> = files
        .iter()
        .map(|(name, digest)| (name.clone(), digest.to_string()))
        .collect();
    table(card, title, ["file", "BLAKE3"], &rows);
}

fn table(card: &mut String, title: &str, heads: [&str; 2], rows: &[(String, String)]) {
    if rows.is_empty() {
        return;
    }
    let _ = writeln!(
        card,
        "## {title}\n\n| {} | {} |\n|---|---|",
        heads[0], heads[1]
    );
    for (name, value) in rows {
        let _ = writeln!(card, "| {} | {} |", plain(name), plain(value));
    }
    card.push('\n');
}

fn section(card: &mut String, title: &str, sentences: &[String]) {
    if sentences.is_empty() {
        return;
    }
    let _ = writeln!(card, "## {title}\n");
    for sentence in sentences {
        let _ = writeln!(card, "- {}", plain(sentence));
    }
    card.push('\n');
}

/// A text in one line in which Markdown finds nothing of its own.
fn plain(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\r' | '\t' => escaped.push(' '),
            '\\' | '|' | '<' | '>' | '[' | ']' | '*' | '_' | '`' | '#' | '!' => {
                escaped.push('\\');
                escaped.push(character);
            }
            '&' => escaped.push_str("&amp;"),
            control if control.is_control() => escaped.push('\u{FFFD}'),
            other => escaped.push(other),
        }
    }
    escaped
}

/// A text that can stand between backticks.
fn code(text: &str) -> String {
    text.chars()
        .map(|character| {
            if character == '`' || character.is_control() {
                '\u{FFFD}'
            } else {
                character
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use concord_common::{Timestamp, clock::MockClock};

    use super::*;
    use crate::filter::FilterRules;
    use crate::machine::{
        Plan, Work,
        testing::{GOOD, World, plan, specification},
    };

    const SAMPLE: &str = include_str!("../../../deploy/artaug/job.toml");

    fn card(world: World, plan: Plan, facts: &CardFacts) -> String {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(MockClock::new(Timestamp(5)));
        let mut job =
            JobFolder::open(folder.path(), plan, specification(), 1 << 20, clock).unwrap();
        while job.machine().work() != Work::Done {
            for event in world.act(job.machine()) {
                job.record(&event).unwrap();
            }
        }
        model_card(&ArtaugSpec::parse(SAMPLE).unwrap(), &job, facts)
    }

    fn after_one_iteration(folder: &Path) -> JobFolder {
        let clock = Arc::new(MockClock::new(Timestamp(5)));
        let mut job = JobFolder::open(folder, plan(), specification(), 1 << 20, clock).unwrap();
        while job.machine().iteration() == 1 {
            for event in GOOD.act(job.machine()) {
                job.record(&event).unwrap();
            }
        }
        job
    }

    fn facts() -> CardFacts {
        CardFacts {
            base_files: vec![("unet.safetensors".to_owned(), Digest::of(b"unet"))],
            data_files: vec![("icons of fluent".to_owned(), Digest::of(b"icons"))],
            licences: vec!["Fluent Emoji, MIT.".to_owned()],
            versions: vec![("advisor".to_owned(), "rules-1 | <b>".to_owned())],
            limits: vec!["The headroom is planted.".to_owned()],
            results: vec![("merged.safetensors".to_owned(), Digest::of(b"merged"))],
        }
    }

    #[test]
    fn the_card_tells_what_was_done_with_what_and_what_came_out() {
        let card = card(GOOD, plan(), &facts());
        for text in [
            "# icons, first try",
            "The result is the model after iteration 3. The job ended because it had done all its iterations.",
            "The headroom is planted.",
            "| 3 | enhanced |",
            "| 1 | prompt rewriting alone |",
            "In iteration 1, 3 of the 200 prompts of the arm prompt rewriting alone were longer",
            "Both control arms",
            "Fluent Emoji, MIT.",
            "rules-1 \\| \\<b\\>",
            "kind = \"artaug\"",
            "seed = 0",
            &Digest::of(b"unet").to_string(),
            &Digest::of(b"icons").to_string(),
            &specification().to_string(),
            "training steps",
        ] {
            assert!(card.contains(text), "{text}\n{card}");
        }
    }

    #[test]
    fn no_gain_and_a_control_that_is_not_below_are_said() {
        let nothing = card(World { raw: -0.05, ..GOOD }, plan(), &facts());
        assert!(
            nothing.contains("**The result is the base model")
                && nothing.contains("Nothing was evaluated"),
            "{nothing}"
        );
        let dead = World {
            unscored: 1,
            ..GOOD
        };
        assert!(card(dead, plan(), &facts()).contains("counts as failed"));
        let worse = World {
            judge: -0.5,
            ..GOOD
        };
        let card = card(worse, plan(), &facts());
        assert!(card.contains("is not below the enhanced model"), "{card}");
        assert!(!card.contains("Both control arms"));
    }

    #[test]
    fn the_control_arms_are_those_of_the_last_iteration_that_was_evaluated() {
        let folder = tempfile::tempdir().unwrap();
        let mut job = after_one_iteration(folder.path());
        let limit = std::time::Duration::from_mins(1);
        job.record(&job.machine().out_of_time(limit)).unwrap();
        let card = model_card(&ArtaugSpec::parse(SAMPLE).unwrap(), &job, &facts());
        let said = "In iteration 1, the last that was evaluated with all arms: Both control arms";
        assert!(card.contains(said), "{card}");
        assert!(
            card.contains("because the job's time of 60 s is used up"),
            "{card}"
        );
    }

    #[test]
    fn a_card_on_the_way_does_not_say_how_the_job_stands_now() {
        let folder = tempfile::tempdir().unwrap();
        let job = after_one_iteration(folder.path());
        let card = model_card(&ArtaugSpec::parse(SAMPLE).unwrap(), &job, &facts());
        let said = "The job was not over when this was written, after 1 of at most 3 iterations";
        assert!(card.contains(said), "{card}");
    }

    #[test]
    fn without_control_arms_nothing_is_claimed_for_the_differential_step() {
        let alone = Plan {
            control: false,
            ..plan()
        };
        assert!(card(GOOD, alone, &facts()).contains("it is not shown that the differential step"));
    }

    #[test]
    fn a_filter_that_sees_the_guard_is_said_plainly() {
        let seen = Plan {
            filter: FilterRules {
                least_gain: [("light".to_owned(), 0.05), ("fit".to_owned(), -9.0)].into(),
                ..plan().filter
            },
            ..plan()
        };
        assert!(card(GOOD, seen, &facts()).contains("The filter sees the guard too"));
        assert!(!card(GOOD, plan(), &facts()).contains("The filter sees"));
    }

    #[test]
    fn hostile_names_stay_text() {
        assert_eq!(plain("a|b\n# <i>`"), "a\\|b \\# \\<i\\>\\`");
        assert_eq!(code("a`b"), "a\u{FFFD}b");
    }
}
