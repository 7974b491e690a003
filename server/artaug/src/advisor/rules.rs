//! The embedded advisor: measured faults against the ranges of clean images become boxes and prompts. It needs no model.

use super::{Advice, Advisor, AdvisorError, MAX_REGIONS, Question, Region, RegionPrompt};
use crate::{
    photometry::{CleanLooks, CleanRanges, GRID, Survey, cell_area, survey},
    region::Area,
    words::{Dimension, Level, Place, Statement, describe},
};

/// How the rules read the measures.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RuleSettings {
    /// A fault counts from this excess on, in visible steps.
    pub least_excess: f64,
    /// A box has at least this many cells of the 4 x 4 grid.
    pub least_cells: usize,
    /// From this many faulty cells on, the whole image is meant.
    pub whole_cells: usize,
}

impl Default for RuleSettings {
    fn default() -> Self {
        Self {
            least_excess: 0.5,
            least_cells: 2,
            whole_cells: 12,
        }
    }
}

/// Advises by measured photometry and composition.
#[derive(Debug, Clone)]
pub struct RuleAdvisor {
    looks: CleanLooks,
    settings: RuleSettings,
}

/// A fault with the box in which it was found.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Fault {
    dimension: Dimension,
    level: Level,
    area: Area,
    excess: f64,
}

impl RuleAdvisor {
    /// An advisor that compares with `looks`.
    pub fn new(looks: impl Into<CleanLooks>, settings: RuleSettings) -> Self {
        Self {
            looks: looks.into(),
            settings,
        }
    }

    /// The faults of an image as statements about the nearest named places, for rewriting a prompt as a whole (one of the
    /// control arms) and for tables.
    pub fn faults(&self, survey: &Survey, prompt: &str) -> Vec<Statement> {
        self.find(survey, self.looks.for_prompt(prompt))
            .into_iter()
            .map(|fault| Statement {
                dimension: fault.dimension,
                level: fault.level,
                place: Place::nearest(fault.area),
            })
            .collect()
    }

    fn find(&self, survey: &Survey, ranges: &CleanRanges) -> Vec<Fault> {
        Dimension::ALL
            .into_iter()
            .filter_map(|dimension| {
                // A region explains more than the whole does, which a large region moves too.
                self.regional_fault(survey, ranges, dimension)
                    .or_else(|| self.whole_fault(survey, ranges, dimension))
            })
            .collect()
    }

    fn whole_fault(
        &self,
        survey: &Survey,
        ranges: &CleanRanges,
        dimension: Dimension,
    ) -> Option<Fault> {
        let finding = ranges.judge_whole(survey, dimension)?;
        (finding.excess >= self.settings.least_excess).then_some(Fault {
            dimension,
            level: finding.level,
            area: Area::WHOLE,
            excess: finding.excess,
        })
    }

    /// The larger of the two boxes of cells that are too low and too high.
    fn regional_fault(
        &self,
        survey: &Survey,
        ranges: &CleanRanges,
        dimension: Dimension,
    ) -> Option<Fault> {
        let boxed = |level: Level| {
            let excess: [f64; GRID * GRID] = std::array::from_fn(|cell| {
                ranges
                    .judge_cell(survey, cell, dimension)
                    .filter(|finding| finding.level == level)
                    .map_or(0.0, |finding| finding.excess)
            });
            let faulty = excess.map(|value| value >= self.settings.least_excess && value > 0.0);
            let count = faulty.iter().filter(|cell| **cell).count();
            let (mut area, mut cells) = largest_box(&faulty)?;
            // Many faulty cells, or most of them outside any one box: the fault is everywhere.
            if count >= self.settings.whole_cells || count > 2 * cells {
                (area, cells) = (Area::WHOLE, count);
            }
            (cells >= self.settings.least_cells).then(|| Fault {
                dimension,
                level,
                area,
                excess: excess.iter().sum::<f64>() / count as f64,
            })
        };
        match (boxed(Level::Low), boxed(Level::High)) {
            (Some(low), Some(high)) if high.area.share() > low.area.share() => Some(high),
            (low, high) => low.or(high),
        }
    }
}

/// The largest box of faulty cells, and its number of cells; the first from the top left among equals.
fn largest_box(faulty: &[bool; GRID * GRID]) -> Option<(Area, usize)> {
    let mut best: Option<(Area, usize)> = None;
    for row in 0..GRID {
        for column in 0..GRID {
            for rows in 1..=GRID - row {
                for columns in 1..=GRID - column {
                    let full = (row..row + rows)
                        .all(|y| (column..column + columns).all(|x| faulty[y * GRID + x]));
                    let cells = rows * columns;
                    if full && best.is_none_or(|(_, most)| cells > most) {
                        best = Some((cell_area(column, row, columns, rows), cells));
                    }
                }
            }
        }
    }
    best
}

impl Advisor for RuleAdvisor {
    fn name(&self) -> String {
        format!("rules v1 on {} clean images", self.looks.images())
    }

    fn advise(&self, question: &Question<'_>) -> Result<Advice, AdvisorError> {
        // Faults in one box become one region whose prompt asks for all of them to be good.
        let mut boxes: Vec<(Area, f64, Vec<Statement>)> = Vec::new();
        for fault in self.find(
            &survey(question.image),
            self.looks.for_prompt(question.prompt),
        ) {
            let wish = Statement {
                dimension: fault.dimension,
                level: Level::Good,
                place: Place::Whole,
            };
            match boxes.iter_mut().find(|(area, ..)| *area == fault.area) {
                Some((_, excess, wishes)) => {
                    *excess += fault.excess;
                    wishes.push(wish);
                }
                None => boxes.push((fault.area, fault.excess, vec![wish])),
            }
        }
        boxes.sort_by(|(_, first, _), (_, second, _)| second.total_cmp(first));
        let regions = boxes
            .into_iter()
            .take(question.max_regions.min(MAX_REGIONS))
            .filter_map(|(area, excess, wishes)| {
                // A prompt of an operator may be longer or stranger than a region's may be: then the wishes stand alone.
                let prompt = RegionPrompt::new(&describe(question.prompt, &wishes))
                    .or_else(|_| RegionPrompt::new(&wishes_alone(&wishes)))
                    .ok()?;
                Some(Region {
                    area,
                    prompt,
                    confidence: excess / (1.0 + excess),
                })
            })
            .collect();
        Ok(Advice {
            regions,
            ..Advice::default()
        })
    }
}

fn wishes_alone(wishes: &[Statement]) -> String {
    let words: Vec<String> = wishes.iter().map(ToString::to_string).collect();
    words.join(", ")
}
