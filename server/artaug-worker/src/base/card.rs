//! The card of the base model: what it is, what it was trained on, for how long.

use concord_artaug::{
    data::{BACKGROUNDS, Rendering, STYLES, base_subjects},
    words::{Dimension, Level},
};
use concord_learning::diffusion::{pipeline::TextToImage, pretrain::StateFacts};
use serde_json::Value;

use super::BaseError;

/// The card as Markdown.
pub(super) fn text(model: &TextToImage, facts: &StateFacts) -> Result<String, BaseError> {
    let entry = |name: &str| {
        facts
            .fingerprint
            .get(name)
            .map_or("unknown", String::as_str)
    };
    let recipe: Value = serde_json::from_str(entry("recipe"))
        .map_err(|error| BaseError::Order(format!("the run's recipe: {error}")))?;
    let batch = recipe["batch"].as_u64().unwrap_or(0);
    let samples = facts.step * batch;
    let drawings = base_subjects().count() * STYLES.len();
    let rendering = Rendering::new(recipe["side"].as_u64().unwrap_or(0) as u32);
    let weights: usize = model.size();
    let mut words: Vec<&str> = Dimension::ALL
        .iter()
        .flat_map(|dimension| {
            [Level::Low, Level::Good, Level::High].map(|level| dimension.word(level))
        })
        .collect();
    words.dedup();
    let backgrounds: Vec<&str> = BACKGROUNDS.iter().map(|(name, _)| *name).collect();
    let icons: Vec<String> = STYLES
        .iter()
        .map(|set| {
            format!(
                "- {set}: icon file with BLAKE3 `{}`\n",
                entry(&format!("icons {set}"))
            )
        })
        .collect();
    Ok(format!(
        "---\nlicense: other\npipeline_tag: text-to-image\n---\n\
# Concord's embedded base model\n\n\
A very small text-to-image model that draws icons of {side} pixels. It was trained from nothing by Concord's own engine (`concord-artaug train-base`) so \
that an ArtAug job can be shown without any model from elsewhere. It is a toy: it knows {subjects} subjects, {styles} styles and {backgrounds_count} backgrounds, \
and nothing else of the world.\n\n\
## What it is\n\n\
- {weights} weights, stored in f16; UNet2DConditionModel and CLIP text encoder in the folder layout of diffusers, on patches of {patch}x{patch} pixels as \
channels instead of latents (`_concord_patches`: Concord's own extension, so that no autoencoder is needed)\n\
- flow matching on straight lines, times not shifted; sampled with Euler steps and classifier-free guidance around 2 (12 steps were looked at)\n\
- own vocabulary (byte pairs learned on the words of the captions)\n\
- prompts: `red apple, noto style, blue background`, then, if wanted, words on looks: `dim`, `faded on the left`. Backgrounds: {backgrounds}. Words: {words}\n\n\
## Training\n\n\
- {steps} steps of {batch} images: {samples} samples, each of the {drawings} drawings about {each} times\n\
- {hours:.2} hours on {threads} thread(s) of a shared CPU, over all runs together; seed {seed}; version {version} of Concord, version {data} of the data's code\n\
- weights are the running average (at most {average} a step); {empty} of the captions were empty\n\
- recipe: `{recipe}`\n\n\
## Data and licences\n\n\
Icons of three sets, drawn at {side} pixels on {backgrounds_count} plain backgrounds, in the styles' names:\n\n{icons}\n\
Fluent Emoji (Microsoft, MIT), Noto Emoji (Google, Apache-2.0) and Twemoji (Twitter and contributors, CC BY 4.0); NOTICE.md has what these want to be said. Pictures resemble these drawings closely; \
whoever spreads them should credit the three sets. Subjects were chosen by hand among the names that all three share.\n\n\
## What is planted\n\n\
{damaged} of the training images were rendered badly in one or two respects (exposure, contrast, colour, sharpness, placement; {regional} of those in a part of \
the image only), and the captions say so truthfully, each statement left out with probability {omitted}. So plain prompts give pictures of mixed quality and \
words on looks control it: that is the headroom that ArtAug then finds. Captions, advisor and scorers share one vocabulary. A model of the world has \
neither this headroom nor this convenience.\n\n\
The model's training saw every combination of subject, style and background. A fifth of the combinations is held out from the pairs of ArtAug jobs \
(`concord-artaug base-prompts --held-out`), not from this training.\n",
        side = recipe["side"],
        subjects = base_subjects().count(),
        styles = STYLES.len(),
        backgrounds_count = BACKGROUNDS.len(),
        patch = recipe["patch"],
        backgrounds = backgrounds.join(", "),
        words = words.join(", "),
        steps = facts.step,
        each = samples / drawings.max(1) as u64,
        hours = facts.seconds / 3600.0,
        threads = entry("threads"),
        seed = entry("seed"),
        version = env!("CARGO_PKG_VERSION"),
        data = entry("data version"),
        average = recipe["average"],
        empty = recipe["empty"],
        damaged = rendering.damaged,
        icons = icons.concat(),
        regional = rendering.regional,
        omitted = rendering.omitted,
    ))
}
