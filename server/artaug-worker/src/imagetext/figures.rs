//! What projections are good for: on subjects that a first fit was not trained on, and on new renderings of subjects that the final one knows.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
};

use concord_artaug::words::{Dimension, Level, Place, Statement, describe};
use concord_learning::vision::{Alignment, Rows, TextTower, cosine};
use serde::{Deserialize, Serialize};

use super::{Dataset, Drawings, ImageTextError, Shown};

/// Most renderings on which words about looks are measured.
const LOOKED_AT: usize = 300;

/// How often the right subject is found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Recognised {
    /// Images asked about.
    pub images: usize,
    /// Subjects to choose from.
    pub subjects: usize,
    /// Part of the images whose subject comes first.
    pub top1: f64,
    /// Part whose subject is among the first five.
    pub top5: f64,
}

/// How words about one side of the looks are told apart, on whole images or parts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WordFigures {
    /// Images with the fault "too little".
    pub faulty: usize,
    /// Images without a fault in this respect.
    pub good: usize,
    /// Probability that a faulty image is nearer to the word for the fault, against the word for good, than a good image is (0.5: chance).
    pub auc: f64,
    /// Mean rise of a faulty image's alignment when its prompt names the fault instead of the good.
    pub rise_faulty: f64,
    /// Mean rise of a good image's alignment when its prompt names the good instead of the fault.
    pub rise_good: f64,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Clean drawings of the held-out subjects among these, by a fit that was trained on none of them.
    pub unknown_subjects: Recognised,
    /// New clean renderings of the same subjects, by the final fit, which was trained on other renderings of them.
    pub known_subjects: Recognised,
    /// The same, on new renderings that may be damaged.
    pub known_subjects_damaged: Recognised,
    /// By dimension, on new renderings of the base model's subjects by the final fit.
    pub words: BTreeMap<String, WordFigures>,
    /// Cosine that 1 in 20 new clean renderings falls below with its plain prompt, by the final fit.
    pub low: f64,
    /// Its median.
    pub typical: f64,
    /// Mean cosine of the same renderings with the plain prompt of another subject.
    pub wrong: f64,
}

impl Figures {
    /// Measures `first`, trained without the held-out subjects, and the final fit. `rows` are the features of the dataset's images, as the projections
    /// read them.
    ///
    /// # Errors
    /// If a text cannot be read.
    pub fn measure(
        dataset: &Dataset,
        drawings: &Drawings,
        (first, last): (&Alignment, &Alignment),
        rows: &Rows,
        tower: &TextTower,
    ) -> Result<Self, ImageTextError> {
        let names: Vec<&str> = drawings.held_out().iter().copied().collect();
        let choose = |fits: &dyn Fn(&Shown) -> bool| -> Vec<usize> {
            (0..dataset.shown.len())
                .filter(|place| fits(&dataset.shown[*place]))
                .collect()
        };
        let held_out = |shown: &Shown| {
            let name = dataset.subjects[shown.subject].as_str();
            drawings.held_out().contains(name)
        };
        let unknown = choose(&|shown| shown.clean && held_out(shown));
        let clean = choose(&|shown| shown.clean && shown.check && held_out(shown));
        let damaged = choose(&|shown| !shown.clean && shown.check && held_out(shown));
        let checks = choose(&|shown| shown.check);
        let known: RefCell<BTreeMap<String, Vec<f32>>> = RefCell::default();
        let ask = |alignment: &Alignment, places: &[usize]| {
            let images = alignment.project_images(rows)?;
            let reader = Reader {
                alignment,
                tower,
                known: &known,
            };
            recognised(dataset, &images, &names, places, &reader)
        };
        let (known_subjects, mut own, wrong) = ask(last, &clean)?;
        own.sort_by(f64::total_cmp);
        let quantile = |part: f64| {
            let place = (part * own.len() as f64) as usize;
            own.get(place).copied().unwrap_or(0.0)
        };
        let images = last.project_images(rows)?;
        let reader = Reader {
            alignment: last,
            tower,
            known: &known,
        };
        Ok(Self {
            unknown_subjects: ask(first, &unknown)?.0,
            known_subjects,
            known_subjects_damaged: ask(last, &damaged)?.0,
            words: words(dataset, &images, &checks, &reader)?,
            low: quantile(0.05),
            typical: quantile(0.5),
            wrong,
        })
    }
}

/// Texts into the common space. What the tower read is remembered, because every projection is asked about the same texts.
struct Reader<'a> {
    alignment: &'a Alignment,
    tower: &'a TextTower,
    known: &'a RefCell<BTreeMap<String, Vec<f32>>>,
}

