use std::sync::Arc;

use concord_common::{
    adapter::{AdapterShape, InitialScale},
    job::{AdapterPosition, CkaEstimator, Pool},
    seed::Seed,
};
use tch::Kind;

use super::*;
use crate::{
    adapter::{GlobalBase, Private},
    backbone::{Backbone, Batch, Place},
    head::{Head, pooled, token_weights},
    loss::{BatchTargets, cka, contrast, task_loss},
    named::HostTensor,
    optimiser::{AdamW, AdamWSettings, Parameter},
    testing::{backbone, check_gradient, number, tokenizer},
    tokenize::{Encoded, pad},
};

const FFN: AdapterPosition = AdapterPosition::Ffn;
const POSITIONS: [AdapterPosition; 2] = [FFN, AdapterPosition::Attention];

const SUM: FusionRule = FusionRule {
    combine: Combine::Sum,
    scale_global: 1.0,
    scale_private: 1.0,
};

fn shape() -> AdapterShape {
    AdapterShape {
        hidden: 24,
        bottleneck: 3,
        layers: vec![0, 1],
        shared_head: None,
    }
}

fn init() -> InitialScale {
    InitialScale {
        up: 0.3,
        ..InitialScale::default()
    }
}

fn base() -> GlobalBase {
    let payload = shape().initial_payload(init(), Seed(1)).unwrap();
    GlobalBase::receive(&shape(), &payload).unwrap()
}

fn private(kind: Kind) -> Adapter<Private> {
    let narrow = AdapterShape {
        bottleneck: 2,
        ..shape()
    };
    Adapter::independent(&narrow, init(), Seed(2), kind).unwrap()
}

fn batch(backbone: &Arc<Backbone>) -> Batch {
    let texts = [
        "rain",
        "the old town",
        "apples and a boat",
        "letter",
        "clock at the town",
    ];
    let encoded: Vec<Encoded> = texts
        .iter()
        .map(|text| tokenizer(backbone).encode(text).unwrap())
        .collect();
    pad(
        &encoded.iter().collect::<Vec<_>>(),
        backbone.config().pad_id,
    )
    .unwrap()
}

/// The definition: each adapter apart, then joined.
struct ByTheBook<'a> {
    position: AdapterPosition,
    global: &'a [Bottleneck],
    private: &'a [Bottleneck],
    coefficients: [(f64, f64); 2],
}

impl LayerHook for ByTheBook<'_> {
    fn position(&self) -> AdapterPosition {
        self.position
    }

    fn adapt(&mut self, layer: usize, h: Tensor) -> Result<Tensor, LearningError> {
        let output = |part: &Bottleneck| {
            h.linear(&part.down_weight, Some(&part.down_bias))
                .gelu("none")
                .linear(&part.up_weight, Some(&part.up_bias))
        };
        let (c_g, c_p) = self.coefficients[layer];
        Ok(&h + output(&self.global[layer]) * c_g + output(&self.private[layer]) * c_p)
    }
}

#[test]
fn the_fused_bottleneck_is_both_adapters_in_every_way_of_joining() {
    let backbone = backbone(Kind::Double);
    let batch = batch(&backbone);
    let global = base().adapter(Kind::Double).unwrap();
    let private = private(Kind::Double);
    let gate = Tensor::from_slice(&[0.4, -1.0]);
    let g = |x: f64| 1.0 / (1.0 + (-x).exp());
    for (combine, coefficients) in [
        (Combine::Sum, [(2.0, -0.5); 2]),
        (Combine::Mean, [(1.0, -0.25); 2]),
        (
            Combine::Gate,
            [
                (2.0 * g(0.4), -0.5 * (1.0 - g(0.4))),
                (2.0 * g(-1.0), -0.5 * (1.0 - g(-1.0))),
            ],
        ),
    ] {
        let rule = FusionRule {
            combine,
            scale_global: 2.0,
            scale_private: -0.5,
        };
        let parts = Parts {
            global: Some(global.layers()),
            private: Some(private.layers()),
            gate: Some(&gate),
        };
        let stacks = parts.stack(rule).unwrap();
        assert_eq!(stacks[0].down_weight.size(), [5, 24]);
        for position in POSITIONS {
            let fused = backbone
                .forward(&batch, &mut Fusion::new(position, &stacks))
                .unwrap();
            let mut book = ByTheBook {
                position,
                global: global.layers(),
                private: private.layers(),
                coefficients,
            };
            let apart = backbone.forward(&batch, &mut book).unwrap();
            let difference = number(&(fused - apart).abs().max());
            assert!(difference < 1e-12, "{combine:?}, {position}: {difference}");
        }
    }
}

