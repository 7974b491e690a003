//! How adapters are hooked into the backbone: h' = h + c_g A_g(h) + c_p A_p(h).
//!
//! The coefficients follow from the job's `combine` and scales:
//!
//! | combine | c_g | c_p |
//! |---|---|---|
//! | `sum` | s_g | s_p |
//! | `mean` | s_g / 2 | s_p / 2 |
//! | `gate` | g s_g | (1 - g) s_p, g = sigmoid of one learned number a layer |
//! | one adapter alone | s_g | s_g |
//!
//! All of them are linear in the two adapters' outputs, so the pair is computed as ONE bottleneck: the downs stacked, the ups joined with
//! the coefficients folded in. That is quicker than two, and it is the bottleneck that an export holds.
//!
//! For the contrastive term the hook keeps, per layer, z = the mean over each row's real tokens of A(h), `[n, d]`, without the
//! coefficients (CKA ignores them): `z_g` and `z_p` with their graph, and `z_g^t` of the frozen copy of the adapter just received, at the
//! same h and without a graph. The mean is taken before W_up, which is linear, so the term costs next to nothing and no further pass through
//! the backbone.

use concord_common::job::{AdapterPosition, AdapterSpec, Combine};
use tch::Tensor;

use crate::{
    adapter::{Adapter, Bottleneck, Global, Sharing},
    backbone::{LayerHook, add_dense},
    error::LearningError,
    head::token_mean,
};

#[cfg(test)]
mod tests;

/// The part of a job that says how two adapters are joined.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct FusionRule {
    /// Sum, mean or gate.
    pub combine: Combine,
    /// s_g
    pub scale_global: f64,
    /// s_p
    pub scale_private: f64,
}

impl From<&AdapterSpec> for FusionRule {
    fn from(spec: &AdapterSpec) -> Self {
        Self {
            combine: spec.combine,
            scale_global: spec.scale_global,
            scale_private: spec.scale_private,
        }
    }
}

/// The bottlenecks of one layer as one: A(h) = up · GELU(down · h + down_bias) + up_bias.
#[derive(Debug)]
pub(crate) struct Stacked {
    pub(crate) layer: usize,
    /// `[r, d]`, r the sum of the parts' bottlenecks
    pub(crate) down_weight: Tensor,
    /// `[r]`
    pub(crate) down_bias: Tensor,
    /// `[d, r]`
    pub(crate) up_weight: Tensor,
    /// `[d]`
    pub(crate) up_bias: Tensor,
}

impl Stacked {
    /// GELU(down · h + down_bias), `[n, t, r]`.
    fn inner(&self, h: &Tensor) -> Result<Tensor, LearningError> {
        inner(h, &self.down_weight, &self.down_bias)
    }
}

fn inner(h: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor, LearningError> {
    Ok(h.f_linear(weight, Some(bias))?.f_gelu("none")?)
}

/// The adapters of one forward pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts<'a> {
    /// Lowest layer first.
    pub(crate) global: Option<&'a [Bottleneck]>,
    /// The same layers.
    pub(crate) private: Option<&'a [Bottleneck]>,
    /// One number a layer, `[layers]`; needed by [`Combine::Gate`] with both adapters.
    pub(crate) gate: Option<&'a Tensor>,
}

impl<'a> Parts<'a> {
    /// One adapter alone.
    pub(crate) fn alone<S: Sharing>(adapter: &'a Adapter<S>) -> Self {
        Self {
            global: Some(adapter.layers()),
            private: None,
            gate: None,
        }
    }

    /// One bottleneck a layer.
    pub(crate) fn stack(&self, rule: FusionRule) -> Result<Vec<Stacked>, LearningError> {
        let (first, second) = match (self.global, self.private) {
            (Some(global), Some(private)) => (global, Some(private)),
            (Some(alone), None) | (None, Some(alone)) => (alone, None),
            (None, None) => return Ok(Vec::new()),
        };
        first
            .iter()
            .enumerate()
            .map(|(index, a)| match second {
                None => single(a, rule.scale_global),
                Some(second) => self.pair(index, a, &second[index], rule),
            })
            .collect()
    }

    fn pair(
        &self,
        index: usize,
        global: &Bottleneck,
        private: &Bottleneck,
        rule: FusionRule,
    ) -> Result<Stacked, LearningError> {
        debug_assert_eq!(global.layer, private.layer);
        let (s_g, s_p) = (rule.scale_global, rule.scale_private);
        let scaled = |part: &Bottleneck, scale: f64| {
            Ok::<_, LearningError>((
                part.up_weight.f_mul_scalar(scale)?,
                part.up_bias.f_mul_scalar(scale)?,
            ))
        };
        let ((up_g, bias_g), (up_p, bias_p)) = match rule.combine {
            Combine::Sum => (scaled(global, s_g)?, scaled(private, s_p)?),
            Combine::Mean => (scaled(global, s_g / 2.0)?, scaled(private, s_p / 2.0)?),
            Combine::Gate => {
                let gate = self.gate.ok_or_else(|| {
                    LearningError::Config("combine `gate` needs the gate's numbers".to_owned())
                })?;
                let g = gate.f_select(0, index as i64)?.f_sigmoid()?;
                let rest = g.f_neg()?.f_add_scalar(1.0)?;
                let ((up_g, bias_g), (up_p, bias_p)) =
                    (scaled(global, s_g)?, scaled(private, s_p)?);
                (
                    (up_g.f_mul(&g)?, bias_g.f_mul(&g)?),
                    (up_p.f_mul(&rest)?, bias_p.f_mul(&rest)?),
                )
            }
        };
        Ok(Stacked {
            layer: global.layer,
            down_weight: Tensor::f_cat(&[&global.down_weight, &private.down_weight], 0)?,
            down_bias: Tensor::f_cat(&[&global.down_bias, &private.down_bias], 0)?,
            up_weight: Tensor::f_cat(&[up_g, up_p], 1)?,
            up_bias: bias_g.f_add(&bias_p)?,
        })
    }
}

