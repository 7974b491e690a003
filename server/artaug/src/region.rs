//! Regions: where advice applies, as a box, as a mask at the latent size, and softened.

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

/// Weights from 0 to 1 over the latent grid, row by row.
#[derive(Clone, PartialEq, Debug)]
pub struct Mask {
    width: usize,
    height: usize,
    values: Vec<f32>,
}

/// How far a mask is softened.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Softening {
    /// Standard deviation of the Gaussian in latent cells.
    pub sigma: f64,
    /// Number of taps on each side of the middle one.
    pub radius: usize,
}

impl Softening {
    /// That of the method's authors (kernel 33, sigma 10 at 128 x 128 latent cells), scaled to the shorter side of a grid.
    pub fn for_grid(width: usize, height: usize) -> Self {
        let scale = width.min(height) as f64 / 128.0;
        Self {
            sigma: 10.0 * scale,
            radius: ((16.0 * scale).round() as usize).max(1),
        }
    }
}

impl Mask {
    /// 1 in the cells whose middle lies in `area`, else 0. A box without any middle takes the cell that holds its own middle,
    /// so that no region is empty. Sides of 0 count as 1.
    pub fn of(area: Area, width: usize, height: usize) -> Self {
        let (width, height) = (width.max(1), height.max(1));
        let covered = |low: f64, high: f64, cells: usize| {
            let middle = (f64::midpoint(low, high) * cells as f64) as usize;
            let inside: Vec<bool> = (0..cells)
                .map(|cell| (cell as f64 + 0.5) / cells as f64)
                .map(|place| place >= low && place < high)
                .collect();
            if inside.contains(&true) {
                inside
            } else {
                (0..cells)
                    .map(|cell| cell == middle.min(cells - 1))
                    .collect()
            }
        };
        let columns = covered(area.left, area.right, width);
        let rows = covered(area.top, area.bottom, height);
        let values = rows
            .iter()
            .flat_map(|row| columns.iter().map(move |column| f32::from(*row && *column)))
            .collect();
        Self {
            width,
            height,
            values,
        }
    }

    /// Cells from left to right.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Cells from top to bottom.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The weights, row by row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The mask after a Gaussian blur: separable, the edges mirrored without repeating the outermost cell, as torchvision's.
    #[must_use]
    pub fn softened(&self, softening: Softening) -> Self {
        let taps = taps(softening);
        let pass = |source: &dyn Fn(usize, usize) -> f64, length: usize, lines: usize| {
            let mut result = vec![0.0; length * lines];
            for line in 0..lines {
                for place in 0..length {
                    let sum: f64 = taps
                        .iter()
                        .enumerate()
                        .map(|(tap, weight)| {
                            let wanted = place as isize + tap as isize - softening.radius as isize;
                            weight * source(line, mirrored(wanted, length))
                        })
                        .sum();
                    result[line * length + place] = sum;
                }
            }
            result
        };
        let values = &self.values;
        let across = pass(
            &|row, column| f64::from(values[row * self.width + column]),
            self.width,
            self.height,
        );
        // The second pass runs down the columns: its lines are columns.
        let down = pass(
            &|column, row| across[row * self.width + column],
            self.height,
            self.width,
        );
        let values = (0..self.width * self.height)
            .map(|cell| down[(cell % self.width) * self.height + cell / self.width] as f32)
            .collect();
        Self {
            width: self.width,
            height: self.height,
            values,
        }
    }
}

/// The weights of a Gaussian, summing to 1.
fn taps(softening: Softening) -> Vec<f64> {
    let radius = softening.radius as f64;
    let sigma = softening.sigma.max(1e-6);
    let raw: Vec<f64> = (0..=2 * softening.radius)
        .map(|tap| (-0.5 * ((tap as f64 - radius) / sigma).powi(2)).exp())
        .collect();
    let sum: f64 = raw.iter().sum();
    raw.iter().map(|weight| weight / sum).collect()
}

fn mirrored(place: isize, length: usize) -> usize {
    if length == 1 {
        return 0;
    }
    let period = 2 * (length as isize - 1);
    let within = place.rem_euclid(period);
    within.min(period - within) as usize
}

/// One region's part in the mix of predictions.
#[derive(Debug, Clone, Copy)]
pub struct Contribution<'a> {
    /// The prediction under the region's prompt, channel by channel over the grid.
    pub prediction: &'a [f32],
    /// s_i, at least 0.
    pub strength: f32,
    /// The softened mask.
    pub mask: &'a Mask,
}