#[test]
fn an_adapter_alone_has_the_global_scale() {
    let backbone = backbone(Kind::Double);
    let batch = batch(&backbone);
    let global = base().adapter(Kind::Double).unwrap();
    let private = private(Kind::Double);
    let rule = FusionRule {
        combine: Combine::Mean,
        scale_global: 1.5,
        scale_private: 9.0,
    };
    let alone = Parts::alone(&global).stack(rule).unwrap();
    let got = backbone
        .forward(&batch, &mut Fusion::new(FFN, &alone))
        .unwrap();
    let mut book = ByTheBook {
        position: FFN,
        global: global.layers(),
        private: private.layers(),
        coefficients: [(1.5, 0.0); 2],
    };
    let want = backbone.forward(&batch, &mut book).unwrap();
    assert!(number(&(got - want).abs().max()) < 1e-12);
}

#[test]
fn layers_without_an_adapter_pass_through() {
    let backbone = backbone(Kind::Double);
    let batch = batch(&backbone);
    let top = AdapterShape {
        layers: vec![1],
        ..shape()
    };
    let adapter = Adapter::<Private>::independent(&top, init(), Seed(2), Kind::Double).unwrap();
    let stacks = Parts::alone(&adapter).stack(SUM).unwrap();
    for position in POSITIONS {
        let whole = backbone
            .forward(&batch, &mut Fusion::new(position, &stacks))
            .unwrap();
        let first = Place { layer: 1, position };
        let prefix = backbone.run_prefix(&batch, first).unwrap();
        let mut hook = Fusion::new(position, &stacks);
        let from_prefix = backbone
            .run_from_prefix(&prefix, &batch.mask, &mut hook)
            .unwrap();
        assert_eq!(whole, from_prefix, "{position}");
    }
}

#[test]
fn a_gate_without_numbers_is_an_error() {
    let global = base().adapter(Kind::Double).unwrap();
    let private = private(Kind::Double);
    let parts = Parts {
        global: Some(global.layers()),
        private: Some(private.layers()),
        gate: None,
    };
    assert!(
        parts
            .stack(FusionRule {
                combine: Combine::Gate,
                ..SUM
            })
            .is_err()
    );
}

/// Every parameter of both adapters, the gate and a head, as leaves for a gradient check.
fn leaves(
    global: &Adapter<Global>,
    private: &Adapter<Private>,
    head: &Head<Private>,
) -> Vec<Tensor> {
    global
        .named()
        .into_iter()
        .chain(private.named())
        .chain(head.linear.named(""))
        .map(|(_, tensor)| tensor.copy())
        .chain([Tensor::from_slice(&[0.3, -0.2])])
        .collect()
}

/// The bottlenecks made of eight leaves.
fn bottlenecks(leaves: &[Tensor]) -> Vec<Bottleneck> {
    let (groups, _) = leaves.as_chunks::<4>();
    groups
        .iter()
        .enumerate()
        .map(
            |(layer, [down_weight, down_bias, up_weight, up_bias])| Bottleneck {
                layer,
                down_weight: down_weight.shallow_clone(),
                down_bias: down_bias.shallow_clone(),
                up_weight: up_weight.shallow_clone(),
                up_bias: up_bias.shallow_clone(),
            },
        )
        .collect()
}

