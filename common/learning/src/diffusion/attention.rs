//! Attention and the transformer that sits between a UNet's convolutions (Rombach et al. 2021, arXiv 2112.10752, appendix E).

use tch::Tensor;

use super::{
    layers::{GroupNorm, LayerNorm},
    linear::{Linear, Shape, sites},
    params::Params,
};
use crate::error::LearningError;

/// Epsilon of the norms inside a transformer block, and of the one before it. Neither is in `config.json`.
const BLOCK_EPS: f64 = 1e-5;
const TRANSFORMER_EPS: f64 = 1e-6;

/// softmax(Q K' / sqrt(d / heads)) V between two linear layers.
#[derive(Debug)]
pub struct Attention {
    heads: i64,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}
sites!(Attention {
    to_q,
    to_k,
    to_v,
    to_out
});

impl Attention {
    /// Takes `to_q`, `to_k`, `to_v` and `to_out.0`; keys and values read `context` values.
    ///
    /// # Errors
    /// Those of [`Params::take`].
    pub fn take(
        params: &mut Params,
        name: &str,
        width: i64,
        context: i64,
        heads: i64,
        bias: bool,
    ) -> Result<Self, LearningError> {
        let mut linear = |part: &str, inputs: i64, bias: bool| {
            Linear::take(
                params,
                &format!("{name}.{part}"),
                (inputs, width),
                bias,
                Shape::Matrix,
            )
        };
        Ok(Self {
            heads,
            to_q: linear("to_q", width, bias)?,
            to_k: linear("to_k", context, bias)?,
            to_v: linear("to_v", context, bias)?,
            to_out: linear("to_out.0", width, true)?,
        })
    }

    /// `x` is `[n, t, d]`, what is attended to `[n, s, context]`.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn run(&self, x: &Tensor, context: &Tensor) -> Result<Tensor, LearningError> {
        let split = |linear: &Linear, input: &Tensor| -> Result<Tensor, LearningError> {
            let (n, t, _) = input.size3()?;
            let wide = linear.run(input)?;
            Ok(wide
                .f_view([n, t, self.heads, linear.outputs() / self.heads])?
                .f_transpose(1, 2)?)
        };
        let (n, t, _) = x.size3()?;
        let mixed = Tensor::f_scaled_dot_product_attention(
            &split(&self.to_q, x)?,
            &split(&self.to_k, context)?,
            &split(&self.to_v, context)?,
            None::<&Tensor>,
            0.0,
            false,
            None,
            false,
        )?;
        let joined = mixed
            .f_transpose(1, 2)?
            .f_reshape([n, t, self.to_q.outputs()])?;
        self.to_out.run(&joined)
    }
}

/// A gated feed-forward network: (a gelu(b)) where a and b are halves of one product (Shazeer 2020, arXiv 2002.05202).
#[derive(Debug)]
struct FeedForward {
    up: Linear,
    down: Linear,
}
sites!(FeedForward { up, down });

impl FeedForward {
    fn take(params: &mut Params, name: &str, width: i64) -> Result<Self, LearningError> {
        let inner = 4 * width;
        Ok(Self {
            up: Linear::take(
                params,
                &format!("{name}.net.0.proj"),
                (width, 2 * inner),
                true,
                Shape::Matrix,
            )?,
            down: Linear::take(
                params,
                &format!("{name}.net.2"),
                (inner, width),
                true,
                Shape::Matrix,
            )?,
        })
    }

    fn run(&self, x: &Tensor) -> Result<Tensor, LearningError> {
        let halves = self.up.run(x)?.f_chunk(2, -1)?;
        self.down.run(&halves[0].f_mul(&halves[1].f_gelu("none")?)?)
    }
}

/// Self-attention, cross-attention, feed-forward, each after a norm and added to its input.
#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: FeedForward,
}
sites!(Block { attn1, attn2, ff });

