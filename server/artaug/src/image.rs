//! RGB images with bounded sides, and their content address.

mod png_file;
#[cfg(test)]
mod tests;

use concord_common::Digest;

pub use self::png_file::MAX_PNG_BYTES;

/// Longest side in pixels: twice that of the largest models this engine runs.
pub const MAX_SIDE: u32 = 2048;

/// An image of 8-bit sRGB pixels, row by row from the top left. Both sides are from 1 to [`MAX_SIDE`].
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

/// Why something is no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// A side is 0 or too long.
    #[error("an image has sides of 1 to {MAX_SIDE} pixels, this one has {width} x {height}")]
    Sides {
        /// Pixels from left to right.
        width: u32,
        /// Pixels from top to bottom.
        height: u32,
    },
    /// The pixels do not fill the sides.
    #[error("an RGB image of {width} x {height} pixels has {expected} bytes, these are {found}")]
    Length {
        /// Pixels from left to right.
        width: u32,
        /// Pixels from top to bottom.
        height: u32,
        /// 3 x width x height.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// The file has too many bytes to be looked at.
    #[error("a PNG file has at most {MAX_PNG_BYTES} bytes, this one has {0}")]
    FileSize(usize),
    /// The file cannot be read as PNG, or the image cannot be written as one.
    #[error("not a usable PNG file: {0}")]
    Png(String),
}

impl Image {
    /// An image of `pixels`: three bytes (red, green, blue) a pixel.
    ///
    /// # Errors
    /// If a side is out of bounds or the number of bytes does not fit.
    pub fn new(width: u32, height: u32, pixels: Vec<u8>) -> Result<Self, ImageError> {
        let expected = bytes_of(width, height)?;
        if pixels.len() != expected {
            return Err(ImageError::Length {
                width,
                height,
                expected,
                found: pixels.len(),
            });
        }
        Ok(Self {
            width,
            height,
            pixels,
        })
    }

    /// An image of one colour.
    ///
    /// # Errors
    /// If a side is out of bounds.
    pub fn filled(width: u32, height: u32, colour: [u8; 3]) -> Result<Self, ImageError> {
        let pixels = colour.repeat(bytes_of(width, height)? / 3);
        Ok(Self {
            width,
            height,
            pixels,
        })
    }

    /// Pixels from left to right.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Pixels from top to bottom.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Red, green and blue of every pixel, row by row.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The colour of one pixel.
    ///
    /// # Panics
    /// If the place is outside the image.
    pub fn at(&self, x: u32, y: u32) -> [u8; 3] {
        let start = self.offset(x, y);
        [
            self.pixels[start],
            self.pixels[start + 1],
            self.pixels[start + 2],
        ]
    }

    /// The same image with one pixel replaced, for drawing.
    ///
    /// # Panics
    /// If the place is outside the image.
    pub fn put(&mut self, x: u32, y: u32, colour: [u8; 3]) {
        let start = self.offset(x, y);
        self.pixels[start..start + 3].copy_from_slice(&colour);
    }

    /// The content address: BLAKE3 over sides and pixels, so the same picture has one name however its file was packed.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new_derive_key("concord.v1 artaug rgb image");
        hasher.update(&self.width.to_le_bytes());
        hasher.update(&self.height.to_le_bytes());
        hasher.update(&self.pixels);
        hasher.finalize().into()
    }

    /// The image averaged down to `side` x `side` cells, as red, green and blue in 0..1; cells of an image that is smaller
    /// repeat its pixels.
    pub fn thumbnail(&self, side: u32) -> Vec<[f64; 3]> {
        let side = side.clamp(1, MAX_SIDE);
        let span = |index: u32, pixels: u32| {
            let start = index * pixels / side;
            let end = ((index + 1) * pixels / side).max(start + 1).min(pixels);
            start.min(pixels - 1)..end
        };
        let mut cells = Vec::with_capacity((side * side) as usize);
        for row in 0..side {
            for column in 0..side {
                let (xs, ys) = (span(column, self.width), span(row, self.height));
                let count = f64::from(xs.end - xs.start) * f64::from(ys.end - ys.start) * 255.0;
                let mut sum = [0.0; 3];
                for y in ys {
                    for x in xs.clone() {
                        for (total, value) in sum.iter_mut().zip(self.at(x, y)) {
                            *total += f64::from(value);
                        }
                    }
                }
                cells.push(sum.map(|total| total / count));
            }
        }
        cells
    }

    /// The image shrunk by a whole factor until no side is longer than `longest`, each pixel the mean of those it stands for; an image that is
    /// small enough stays as it is.
    #[must_use]
    pub fn shrunk(self, longest: u32) -> Self {
        let factor = self.width.max(self.height).div_ceil(longest.max(1));
        if factor <= 1 {
            return self;
        }
        let (width, height) = (self.width.div_ceil(factor), self.height.div_ceil(factor));
        let mut pixels = Vec::with_capacity(width as usize * height as usize * 3);
        for row in 0..height {
            for column in 0..width {
                let mut sum = [0_u32; 3];
                let mut count = 0;
                for y in row * factor..((row + 1) * factor).min(self.height) {
                    for x in column * factor..((column + 1) * factor).min(self.width) {
                        for (total, value) in sum.iter_mut().zip(self.at(x, y)) {
                            *total += u32::from(value);
                        }
                        count += 1;
                    }
                }
                // A mean of bytes is one.
                pixels.extend(sum.map(|total| ((total + count / 2) / count) as u8));
            }
        }
        Self {
            width,
            height,
            pixels,
        }
    }

    fn offset(&self, x: u32, y: u32) -> usize {
        assert!(x < self.width && y < self.height, "pixel outside the image");
        (y as usize * self.width as usize + x as usize) * 3
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Image({} x {}, {})",
            self.width,
            self.height,
            self.digest().short()
        )
    }
}

fn bytes_of(width: u32, height: u32) -> Result<usize, ImageError> {
    if (1..=MAX_SIDE).contains(&width) && (1..=MAX_SIDE).contains(&height) {
        Ok(width as usize * height as usize * 3)
    } else {
        Err(ImageError::Sides { width, height })
    }
}
