//! EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946, in the Lite form: no squeeze-and-excitation, ReLU6), an ImageNet classifier, for
//! inference.
//!
//! The weights are those of the package that `deploy/artaug/fetch.py` fetches. They were trained with TensorFlow: convolutions pad as "same" does
//! there (the odd pixel on the right and at the bottom), and pixels enter as (x - 127) / 128. Batch normalisation is folded into the convolutions when
//! they are loaded.

use std::{collections::HashMap, path::Path};

use concord_common::Digest;
use tch::{Kind, Tensor};

use super::{Picture, Rows};
use crate::{
    error::LearningError,
    weights::{Expected, Naming, WeightsFile},
};

/// Pixels of a side at which it was trained.
pub const SIDE: i64 = 224;
/// Values of the last layer before the classes.
pub const FEATURES: i64 = 1280;
/// Classes of ImageNet.
pub const CLASSES: i64 = 1000;
/// Cells of a side of the grids over which early layers are averaged.
pub const GRID: i64 = 2;

const STEM: i64 = 32;
const NORM_EPSILON: f64 = 1e-3;

/// Blocks of one width.
struct Stage {
    repeats: usize,
    kernel: i64,
    stride: i64,
    expansion: i64,
    inner: i64,
    outer: i64,
}

const fn stage(
    repeats: usize,
    kernel: i64,
    stride: i64,
    expansion: i64,
    inner: i64,
    outer: i64,
) -> Stage {
    Stage {
        repeats,
        kernel,
        stride,
        expansion,
        inner,
        outer,
    }
}

const STAGES: [Stage; 7] = [
    stage(1, 3, 1, 1, STEM, 16),
    stage(2, 3, 2, 6, 16, 24),
    stage(2, 5, 2, 6, 24, 40),
    stage(3, 3, 2, 6, 40, 80),
    stage(3, 5, 1, 6, 80, 112),
    stage(4, 5, 2, 6, 112, 192),
    stage(1, 3, 1, 6, 192, 320),
];
/// The block after which the second grid is taken, and its channels.
const GRID_BLOCK: (usize, i64) = (2, 24);

/// Values of the looks that [`EfficientNetLite0::see`] gives: two early layers, averaged over the cells of a grid.
pub const LOOKS: i64 = (STEM + GRID_BLOCK.1) * GRID * GRID;

/// A convolution with its batch normalisation folded in.
#[derive(Debug)]
struct Convolution {
    weight: Tensor,
    bias: Tensor,
    kernel: i64,
    stride: i64,
    groups: i64,
}

/// An inverted residual: widen, mix each channel in space, narrow.
#[derive(Debug)]
struct Block {
    expand: Option<Convolution>,
    depthwise: Convolution,
    project: Convolution,
    residual: bool,
}

/// The network.
#[derive(Debug)]
pub struct EfficientNetLite0 {
    stem: Convolution,
    blocks: Vec<Block>,
    head: Convolution,
    class_weight: Tensor,
    class_bias: Tensor,
    digest: Digest,
}

/// What one pass gives, both `[n, ...]`.
struct Seen {
    features: Tensor,
    looks: Tensor,
}

impl EfficientNetLite0 {
    /// Loads the weights.
    ///
    /// # Errors
    /// [`LearningError::Io`]; [`LearningError::Weights`] that names every tensor that is missing, unexpected or of a wrong shape.
    pub fn load(path: &Path) -> Result<Self, LearningError> {
        let file = WeightsFile::open(path)?;
        let _frozen = tch::no_grad_guard();
        let naming = Naming {
            prefix: "",
            ignored: &[],
        };
        let mut tensors = file.load_strict(naming, &expected(), Kind::Float)?;
        let mut blocks = Vec::new();
        for shape in shapes() {
            let name = format!("_blocks.{}", blocks.len());
            let mut part = |conv: &str, norm: &str, kernel: i64, stride: i64, groups: i64| {
                let (conv, norm) = (format!("{name}.{conv}"), format!("{name}.{norm}"));
                Convolution::take(&mut tensors, &conv, &norm, (kernel, stride, groups))
            };
            blocks.push(Block {
                expand: (shape.wide != shape.inner)
                    .then(|| part("_expand_conv", "_bn0", 1, 1, 1))
                    .transpose()?,
                depthwise: part(
                    "_depthwise_conv",
                    "_bn1",
                    shape.kernel,
                    shape.stride,
                    shape.wide,
                )?,
                project: part("_project_conv", "_bn2", 1, 1, 1)?,
                residual: shape.stride == 1 && shape.inner == shape.outer,
            });
        }
        Ok(Self {
            stem: Convolution::take(&mut tensors, "_conv_stem", "_bn0", (3, 2, 1))?,
            blocks,
            head: Convolution::take(&mut tensors, "_conv_head", "_bn1", (1, 1, 1))?,
            class_weight: taken(&mut tensors, "_fc.weight"),
            class_bias: taken(&mut tensors, "_fc.bias"),
            digest: *file.digest(),
        })
    }

