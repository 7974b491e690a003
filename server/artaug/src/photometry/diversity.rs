//! How unlike each other the images of a set are.

use crate::image::Image;

/// Sides of the thumbnails that are compared.
const SIDE: u32 = 8;

/// The mean over all pairs of the root mean square difference of 8 x 8 thumbnails (channels in 0..1): 0 for equal images, about
/// 0.4 for random colours. None below two images.
///
/// It sees layout and colour, not meaning; it is here to notice a model that begins to draw the same picture for every prompt.
pub fn diversity<'a>(images: impl IntoIterator<Item = &'a Image>) -> Option<f64> {
    let thumbnails: Vec<Vec<f64>> = images
        .into_iter()
        .map(|image| image.thumbnail(SIDE).into_iter().flatten().collect())
        .collect();
    let (mut sum, mut pairs) = (0.0, 0_u64);
    for (index, first) in thumbnails.iter().enumerate() {
        for second in &thumbnails[..index] {
            let squares: f64 = first.iter().zip(second).map(|(a, b)| (a - b).powi(2)).sum();
            sum += (squares / first.len() as f64).sqrt();
            pairs += 1;
        }
    }
    (pairs > 0).then(|| sum / pairs as f64)
}
