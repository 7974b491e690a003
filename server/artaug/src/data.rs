//! Captioned images for the embedded base model: icon sets, rasterised, rendered well and badly, with captions that say so.

mod icons;
mod looks;
mod raster;
mod subjects;
#[cfg(test)]
mod tests;

use concord_common::seed::{Rng, Seed};

pub use self::{
    icons::{Icon, MAX_ICON_FILE, Split, read_icons},
    looks::apply,
    raster::{Raster, rasterise},
    subjects::{
        DATA_VERSION, PromptSide, STYLES, base_subjects, plain_prompt, plain_prompts, prompt_side,
    },
};
use crate::{
    image::{Image, ImageError},
    words::{Dimension, Level, Place, Statement, describe},
};

/// Why captioned images cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file of an icon set is not one.
    #[error("the icon set {set}: {what}; fetch it again with deploy/artaug/fetch.py")]
    Set {
        /// Which set.
        set: String,
        /// What is wrong.
        what: String,
    },
    /// An icon cannot be drawn.
    #[error("the icon {name} of the set {set} cannot be drawn: {what}")]
    Icon {
        /// Its name.
        name: String,
        /// Which set.
        set: String,
        /// What is wrong.
        what: String,
    },
    /// A side that images cannot have.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// The backgrounds, by the name that captions use.
pub const BACKGROUNDS: [(&str, [u8; 3]); 8] = [
    ("white", [244, 244, 244]),
    ("grey", [150, 152, 156]),
    ("blue", [112, 160, 222]),
    ("green", [130, 190, 132]),
    ("yellow", [236, 214, 120]),
    ("pink", [232, 166, 190]),
    ("purple", [160, 138, 206]),
    ("brown", [166, 132, 104]),
];

/// How captioned images are rendered.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rendering {
    /// Pixels of a side.
    pub side: u32,
    /// Part of the images that are rendered badly in one or two respects.
    pub damaged: f64,
    /// Part of the damages that hold in a region only.
    pub regional: f64,
    /// Each true statement is left out of the caption with this probability, so that plain captions stand for mixed quality.
    pub omitted: f64,
}

impl Rendering {
    /// The usual one for a side.
    pub fn new(side: u32) -> Self {
        Self {
            side,
            damaged: 0.75,
            regional: 0.6,
            omitted: 0.5,
        }
    }
}

/// A captioned image.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// The image.
    pub image: Image,
    /// Subject, style and background: "red apple, noto style, blue background".
    pub subject: String,
    /// All that is true of how it looks.
    pub truth: Vec<Statement>,
    /// The subject with the statements that were not left out.
    pub caption: String,
}

/// One example of an icon: the same bytes for the same icon, rendering, seed and number.
///
/// # Errors
/// If the side is out of bounds.
pub fn example(
    icon: &Icon,
    raster: &Raster,
    rendering: &Rendering,
    seed: Seed,
    number: u64,
) -> Result<Example, ImageError> {
    let purpose = format!("artaug example {}/{} {number}", icon.set, icon.name);
    let mut rng = seed.derive(&purpose).rng();
    let (background, colour) = BACKGROUNDS[rng.below(BACKGROUNDS.len() as u64) as usize];
    let truth = draw_truth(&mut rng, rendering);
    let shift = if truth
        .iter()
        .any(|s| s.dimension == Dimension::Placement && s.level == Level::Low)
    {
        off_centre(&mut rng, rendering.side)
    } else {
        (0, 0)
    };
    let mut image = raster.on_background(rendering.side, colour, shift)?;
    for statement in &truth {
        apply(&mut image, *statement, rng.uniform());
    }
    let subject = plain_prompt(&icon.name, &icon.set, background);
    let said: Vec<Statement> = truth
        .iter()
        .copied()
        .filter(|_| rng.uniform() >= rendering.omitted)
        .collect();
    Ok(Example {
        caption: describe(&subject, &said),
        image,
        subject,
        truth,
    })
}

/// A clean image of an icon, from which ranges and statistics are measured.
///
/// # Errors
/// If the side is out of bounds.
pub fn clean_image(raster: &Raster, side: u32, background: usize) -> Result<Image, ImageError> {
    let (_, colour) = BACKGROUNDS[background % BACKGROUNDS.len()];
    raster.on_background(side, colour, (0, 0))
}

/// Every dimension once: good, unless it is drawn to be damaged (or, for colours, made vivid).
fn draw_truth(rng: &mut Rng, rendering: &Rendering) -> Vec<Statement> {
    let mut levels = Dimension::ALL.map(|dimension| (dimension, Level::Good, Place::Whole));
    if rng.uniform() < rendering.damaged {
        let damages = 1 + rng.below(2);
        for _ in 0..damages {
            let chosen = &mut levels[rng.below(Dimension::ALL.len() as u64) as usize];
            let high = chosen.0.too_high_is_a_fault() && rng.uniform() < 0.35;
            chosen.1 = if high { Level::High } else { Level::Low };
            chosen.2 = if chosen.0 != Dimension::Placement && rng.uniform() < rendering.regional {
                Place::ALL[1 + rng.below(Place::ALL.len() as u64 - 1) as usize]
            } else {
                Place::Whole
            };
        }
    }
    let colour = &mut levels[Dimension::Colour.index()];
    if colour.1 == Level::Good && rng.uniform() < 0.2 {
        colour.1 = Level::High;
    }
    levels
        .into_iter()
        .map(|(dimension, level, place)| Statement {
            dimension,
            level,
            place,
        })
        .collect()
}

/// A shift by a fifth to a third of the side, in any of eight directions.
fn off_centre(rng: &mut Rng, side: u32) -> (i32, i32) {
    let distance = f64::from(side) * (0.2 + 0.13 * rng.uniform());
    let angle = rng.below(8) as f64 * std::f64::consts::FRAC_PI_4;
    let along = |part: f64| (distance * part).round() as i32;
    (along(angle.cos()), along(angle.sin()))
}
