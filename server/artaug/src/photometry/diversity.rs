//! How unlike each other the images of a set are.

use crate::image::Image;

/// Sides of the thumbnails that are compared.
const SIDE: u32 = 8;

/// Thumbnails of the images of a set: what is left of each once it was looked at.
#[derive(Debug, Clone, Default)]
pub struct Thumbnails(Vec<Vec<f64>>);

impl Thumbnails {
    /// Adds an image.
    pub fn add(&mut self, image: &Image) {
        let cells = image.thumbnail(SIDE);
        self.0.push(cells.into_iter().flatten().collect());
    }

    /// The mean over all pairs of the root mean square difference of 8 x 8 thumbnails (channels in 0..1): 0 for equal images, about
    /// 0.4 for random colours. None below two images.
    ///
    /// It sees layout and colour, not meaning; it is here to notice a model that begins to draw the same picture for every prompt.
    pub fn diversity(&self) -> Option<f64> {
        let (mut sum, mut pairs) = (0.0, 0_u64);
        for (index, first) in self.0.iter().enumerate() {
            for second in &self.0[..index] {
                let squares: f64 = first.iter().zip(second).map(|(a, b)| (a - b).powi(2)).sum();
                sum += (squares / first.len() as f64).sqrt();
                pairs += 1;
            }
        }
        (pairs > 0).then(|| sum / pairs as f64)
    }
}