fn single(part: &Bottleneck, scale: f64) -> Result<Stacked, LearningError> {
    Ok(Stacked {
        layer: part.layer,
        down_weight: part.down_weight.shallow_clone(),
        down_bias: part.down_bias.shallow_clone(),
        up_weight: part.up_weight.f_mul_scalar(scale)?,
        up_bias: part.up_bias.f_mul_scalar(scale)?,
    })
}

/// What the contrastive term reads of one layer; each `[n, d]`.
#[derive(Debug)]
pub(crate) struct LayerViews {
    /// Of the global adapter.
    pub(crate) global: Tensor,
    /// Of the private adapter.
    pub(crate) private: Tensor,
    /// Of the frozen copy of the global adapter as received.
    pub(crate) received: Tensor,
}

impl LayerViews {
    /// Puts the views of a batch's pieces together, layer by layer; all pieces have the same layers.
    pub(crate) fn of_all_rows(pieces: &[Vec<Self>]) -> Result<Vec<Self>, LearningError> {
        let layers = pieces.first().map_or(0, Vec::len);
        (0..layers)
            .map(|layer| {
                let all = |view: fn(&Self) -> &Tensor| {
                    let parts: Vec<&Tensor> =
                        pieces.iter().map(|piece| view(&piece[layer])).collect();
                    Tensor::f_cat(&parts, 0)
                };
                Ok(Self {
                    global: all(|view| &view.global)?,
                    private: all(|view| &view.private)?,
                    received: all(|view| &view.received)?,
                })
            })
            .collect()
    }
}

/// What is needed to take the views.
#[derive(Debug)]
struct Watch<'a> {
    parts: Parts<'a>,
    received: &'a Adapter<Global>,
    weights: &'a Tensor,
    views: Vec<LayerViews>,
}

/// The hook.
#[derive(Debug)]
pub(crate) struct Fusion<'a> {
    position: AdapterPosition,
    stacks: &'a [Stacked],
    watch: Option<Watch<'a>>,
}

impl<'a> Fusion<'a> {
    /// Adapters alone.
    pub(crate) fn new(position: AdapterPosition, stacks: &'a [Stacked]) -> Self {
        Self {
            position,
            stacks,
            watch: None,
        }
    }

    /// Takes the views as well. `weights` are the rows' token weights, `[n, t]`; `parts` must have both adapters.
    pub(crate) fn watching(
        position: AdapterPosition,
        stacks: &'a [Stacked],
        parts: Parts<'a>,
        received: &'a Adapter<Global>,
        weights: &'a Tensor,
    ) -> Self {
        Self {
            position,
            stacks,
            watch: Some(Watch {
                parts,
                received,
                weights,
                views: Vec::new(),
            }),
        }
    }

    /// The views of the layers that have been run, lowest first.
    pub(crate) fn into_views(self) -> Vec<LayerViews> {
        self.watch.map(|watch| watch.views).unwrap_or_default()
    }
}

impl Watch<'_> {
    fn look(&mut self, index: usize, h: &Tensor, inner: &Tensor) -> Result<(), LearningError> {
        let (Some(global), Some(private)) = (self.parts.global, self.parts.private) else {
            return Err(LearningError::Config(
                "the contrastive term needs a global and a private adapter".to_owned(),
            ));
        };
        let (global, private) = (&global[index], &private[index]);
        let widths = [global.down_bias.size()[0], private.down_bias.size()[0]];
        let mean = token_mean(inner, self.weights)?;
        let of = |part: &Bottleneck, start: i64, width: i64| {
            Ok::<_, LearningError>(
                mean.f_narrow(1, start, width)?
                    .f_linear(&part.up_weight, Some(&part.up_bias))?,
            )
        };
        let received = {
            let _frozen = tch::no_grad_guard();
            let part = &self.received.layers()[index];
            let inner = self::inner(&h.f_detach()?, &part.down_weight, &part.down_bias)?;
            token_mean(&inner, self.weights)?.f_linear(&part.up_weight, Some(&part.up_bias))?
        };
        self.views.push(LayerViews {
            global: of(global, 0, widths[0])?,
            private: of(private, widths[0], widths[1])?,
            received,
        });
        Ok(())
    }
}

impl LayerHook for Fusion<'_> {
    fn position(&self) -> AdapterPosition {
        self.position
    }

    fn adapt(&mut self, layer: usize, h: Tensor) -> Result<Tensor, LearningError> {
        let (_, _, d) = h.size3()?;
        let mut sum = h.f_reshape([-1, d])?.f_zeros_like()?;
        let shape = h.size();
        self.add_adapted(layer, h, &mut sum)?;
        Ok(sum.f_view(shape.as_slice())?)
    }

    fn add_adapted(
        &mut self,
        layer: usize,
        h: Tensor,
        sum: &mut Tensor,
    ) -> Result<(), LearningError> {
        let (_, _, d) = h.size3()?;
        let _ = sum.f_add_(&h.f_reshape([-1, d])?)?;
        let Some(index) = self.stacks.iter().position(|stack| stack.layer == layer) else {
            return Ok(());
        };
        let stack = &self.stacks[index];
        let inner = stack.inner(&h)?;
        if let Some(watch) = &mut self.watch {
            watch.look(index, &h, &inner)?;
        }
        let (_, _, r) = inner.size3()?;
        let inner = inner.f_reshape([-1, r])?;
        add_dense(sum, &inner, &stack.up_weight, &stack.up_bias)
    }
}
