//! Between images and what a model works on.

use tch::Tensor;

use crate::{
    diffusion::{denoiser::LatentCodec, vae::Vae},
    error::LearningError,
};

/// The autoencoder as the denoiser's codec: latents are shifted and scaled.
impl LatentCodec for Vae {
    fn factor(&self) -> i64 {
        self.config().factor()
    }

    fn channels(&self) -> i64 {
        self.config().latent_channels
    }

    fn encode(&self, images: &Tensor) -> Result<Tensor, LearningError> {
        let config = self.config();
        Ok(Vae::encode(self, images)?
            .mean
            .f_sub_scalar(config.shift_factor)?
            .f_mul_scalar(config.scaling_factor)?)
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor, LearningError> {
        let config = self.config();
        let plain = latents
            .f_div_scalar(config.scaling_factor)?
            .f_add_scalar(config.shift_factor)?;
        Vae::decode(self, &plain)
    }
}

/// Pixels are the latents.
#[derive(Debug, Clone, Copy)]
pub struct Pixels;

impl LatentCodec for Pixels {
    fn factor(&self) -> i64 {
        1
    }

    fn channels(&self) -> i64 {
        3
    }

    fn encode(&self, images: &Tensor) -> Result<Tensor, LearningError> {
        Ok(images.shallow_clone())
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor, LearningError> {
        Ok(latents.shallow_clone())
    }
}

/// The most pixels a side that a patch may have.
const LARGEST_PATCH: i64 = 4;

/// Square patches of pixels as channels (`torch.pixel_unshuffle`): nothing is lost, and a UNet works on a smaller picture. Channel
/// `(colour * factor + row) * factor + column` of a patch holds the colour of its pixel at that row and column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patches {
    factor: i64,
}

impl Patches {
    /// Patches of `factor` pixels a side.
    ///
    /// # Errors
    /// If that is less than 2 or more than 4.
    pub fn new(factor: i64) -> Result<Self, String> {
        if (2..=LARGEST_PATCH).contains(&factor) {
            Ok(Self { factor })
        } else {
            Err(format!("{factor} is not in 2..={LARGEST_PATCH}"))
        }
    }
}

impl LatentCodec for Patches {
    fn factor(&self) -> i64 {
        self.factor
    }

    fn channels(&self) -> i64 {
        3 * self.factor * self.factor
    }

    fn encode(&self, images: &Tensor) -> Result<Tensor, LearningError> {
        Ok(images.f_pixel_unshuffle(self.factor)?)
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor, LearningError> {
        Ok(latents.f_pixel_shuffle(self.factor)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::testing;

    #[test]
    fn patches_lose_nothing_and_follow_their_definition() {
        let (n, height, width, factor) = (2, 6, 4, 2);
        let images = testing::values(
            "images",
            &[n as usize, 3, height as usize, width as usize],
            1.0,
            tch::Kind::Float,
        );
        let patches = Patches::new(factor).unwrap();
        let latents = patches.encode(&images).unwrap();
        assert_eq!(latents.size(), [n, 12, height / 2, width / 2]);
        // "n c (h p) (w q) -> n (c p q) h w"
        let defined = images
            .view([n, 3, height / factor, factor, width / factor, factor])
            .permute([0, 1, 3, 5, 2, 4])
            .reshape(latents.size());
        assert!(testing::same(&latents, &defined));
        for (colour, row, column) in [(0, 0, 0), (1, 0, 1), (2, 1, 0)] {
            let channel = (colour * factor + row) * factor + column;
            let pixel = images.double_value(&[1, colour, 2 + row, 2 + column]);
            let value = latents.double_value(&[1, channel, 1, 1]);
            assert!((pixel - value).abs() <= 0.0);
        }
        assert!(testing::same(&patches.decode(&latents).unwrap(), &images));
        assert!(patches.encode(&images.narrow(2, 0, 5)).is_err());
        assert!(Patches::new(1).is_err() && Patches::new(5).is_err());
    }
}
