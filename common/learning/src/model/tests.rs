use std::sync::Arc;

use tch::Tensor;

use super::*;
use crate::{
    backbone::{Backbone, LayerHook},
    data::{Label, Split, TaskData},
    head::{pooled, token_weights},
    network::softmax,
    testing::{
        applied, backbone, classification, first_payload, go_on, regression, spec_with, tokenizer,
        trainer,
    },
    tokenize::pad,
    trainer::LocalTrainer,
};

fn trained(algorithm: &str, adapter: &str, data: &TaskData) -> (LocalTrainer, Vec<u8>) {
    let spec = spec_with(algorithm, adapter, "", "epochs = 3");
    let mut trainer = trainer(&spec, data);
    let first = first_payload(&spec);
    let update = trainer.train_round(1, &first, &mut go_on).unwrap().update;
    (trainer, applied(&first, update.payload()))
}

fn model(algorithm: &str, adapter: &str, data: &TaskData) -> PersonalModel {
    let (mut trainer, payload) = trained(algorithm, adapter, data);
    trainer.personal_model(&payload).unwrap()
}

fn texts(data: &TaskData) -> Vec<(&str, Option<&str>)> {
    data.test
        .iter()
        .map(|row| (row.text.as_str(), row.pair.as_deref()))
        .collect()
}

#[test]
fn a_model_survives_its_file_and_equal_models_give_equal_bytes() {
    let model = model(
        "name = \"fedmcp\"",
        "combine = \"gate\"",
        &classification(30, 9),
    );
    let bytes = model.to_bytes().unwrap();
    let again = PersonalModel::from_bytes(&bytes).unwrap();
    assert_eq!(again, model);
    assert_eq!(again.to_bytes().unwrap(), bytes);
    assert_eq!(model.facts.validation, None);
    // 2 layers of 2dr + r + d for two adapters, the gate, the head.
    assert_eq!(
        model.parameters(),
        2 * 2 * (2 * 24 * 4 + 4 + 24) + 2 + 3 * 24 + 3
    );
}

#[test]
fn a_model_says_its_position_only_where_it_is_not_the_default() {
    let data = classification(30, 0);
    let facts = |adapter: &str| model("name = \"fedmcp\"", adapter, &data).facts;
    let plain = facts("");
    assert_eq!(plain.adapter_position, AdapterPosition::Ffn);
    assert!(!json(&plain).unwrap().contains("position"));
    let text = json(&facts("position = \"attention\"")).unwrap();
    assert!(
        text.contains("\"adapter_position\":\"attention\""),
        "{text}"
    );
}

#[test]
fn a_task_prepared_for_another_position_is_refused() {
    let data = classification(30, 9);
    let (trainer, _) = trained("name = \"fedmcp\"", "", &data);
    let model = model("name = \"fedmcp\"", "position = \"attention\"", &data);
    let predictor = Predictor::new(model, backbone(Kind::Float)).unwrap();
    let error = predictor
        .evaluate(trainer.task(), Split::Test)
        .unwrap_err()
        .to_string();
    assert!(error.contains("place of the first adapter"), "{error}");
}

#[test]
fn a_model_whose_tensors_are_not_those_of_its_facts_is_refused() {
    let model = model("name = \"fedmcp\"", "", &classification(30, 0));
    let refused = |change: &dyn Fn(&mut PersonalModel)| {
        let mut changed = model.clone();
        change(&mut changed);
        PersonalModel::from_bytes(&changed.to_bytes().unwrap())
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&|m| drop(m.tensors.remove("head.bias"))).contains("`head.bias`"));
    assert!(refused(&|m| m.facts.private_bottleneck = None).contains("private.layer.0"));
    assert!(refused(&|m| m.facts.format = 99).contains("format 99"));
    assert!(refused(&|m| m.facts.private_bottleneck = Some(7)).contains("shape"));
}