    /// BLAKE3 of the weights file.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The last layer before the classes, [`FEATURES`] values an image, and two early layers over a grid, [`LOOKS`] values. Images are brought to
    /// `side` x `side` pixels first; [`SIDE`] is what the network was trained at, less is faster.
    ///
    /// # Errors
    /// [`LearningError::Data`] if there is no image, or one whose bytes do not fill its sides; [`LearningError::Config`] for a side below 32.
    pub fn see(&self, pictures: &[Picture<'_>], side: i64) -> Result<(Rows, Rows), LearningError> {
        let _frozen = tch::no_grad_guard();
        let seen = self.run(&prepared(pictures, side)?)?;
        Ok((
            Rows::from_tensor(&seen.features)?,
            Rows::from_tensor(&seen.looks)?,
        ))
    }

    /// Scores of ImageNet's classes, [`CLASSES`] an image.
    ///
    /// # Errors
    /// As [`EfficientNetLite0::see`].
    pub fn logits(&self, pictures: &[Picture<'_>]) -> Result<Rows, LearningError> {
        let _frozen = tch::no_grad_guard();
        let seen = self.run(&prepared(pictures, SIDE)?)?;
        Rows::from_tensor(
            &seen
                .features
                .f_linear(&self.class_weight, Some(&self.class_bias))?,
        )
    }

    /// Images `[n, 3, h, w]` as [`prepared`] gives them.
    fn run(&self, images: &Tensor) -> Result<Seen, LearningError> {
        let mut x = self.stem.run(&channels_last(images)?)?.f_clamp_(0.0, 6.0)?;
        let mut looks = vec![on_grid(&x)?];
        for (number, block) in self.blocks.iter().enumerate() {
            x = block.run(&x)?;
            if number == GRID_BLOCK.0 {
                looks.push(on_grid(&x)?);
            }
        }
        let features = self.head.run(&x)?.f_clamp_(0.0, 6.0)?.f_mean_dim(
            Some(&[2_i64, 3][..]),
            false,
            None,
        )?;
        Ok(Seen {
            features,
            looks: Tensor::f_cat(&looks, 1)?,
        })
    }
}

impl Block {
    fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        let wide = match &self.expand {
            Some(expand) => expand.run(x)?.f_clamp_(0.0, 6.0)?,
            None => x.shallow_clone(),
        };
        let mixed = self.depthwise.run(&wide)?.f_clamp_(0.0, 6.0)?;
        let mut narrow = self.project.run(&mixed)?;
        if self.residual {
            narrow = narrow.f_add_(x)?;
        }
        Ok(narrow)
    }
}

impl Convolution {
    /// w' = w g / sqrt(v + eps), b' = b - m g / sqrt(v + eps).
    fn take(
        tensors: &mut HashMap<String, Tensor>,
        conv: &str,
        norm: &str,
        (kernel, stride, groups): (i64, i64, i64),
    ) -> Result<Self, LearningError> {
        let weight = taken(tensors, &format!("{conv}.weight"));
        let mut of_norm = |part: &str| taken(tensors, &format!("{norm}.{part}"));
        let spread = of_norm("running_var")
            .f_add_scalar(NORM_EPSILON)?
            .f_sqrt()?;
        let gain = of_norm("weight").f_div(&spread)?;
        let shift = of_norm("running_mean").f_mul(&gain)?;
        Ok(Self {
            bias: of_norm("bias").f_sub(&shift)?,
            weight: channels_last(&weight.f_mul(&gain.f_view([-1, 1, 1, 1])?)?)?,
            kernel,
            stride,
            groups,
        })
    }

    fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        let (_, _, height, width) = x.size4()?;
        let (top, bottom) = self.padding(height);
        let (left, right) = self.padding(width);
        let (stride, ones) = ([self.stride; 2], [1; 2]);
        let bias = Some(&self.bias);
        // What is equal on both sides is left to the convolution, which needs no copy for it.
        if top == bottom && left == right {
            return Ok(x.f_conv2d(&self.weight, bias, stride, [top, left], ones, self.groups)?);
        }
        let padded = channels_last(&x.f_constant_pad_nd([left, right, top, bottom])?)?;
        Ok(padded.f_conv2d(&self.weight, bias, stride, [0; 2], ones, self.groups)?)
    }

    /// TensorFlow's "same": as much as gives ceil(length / stride) results.
    fn padding(&self, length: i64) -> (i64, i64) {
        let results = (length + self.stride - 1) / self.stride;
        let total = ((results - 1) * self.stride + self.kernel - length).max(0);
        (total / 2, total - total / 2)
    }
}

