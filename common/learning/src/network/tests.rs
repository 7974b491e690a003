use std::sync::Arc;

use concord_common::{
    adapter::{AdapterShape, InitialScale},
    job::{AdapterPosition, Combine},
    seed::Seed,
};

use super::*;
use crate::{
    adapter::{GlobalBase, Private},
    backbone::Place,
    cache::CacheSettings,
    fusion::FusionRule,
    testing::{MAX_LENGTH, backbone, classification, number, tokenizer},
};

fn close(got: f64, want: f64) {
    assert!((got - want).abs() < 1e-12, "{got} is not {want}");
}

#[test]
fn classes_are_scored_by_loss_and_the_largest_output() {
    let problem = Problem::Classification {
        classes: vec!["a".into(), "b".into()],
    };
    let outputs = [0.0, 0.0, 2.0, 1.0];
    let evaluation = score(
        &problem,
        &Targets::Classes(vec![0, 1]),
        TargetScale {
            mean: 0.0,
            std: 1.0,
        },
        &outputs,
    )
    .unwrap();
    assert_eq!(evaluation.rows, 2);
    close(evaluation.metrics["accuracy"], 0.5);
    close(
        evaluation.metrics["loss"],
        f64::midpoint(2.0_f64.ln(), (1.0 + 1.0_f64.exp()).ln()),
    );
}

#[test]
fn numbers_are_scored_on_the_standard_scale() {
    let scale = TargetScale {
        mean: 10.0,
        std: 2.0,
    };
    let evaluation = score(
        &Problem::Regression,
        &Targets::Values(vec![10.0, 12.0]),
        scale,
        &[1.0, 2.0],
    )
    .unwrap();
    close(evaluation.metrics["loss"], 1.0);
    close(evaluation.metrics["spearman"], 1.0);
}

#[test]
fn a_split_without_rows_has_no_metrics() {
    let evaluation = score(
        &Problem::Regression,
        &Targets::Values(Vec::new()),
        TargetScale {
            mean: 0.0,
            std: 1.0,
        },
        &[],
    )
    .unwrap();
    assert_eq!(evaluation.rows, 0);
    assert!(evaluation.metrics.is_empty());
}

#[test]
fn outputs_that_are_no_numbers_are_an_error() {
    let problem = Problem::Classification {
        classes: vec!["a".into(), "b".into()],
    };
    let scale = TargetScale {
        mean: 0.0,
        std: 1.0,
    };
    assert!(
        score(
            &problem,
            &Targets::Classes(vec![0]),
            scale,
            &[f64::NAN, 1.0]
        )
        .is_err()
    );
}

#[test]
fn softmax_survives_large_logits() {
    let p = softmax(&[1000.0, 1000.0, -1000.0]);
    close(p[0], 0.5);
    close(p.iter().sum(), 1.0);
}

/// Rows of a toy task as one batch, with the task's prefix in layer 0.
fn inputs(backbone: &Backbone, position: AdapterPosition, rows: &[usize]) -> Inputs {
    let settings = CacheSettings::default();
    let tokens = tokenizer(backbone);
    PreparedTask::new(
        &classification(30, 0),
        backbone,
        &tokens,
        MAX_LENGTH,
        Place { layer: 0, position },
        settings,
        &Pulse::default(),
    )
    .unwrap()
    .inputs(backbone, Split::Train, rows)
    .unwrap()
}

struct Adapters {
    received: Adapter<Global>,
    global: Adapter<Global>,
    private: Adapter<Private>,
}

fn adapters() -> Adapters {
    let shape = AdapterShape {
        hidden: 24,
        bottleneck: 3,
        layers: vec![0, 1],
        shared_head: None,
    };
    let init = InitialScale {
        up: 0.3,
        ..InitialScale::default()
    };
    let drawn = |seed| {
        let payload = shape.initial_payload(init, Seed(seed)).unwrap();
        let base = GlobalBase::receive(&shape, &payload).unwrap();
        base.adapter(Kind::Double).unwrap()
    };
    Adapters {
        received: drawn(1),
        global: drawn(2),
        private: Adapter::independent(&shape, init, Seed(3), Kind::Double).unwrap(),
    }
}

