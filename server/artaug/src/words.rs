//! The words in which captions and advice speak of how an image looks. The embedded base model is trained on captions that use
//! them truthfully, so that advice in the same words can act. That captions, advisor and scorers share one vocabulary is a
//! planted convenience of the embedded set-up; a model of the world needs none of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::region::Area;

/// A side of how an image looks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dimension {
    /// How bright it is.
    Exposure,
    /// How far dark and bright are apart.
    Contrast,
    /// How strong the colours are.
    Colour,
    /// How crisp the edges are.
    Sharpness,
    /// How near the subject is to the middle; of whole images only.
    Placement,
}

/// Where a measure stands against clean images.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Below.
    Low,
    /// Within.
    Good,
    /// Above.
    High,
}

impl Dimension {
    /// Every dimension.
    pub const ALL: [Self; 5] = [
        Self::Exposure,
        Self::Contrast,
        Self::Colour,
        Self::Sharpness,
        Self::Placement,
    ];
    /// Those that a part of an image has too.
    pub const REGIONAL: [Self; 4] = [
        Self::Exposure,
        Self::Contrast,
        Self::Colour,
        Self::Sharpness,
    ];

    /// Place in [`Dimension::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// The word for an image at `level`. Nothing is too sharp or too well placed, so `High` is `Good` there.
    pub fn word(self, level: Level) -> &'static str {
        match (self, level) {
            (Self::Exposure, Level::Low) => "dim",
            (Self::Exposure, Level::Good) => "well lit",
            (Self::Exposure, Level::High) => "glaring",
            (Self::Contrast, Level::Low) => "flat",
            (Self::Contrast, Level::Good) => "clear",
            (Self::Contrast, Level::High) => "harsh",
            (Self::Colour, Level::Low) => "faded",
            (Self::Colour, Level::Good) => "colourful",
            (Self::Colour, Level::High) => "vivid",
            (Self::Sharpness, Level::Low) => "blurred",
            (Self::Sharpness, _) => "sharp",
            (Self::Placement, Level::Low) => "off centre",
            (Self::Placement, _) => "centred",
        }
    }

    /// Whether a measure above those of clean images is a fault.
    pub fn too_high_is_a_fault(self) -> bool {
        matches!(self, Self::Exposure | Self::Contrast)
    }
}

/// A part of an image that words can name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// All of it.
    Whole,
    /// The left half.
    Left,
    /// The right half.
    Right,
    /// The upper half.
    Top,
    /// The lower half.
    Bottom,
    /// A quarter.
    TopLeft,
    /// A quarter.
    TopRight,
    /// A quarter.
    BottomLeft,
    /// A quarter.
    BottomRight,
    /// The middle, half of each side.
    Centre,
}

impl Place {
    /// Every place.
    pub const ALL: [Self; 10] = [
        Self::Whole,
        Self::Left,
        Self::Right,
        Self::Top,
        Self::Bottom,
        Self::TopLeft,
        Self::TopRight,
        Self::BottomLeft,
        Self::BottomRight,
        Self::Centre,
    ];

    /// The box that it means.
    pub fn area(self) -> Area {
        Area::trusted(match self {
            Self::Whole => [0.0, 0.0, 1.0, 1.0],
            Self::Left => [0.0, 0.0, 0.5, 1.0],
            Self::Right => [0.5, 0.0, 1.0, 1.0],
            Self::Top => [0.0, 0.0, 1.0, 0.5],
            Self::Bottom => [0.0, 0.5, 1.0, 1.0],
            Self::TopLeft => [0.0, 0.0, 0.5, 0.5],
            Self::TopRight => [0.5, 0.0, 1.0, 0.5],
            Self::BottomLeft => [0.0, 0.5, 0.5, 1.0],
            Self::BottomRight => [0.5, 0.5, 1.0, 1.0],
            Self::Centre => [0.25, 0.25, 0.75, 0.75],
        })
    }

    /// The place that overlaps most with `area`.
    pub fn nearest(area: Area) -> Self {
        let mut best = Self::Whole;
        for place in Self::ALL {
            if place.area().overlap(area) > best.area().overlap(area) {
                best = place;
            }
        }
        best
    }

    /// What follows an attribute to say where it holds; empty for the whole.
    pub fn words(self) -> &'static str {
        match self {
            Self::Whole => "",
            Self::Left => "on the left",
            Self::Right => "on the right",
            Self::Top => "at the top",
            Self::Bottom => "at the bottom",
            Self::TopLeft => "at the top left",
            Self::TopRight => "at the top right",
            Self::BottomLeft => "at the bottom left",
            Self::BottomRight => "at the bottom right",
            Self::Centre => "in the middle",
        }
    }
}

/// One true thing that a caption says of how an image looks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Statement {
    /// In which respect.
    pub dimension: Dimension,
    /// How.
    pub level: Level,
    /// Where.
    pub place: Place,
}

impl Statement {
    /// Whether it names a fault.
    pub fn is_fault(self) -> bool {
        match self.level {
            Level::Low => true,
            Level::Good => false,
            Level::High => self.dimension.too_high_is_a_fault(),
        }
    }
}

impl fmt::Display for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.dimension.word(self.level))?;
        if self.place != Place::Whole {
            write!(f, " {}", self.place.words())?;
        }
        Ok(())
    }
}

/// `subject` with the statements after it: "red apple, blue background, dim, faded on the left".
pub fn describe(subject: &str, statements: &[Statement]) -> String {
    let mut text = subject.to_owned();
    for statement in statements {
        text.push_str(", ");
        text.push_str(&statement.to_string());
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_place_is_the_nearest_to_its_own_box() {
        for place in Place::ALL {
            assert_eq!(Place::nearest(place.area()), place);
        }
    }

    #[test]
    fn a_box_without_a_name_takes_the_nearest() {
        let corner = Area::new(0.0, 0.0, 0.5, 0.25).unwrap();
        assert_eq!(Place::nearest(corner), Place::TopLeft);
        let most = Area::new(0.0, 0.0, 1.0, 0.9).unwrap();
        assert_eq!(Place::nearest(most), Place::Whole);
    }

    #[test]
    fn faults_and_good_looks_have_words_of_their_own() {
        let mut words = BTreeSet::new();
        for dimension in Dimension::ALL {
            assert!(words.insert(dimension.word(Level::Low)));
            assert!(words.insert(dimension.word(Level::Good)));
            if dimension.too_high_is_a_fault() {
                assert!(words.insert(dimension.word(Level::High)));
            }
            assert_eq!(Dimension::ALL[dimension.index()], dimension);
        }
    }

    #[test]
    fn a_description_says_what_where() {
        let statements = [
            Statement {
                dimension: Dimension::Exposure,
                level: Level::Low,
                place: Place::Whole,
            },
            Statement {
                dimension: Dimension::Colour,
                level: Level::Low,
                place: Place::Left,
            },
        ];
        assert_eq!(
            describe("red apple, blue background", &statements),
            "red apple, blue background, dim, faded on the left"
        );
    }
}
