//! PNG files. Sizes are checked in the header before any pixel is unpacked.

use std::io::Cursor;

use png::{BitDepth, ColorType, Decoder, Encoder, Limits, Transformations};

use super::{Image, ImageError, MAX_SIDE};

/// Largest PNG file that is looked at.
pub const MAX_PNG_BYTES: usize = 32 << 20;
/// What the decoder may allocate beside the pixels.
const DECODER_BYTES: usize = 64 << 20;

impl Image {
    /// Reads a PNG file of any colour type; transparent pixels are laid on white. Only the first picture of an animation counts.
    ///
    /// # Errors
    /// If the file is too large, is no PNG, is cut short, or its sides are out of bounds.
    pub fn from_png(bytes: &[u8]) -> Result<Self, ImageError> {
        if bytes.len() > MAX_PNG_BYTES {
            return Err(ImageError::FileSize(bytes.len()));
        }
        let failed = |error: png::DecodingError| ImageError::Png(error.to_string());
        let limits = Limits {
            bytes: DECODER_BYTES,
        };
        let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), limits);
        // Texts and colour profiles are compressed data that nobody needs here.
        decoder.set_ignore_text_chunk(true);
        decoder.set_ignore_iccp_chunk(true);
        decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
        let header = decoder.read_header_info().map_err(failed)?;
        let (width, height) = (header.width, header.height);
        if width == 0 || width > MAX_SIDE || height == 0 || height > MAX_SIDE {
            return Err(ImageError::Sides { width, height });
        }
        let mut reader = decoder.read_info().map_err(failed)?;
        let (colour, depth) = reader.output_color_type();
        if depth != BitDepth::Eight {
            return Err(ImageError::Png(format!(
                "its pixels have a depth of {depth:?}"
            )));
        }
        let channels = match colour {
            ColorType::Grayscale => 1,
            ColorType::GrayscaleAlpha => 2,
            ColorType::Rgb => 3,
            ColorType::Rgba => 4,
            ColorType::Indexed => {
                return Err(ImageError::Png("its palette is missing".to_owned()));
            }
        };
        let count = width as usize * height as usize;
        let size = reader
            .output_buffer_size()
            .filter(|size| *size == count * channels)
            .ok_or_else(|| ImageError::Png("its rows do not fit its header".to_owned()))?;
        let mut unpacked = vec![0; size];
        let frame = reader.next_frame(&mut unpacked).map_err(failed)?;
        // The first picture of an animation may be smaller than the canvas.
        if (frame.width, frame.height) != (width, height) {
            return Err(ImageError::Png(
                "its first picture does not fill it".to_owned(),
            ));
        }
        Self::new(width, height, to_rgb(&unpacked, channels))
    }

    /// The image as an RGB PNG file. The same image gives the same bytes.
    ///
    /// # Errors
    /// If the encoder refuses, which an image within its bounds does not bring about.
    pub fn to_png(&self) -> Result<Vec<u8>, ImageError> {
        let failed = |error: png::EncodingError| ImageError::Png(error.to_string());
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(ColorType::Rgb);
        encoder.set_depth(BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&self.pixels).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }
}

fn to_rgb(unpacked: &[u8], channels: usize) -> Vec<u8> {
    let over_white = |value: u8, alpha: u8| {
        let (value, alpha) = (u32::from(value), u32::from(alpha));
        ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    unpacked
        .chunks_exact(channels)
        .flat_map(|pixel| match *pixel {
            [grey] => [grey; 3],
            [grey, alpha] => [over_white(grey, alpha); 3],
            [red, green, blue] => [red, green, blue],
            [red, green, blue, alpha] => [red, green, blue].map(|value| over_white(value, alpha)),
            _ => unreachable!("a PNG pixel has one to four channels"),
        })
        .collect()
}
