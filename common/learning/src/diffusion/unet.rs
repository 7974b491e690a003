//! UNet2DConditionModel of Stable Diffusion 1.x and 2.x (Ronneberger et al. 2015; Ho et al. 2020; Rombach et al. 2021, arXiv 2112.10752).
//!
//! A way down through levels of halved resolution, a middle, and a way up that reads, beside what comes from below, everything that the way
//! down left behind. Names are those of `unet/diffusion_pytorch_model.safetensors`.

mod checkpoint;
mod config;

use std::{collections::BTreeMap, path::Path};

use tch::{Kind, Tensor};

pub use self::{
    checkpoint::pull_through,
    config::{Level, UNetConfig},
};
use super::{
    attention::{Transformer, TransformerSizes},
    files,
    layers::{Conv, GroupNorm},
    linear::{Linear, Shape, Sites, sites},
    params::{Compute, Params},
    resnet::{Downsample, Resnet, ResnetSizes, Upsample},
};
use crate::{error::LearningError, weights::WeightsFile};

/// The longest period of the time's sinusoids.
const LONGEST_PERIOD: f64 = 10_000.0;

/// A residual block and the transformer behind it.
#[derive(Debug)]
struct Cell {
    resnet: Resnet,
    transformer: Option<Transformer>,
}
sites!(Cell {
    resnet,
    transformer
});

impl Cell {
    fn run(&self, x: &Tensor, state: &State) -> Result<Tensor, LearningError> {
        let x = self.resnet.run(x, Some(&state.time))?;
        match &self.transformer {
            Some(transformer) => transformer.run(&x, &state.context),
            None => Ok(x),
        }
    }
}

#[derive(Debug)]
struct Down {
    cells: Vec<Cell>,
    downsample: Option<Downsample>,
}
sites!(Down { cells });

#[derive(Debug)]
struct Up {
    cells: Vec<Cell>,
    upsample: Option<Upsample>,
}
sites!(Up { cells });

#[derive(Debug)]
struct Middle {
    first: Resnet,
    transformer: Transformer,
    second: Resnet,
}
sites!(Middle {
    first,
    transformer,
    second
});

/// What every block reads beside the features.
#[derive(Debug)]
pub struct State {
    /// SiLU of the time's embedding, `[n, time]`.
    time: Tensor,
    /// The text, `[n, t, d]`.
    context: Tensor,
}

/// The network.
#[derive(Debug)]
pub struct UNet {
    config: UNetConfig,
    compute: Compute,
    tensors: BTreeMap<String, Tensor>,
    conv_in: Conv,
    time: [Linear; 2],
    down: Vec<Down>,
    middle: Middle,
    up: Vec<Up>,
    norm_out: GroupNorm,
    conv_out: Conv,
}

impl Sites for UNet {
    fn linears_mut<'a>(&'a mut self, found: &mut Vec<&'a mut Linear>) {
        found.extend(&mut self.time);
        self.down.linears_mut(found);
        self.middle.linears_mut(found);
        self.up.linears_mut(found);
    }

    fn linears<'a>(&'a self, found: &mut Vec<&'a Linear>) {
        found.extend(&self.time);
        self.down.linears(found);
        self.middle.linears(found);
        self.up.linears(found);
    }
}

impl UNet {
    /// Loads the folder `unet` of a model: `config.json` and `diffusion_pytorch_model.safetensors`.
    ///
    /// # Errors
    /// [`LearningError::Io`], [`LearningError::Config`], [`LearningError::Weights`] that names every missing and unexpected tensor.
    pub fn load(folder: &Path, compute: Compute) -> Result<Self, LearningError> {
        let config = UNetConfig::read(&folder.join("config.json"))?;
        let file = files::weights(folder, "diffusion_pytorch_model")?;
        Self::build(
            config,
            Params::open(&file, |stored| Some(stored.to_owned()), compute)?,
        )
    }

    /// The file of a folder's weights, whose names are the layout's own.
    ///
    /// # Errors
    /// As [`UNet::load`].
    pub fn stored(folder: &Path) -> Result<WeightsFile, LearningError> {
        WeightsFile::open(&files::weights(folder, "diffusion_pytorch_model")?)
    }