#[test]
fn gradients_of_the_whole_objective_agree_with_differences() {
    let kind = Kind::Double;
    let backbone = backbone(kind);
    let batch = batch(&backbone);
    let weights = token_weights(&batch.mask, kind).unwrap();
    let received = base().adapter(kind).unwrap();
    // Not where the round began, or the similarity to what was received would be at its maximum.
    let other = shape().initial_payload(init(), Seed(9)).unwrap();
    let global = GlobalBase::receive(&shape(), &other)
        .unwrap()
        .adapter(kind)
        .unwrap();
    let private = private(kind);
    let head = Head::draw(3, 24, Seed(3), kind).unwrap();
    let targets = BatchTargets::Classes(Tensor::from_slice(&[0_i64, 2, 1, 1, 0]));
    for (combine, position) in [
        (Combine::Sum, FFN),
        (Combine::Gate, FFN),
        (Combine::Sum, AdapterPosition::Attention),
    ] {
        let rule = FusionRule {
            combine,
            scale_global: 1.2,
            scale_private: 0.7,
        };
        check_gradient(&leaves(&global, &private, &head), 1e-5, |leaves| {
            let (global, private) = (bottlenecks(&leaves[..8]), bottlenecks(&leaves[8..16]));
            let parts = Parts {
                global: Some(&global),
                private: Some(&private),
                gate: Some(&leaves[18]),
            };
            let stacks = parts.stack(rule).unwrap();
            let mut hook = Fusion::watching(position, &stacks, parts, &received, &weights);
            let hidden = backbone.forward(&batch, &mut hook).unwrap();
            let pooled = pooled(Pool::Mean, &hidden, &weights).unwrap();
            let logits = pooled.linear(&leaves[16], Some(&leaves[17]));
            let mut loss = task_loss(&logits, &targets).unwrap();
            for (layer, view) in hook.into_views().iter().enumerate() {
                let similar = |x: &Tensor| cka(&view.global, x, CkaEstimator::Unbiased).unwrap();
                let push = similar(&view.private);
                // z_g^t is a constant to the loss by design. Above the lowest layer h moves with the adapters below, and differences would see it
                // move too, so the whole term is checked in the lowest layer and the other part in both.
                let pull = if layer == 0 {
                    similar(&view.received)
                } else {
                    push.zeros_like()
                };
                loss += contrast(&pull, &push, 0.5).unwrap();
            }
            loss
        });
    }
}

#[test]
fn the_views_are_token_means_of_the_adapters_outputs_at_one_input() {
    let kind = Kind::Double;
    let backbone = backbone(kind);
    let batch = batch(&backbone);
    let weights = token_weights(&batch.mask, kind).unwrap();
    let global = base().adapter(kind).unwrap();
    let received = base().adapter(kind).unwrap();
    let private = private(kind);
    for (_, tensor) in global.named() {
        let _ = tensor.set_requires_grad(true);
    }
    let parts = Parts {
        global: Some(global.layers()),
        private: Some(private.layers()),
        gate: None,
    };
    let stacks = parts.stack(SUM).unwrap();
    let mut hook = Fusion::watching(FFN, &stacks, parts, &received, &weights);
    let first = Place {
        layer: 0,
        position: FFN,
    };
    let h = backbone.run_prefix(&batch, first).unwrap().output;
    let _ = hook.adapt(0, h.shallow_clone()).unwrap();
    let views = hook.into_views();
    let view = &views[0];
    assert_eq!(view.global.size(), [5, 24]);
    let output = |part: &Bottleneck| {
        h.linear(&part.down_weight, Some(&part.down_bias))
            .gelu("none")
            .linear(&part.up_weight, Some(&part.up_bias))
    };
    let mean = |x: Tensor| {
        let mask = batch.mask.to_kind(kind).unsqueeze(-1);
        (x * &mask).sum_dim_intlist(1_i64, false, kind) / mask.sum_dim_intlist(1_i64, false, kind)
    };
    for (got, part) in [
        (&view.global, &global.layers()[0]),
        (&view.private, &private.layers()[0]),
        (&view.received, &received.layers()[0]),
    ] {
        let difference = number(&(got - mean(output(part))).abs().max());
        assert!(difference < 1e-12, "{difference}");
    }
    assert!(view.global.requires_grad());
    assert!(!view.received.requires_grad());
}