impl Reader<'_> {
    fn read(&self, texts: &BTreeSet<String>) -> Result<BTreeMap<String, Vec<f32>>, ImageTextError> {
        if texts.is_empty() {
            return Ok(BTreeMap::new());
        }
        let mut known = self.known.borrow_mut();
        let new: Vec<&str> = texts
            .iter()
            .map(String::as_str)
            .filter(|text| !known.contains_key(*text))
            .collect();
        let rows = self.tower.read(&new)?;
        for (row, text) in new.iter().enumerate() {
            known.insert((*text).to_owned(), rows.row(row).to_vec());
        }
        let values = texts.iter().flat_map(|text| known[text].clone()).collect();
        let rows = Rows::new(self.tower.width(), values)?;
        let projected = self.alignment.project_texts(&rows)?;
        Ok(texts
            .iter()
            .enumerate()
            .map(|(row, text)| (text.clone(), projected.row(row).to_vec()))
            .collect())
    }
}

/// What of a plain prompt follows its subject: style and background.
fn tail(plain: &str) -> &str {
    plain.find(", ").map_or("", |start| &plain[start..])
}

fn said(name: &str, tail: &str) -> String {
    format!("{}{tail}", name.replace(['-', '_'], " "))
}

/// How often the own subject is found with style and background as they are, the cosines with the own prompt, and the mean with others.
fn recognised(
    dataset: &Dataset,
    images: &Rows,
    names: &[&str],
    places: &[usize],
    reader: &Reader<'_>,
) -> Result<(Recognised, Vec<f64>, f64), ImageTextError> {
    let tail_of = |place: &usize| tail(&dataset.texts[dataset.shown[*place].plain]);
    let tails: BTreeSet<&str> = places.iter().map(tail_of).collect();
    let texts = tails
        .iter()
        .flat_map(|tail| names.iter().map(move |name| said(name, tail)))
        .collect();
    let read = reader.read(&texts)?;
    let (mut first, mut among, mut own, mut other) = (0_usize, 0_usize, Vec::new(), 0.0);
    for place in places {
        let image = images.row(*place);
        let right = dataset.subjects[dataset.shown[*place].subject].as_str();
        let with = |name: &str| cosine(image, &read[&said(name, tail_of(place))]);
        let mine = with(right);
        let others: Vec<f64> = names
            .iter()
            .filter(|name| **name != right)
            .map(|name| with(name))
            .collect();
        let rank = others.iter().filter(|value| **value >= mine).count();
        first += usize::from(rank == 0);
        among += usize::from(rank < 5);
        own.push(mine);
        other += others.iter().sum::<f64>() / others.len().max(1) as f64;
    }
    let count = places.len().max(1) as f64;
    let recognised = Recognised {
        images: places.len(),
        subjects: names.len(),
        top1: first as f64 / count,
        top5: among as f64 / count,
    };
    Ok((recognised, own, other / count))
}

/// Whether an image is nearer to the word for its fault than good images are.
fn words(
    dataset: &Dataset,
    images: &Rows,
    places: &[usize],
    reader: &Reader<'_>,
) -> Result<BTreeMap<String, WordFigures>, ImageTextError> {
    let step = places.len().div_ceil(LOOKED_AT).max(1);
    let places: Vec<usize> = places.iter().copied().step_by(step).collect();
    let with = |place: usize, dimension: Dimension, level: Level| {
        let statement = Statement {
            dimension,
            level,
            place: Place::Whole,
        };
        describe(&dataset.texts[dataset.shown[place].plain], &[statement])
    };
    let mut texts = BTreeSet::new();
    for place in &places {
        for dimension in Dimension::ALL {
            texts.insert(with(*place, dimension, Level::Low));
            texts.insert(with(*place, dimension, Level::Good));
        }
    }
    let read = reader.read(&texts)?;
    let mut figures = BTreeMap::new();
    for dimension in Dimension::ALL {
        // How much nearer to the word for the fault than to that for good.
        let (mut faulty, mut good) = (Vec::new(), Vec::new());
        for place in &places {
            let nearer = cosine(
                images.row(*place),
                &read[&with(*place, dimension, Level::Low)],
            ) - cosine(
                images.row(*place),
                &read[&with(*place, dimension, Level::Good)],
            );
            let mine = |statement: &&Statement| statement.dimension == dimension;
            for statement in dataset.shown[*place].truth.iter().filter(mine) {
                match statement.level {
                    Level::Low => faulty.push(nearer),
                    _ if !statement.is_fault() => good.push(nearer),
                    _ => {}
                }
            }
        }
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let won: f64 = faulty
            .iter()
            .flat_map(|bad| good.iter().map(move |fine| bad.total_cmp(fine)))
            .map(|order| match order {
                std::cmp::Ordering::Greater => 1.0,
                std::cmp::Ordering::Equal => 0.5,
                std::cmp::Ordering::Less => 0.0,
            })
            .sum();
        let name = dimension.word(Level::Low).replace(' ', "-");
        let found = WordFigures {
            faulty: faulty.len(),
            good: good.len(),
            auc: won / (faulty.len() * good.len()).max(1) as f64,
            rise_faulty: mean(&faulty),
            rise_good: -mean(&good),
        };
        figures.insert(name, found);
    }
    Ok(figures)
}