#[test]
fn predictions_are_those_of_the_trainers_evaluation() {
    for (algorithm, adapter) in [
        ("name = \"fedmcp\"", ""),
        (
            "name = \"fedmcp\"",
            "combine = \"mean\"\nscale_global = 0.5",
        ),
        ("name = \"fedmcp\"", "combine = \"gate\"\nlayers = [1]"),
        ("name = \"fedmcp\"", "position = \"attention\""),
        ("name = \"ditto\"", "position = \"attention\"\nlayers = [1]"),
        ("name = \"ditto\"", ""),
        ("name = \"local\"", "private_bottleneck = 8"),
        ("name = \"fedavg\"", "scale_global = 2.0"),
    ] {
        let data = classification(30, 12);
        let (mut trainer, payload) = trained(algorithm, adapter, &data);
        let want = trainer.evaluate(&payload, Split::Test).unwrap();
        let model = trainer.personal_model(&payload).unwrap();
        let backbone = backbone(Kind::Float);
        let tokenizer = tokenizer(&backbone);
        let predictor = Predictor::new(model, backbone).unwrap();
        assert_eq!(
            predictor.evaluate(trainer.task(), Split::Test).unwrap(),
            want
        );
        let rows = predictor.evaluate_rows(&tokenizer, &data.test).unwrap();
        assert!(
            (rows.metrics["accuracy"] - want.metrics["accuracy"]).abs() < 1e-12,
            "{algorithm}"
        );
        assert!(
            (rows.metrics["loss"] - want.metrics["loss"]).abs() < 1e-5,
            "{algorithm}"
        );
        let predictions = predictor.predict(&tokenizer, &texts(&data)).unwrap();
        let right = predictions
            .iter()
            .zip(&data.test)
            .filter(|(prediction, row)| {
                let Prediction::Class {
                    label,
                    probabilities,
                } = prediction
                else {
                    panic!("a class is due");
                };
                assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-9);
                matches!(&row.label, Label::Class(class) if class == label)
            })
            .count();
        assert!(
            (right as f64 / 12.0 - want.metrics["accuracy"]).abs() < 1e-12,
            "{algorithm}"
        );
    }
}

#[test]
fn numbers_come_back_on_the_scale_of_the_labels() {
    let data = regression(60, 12);
    let model = model("name = \"fedavg\"", "", &data);
    assert!((model.facts.target_mean - 3.0).abs() < 1e-9);
    let backbone = backbone(Kind::Float);
    let tokenizer = tokenizer(&backbone);
    let predictor = Predictor::new(model, backbone).unwrap();
    for prediction in predictor.predict(&tokenizer, &texts(&data)).unwrap() {
        let Prediction::Number { value } = prediction else {
            panic!("a number is due");
        };
        assert!((-2.0..8.0).contains(&value), "{value}");
    }
}

