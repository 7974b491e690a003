//! Renders images badly, in whole or by region, so that captions can truthfully say so.
//!
//! Exposure is changed in linear light (sRGB's transfer function, IEC 61966-2-1) by stops; contrast around the region's mean
//! luma; colour by scaling the distance of each channel from the luma; sharpness by a Gaussian blur.

use crate::{
    image::Image,
    region::Area,
    words::{Dimension, Level, Statement},
};

/// Makes a statement true of an image. `amount` in 0..1 says how strongly; good looks and placement change nothing here
/// (placement is drawn that way).
pub fn apply(image: &mut Image, statement: Statement, amount: f64) {
    let between = |low: f64, high: f64| low + (high - low) * amount.clamp(0.0, 1.0);
    let area = statement.place.area();
    match (statement.dimension, statement.level) {
        (Dimension::Exposure, Level::Low) => expose(image, area, -between(1.2, 2.4)),
        (Dimension::Exposure, Level::High) => expose(image, area, between(0.9, 1.7)),
        (Dimension::Contrast, Level::Low) => stretch(image, area, between(0.45, 0.2)),
        (Dimension::Contrast, Level::High) => stretch(image, area, between(1.6, 2.4)),
        (Dimension::Colour, Level::Low) => saturate(image, area, between(0.4, 0.1)),
        (Dimension::Colour, Level::High) => saturate(image, area, between(1.4, 2.0)),
        (Dimension::Sharpness, Level::Low) => {
            let side = f64::from(image.width().min(image.height()));
            blur(image, area, side * between(0.02, 0.05));
        }
        (Dimension::Placement, _) | (_, Level::Good) | (Dimension::Sharpness, Level::High) => {}
    }
}

fn expose(image: &mut Image, area: Area, stops: f64) {
    let gain = stops.exp2();
    change(image, area, |pixel| {
        pixel.map(|value| encode(decode(value) * gain))
    });
}

fn stretch(image: &mut Image, area: Area, factor: f64) {
    let places = places(image, area);
    let sum: f64 = places
        .iter()
        .map(|(x, y)| luma(unit(image.at(*x, *y))))
        .sum();
    let mean = sum / places.len() as f64;
    change(image, area, |pixel| {
        pixel.map(|value| mean + (value - mean) * factor)
    });
}

fn saturate(image: &mut Image, area: Area, factor: f64) {
    change(image, area, |pixel| {
        let grey = luma(pixel);
        pixel.map(|value| grey + (value - grey) * factor)
    });
}

/// Each pixel of the area becomes the weighted mean of its neighbours in the whole image.
fn blur(image: &mut Image, area: Area, sigma: f64) {
    let radius = (3.0 * sigma).ceil() as i64;
    let taps: Vec<f64> = (-radius..=radius)
        .map(|tap| (-0.5 * (tap as f64 / sigma).powi(2)).exp())
        .collect();
    let total: f64 = taps.iter().sum();
    let (width, height) = (i64::from(image.width()), i64::from(image.height()));
    // Twice in one direction: along the rows, then along the columns of the result.
    for (along_x, along_y) in [(1, 0), (0, 1)] {
        let source = image.clone();
        for (x, y) in places(image, area) {
            let mut sum = [0.0; 3];
            for (tap, weight) in (-radius..=radius).zip(&taps) {
                let column = (i64::from(x) + tap * along_x).clamp(0, width - 1) as u32;
                let row = (i64::from(y) + tap * along_y).clamp(0, height - 1) as u32;
                for (channel, value) in sum.iter_mut().zip(source.at(column, row)) {
                    *channel += weight * f64::from(value);
                }
            }
            image.put(x, y, sum.map(|value| (value / total).round() as u8));
        }
    }
}

fn change(image: &mut Image, area: Area, new: impl Fn([f64; 3]) -> [f64; 3]) {
    for (x, y) in places(image, area) {
        let changed = new(unit(image.at(x, y)));
        image.put(
            x,
            y,
            changed.map(|value| (value.clamp(0.0, 1.0) * 255.0).round() as u8),
        );
    }
}

fn places(image: &Image, area: Area) -> Vec<(u32, u32)> {
    let [left, top, right, bottom] = area.edges();
    let span = |low: f64, high: f64, length: u32| {
        let start = ((low * f64::from(length)).round() as u32).min(length - 1);
        start..((high * f64::from(length)).round() as u32).clamp(start + 1, length)
    };
    let columns = span(left, right, image.width());
    span(top, bottom, image.height())
        .flat_map(|y| columns.clone().map(move |x| (x, y)))
        .collect()
}

fn unit(pixel: [u8; 3]) -> [f64; 3] {
    pixel.map(|value| f64::from(value) / 255.0)
}

fn luma([red, green, blue]: [f64; 3]) -> f64 {
    0.2126 * red + 0.7152 * green + 0.0722 * blue
}

fn decode(value: f64) -> f64 {
    if value <= 0.04045 {
        value / 12.92
    } else {
        ((value + 0.055) / 1.055).powf(2.4)
    }
}

fn encode(value: f64) -> f64 {
    let value = value.clamp(0.0, 1.0);
    if value <= 0.003_130_8 {
        value * 12.92
    } else {
        1.055 * value.powf(1.0 / 2.4) - 0.055
    }
}
