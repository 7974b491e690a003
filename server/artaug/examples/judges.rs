//! How well the judges that need no trained model see what was rendered: the table of docs/artaug.md.
//!
//! ```text
//! judges <folder of icon sets> [pixels of a side]
//! ```
//!
//! A tenth of the subjects, by name and so in all styles, is held out: ranges and discriminant are measured on the others, and everything that is
//! printed on four renderings of each held-out drawing. The same files give the same figures.

use std::{env, error::Error, fs, path::Path, process::ExitCode};

use concord_artaug::{
    advisor::{Advisor as _, Question, RuleAdvisor, RuleSettings},
    data::{
        Example, Icon, MAX_ICON_FILE, Raster, Rendering, STYLES, Split, example, rasterise,
        read_icons,
    },
    photometry::survey,
    scorer::{FaultScorer, Scorer, StatisticsScorer},
    setup::Clean,
    words::{Dimension, Level, Place, Statement},
};
use concord_common::seed::Seed;

/// Part of the subjects that is held out, and the seed by which it is.
const HELD_OUT: (f64, Seed) = (0.1, Seed(1));
/// Of the renderings from which ranges and discriminant are measured, and of those on which they are tried.
const SEEDS: (Seed, Seed) = (Seed(0), Seed(2));
/// Renderings of each held-out drawing.
const RENDERINGS: u64 = 4;
/// Part of clean images beyond a range on each side, as an advisor of a job has it by default.
const TAIL: f64 = 0.02;
/// Most regions of an image's advice.
const REGIONS: usize = 2;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        [icons] => measure(Path::new(icons), 64),
        [icons, side] => side
            .parse()
            .map_err(Into::into)
            .and_then(|side| measure(Path::new(icons), side)),
        _ => Err("usage: judges <folder of icon sets> [pixels of a side]".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

type Drawings = Vec<(Icon, Raster)>;

fn measure(icons: &Path, side: u32) -> Result<(), Box<dyn Error>> {
    let (known, held_out) = drawings(icons, side)?;
    let clean = Clean::measure(&known, side, TAIL, SEEDS.0)?;
    let rendering = Rendering::new(side);
    let mut seen = Vec::new();
    for (icon, raster) in &held_out {
        for number in 0..RENDERINGS {
            seen.push(example(icon, raster, &rendering, SEEDS.1, number)?);
        }
    }
    println!(
        "{} renderings of {} drawings whose subjects were in no fit, {side} x {side} pixels; ranges from {} clean drawings, the discriminant from a \
         rendering of each",
        seen.len(),
        held_out.len(),
        clean.looks.images(),
    );
    tell_apart(&StatisticsScorer::new(clean.statistics), &seen)?;
    tell_apart(&FaultScorer::photometry(clean.looks.clone()), &seen)?;
    tell_apart(&FaultScorer::colour(clean.looks.clone()), &seen)?;
    rules(
        &RuleAdvisor::new(clean.looks, RuleSettings::default()),
        &seen,
    )
}

/// How well a scorer tells good renderings from bad ones.
fn tell_apart(judge: &impl Scorer, seen: &[Example]) -> Result<(), Box<dyn Error>> {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for made in seen {
        let score = judge.score(&made.image, &made.subject)?;
        let side = if faults(made).is_empty() {
            &mut good
        } else {
            &mut bad
        };
        side.push(score);
    }
    println!(
        "{}, good against bad renderings, area under the curve: {:.2}",
        judge.name(),
        area_under_curve(&good, &bad)
    );
    Ok(())
}

/// All icons of the sets, drawn: those of known subjects and of held-out ones.
fn drawings(folder: &Path, side: u32) -> Result<(Drawings, Drawings), Box<dyn Error>> {
    let (mut known, mut held_out) = (Vec::new(), Vec::new());
    for style in STYLES {
        let file = folder.join(style).join("icons.json");
        let named = |error: std::io::Error| format!("{}: {error}", file.display());
        if fs::metadata(&file).map_err(named)?.len() > MAX_ICON_FILE as u64 {
            return Err(format!("{} has more than {MAX_ICON_FILE} bytes", file.display()).into());
        }
        for icon in read_icons(style, &fs::read(&file).map_err(named)?)? {
            let raster = rasterise(&icon, side)?;
            match icon.split(HELD_OUT.0, HELD_OUT.1) {
                Split::Training => known.push((icon, raster)),
                Split::HeldOut => held_out.push((icon, raster)),
            }
        }
    }
    Ok((known, held_out))
}

fn faults(made: &Example) -> Vec<Statement> {
    let truth = made.truth.iter().copied();
    truth.filter(|statement| statement.is_fault()).collect()
}

/// Probability that a good one scores above a bad one, ties counting half.
fn area_under_curve(good: &[f64], bad: &[f64]) -> f64 {
    let above = |good: f64| -> f64 {
        let points = bad.iter().map(|bad| match good.total_cmp(bad) {
            std::cmp::Ordering::Greater => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Less => 0.0,
        });
        points.sum()
    };
    let sum: f64 = good.iter().map(|good| above(*good)).sum();
    sum / (good.len() * bad.len()) as f64
}

/// How many of the rendered faults the rules find, and what they say of good renderings.
fn rules(advisor: &RuleAdvisor, seen: &[Example]) -> Result<(), Box<dyn Error>> {
    let said: Vec<Vec<Statement>> = seen
        .iter()
        .map(|made| advisor.faults(&survey(&made.image), &made.subject))
        .collect();
    for (title, is_whole) in [
        ("faults of the whole image, found anywhere", true),
        ("faults of a part, found in that place", false),
    ] {
        for dimension in Dimension::ALL {
            for level in [Level::Low, Level::High] {
                let (mut rendered, mut found) = (0_u32, 0_u32);
                for (made, said) in seen.iter().zip(&said) {
                    for fault in faults(made) {
                        if (fault.dimension, fault.level) != (dimension, level)
                            || (fault.place == Place::Whole) != is_whole
                        {
                            continue;
                        }
                        rendered += 1;
                        found += u32::from(said.iter().any(|said| {
                            (said.dimension, said.level) == (dimension, level)
                                && (is_whole || said.place == fault.place)
                        }));
                    }
                }
                if rendered > 0 {
                    println!(
                        "rules, {title}: {}: {:.2} of {rendered}",
                        dimension.word(level),
                        f64::from(found) / f64::from(rendered)
                    );
                }
            }
        }
    }
    let (mut good, mut advised) = (0_u32, 0_u32);
    for made in seen.iter().filter(|made| faults(made).is_empty()) {
        let advice = advisor.advise(&Question {
            image: &made.image,
            prompt: &made.subject,
            max_regions: REGIONS,
        })?;
        good += 1;
        advised += u32::from(!advice.regions.is_empty());
    }
    println!(
        "rules, good renderings that get advice all the same: {:.2} of {good}",
        f64::from(advised) / f64::from(good)
    );
    Ok(())
}
