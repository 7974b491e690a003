//! What the embedded base model is trained to draw, and which of its prompts are kept for evaluation.
//!
//! The subjects are a list chosen by hand out of the names that all three icon sets share: things that differ visibly at 32 pixels, without people,
//! smileys, flags, keycaps, letters, clocks and signs. Few enough that a small model sees each one often.

use concord_common::seed::Seed;

use super::BACKGROUNDS;

/// Counts up whenever the same seed would give other training images or captions; part of the fingerprint of a base model's training.
pub const DATA_VERSION: u32 = 1;

/// The icon sets, by the names of their folders, which captions use as the names of styles.
pub const STYLES: [&str; 3] = ["fluent", "noto", "twemoji"];

/// Of the plain prompts, the part that is held out.
const HELD_OUT: f64 = 0.2;

/// Which plain prompts a list has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptSide {
    /// Those from which a job may make pairs.
    Training,
    /// Those that only an evaluation may draw.
    HeldOut,
}

/// Names of the subjects, as in the icon sets, in their order.
pub fn base_subjects() -> impl Iterator<Item = &'static str> {
    include_str!("subjects.txt").lines()
}

/// A prompt without a word on looks: "red apple, noto style, blue background".
pub fn plain_prompt(name: &str, style: &str, background: &str) -> String {
    let subject = name.replace(['-', '_'], " ");
    format!("{subject}, {style} style, {background} background")
}

/// On which side a combination of subject, style and background is. The base model's own training draws from both; pairs of a job may not use what is
/// held out. Decided by a hash, so that it is the same at every time.
pub fn prompt_side(name: &str, style: &str, background: &str) -> PromptSide {
    let prompt = plain_prompt(name, style, background);
    let draw = Seed(0)
        .derive(&format!("artaug held-out prompt {prompt}"))
        .rng()
        .uniform();
    if draw < HELD_OUT {
        PromptSide::HeldOut
    } else {
        PromptSide::Training
    }
}

/// All plain prompts of one side, in an order that depends on nothing but the seed: the first `n` are a fair draw of `n`.
pub fn plain_prompts(side: PromptSide, seed: Seed) -> Vec<String> {
    let mut prompts = Vec::new();
    for name in base_subjects() {
        for style in STYLES {
            for (background, _) in BACKGROUNDS {
                if prompt_side(name, style, background) == side {
                    prompts.push(plain_prompt(name, style, background));
                }
            }
        }
    }
    seed.derive("artaug order of plain prompts")
        .rng()
        .shuffle(&mut prompts);
    prompts
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn subjects_are_distinct_and_in_order() {
        let names: Vec<&str> = base_subjects().collect();
        assert!((300..400).contains(&names.len()), "{}", names.len());
        assert!(names.is_sorted());
        assert_eq!(
            names.iter().copied().collect::<BTreeSet<_>>().len(),
            names.len()
        );
    }

    #[test]
    fn no_prompt_is_on_both_sides_and_a_fifth_is_held_out() {
        let training: BTreeSet<String> = plain_prompts(PromptSide::Training, Seed(1))
            .into_iter()
            .collect();
        let held_out: BTreeSet<String> = plain_prompts(PromptSide::HeldOut, Seed(1))
            .into_iter()
            .collect();
        assert!(training.is_disjoint(&held_out));
        let all = base_subjects().count() * STYLES.len() * BACKGROUNDS.len();
        assert_eq!(training.len() + held_out.len(), all);
        let part = held_out.len() as f64 / all as f64;
        assert!((0.18..0.22).contains(&part), "{part}");
        for name in base_subjects() {
            let both = STYLES.iter().any(|style| {
                BACKGROUNDS.iter().any(|(background, _)| {
                    prompt_side(name, style, background) == PromptSide::Training
                })
            });
            assert!(both, "{name} would never be drawn for a pair");
        }
    }

    #[test]
    fn a_seed_orders_the_same_prompts_in_its_own_way() {
        let first = plain_prompts(PromptSide::HeldOut, Seed(1));
        let second = plain_prompts(PromptSide::HeldOut, Seed(2));
        assert_ne!(first, second);
        assert_eq!(first, plain_prompts(PromptSide::HeldOut, Seed(1)));
        assert_eq!(
            first.into_iter().collect::<BTreeSet<_>>(),
            second.into_iter().collect()
        );
    }
}