    /// Makes one from parameters.
    ///
    /// # Errors
    /// [`LearningError::Config`] if the configuration's numbers do not go together, and those of [`Params::finish`].
    pub fn build(config: UNetConfig, mut params: Params) -> Result<Self, LearningError> {
        let p = &mut params;
        let levels = &config.levels;
        let last = levels.len() - 1;
        let sizes = ResnetSizes {
            time: Some(config.time),
            groups: config.groups,
            eps: config.eps,
        };
        let conv_in = Conv::take(p, "conv_in", (config.in_channels, levels[0].channels), 3)?;
        let time = [
            ("time_embedding.linear_1", levels[0].channels),
            ("time_embedding.linear_2", config.time),
        ]
        .map(|(name, inputs)| Linear::take(p, name, (inputs, config.time), true, Shape::Matrix));
        let [time_1, time_2] = time;
        let time = [time_1?, time_2?];

        let mut down = Vec::new();
        for (index, level) in levels.iter().enumerate() {
            let above = levels[index.saturating_sub(1)].channels;
            let name = format!("down_blocks.{index}");
            let cells = (0..level.resnets)
                .map(|place| {
                    let inputs = if place == 0 { above } else { level.channels };
                    config.cell(p, &name, place, inputs, level, sizes, level.attends_down)
                })
                .collect::<Result<_, _>>()?;
            let downsample = (index < last)
                .then(|| {
                    Downsample::take(p, &format!("{name}.downsamplers.0"), level.channels, false)
                })
                .transpose()?;
            down.push(Down { cells, downsample });
        }

        let bottom = &levels[last];
        let width = (bottom.channels, bottom.channels);
        let middle = Middle {
            first: Resnet::take(p, "mid_block.resnets.0", width, sizes)?,
            transformer: Transformer::take(
                p,
                "mid_block.attentions.0",
                config.transformer(bottom),
            )?,
            second: Resnet::take(p, "mid_block.resnets.1", width, sizes)?,
        };

        let mut up = Vec::new();
        for (index, level) in levels.iter().rev().enumerate() {
            let below = levels[(last - index + 1).min(last)].channels;
            let above = levels[(last - index).saturating_sub(1)].channels;
            let name = format!("up_blocks.{index}");
            let cells = (0..=level.resnets)
                .map(|place| {
                    let from_below = if place == 0 { below } else { level.channels };
                    // The last skip connection of a level is what entered it.
                    let skip = if place == level.resnets {
                        above
                    } else {
                        level.channels
                    };
                    let inputs = from_below + skip;
                    config.cell(p, &name, place, inputs, level, sizes, level.attends_up)
                })
                .collect::<Result<_, _>>()?;
            let upsample = (index < last)
                .then(|| Upsample::take(p, &format!("{name}.upsamplers.0"), level.channels))
                .transpose()?;
            up.push(Up { cells, upsample });
        }

        let norm_out = GroupNorm::take(
            p,
            "conv_norm_out",
            levels[0].channels,
            config.groups,
            config.eps,
        )?;
        let conv_out = Conv::take(p, "conv_out", (levels[0].channels, config.out_channels), 3)?;
        let compute = params.compute();
        Ok(Self {
            tensors: params.finish()?,
            config,
            compute,
            conv_in,
            time,
            down,
            middle,
            up,
            norm_out,
            conv_out,
        })
    }

    /// Sizes.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// Where and in what it computes.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// All weights by name; they share memory with the network's.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// The model's output for noisy samples `[n, in, h, w]` at times `[n]`, each sample at its own, given texts `[n, t, d]`.
    ///
    /// # Errors
    /// [`LearningError::Data`] if the batches differ, [`LearningError::Torch`] if shapes do not fit.
    pub fn run(
        &self,
        sample: &Tensor,
        times: &Tensor,
        context: &Tensor,
    ) -> Result<Tensor, LearningError> {
        let state = self.state(sample, times, context)?;
        let mut x = self.conv_in.run(sample)?;
        let mut skips = vec![x.shallow_clone()];
        for level in 0..self.down.len() {
            x = self.run_down(level, x, &state, &mut skips)?;
        }
        x = self.run_middle(&x, &state)?;
        for level in 0..self.up.len() {
            let wanted = self.skips_of(level);
            let own = skips.split_off(skips.len() - wanted);
            let size = skips.last().map(Tensor::size4).transpose()?;
            x = self.run_up(level, x, &state, own, size.map(|(_, _, h, w)| (h, w)))?;
        }
        self.run_out(&x)
    }