/// The mixed prediction [eps(P) + sum s_i eps(P_i) m_i] / (1 + sum s_i m_i) of ArtAug (arXiv 2412.12888), with masks m_i over
/// the grid shared by all channels. The engine does the same on tensors; this is the reference that it is tested against.
///
/// # Panics
/// If a prediction's length differs from the base's, or is no multiple of the grid's.
pub fn mix(base: &[f32], regions: &[Contribution<'_>]) -> Vec<f32> {
    (0..base.len())
        .map(|index| {
            let (mut sum, mut weight) = (f64::from(base[index]), 1.0);
            for region in regions {
                let grid = region.mask.values.len();
                assert!(
                    region.prediction.len() == base.len() && base.len().is_multiple_of(grid),
                    "predictions and masks fit one grid"
                );
                let share =
                    f64::from(region.strength) * f64::from(region.mask.values[index % grid]);
                sum += share * f64::from(region.prediction[index]);
                weight += share;
            }
            (sum / weight) as f32
        })
        .collect()
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

    #[test]
    fn a_mask_covers_the_cells_whose_middle_is_inside() {
        let mask = Mask::of(Area::new(0.0, 0.0, 0.5, 0.5).unwrap(), 4, 4);
        let rows: Vec<&[f32]> = mask.values().chunks(4).collect();
        assert_eq!(rows[0], [1.0, 1.0, 0.0, 0.0]);
        assert_eq!(rows[1], [1.0, 1.0, 0.0, 0.0]);
        assert_eq!(rows[2], [0.0; 4]);
    }

    #[test]
    fn a_box_smaller_than_a_cell_takes_one_cell() {
        let mask = Mask::of(Area::new(0.26, 0.51, 0.3, 0.52).unwrap(), 4, 4);
        assert_eq!(mask.values().iter().sum::<f32>(), 1.0);
        assert_eq!(mask.values()[2 * 4 + 1], 1.0);
    }

    #[test]
    fn the_authors_softening_is_that_of_a_latent_of_128() {
        let full = Softening::for_grid(128, 128);
        assert_eq!((full.sigma, full.radius), (10.0, 16));
        let small = Softening::for_grid(32, 64);
        assert_eq!((small.sigma, small.radius), (2.5, 4));
        assert_eq!(Softening::for_grid(4, 4).radius, 1);
    }

    #[test]
    fn softening_leaves_the_whole_image_as_it_is() {
        let whole = Mask::of(Area::WHOLE, 9, 5);
        let soft = whole.softened(Softening::for_grid(64, 64));
        for value in soft.values() {
            assert!((value - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn an_edge_is_softened_as_by_torchvision() {
        // torchvision.transforms.functional.gaussian_blur(x, [3, 3], [0.625, 0.625]) of the row 1 1 0 0 on a height of 4.
        let mask = Mask::of(Area::new(0.0, 0.0, 0.5, 1.0).unwrap(), 4, 4);
        let soft = mask.softened(Softening {
            sigma: 0.625,
            radius: 1,
        });
        let side = (-0.5 / (0.625_f64 * 0.625)).exp();
        let side = side / (1.0 + 2.0 * side);
        let expected = [1.0, 1.0 - side, side, 0.0];
        for (value, wanted) in soft.values().iter().zip(expected.iter().cycle()) {
            assert!((f64::from(*value) - wanted).abs() < 1e-6, "{soft:?}");
        }
    }

    #[test]
    fn the_mix_without_regions_is_the_base_and_with_a_strong_one_the_region() {
        let mask = Mask::of(Area::new(0.0, 0.0, 0.5, 1.0).unwrap(), 2, 1);
        let base = [1.0, 1.0, 2.0, 2.0];
        assert_eq!(mix(&base, &[]), base);
        let region = Contribution {
            prediction: &[3.0, 3.0, 6.0, 6.0],
            strength: 1.0,
            mask: &mask,
        };
        assert_eq!(mix(&base, &[region]), [2.0, 1.0, 4.0, 2.0]);
    }

    proptest! {
        #[test]
        fn a_softened_mask_stays_between_nothing_and_all(
            edges in proptest::array::uniform4(0.0_f64..1.0), width in 1_usize..20, height in 1_usize..20,
        ) {
            let [a, b, c, d] = edges;
            if let Ok(area) = Area::new(a.min(c), b.min(d), a.max(c), b.max(d)) {
                let mask = Mask::of(area, width, height);
                prop_assert!(mask.values().contains(&1.0));
                for value in mask.softened(Softening::for_grid(width, height)).values() {
                    prop_assert!((-1e-6..=1.0 + 1e-6).contains(value));
                }
            }
        }
    }
}