impl Block {
    fn take(
        params: &mut Params,
        name: &str,
        width: i64,
        context: i64,
        heads: i64,
    ) -> Result<Self, LearningError> {
        let at = |part: &str| format!("{name}.{part}");
        Ok(Self {
            norm1: LayerNorm::take(params, &at("norm1"), width, BLOCK_EPS)?,
            attn1: Attention::take(params, &at("attn1"), width, width, heads, false)?,
            norm2: LayerNorm::take(params, &at("norm2"), width, BLOCK_EPS)?,
            attn2: Attention::take(params, &at("attn2"), width, context, heads, false)?,
            norm3: LayerNorm::take(params, &at("norm3"), width, BLOCK_EPS)?,
            ff: FeedForward::take(params, &at("ff"), width)?,
        })
    }

    fn run(&self, x: &Tensor, context: &Tensor) -> Result<Tensor, LearningError> {
        let normed = self.norm1.run(x)?;
        let x = self.attn1.run(&normed, &normed)?.f_add(x)?;
        let x = self.attn2.run(&self.norm2.run(&x)?, context)?.f_add(&x)?;
        Ok(self.ff.run(&self.norm3.run(&x)?)?.f_add(&x)?)
    }
}

/// What a [`Transformer`] is made of.
#[derive(Debug, Clone, Copy)]
pub struct TransformerSizes {
    /// Channels, which are also its hidden units.
    pub width: i64,
    /// Values per token of the text.
    pub context: i64,
    /// Attention heads.
    pub heads: i64,
    /// Blocks one after another.
    pub depth: usize,
    /// Groups of its first norm.
    pub groups: i64,
    /// How its projections are stored: 1.x has convolutions, 2.x matrices.
    pub projections: Shape,
}

/// A transformer over the pixels of a feature map, added to the map.
#[derive(Debug)]
pub struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<Block>,
    proj_out: Linear,
}
sites!(Transformer {
    proj_in,
    blocks,
    proj_out
});

impl Transformer {
    /// Takes one.
    ///
    /// # Errors
    /// [`LearningError::Config`] if the sizes do not go together, and those of [`Params::take`].
    pub fn take(
        params: &mut Params,
        name: &str,
        sizes: TransformerSizes,
    ) -> Result<Self, LearningError> {
        let TransformerSizes {
            width,
            context,
            heads,
            depth,
            groups,
            projections,
        } = sizes;
        if heads < 1 || width % heads != 0 {
            return Err(LearningError::Config(format!(
                "attention_head_dim {heads} (which counts heads) does not divide the {width} channels of {name}"
            )));
        }
        let norm = GroupNorm::take(
            params,
            &format!("{name}.norm"),
            width,
            groups,
            TRANSFORMER_EPS,
        )?;
        let mut projection = |part: &str| {
            Linear::take(
                params,
                &format!("{name}.{part}"),
                (width, width),
                true,
                projections,
            )
        };
        let proj_in = projection("proj_in")?;
        let proj_out = projection("proj_out")?;
        let blocks = (0..depth)
            .map(|index| {
                Block::take(
                    params,
                    &format!("{name}.transformer_blocks.{index}"),
                    width,
                    context,
                    heads,
                )
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            norm,
            proj_in,
            blocks,
            proj_out,
        })
    }

    /// `x` is `[n, c, h, w]`, `context` the text's `[n, t, d]`.
    ///
    /// # Errors
    /// [`LearningError::Torch`] if the shapes do not fit.
    pub fn run(&self, x: &Tensor, context: &Tensor) -> Result<Tensor, LearningError> {
        let (n, c, h, w) = x.size4()?;
        let pixels = self
            .norm
            .run(x)?
            .f_permute([0, 2, 3, 1])?
            .f_reshape([n, h * w, c])?;
        let mut hidden = self.proj_in.run(&pixels)?;
        for block in &self.blocks {
            hidden = block.run(&hidden, context)?;
        }
        let map = self
            .proj_out
            .run(&hidden)?
            .f_view([n, h, w, c])?
            .f_permute([0, 3, 1, 2])?
            .f_contiguous()?;
        Ok(map.f_add(x)?)
    }
}