/// Trains two adapters side by side on three classes and gives their largest difference before and after.
fn trained_apart(private: &Adapter<Private>) -> (f64, f64) {
    let backbone = backbone(Kind::Float);
    let batch = batch(&backbone);
    let weights = token_weights(&batch.mask, Kind::Float).unwrap();
    let global = base().adapter(Kind::Float).unwrap();
    let head = Head::draw(3, 24, Seed(3), Kind::Float).unwrap();
    let targets = BatchTargets::Classes(Tensor::from_slice(&[0_i64, 2, 1, 1, 0]));
    let difference = || {
        global
            .named()
            .iter()
            .zip(private.named())
            .map(|((_, g), (_, p))| number(&(*g - p).abs().max()))
            .fold(0.0, f64::max)
    };
    let before = difference();
    let mut parameters: Vec<Parameter> = global
        .named()
        .into_iter()
        .map(|(name, tensor)| (format!("global.{name}"), tensor))
        .chain(
            private
                .named()
                .into_iter()
                .map(|(name, tensor)| (format!("private.{name}"), tensor)),
        )
        .map(|(name, tensor)| Parameter {
            name,
            tensor: tensor.set_requires_grad(true),
            learning_rate: 0.01,
        })
        .collect();
    let mut adam = AdamW::new(AdamWSettings {
        weight_decay: 0.01,
        warmup_steps: 0,
        clip_norm: 0.0,
    });
    for _ in 0..10 {
        let parts = Parts {
            global: Some(global.layers()),
            private: Some(private.layers()),
            gate: None,
        };
        let stacks = parts.stack(SUM).unwrap();
        let hidden = backbone
            .forward(&batch, &mut Fusion::new(FFN, &stacks))
            .unwrap();
        let logits = head
            .linear
            .forward(&pooled(Pool::Mean, &hidden, &weights).unwrap(), 3)
            .unwrap();
        let loss = task_loss(&logits, &targets).unwrap();
        let tensors: Vec<&Tensor> = parameters
            .iter()
            .map(|parameter| &parameter.tensor)
            .collect();
        let gradients = Tensor::f_run_backward(&[loss], &tensors, false, false).unwrap();
        adam.step(&mut parameters, &gradients).unwrap();
    }
    (before, difference())
}

#[test]
fn trap_3_adapters_that_start_equal_receive_equal_gradients_and_never_separate() {
    let global = base().adapter(Kind::Float).unwrap();
    let (before, after) = trained_apart(&Adapter::copy_of(&global).unwrap());
    assert!(before == 0.0 && after < 1e-6, "{after}");
}

#[test]
fn trap_3_our_two_ways_to_start_separate() {
    let global = base().adapter(Kind::Float).unwrap();
    let near = Adapter::near(&global, 0.1, Seed(5), Kind::Float).unwrap();
    let (before, after) = trained_apart(&near);
    assert!(before > 0.0 && after > before, "{before} then {after}");
    let independent = Adapter::independent(&shape(), init(), Seed(5), Kind::Float).unwrap();
    let (before, _) = trained_apart(&independent);
    assert!(before > 0.1);
}

#[test]
fn trap_2_a_new_adapter_has_outputs_that_can_be_compared() {
    let backbone = backbone(Kind::Float);
    let batch = batch(&backbone);
    let weights = token_weights(&batch.mask, Kind::Float).unwrap();
    let payload = shape()
        .initial_payload(InitialScale::default(), Seed(1))
        .unwrap();
    let base = GlobalBase::receive(&shape(), &payload).unwrap();
    let (global, received) = (
        base.adapter(Kind::Float).unwrap(),
        base.adapter(Kind::Float).unwrap(),
    );
    let private =
        Adapter::<Private>::independent(&shape(), InitialScale::default(), Seed(2), Kind::Float)
            .unwrap();
    let parts = Parts {
        global: Some(global.layers()),
        private: Some(private.layers()),
        gate: None,
    };
    let stacks = parts.stack(SUM).unwrap();
    let mut hook = Fusion::watching(FFN, &stacks, parts, &received, &weights);
    let _ = backbone.forward(&batch, &mut hook).unwrap();
    for view in hook.into_views() {
        assert!(
            HostTensor::from_tensor(&view.global)
                .unwrap()
                .values
                .iter()
                .any(|z| *z != 0.0)
        );
        let pull = number(&cka(&view.global, &view.received, CkaEstimator::Unbiased).unwrap());
        let push = number(&cka(&view.global, &view.private, CkaEstimator::Unbiased).unwrap());
        assert!(
            (pull - 1.0).abs() < 1e-3 && push.is_finite(),
            "{pull}, {push}"
        );
    }
}
