//! Measured photometry and composition, of whole images and by region (4 x 4 cells), and the ranges that clean images keep.
//!
//! With R, G and B in 0..1 as they stand in the file (sRGB, gamma encoded) and the luma Y = 0.2126 R + 0.7152 G + 0.0722 B
//! (ITU-R BT.709):
//!
//! - exposure: the mean of Y;
//! - contrast: the standard deviation of Y (RMS contrast; Peli, "Contrast in complex images", J. Opt. Soc. Am. A, 1990);
//! - colourfulness: sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2), rg = R - G, yb = (R + G) / 2 - B
//!   (Hasler and Suesstrunk, "Measuring colourfulness in natural images", SPIE 5007, 2003);
//! - sharpness: the standard deviation of the 4-neighbour Laplacian of Y (focus measure of Pech-Pacheco et al., ICPR 2000)
//!   over that of Y, so that a flat image is not taken for a blurred one; 0 where Y hardly varies;
//! - placement: 1 - 2 |c - m|, c the mean place of the pixels weighted by their distance from the background's colour (the
//!   median of the border, channel by channel), m the middle, in fractions of the sides.

mod clean;
mod diversity;
mod subject;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use self::{
    clean::{CleanLooks, CleanRanges, Finding, NoImages, Range},
    diversity::{Nearest, Thumbnails},
    subject::Subject,
};
use crate::{image::Image, region::Area, words::Dimension};

/// Cells on each side of the grid on which regions are measured.
pub const GRID: usize = 4;
/// Below this standard deviation of the luma (one and a quarter of 256 steps) there are no edges to judge.
const FLAT: f64 = 0.005;

/// What was measured of an image or a part of it; see the module for the formulae.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Photometry {
    /// Mean luma, 0..1.
    pub exposure: f64,
    /// Standard deviation of the luma, 0..0.5.
    pub contrast: f64,
    /// 0 for grey, about 1 for the strongest colours.
    pub colourfulness: f64,
    /// Relative strength of fine detail, 0 to about 5.
    pub sharpness: f64,
}

impl Photometry {
    /// One of the four measures; placement is none of them.
    pub fn get(&self, dimension: Dimension) -> Option<f64> {
        match dimension {
            Dimension::Exposure => Some(self.exposure),
            Dimension::Contrast => Some(self.contrast),
            Dimension::Colour => Some(self.colourfulness),
            Dimension::Sharpness => Some(self.sharpness),
            Dimension::Placement => None,
        }
    }
}

/// Everything measured of one image.
#[derive(Clone, PartialEq, Debug)]
pub struct Survey {
    /// The image as a whole.
    pub whole: Photometry,
    /// Its cells, row by row.
    pub cells: [Photometry; GRID * GRID],
    /// Where its subject stands; none if nothing differs from the background.
    pub subject: Option<Subject>,
}

/// Measures an image.
pub fn survey(image: &Image) -> Survey {
    let plane = Plane::of(image);
    let cells = std::array::from_fn(|cell| {
        let [left, top, right, bottom] = cell_area(cell % GRID, cell / GRID, 1, 1).edges();
        plane.measure(plane.columns(left, right), plane.rows(top, bottom))
    });
    Survey {
        whole: plane.measure(0..plane.width, 0..plane.height),
        cells,
        subject: subject::find(image),
    }
}

impl Survey {
    /// A measure of the whole image; placement is 1 where there is no subject to place.
    pub fn whole(&self, dimension: Dimension) -> f64 {
        self.whole
            .get(dimension)
            .unwrap_or_else(|| self.subject.map_or(1.0, Subject::placement))
    }
}

/// The box of `columns` x `rows` cells from a first cell on.
///
/// # Panics
/// If it reaches beyond the grid or is empty.
pub fn cell_area(column: usize, row: usize, columns: usize, rows: usize) -> Area {
    let place = |cell: usize| cell as f64 / GRID as f64;
    Area::new(
        place(column),
        place(row),
        place(column + columns),
        place(row + rows),
    )
    .expect("the cells are inside the grid")
}

/// Luma and opponent colours of every pixel.
struct Plane {
    width: usize,
    height: usize,
    luma: Vec<f64>,
    /// rg and yb.
    colour: Vec<[f64; 2]>,
}

impl Plane {
    fn of(image: &Image) -> Self {
        let (luma, colour) = image
            .pixels()
            .chunks_exact(3)
            .map(|pixel| {
                let [red, green, blue] =
                    [pixel[0], pixel[1], pixel[2]].map(|v| f64::from(v) / 255.0);
                let luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
                (luma, [red - green, f64::midpoint(red, green) - blue])
            })
            .unzip();
        Self {
            width: image.width() as usize,
            height: image.height() as usize,
            luma,
            colour,
        }
    }

    fn columns(&self, low: f64, high: f64) -> std::ops::Range<usize> {
        pixels(low, high, self.width)
    }

    fn rows(&self, low: f64, high: f64) -> std::ops::Range<usize> {
        pixels(low, high, self.height)
    }

    fn measure(&self, columns: std::ops::Range<usize>, rows: std::ops::Range<usize>) -> Photometry {
        let places = || {
            rows.clone()
                .flat_map(|row| columns.clone().map(move |column| (row, column)))
        };
        let at = |(row, column): (usize, usize)| row * self.width + column;
        let (exposure, contrast) = moments(places().map(|place| self.luma[at(place)]));
        let (mean_rg, sd_rg) = moments(places().map(|place| self.colour[at(place)][0]));
        let (mean_yb, sd_yb) = moments(places().map(|place| self.colour[at(place)][1]));
        let (_, detail) = moments(places().map(|(row, column)| self.laplacian(row, column)));
        Photometry {
            exposure,
            contrast,
            colourfulness: sd_rg.hypot(sd_yb) + 0.3 * mean_rg.hypot(mean_yb),
            sharpness: if contrast < FLAT {
                0.0
            } else {
                detail / contrast
            },
        }
    }

    /// The Laplacian over the four neighbours, the image's edge repeated.
    fn laplacian(&self, row: usize, column: usize) -> f64 {
        let at = |row: usize, column: usize| self.luma[row * self.width + column];
        let up = at(row.saturating_sub(1), column);
        let down = at((row + 1).min(self.height - 1), column);
        let left = at(row, column.saturating_sub(1));
        let right = at(row, (column + 1).min(self.width - 1));
        up + down + left + right - 4.0 * at(row, column)
    }
}

/// The pixels between two fractions of a side, at least one.
fn pixels(low: f64, high: f64, length: usize) -> std::ops::Range<usize> {
    let start = ((low * length as f64).round() as usize).min(length - 1);
    let end = ((high * length as f64).round() as usize).clamp(start + 1, length);
    start..end
}

/// Mean and standard deviation (over n); zeros for no values.
pub(crate) fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let (count, sum) = values
        .clone()
        .fold((0_u32, 0.0), |(count, sum), value| (count + 1, sum + value));
    if count == 0 {
        return (0.0, 0.0);
    }
    let mean = sum / f64::from(count);
    let squares: f64 = values.map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / f64::from(count)).sqrt())
}
