//! The embedded advisor: measured faults against the ranges of clean images become boxes and prompts. It needs no model.

use super::{Advice, Advisor, AdvisorError, MAX_REGIONS, Question, Region, RegionPrompt};
use crate::{
    photometry::{CleanLooks, CleanRanges, GRID, Survey, cell_area, survey},
    region::Area,
    words::{Dimension, Level, Place, Statement, describe},
};

/// Version of the rules, and of the measures and words that they speak of. Other advice on the same image is a new version, which stands in
/// every model card; a job does not go on with another one than it began with.
const RULES_VERSION: &str = "rules v1";

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
        format!("{RULES_VERSION} on {} clean images", self.looks.images())
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

#[cfg(test)]
mod tests {
    use concord_common::Digest;

    use super::*;
    use crate::image::Image;

    /// What becomes of a pixel, by its place.
    type Damage = fn(u32, u32, [u8; 3]) -> [u8; 3];

    /// A square on a ground that is pale or dark by turns, both grainy.
    fn picture(number: u32, left: u32) -> Image {
        let ground = if number.is_multiple_of(2) {
            [90, 130, 170]
        } else {
            [50, 70, 100]
        };
        let mut image = Image::filled(32, 32, [0; 3]).unwrap();
        for y in 0..32_u32 {
            for x in 0..32_u32 {
                let grain = (3 * x * x + 5 * y * y + x * y + 7 * number) % 24;
                let square = left..left + 12;
                let colour = if square.contains(&x) && square.contains(&y) {
                    [190, 60, 50]
                } else {
                    ground
                };
                let shade = grain + number % 9;
                image.put(x, y, colour.map(|value: u32| (value + shade) as u8));
            }
        }
        image
    }

    /// A pale one with damage in the cells of a mask, whose lowest bit is the first cell.
    fn damaged(left: u32, cells: u16, damage: Damage) -> Image {
        let mut image = picture(100, left);
        for y in 0..32_u32 {
            for x in 0..32_u32 {
                let cell = y / 8 * 4 + x / 8;
                if (cells >> cell) & 1 == 1 {
                    image.put(x, y, damage(x, y, image.at(x, y)));
                }
            }
        }
        image
    }

    fn rules() -> RuleAdvisor {
        let clean: Vec<(String, Survey)> = (0..48)
            .map(|number| {
                let ground = ["pale ground", "dark ground"][number as usize % 2];
                (ground.to_owned(), survey(&picture(number, 10)))
            })
            .collect();
        let looks = CleanLooks::measure(&clean, 0.05).unwrap();
        RuleAdvisor::new(looks, RuleSettings::default())
    }

    #[test]
    fn other_advice_by_the_rules_is_another_version() {
        let keep: Damage = |_, _, pixel| pixel;
        let dim: Damage = |_, _, pixel| pixel.map(|value| value / 4);
        let glare: Damage = |_, _, pixel| pixel.map(|value| 255 - (255 - value) / 5);
        let flat: Damage = |_, _, pixel| pixel.map(|value| 100 + value / 6);
        let fade: Damage = |_, _, pixel| [(pixel.map(u32::from).iter().sum::<u32>() / 3) as u8; 3];
        let smooth: Damage = |x, y, _| [(60 + 2 * x + 3 * y) as u8; 3];
        let (pale, dark) = ("red square, pale ground", "red square, dark ground");
        let questions = [
            (pale, damaged(10, 0, keep)),
            // A whole image, a quarter, halves, and the upper half.
            (pale, damaged(10, 0xFFFF, dim)),
            (pale, damaged(10, 0xCC00, glare)),
            (pale, damaged(10, 0xCCCC, flat)),
            (pale, damaged(10, 0x3333, fade)),
            (pale, damaged(10, 0x00FF, smooth)),
            // One cell and two, eleven and twelve, and every other one.
            (pale, damaged(10, 0x0001, dim)),
            (pale, damaged(10, 0x0003, dim)),
            (pale, damaged(10, 0x07FF, dim)),
            (pale, damaged(10, 0x0FFF, dim)),
            (pale, damaged(10, 0xA5A5, dim)),
            // A square in the corner, another ground than there is, and a prompt that may not pass.
            (pale, damaged(2, 0, keep)),
            (dark, damaged(10, 0x3333, fade)),
            ("a|b", damaged(10, 0x3333, fade)),
        ];
        let rules = rules();
        let mut said = Vec::new();
        for (number, (prompt, image)) in questions.iter().enumerate() {
            let question = Question {
                image,
                prompt,
                max_regions: 3,
            };
            for region in rules.advise(&question).unwrap().regions {
                // Three digits: the last bits of a root are the machine's own.
                said.push(format!(
                    "{number} {:?} {} {:.3}",
                    region.area.edges(),
                    region.prompt.as_str(),
                    region.confidence
                ));
            }
        }
        let said = said.join("\n");
        for dimension in Dimension::ALL {
            assert!(said.contains(dimension.word(Level::Good)), "{said}");
        }
        assert_eq!(rules.name(), format!("{RULES_VERSION} on 48 clean images"));
        let digest = Digest::of(said.as_bytes()).to_string();
        assert_eq!(
            (RULES_VERSION, digest.as_str()),
            (
                "rules v1",
                "8733e925255b01add189feb61f2a47790d96522aa7cacb6c7774c8ad91477a8f"
            ),
            "the advice has changed: give the rules a new version\n{said}"
        );
    }
}
