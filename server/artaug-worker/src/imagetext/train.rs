//! From drawings to projections: renderings, features, training, and what came of it.

use std::path::Path;

use concord_learning::vision::{
    Alignment, AlignmentFacts, AlignmentSettings, Captioned, EfficientNetLite0, Pair, TextTower,
};

use super::{Dataset, Drawings, Features, Figures, ImageTextError, Recipe};

/// What a training gives.
#[derive(Debug)]
pub struct Trained {
    /// The projections' file.
    pub projections: Vec<u8>,
    /// What they are good for.
    pub figures: Figures,
    /// Mean loss of each hundredth of the steps.
    pub losses: Vec<f64>,
    /// The data.
    pub dataset: Dataset,
}

/// Trains and judges projections: once without the held-out subjects, only to measure, then with all of them. Equal drawings, towers and settings give equal projections on one machine with one number of threads. What the towers saw is kept in the folder `keep`, if one is given. `say` is told
/// how far it is.
///
/// # Errors
/// If a tower or the training fails.
pub fn train(
    drawings: &Drawings,
    recipe: &Recipe,
    settings: &AlignmentSettings,
    looks: bool,
    towers: (&EfficientNetLite0, &TextTower),
    keep: Option<&Path>,
    say: &mut dyn FnMut(String),
) -> Result<Trained, ImageTextError> {
    let (dataset, images) = Dataset::render(drawings, recipe)?;
    say(format!(
        "{} subjects, {} renderings, {} texts",
        dataset.subjects.len(),
        dataset.shown.len(),
        dataset.texts.len()
    ));
    let total = images.len();
    let features = dataset.see(&images, recipe, towers, keep, &mut |done| {
        if done % 1600 == 0 {
            say(format!("looked at {done} of {total}"));
        }
    })?;
    let rows = features.images(looks)?;
    let mut fit = |what: &str, pairs: &[Pair]| -> Result<(Alignment, Vec<f64>), ImageTextError> {
        let data = Captioned {
            images: &rows,
            texts: &features.texts,
            pairs,
        };
        let part = (settings.steps / 100).max(1);
        let (mut losses, mut sum) = (Vec::new(), 0.0);
        let alignment = Alignment::fit(data, settings, &mut |step, loss| {
            sum += loss;
            if (step + 1) % part == 0 {
                losses.push(sum / part as f64);
                sum = 0.0;
            }
        })?;
        say(format!(
            "{what}: {} pairs; loss {:.3} at first, {:.3} at last",
            pairs.len(),
            losses.first().copied().unwrap_or(f64::NAN),
            losses.last().copied().unwrap_or(f64::NAN)
        ));
        Ok((alignment, losses))
    };
    let (first, _) = fit(
        "without the held-out subjects",
        &pairs(&dataset, &|name| !drawings.held_out().contains(name)),
    )?;
    let (last, losses) = fit("with all subjects", &pairs(&dataset, &|_| true))?;
    let figures = Figures::measure(&dataset, drawings, (&first, &last), &rows, towers.1)?;
    let facts = facts(towers, recipe, settings, looks, &features, &figures);
    Ok(Trained {
        projections: last.to_bytes(&facts)?,
        figures,
        losses,
        dataset,
    })
}

fn facts(
    (vision, text): (&EfficientNetLite0, &TextTower),
    recipe: &Recipe,
    settings: &AlignmentSettings,
    looks: bool,
    features: &Features,
    figures: &Figures,
) -> AlignmentFacts {
    AlignmentFacts {
        vision: *vision.digest(),
        text: *text.digest(),
        side: recipe.seen_at,
        looks,
        settings: settings.clone(),
        data: features.digest,
        low: figures.low,
        typical: figures.typical,
    }
}

/// Every rendering of the wanted subjects that is not kept for judging, with its plain prompt and its caption.
fn pairs(dataset: &Dataset, wanted: &dyn Fn(&str) -> bool) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for (image, shown) in dataset.shown.iter().enumerate() {
        if shown.check || !wanted(dataset.subjects[shown.subject].as_str()) {
            continue;
        }
        for text in [shown.plain, shown.caption] {
            pairs.push(Pair {
                subject: shown.subject,
                image,
                text,
            });
        }
    }
    pairs
}
