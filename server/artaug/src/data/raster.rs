//! Icons as pixels.

use resvg::{
    tiny_skia::{Pixmap, Transform},
    usvg::{ImageHrefResolver, Options, Tree},
};

use super::{DataError, Icon};
use crate::image::{Image, ImageError};

/// Part of an image's side that the icon fills.
const FILL: f64 = 0.8;

/// An icon's pixels with their opacity, square, made for images of one side.
#[derive(Debug, Clone, PartialEq)]
pub struct Raster {
    side: u32,
    /// Red, green, blue (each already multiplied by the opacity) and opacity.
    pixels: Vec<[u8; 4]>,
}

/// Draws an icon for images of `side` pixels, of which it fills four fifths.
///
/// # Errors
/// If its body is no SVG or the side is 0 or beyond that of images.
pub fn rasterise(icon: &Icon, side: u32) -> Result<Raster, DataError> {
    let refuse = |what: String| DataError::Icon {
        name: icon.name.clone(),
        set: icon.set.clone(),
        what,
    };
    let (width, height) = icon.view;
    let text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" xmlns:xlink=\"http://www.w3.org/1999/xlink\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\">{}</svg>",
        icon.body
    );
    let tree =
        Tree::from_str(&text, &without_files()).map_err(|error| refuse(error.to_string()))?;
    let drawn = ((f64::from(side) * FILL).round() as u32).clamp(1, crate::image::MAX_SIDE);
    let mut pixmap =
        Pixmap::new(drawn, drawn).ok_or_else(|| refuse(format!("no canvas of {drawn} pixels")))?;
    let scale = drawn as f32 / width.max(height) as f32;
    let middle = |length: f64| (drawn as f32 - length as f32 * scale) / 2.0;
    let place = Transform::from_row(scale, 0.0, 0.0, scale, middle(width), middle(height));
    resvg::render(&tree, place, &mut pixmap.as_mut());
    let pixels = pixmap
        .pixels()
        .iter()
        .map(|pixel| [pixel.red(), pixel.green(), pixel.blue(), pixel.alpha()])
        .collect();
    Ok(Raster {
        side: drawn,
        pixels,
    })
}

/// Options under which a drawing can name no file of this machine.
fn without_files() -> Options<'static> {
    Options {
        image_href_resolver: ImageHrefResolver {
            resolve_data: Box::new(|_, _, _| None),
            resolve_string: Box::new(|_, _| None),
        },
        ..Options::default()
    }
}

impl Raster {
    /// Pixels of a side.
    pub fn side(&self) -> u32 {
        self.side
    }

    /// The icon in the middle of an image of `side` pixels, shifted; what leaves the image is cut off.
    ///
    /// # Errors
    /// If the side is out of bounds.
    pub fn on_background(
        &self,
        side: u32,
        colour: [u8; 3],
        (right, down): (i32, i32),
    ) -> Result<Image, ImageError> {
        let mut image = Image::filled(side, side, colour)?;
        let margin = (i64::from(side) - i64::from(self.side)) / 2;
        for (index, [red, green, blue, opacity]) in self.pixels.iter().enumerate() {
            let (column, row) = (index as u32 % self.side, index as u32 / self.side);
            let x = i64::from(column) + margin + i64::from(right);
            let y = i64::from(row) + margin + i64::from(down);
            let inside = 0..i64::from(side);
            if inside.contains(&x) && inside.contains(&y) {
                let (x, y) = (x as u32, y as u32);
                let back = image.at(x, y);
                let over = |front: u8, back: u8| {
                    let hidden = u32::from(back) * (255 - u32::from(*opacity));
                    (u32::from(front) + (hidden + 127) / 255).min(255) as u8
                };
                image.put(
                    x,
                    y,
                    [
                        over(*red, back[0]),
                        over(*green, back[1]),
                        over(*blue, back[2]),
                    ],
                );
            }
        }
        Ok(image)
    }
}
