//! Regions: where advice applies. The engine makes masks at the latent size of them.

use serde::{Deserialize, Serialize};

/// A box inside an image in fractions of its sides: 0 <= left < right <= 1 and 0 <= top < bottom <= 1.
/// Written as `[left, top, right, bottom]`.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(try_from = "[f64; 4]", into = "[f64; 4]")]
pub struct Area {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
}

/// Four numbers that are no box.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error(
    "a box is [left, top, right, bottom] in fractions, left below right and top below bottom, all from 0 to 1; not {0:?}"
)]
pub struct InvalidArea([f64; 4]);

impl Area {
    /// The whole image.
    pub const WHOLE: Self = Self {
        left: 0.0,
        top: 0.0,
        right: 1.0,
        bottom: 1.0,
    };

    /// A box from edges that are known to be inside the image and in order.
    pub(crate) const fn trusted([left, top, right, bottom]: [f64; 4]) -> Self {
        Self {
            left,
            top,
            right,
            bottom,
        }
    }

    /// A box from its edges.
    ///
    /// # Errors
    /// If an edge is outside 0..1 or no number, or the box is empty or turned over.
    pub fn new(left: f64, top: f64, right: f64, bottom: f64) -> Result<Self, InvalidArea> {
        let inside = |low: f64, high: f64| low >= 0.0 && low < high && high <= 1.0;
        if inside(left, right) && inside(top, bottom) {
            Ok(Self {
                left,
                top,
                right,
                bottom,
            })
        } else {
            Err(InvalidArea([left, top, right, bottom]))
        }
    }

    /// Left, top, right and bottom edge.
    pub fn edges(self) -> [f64; 4] {
        [self.left, self.top, self.right, self.bottom]
    }

    /// The part of the image that it covers.
    pub fn share(self) -> f64 {
        (self.right - self.left) * (self.bottom - self.top)
    }

    /// Intersection over union with another box.
    pub fn overlap(self, other: Self) -> f64 {
        let width = (self.right.min(other.right) - self.left.max(other.left)).max(0.0);
        let height = (self.bottom.min(other.bottom) - self.top.max(other.top)).max(0.0);
        let common = width * height;
        common / (self.share() + other.share() - common)
    }
}

impl TryFrom<[f64; 4]> for Area {
    type Error = InvalidArea;

    fn try_from([left, top, right, bottom]: [f64; 4]) -> Result<Self, InvalidArea> {
        Self::new(left, top, right, bottom)
    }
}

impl From<Area> for [f64; 4] {
    fn from(area: Area) -> Self {
        area.edges()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_box_outside_the_image_or_turned_over_is_refused() {
        for edges in [
            [0.5, 0.0, 0.5, 1.0],
            [0.8, 0.0, 0.2, 1.0],
            [-0.1, 0.0, 1.0, 1.0],
            [0.0, 0.0, 1.0, 1.1],
            [f64::NAN, 0.0, 1.0, 1.0],
        ] {
            assert!(Area::try_from(edges).is_err(), "{edges:?}");
        }
        let read: Result<Area, _> = serde_json::from_str("[0.25, 0, 0.75, 2]");
        assert!(read.is_err());
    }

    proptest! {
        #[test]
        fn a_box_that_is_accepted_survives_its_text_form(edges in proptest::array::uniform4(-0.5_f64..1.5)) {
            if let Ok(area) = Area::try_from(edges) {
                prop_assert!(area.share() > 0.0 && area.share() <= 1.0);
                let text = serde_json::to_string(&area).unwrap();
                prop_assert_eq!(serde_json::from_str::<Area>(&text).unwrap(), area);
                prop_assert!((area.overlap(area) - 1.0).abs() < 1e-9);
            }
        }
    }
}