#[test]
fn a_prediction_is_a_flat_line_of_json() {
    let class = Prediction::Class {
        label: "food".to_owned(),
        probabilities: vec![0.25, 0.75],
    };
    assert_eq!(
        serde_json::to_string(&class).unwrap(),
        r#"{"label":"food","probabilities":[0.25,0.75]}"#
    );
    let number = Prediction::Number { value: 1.5 };
    assert_eq!(serde_json::to_string(&number).unwrap(), r#"{"value":1.5}"#);
}

#[test]
fn inputs_of_the_wrong_kind_are_named() {
    let backbone = backbone(Kind::Float);
    let tokenizer = tokenizer(&backbone);
    let model = model("name = \"fedavg\"", "", &classification(30, 0));
    let predictor = Predictor::new(model, backbone).unwrap();
    let error = predictor
        .predict(&tokenizer, &[("rain", None), ("rain", Some("boat"))])
        .unwrap_err()
        .to_string();
    assert!(error.contains("input 1 is a pair"), "{error}");
}

#[test]
fn labels_unseen_in_training_are_named_at_evaluation() {
    let backbone = backbone(Kind::Float);
    let tokenizer = tokenizer(&backbone);
    let mut data = classification(30, 6);
    let model = model("name = \"fedavg\"", "", &data);
    data.test[2].label = Label::Class("music".to_owned());
    let predictor = Predictor::new(model, backbone).unwrap();
    let error = predictor
        .evaluate_rows(&tokenizer, &data.test)
        .unwrap_err()
        .to_string();
    assert!(error.contains("`music`"), "{error}");
}

#[test]
fn another_backbone_is_refused() {
    let mut model = model("name = \"fedavg\"", "", &classification(30, 0));
    model.facts.backbone = Digest::of(b"another");
    assert!(matches!(
        Predictor::new(model, backbone(Kind::Float)),
        Err(LearningError::State(_))
    ));
}

/// Runs the export alone, with none of the trainer's code.
struct Exported(AdapterPosition, Vec<FusedBottleneck>);

impl LayerHook for Exported {
    fn position(&self) -> AdapterPosition {
        self.0
    }

    fn adapt(&mut self, layer: usize, h: Tensor) -> Result<Tensor, LearningError> {
        let part = &self.1[layer];
        let tensor = |host: &HostTensor| host.to_tensor(Kind::Float).unwrap();
        let inner = h
            .linear(&tensor(&part.down_weight), Some(&tensor(&part.down_bias)))
            .gelu("none");
        Ok(&h + inner.linear(&tensor(&part.up_weight), Some(&tensor(&part.up_bias))))
    }
}

#[test]
fn the_two_adapters_are_exactly_one_bottleneck() {
    for (adapter, width) in [
        ("private_bottleneck = 3", 7),
        ("combine = \"mean\"\nscale_private = 0.5", 8),
        ("combine = \"gate\"", 8),
        ("position = \"attention\"", 8),
    ] {
        let data = classification(30, 12);
        let model = model("name = \"fedmcp\"", adapter, &data);
        let fused: Vec<FusedBottleneck> = (0..2)
            .map(|layer| model.fused_bottleneck(layer).unwrap())
            .collect();
        assert_eq!(fused[0].down_weight.shape, [width, 24]);
        assert_eq!(fused[0].up_weight.shape, [24, width]);
        let backbone: Arc<Backbone> = backbone(Kind::Float);
        let tokenizer = tokenizer(&backbone);
        let encoded = tokenizer.encode_all(&texts(&data)).unwrap();
        let batch = pad(
            &encoded.iter().collect::<Vec<_>>(),
            backbone.config().pad_id,
        )
        .unwrap();
        let position = model.facts.adapter_position;
        let hidden = backbone
            .forward(&batch, &mut Exported(position, fused))
            .unwrap();
        let weights = token_weights(&batch.mask, Kind::Float).unwrap();
        let (weight, bias) = model.head().unwrap();
        let logits = pooled(model.facts.pool, &hidden, &weights).unwrap().linear(
            &weight.to_tensor(Kind::Float).unwrap(),
            Some(&bias.to_tensor(Kind::Float).unwrap()),
        );
        let logits = Vec::<Vec<f64>>::try_from(&logits.to_kind(Kind::Double)).unwrap();
        let predictions = Predictor::new(model, backbone)
            .unwrap()
            .predict(&tokenizer, &texts(&data))
            .unwrap();
        for (row, prediction) in logits.iter().zip(predictions) {
            let Prediction::Class { probabilities, .. } = prediction else {
                panic!("a class is due");
            };
            for (want, got) in softmax(row).iter().zip(&probabilities) {
                assert!((want - got).abs() < 1e-5, "{adapter}");
            }
        }
    }
}

#[test]
fn a_layer_without_adapters_cannot_be_exported() {
    let model = model("name = \"fedmcp\"", "layers = [1]", &classification(30, 0));
    assert!(model.fused_bottleneck(1).is_ok());
    assert!(
        model
            .fused_bottleneck(0)
            .unwrap_err()
            .to_string()
            .contains("[1]")
    );
}