/// Vectors and views, and the gradient of a function of all of them.
fn run(tokens: usize, pool: Pool, backbone: &Arc<Backbone>, inputs: &Inputs) -> Vec<Tensor> {
    let Adapters {
        received,
        global,
        private,
    } = adapters();
    let leaves: Vec<Tensor> = global
        .named()
        .into_iter()
        .chain(private.named())
        .map(|(_, leaf)| leaf.shallow_clone().set_requires_grad(true))
        .collect();
    let parts = Parts {
        global: Some(global.layers()),
        private: Some(private.layers()),
        gate: None,
    };
    let rule = FusionRule {
        combine: Combine::Sum,
        scale_global: 1.0,
        scale_private: 1.0,
    };
    let stacks = parts.stack(rule).unwrap();
    let (vectors, views) = in_pieces(
        tokens,
        backbone,
        pool,
        &stacks,
        Some((parts, &received)),
        inputs,
    )
    .unwrap();
    assert_eq!(views.len(), 2);
    let mut all = vec![vectors];
    for view in views {
        all.extend([view.global, view.private, view.received]);
    }
    let value = all
        .iter()
        .map(|x| x.sin().sum(Kind::Double))
        .reduce(|a, b| a + b)
        .unwrap();
    let gradients = Tensor::f_run_backward(&[value], &leaves, false, false).unwrap();
    all.iter().map(Tensor::detach).chain(gradients).collect()
}

#[test]
fn a_batch_in_pieces_gives_the_vectors_views_and_gradients_of_the_whole() {
    let backbone = backbone(Kind::Double);
    for (pool, position) in [
        (Pool::Mean, AdapterPosition::Ffn),
        (Pool::Cls, AdapterPosition::Ffn),
        (Pool::Mean, AdapterPosition::Attention),
    ] {
        let inputs = inputs(&backbone, position, &[3, 0, 7, 29, 11, 4, 5]);
        let whole = run(usize::MAX, pool, &backbone, &inputs);
        for tokens in [1, 25, 40] {
            let got = run(tokens, pool, &backbone, &inputs);
            assert_eq!(got.len(), whole.len());
            for (place, (got, want)) in got.iter().zip(&whole).enumerate() {
                assert_eq!(got.size(), want.size());
                let difference = number(&(got - want).abs().max());
                assert!(
                    difference < 1e-12,
                    "{pool:?}, {position}, {tokens}, {place}: {difference}"
                );
            }
        }
    }
}

#[test]
fn pieces_are_even_keep_the_order_and_share_the_batchs_memory() {
    let backbone = backbone(Kind::Double);
    let inputs = inputs(
        &backbone,
        AdapterPosition::Ffn,
        &[0, 1, 2, 3, 4, 5, 6, 8, 9],
    );
    let t = inputs.mask.size()[1] as usize;
    let rows = |tokens: usize| -> Vec<i64> {
        let pieces = inputs.pieces(tokens).unwrap();
        let joined = |part: fn(&Inputs) -> &Tensor| {
            let parts: Vec<&Tensor> = pieces.iter().map(part).collect();
            assert!(Tensor::cat(&parts, 0) == *part(&inputs));
        };
        joined(|piece| &piece.mask);
        joined(|piece| &piece.weights);
        joined(|piece| &piece.prefix.output);
        joined(|piece| &piece.prefix.residual);
        let first = &pieces[0].prefix.output;
        assert_eq!(first.data_ptr(), inputs.prefix.output.data_ptr());
        pieces.iter().map(|piece| piece.mask.size()[0]).collect()
    };
    assert_eq!(rows(9 * t), [9]);
    assert_eq!(rows(8 * t), [5, 4]);
    assert_eq!(rows(3 * t + 1), [3, 3, 3]);
    // A row longer than a piece goes alone.
    assert_eq!(rows(1), [1; 9]);
}