    /// What the blocks read beside the features.
    ///
    /// # Errors
    /// As [`UNet::run`].
    pub fn state(
        &self,
        sample: &Tensor,
        times: &Tensor,
        context: &Tensor,
    ) -> Result<State, LearningError> {
        let n = sample.size4()?.0;
        let (texts, _, width) = context.size3()?;
        if times.size() != [n] || texts != n || width != self.config.context {
            return Err(LearningError::Data(format!(
                "{n} samples need {n} times and {n} texts of {} values a token; these are {:?} and {:?}",
                self.config.context,
                times.size(),
                context.size()
            )));
        }
        let waves = sinusoids(
            times,
            self.config.levels[0].channels,
            self.config.cosine_first,
            self.config.freq_shift,
        )?
        .f_to_kind(self.compute.kind)?;
        let embedded = self.time[1].run(&self.time[0].run(&waves)?.f_silu()?)?;
        Ok(State {
            // Every residual block reads SiLU of it.
            time: embedded.f_silu()?,
            context: context.shallow_clone(),
        })
    }

    /// One level downwards; what it leaves for the way up goes to the end of `skips`.
    fn run_down(
        &self,
        level: usize,
        mut x: Tensor,
        state: &State,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor, LearningError> {
        let block = &self.down[level];
        for cell in &block.cells {
            x = cell.run(&x, state)?;
            skips.push(x.shallow_clone());
        }
        if let Some(downsample) = &block.downsample {
            x = downsample.run(&x)?;
            skips.push(x.shallow_clone());
        }
        Ok(x)
    }

    fn run_middle(&self, x: &Tensor, state: &State) -> Result<Tensor, LearningError> {
        let x = self.middle.first.run(x, Some(&state.time))?;
        let x = self.middle.transformer.run(&x, &state.context)?;
        self.middle.second.run(&x, Some(&state.time))
    }

    /// How many skip connections a level reads on the way up.
    fn skips_of(&self, level: usize) -> usize {
        self.up[level].cells.len()
    }

    /// One level upwards, with its own skip connections, and the size (height, width) that the next level's have.
    fn run_up(
        &self,
        level: usize,
        mut x: Tensor,
        state: &State,
        mut skips: Vec<Tensor>,
        size: Option<(i64, i64)>,
    ) -> Result<Tensor, LearningError> {
        let block = &self.up[level];
        for cell in &block.cells {
            let skip = skips.pop().ok_or_else(|| {
                LearningError::Data("the way up has run out of skip connections".to_owned())
            })?;
            x = cell.run(&Tensor::f_cat(&[&x, &skip], 1)?, state)?;
        }
        match &block.upsample {
            Some(upsample) => upsample.run(&x, size),
            None => Ok(x),
        }
    }

    fn run_out(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        self.conv_out.run(&self.norm_out.run(x)?.f_silu()?)
    }
}

impl UNetConfig {
    fn transformer(&self, level: &Level) -> TransformerSizes {
        TransformerSizes {
            width: level.channels,
            context: self.context,
            heads: level.heads,
            depth: level.depth,
            groups: self.groups,
            projections: if self.linear_projections {
                Shape::Matrix
            } else {
                Shape::Pixel
            },
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "called in two places, side by side, with what differs between the way down and the way up"
    )]
    fn cell(
        &self,
        params: &mut Params,
        block: &str,
        place: usize,
        inputs: i64,
        level: &Level,
        sizes: ResnetSizes,
        attends: bool,
    ) -> Result<Cell, LearningError> {
        Ok(Cell {
            resnet: Resnet::take(
                params,
                &format!("{block}.resnets.{place}"),
                (inputs, level.channels),
                sizes,
            )?,
            transformer: attends
                .then(|| {
                    Transformer::take(
                        params,
                        &format!("{block}.attentions.{place}"),
                        self.transformer(level),
                    )
                })
                .transpose()?,
        })
    }
}

/// Sines and cosines of times `[n]` at falling frequencies, `[n, channels]`, in f32 whatever the model computes in (as the published models
/// were trained).
fn sinusoids(
    times: &Tensor,
    channels: i64,
    cosine_first: bool,
    shift: i64,
) -> Result<Tensor, LearningError> {
    let half = channels / 2;
    let exponents = Tensor::f_arange(half, (Kind::Float, times.device()))?
        .f_mul_scalar(-LONGEST_PERIOD.ln())?
        .f_div_scalar((half - shift) as f64)?;
    let angles = times
        .f_to_kind(Kind::Float)?
        .f_unsqueeze(1)?
        .f_mul(&exponents.f_exp()?.f_unsqueeze(0)?)?;
    let (sines, cosines) = (angles.f_sin()?, angles.f_cos()?);
    let parts = if cosine_first {
        [cosines, sines]
    } else {
        [sines, cosines]
    };
    Ok(Tensor::f_cat(&parts, 1)?)
}

#[cfg(test)]
mod tests;
