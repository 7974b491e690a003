//! Where the subject stands: what differs from the background's colour.

use serde::{Deserialize, Serialize};

use crate::image::Image;

/// A pixel within this distance of the background's colour (of 255 a channel, root of the sum of squares) belongs to it.
const BACKGROUND_RADIUS: f64 = 24.0;

/// The place and size of what stands out from the background.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Subject {
    /// Mean place from left (0) to right (1).
    pub x: f64,
    /// Mean place from top (0) to bottom (1).
    pub y: f64,
    /// Part of the pixels that differ from the background.
    pub share: f64,
}

impl Subject {
    /// 1 in the middle, 0 or less at the edges.
    pub fn placement(self) -> f64 {
        1.0 - 2.0 * (self.x - 0.5).hypot(self.y - 0.5)
    }
}

/// Finds the subject of an image; none if every pixel is of the background's colour.
pub(super) fn find(image: &Image) -> Option<Subject> {
    let background = border_median(image);
    let (mut weight, mut x_sum, mut y_sum, mut count) = (0.0, 0.0, 0.0, 0_u64);
    for y in 0..image.height() {
        for x in 0..image.width() {
            let squares: f64 = image
                .at(x, y)
                .iter()
                .zip(background)
                .map(|(value, back)| (f64::from(*value) - back).powi(2))
                .sum();
            let distance = squares.sqrt() - BACKGROUND_RADIUS;
            if distance > 0.0 {
                weight += distance;
                x_sum += distance * (f64::from(x) + 0.5);
                y_sum += distance * (f64::from(y) + 0.5);
                count += 1;
            }
        }
    }
    let pixels = f64::from(image.width()) * f64::from(image.height());
    (count > 0).then(|| Subject {
        x: x_sum / weight / f64::from(image.width()),
        y: y_sum / weight / f64::from(image.height()),
        share: count as f64 / pixels,
    })
}

/// The median of the outermost pixels, channel by channel.
fn border_median(image: &Image) -> [f64; 3] {
    let (width, height) = (image.width(), image.height());
    let mut channels: [Vec<u8>; 3] = Default::default();
    let rows = (0..width).flat_map(|x| [(x, 0), (x, height - 1)]);
    let columns = (0..height).flat_map(|y| [(0, y), (width - 1, y)]);
    for (x, y) in rows.chain(columns) {
        for (channel, value) in channels.iter_mut().zip(image.at(x, y)) {
            channel.push(value);
        }
    }
    channels.map(|mut values| {
        values.sort_unstable();
        f64::from(values[values.len() / 2])
    })
}