/// Block after block, with the channels that enter it, those between and those that leave it.
struct BlockShape {
    kernel: i64,
    stride: i64,
    inner: i64,
    wide: i64,
    outer: i64,
}

fn shapes() -> Vec<BlockShape> {
    let mut shapes = Vec::new();
    for stage in &STAGES {
        for repeat in 0..stage.repeats {
            let inner = if repeat == 0 {
                stage.inner
            } else {
                stage.outer
            };
            shapes.push(BlockShape {
                kernel: stage.kernel,
                stride: if repeat == 0 { stage.stride } else { 1 },
                inner,
                wide: inner * stage.expansion,
                outer: stage.outer,
            });
        }
    }
    shapes
}

/// Every tensor of the file.
fn expected() -> Vec<Expected> {
    let mut all = Vec::new();
    let mut add = |conv: String, norm: String, shape: [i64; 4]| {
        all.push(Expected {
            name: format!("{conv}.weight"),
            shape: shape.to_vec(),
        });
        for part in ["weight", "bias", "running_mean", "running_var"] {
            all.push(Expected {
                name: format!("{norm}.{part}"),
                shape: vec![shape[0]],
            });
        }
    };
    add("_conv_stem".to_owned(), "_bn0".to_owned(), [STEM, 3, 3, 3]);
    for (number, shape) in shapes().iter().enumerate() {
        let name = |part: &str| format!("_blocks.{number}.{part}");
        let (wide, kernel) = (shape.wide, shape.kernel);
        if wide != shape.inner {
            add(
                name("_expand_conv"),
                name("_bn0"),
                [wide, shape.inner, 1, 1],
            );
        }
        add(
            name("_depthwise_conv"),
            name("_bn1"),
            [wide, 1, kernel, kernel],
        );
        add(
            name("_project_conv"),
            name("_bn2"),
            [shape.outer, wide, 1, 1],
        );
    }
    add(
        "_conv_head".to_owned(),
        "_bn1".to_owned(),
        [FEATURES, 320, 1, 1],
    );
    for (name, shape) in [
        ("_fc.weight", vec![CLASSES, FEATURES]),
        ("_fc.bias", vec![CLASSES]),
    ] {
        all.push(Expected {
            name: name.to_owned(),
            shape,
        });
    }
    all
}

fn taken(tensors: &mut HashMap<String, Tensor>, name: &str) -> Tensor {
    tensors
        .remove(name)
        .expect("every tensor that is taken was expected, so it was loaded")
}

/// The mean of each cell of the grid, `[n, c * GRID * GRID]`.
fn on_grid(x: &Tensor) -> Result<Tensor, LearningError> {
    let cells = x.f_adaptive_avg_pool2d([GRID, GRID])?;
    Ok(cells.f_reshape([x.size()[0], -1])?)
}

/// The same numbers with a pixel's channels side by side in memory, which convolutions of this network run faster on.
fn channels_last(x: &Tensor) -> Result<Tensor, LearningError> {
    Ok(x.f_permute([0, 2, 3, 1])?
        .f_contiguous()?
        .f_permute([0, 3, 1, 2])?)
}

/// Images as the network takes them, `[n, 3, side, side]`: smaller ones are scaled up and larger ones down bilinearly (with smoothing), whatever
/// their proportions.
fn prepared(pictures: &[Picture<'_>], side: i64) -> Result<Tensor, LearningError> {
    if pictures.is_empty() {
        return Err(LearningError::Data("there is no image".to_owned()));
    }
    if !(32..=1024).contains(&side) {
        return Err(LearningError::Config(format!(
            "images are seen at 32 to 1024 pixels a side, not at {side}"
        )));
    }
    let images = pictures
        .iter()
        .map(|picture| {
            let (width, height) = (picture.width, picture.height);
            if width == 0 || height == 0 || picture.pixels.len() != 3 * width * height {
                return Err(LearningError::Data(format!(
                    "{} bytes are no RGB image of {width} x {height} pixels",
                    picture.pixels.len()
                )));
            }
            let image = Tensor::f_from_slice(picture.pixels)?
                .f_view([1, height as i64, width as i64, 3])?
                .f_permute([0, 3, 1, 2])?
                .f_to_kind(Kind::Float)?
                .f_contiguous()?;
            let size = [side, side];
            Ok(if width as i64 > side || height as i64 > side {
                image.f_internal_upsample_bilinear2d_aa(size, false, None, None)?
            } else {
                image.f_upsample_bilinear2d(size, false, None, None)?
            })
        })
        .collect::<Result<Vec<_>, LearningError>>()?;
    Ok(Tensor::f_cat(&images, 0)?
        .f_sub_scalar(127.0)?
        .f_div_scalar(128.0)?)
}
