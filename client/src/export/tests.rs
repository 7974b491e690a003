use std::{collections::BTreeMap, os::unix::fs::PermissionsExt as _};

use concord_common::{
    RoundNumber,
    job::{AdapterPosition, Combine, Pool},
};
use concord_learning::{
    data::{InputKind, Problem},
    model::ModelFacts,
    named::{HostTensor, NamedTensors, from_safetensors},
};
use serde_json::Value;

use super::*;
use crate::{
    testing::tiny_backbone,
    vault::{Binding, Record},
};

const HIDDEN: usize = 24;

fn weights_digest() -> Digest {
    let files = BackboneFiles::find(&tiny_backbone()).unwrap();
    Digest::of(&fs::read(files.weights).unwrap())
}

/// Adapters of 3 and 2 in layer 1 of the tiny backbone, every element different.
fn model(pool: Pool) -> PersonalModel {
    let mut tensors = NamedTensors::new();
    let mut next = 0.0;
    let mut add = |name: String, shape: &[usize]| {
        let values = (0..shape.iter().product::<usize>())
            .map(|_| {
                next += 0.001;
                next
            })
            .collect();
        tensors.insert(
            name,
            HostTensor {
                shape: shape.to_vec(),
                values,
            },
        );
    };
    for (part, r) in [("global", 3), ("private", 2)] {
        add(format!("{part}.layer.1.down.weight"), &[r, HIDDEN]);
        add(format!("{part}.layer.1.down.bias"), &[r]);
        add(format!("{part}.layer.1.up.weight"), &[HIDDEN, r]);
        add(format!("{part}.layer.1.up.bias"), &[HIDDEN]);
    }
    add("head.weight".to_owned(), &[2, HIDDEN]);
    add("head.bias".to_owned(), &[2]);
    PersonalModel {
        facts: ModelFacts {
            format: 1,
            job: "toy job".to_owned(),
            task: "toy".to_owned(),
            silo: "north".to_owned(),
            algorithm: "fedmcp".to_owned(),
            round: 4,
            backbone_name: "tiny".to_owned(),
            backbone: weights_digest(),
            hidden: HIDDEN as u64,
            adapter_layers: vec![1],
            adapter_position: AdapterPosition::Ffn,
            global_bottleneck: Some(3),
            private_bottleneck: Some(2),
            combine: Combine::Sum,
            scale_global: 1.0,
            scale_private: 1.0,
            pool,
            input: InputKind::Single,
            problem: Problem::Classification {
                classes: vec!["ham".to_owned(), "a|b".to_owned()],
            },
            max_length: 24,
            target_mean: 0.0,
            target_std: 1.0,
            validation: None,
        },
        tensors,
    }
}

fn header() -> Header {
    Header {
        record: Record::Model,
        binding: Binding {
            job: "job-1".parse().unwrap(),
            silo: "north".parse().unwrap(),
            backbone: weights_digest(),
            spec: Digest::of(b"spec"),
        },
        round: RoundNumber(4),
        task: "toy".to_owned(),
        metrics: BTreeMap::from([(
            "test".to_owned(),
            BTreeMap::from([("accuracy".to_owned(), 0.875)]),
        )]),
        spec_toml: String::new(),
    }
}

fn exported(pool: Pool, format: ExportFormat) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("new/adapter");
    let files = write(&model(pool), &header(), &tiny_backbone(), format, &out).unwrap();
    assert!(files.iter().all(|file| file.exists()), "{files:?}");
    (folder, out)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn tensors(path: &Path) -> NamedTensors {
    from_safetensors(&fs::read(path).unwrap()).unwrap().0
}

#[test]
fn two_adapters_become_one_bottleneck_under_the_librarys_names() {
    let (_folder, out) = exported(Pool::Cls, ExportFormat::Adapterhub);
    let found = tensors(&out.join("adapter.safetensors"));
    let place = "bert.encoder.layer.1.output.adapters.concord";
    let shapes: Vec<(&str, &[usize])> = found
        .iter()
        .map(|(name, tensor)| (name.strip_prefix(place).unwrap(), tensor.shape.as_slice()))
        .collect();
    assert_eq!(
        shapes,
        [
            (".adapter_down.0.bias", &[5][..]),
            (".adapter_down.0.weight", &[5, HIDDEN][..]),
            (".adapter_up.bias", &[HIDDEN][..]),
            (".adapter_up.weight", &[HIDDEN, 5][..]),
        ]
    );
    let source = model(Pool::Cls).tensors;
    let down = &found[&format!("{place}.adapter_down.0.weight")].values;
    assert_eq!(
        down[..3 * HIDDEN],
        source["global.layer.1.down.weight"].values
    );
    assert_eq!(
        down[3 * HIDDEN..],
        source["private.layer.1.down.weight"].values
    );
    let bias = &found[&format!("{place}.adapter_up.bias")].values;
    let sum =
        source["global.layer.1.up.bias"].values[7] + source["private.layer.1.up.bias"].values[7];
    assert!((bias[7] - sum).abs() < 1e-6);
}

#[test]
fn the_librarys_configuration_says_where_and_how_wide() {
    let (_folder, out) = exported(Pool::Cls, ExportFormat::Adapterhub);
    let found = json(&out.join("adapter_config.json"));
    assert_eq!(found["model_class"], "BertAdapterModel");
    assert_eq!(found["config"]["leave_out"], serde_json::json!([0]));
    assert_eq!(found["config"]["output_adapter"], true);
    assert_eq!(found["config"]["mh_adapter"], false);
    assert_eq!(found["config"]["original_ln_before"], false);
    let head = json(&out.join("head_config.json"));
    assert_eq!(head["config"]["label2id"]["ham"], 0);
    let weights = tensors(&out.join("model_head.safetensors"));
    assert_eq!(weights["heads.concord.1.weight"].shape, [2, HIDDEN]);
}

#[test]
fn adapters_after_the_attention_are_the_librarys_attention_adapters() {
    let folder = tempfile::tempdir().unwrap();
    let mut moved = model(Pool::Cls);
    moved.facts.adapter_position = AdapterPosition::Attention;
    let export = |format, name: &str| {
        let out = folder.path().join(name);
        write(&moved, &header(), &tiny_backbone(), format, &out).unwrap();
        out
    };
    let hub = export(ExportFormat::Adapterhub, "hub");
    let config = json(&hub.join("adapter_config.json"));
    assert_eq!(config["config"]["mh_adapter"], true);
    assert_eq!(config["config"]["output_adapter"], false);
    let found = tensors(&hub.join("adapter.safetensors"));
    let place = "bert.encoder.layer.1.attention.output.adapters.concord.";
    assert_eq!(found.len(), 4);
    assert!(
        found.keys().all(|name| name.starts_with(place)),
        "{:?}",
        found.keys()
    );
    for out in [hub, export(ExportFormat::Safetensors, "plain")] {
        let card = fs::read_to_string(out.join("README.md")).unwrap();
        let row = "| adapter position | after the attention's output projection |";
        assert!(card.contains(row), "{card}");
        assert!(!card.contains("feed-forward"), "{card}");
    }
}

#[test]
fn a_head_on_the_mean_stands_beside_the_librarys_files() {
    let (_folder, out) = exported(Pool::Mean, ExportFormat::Adapterhub);
    assert!(!out.join("head_config.json").exists());
    assert_eq!(
        tensors(&out.join("concord_head.safetensors"))["head.bias"].shape,
        [2]
    );
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(
        card.contains("concord_head.safetensors") && card.contains("max_length=24"),
        "{card}"
    );
}

#[test]
fn the_code_takes_both_texts_of_a_pair_and_ends_with_the_number() {
    let folder = tempfile::tempdir().unwrap();
    let code = |model: &PersonalModel, name: &str| {
        let out = folder.path().join(name);
        let format = ExportFormat::Adapterhub;
        write(model, &header(), &tiny_backbone(), format, &out).unwrap();
        let page = fs::read_to_string(out.join("README.md")).unwrap();
        page.split("```").nth(1).unwrap().to_owned()
    };
    let single = code(&model(Pool::Cls), "single");
    let texts = "tokenizer([\"a text\"], trunc";
    assert!(single.contains(texts), "{single}");
    assert!(single.ends_with("logits = model(**inputs).logits\n"));

    let mut numbers = model(Pool::Mean);
    numbers.facts.input = InputKind::Pair;
    numbers.facts.problem = Problem::Regression;
    numbers.facts.target_std = 1.5;
    numbers.facts.target_mean = -2.0;
    for (name, shape) in [("head.weight", vec![1, HIDDEN]), ("head.bias", vec![1])] {
        let values = vec![0.5; shape.iter().product()];
        let tensor = HostTensor { shape, values };
        numbers.tensors.insert(name.to_owned(), tensor);
    }
    let pair = code(&numbers, "pair");
    let texts = "tokenizer([\"a text\"], [\"its second text\"], trunc";
    assert!(pair.contains(texts), "{pair}");
    assert!(pair.ends_with("\nnumber = logits * 1.5 + -2\n"), "{pair}");
}

#[test]
fn every_width_survives_the_librarys_division() {
    for hidden in [24, 384, 768, 1024] {
        for width in 1..=hidden + 7 {
            let factor = adapterhub::reduction_factor(hidden, width);
            // Python: int(hidden // factor)
            assert_eq!(
                (hidden as f64 / factor).floor() as usize,
                width,
                "{hidden} {width}"
            );
        }
    }
}

#[test]
fn a_plain_export_is_the_model_with_a_card() {
    let (_folder, out) = exported(Pool::Mean, ExportFormat::Safetensors);
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    assert_eq!(
        PersonalModel::from_bytes(&bytes).unwrap(),
        model(Pool::Mean)
    );
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    for fact in [
        "toy job (job-1)",
        "fedmcp",
        &weights_digest().to_string(),
        "| best round | 4 |",
        "| test | accuracy | 0.8750 |",
        "| 0 | ham |",
        "| 1 | a\\|b |",
        "private adapter",
    ] {
        assert!(card.contains(fact), "{fact} is not in\n{card}");
    }
}

#[test]
fn the_card_gives_the_coefficients_of_every_way_of_joining() {
    let g = 1.0 / (1.0 + (-1.5_f32).exp());
    let cases = [
        (
            Combine::Sum,
            [Some(0.5), Some(2.0)],
            "c_g = s_g and c_p = s_p.",
        ),
        (
            Combine::Mean,
            [Some(0.25), Some(1.0)],
            "c_g = s_g / 2 and c_p = s_p / 2.",
        ),
        (
            Combine::Gate,
            [Some(g * 0.5), Some((1.0 - g) * 2.0)],
            "c_g = g s_g and c_p = (1 - g) s_p, with g = sigmoid(gate[k]) ",
        ),
        (
            Combine::Sum,
            [Some(0.5), None],
            "c_g = s_g and there is no A_p.",
        ),
        (
            Combine::Sum,
            [None, Some(0.5)],
            "c_p = s_g and there is no A_g.",
        ),
    ];
    for (combine, [c_g, c_p], wanted) in cases {
        let mut joined = model(Pool::Mean);
        joined.facts.combine = combine;
        joined.facts.scale_global = 0.5;
        joined.facts.scale_private = 2.0;
        joined.facts.global_bottleneck = c_g.map(|_| 3);
        joined.facts.private_bottleneck = c_p.map(|_| 2);
        let tensors = &mut joined.tensors;
        for (prefix, factor) in [("global.", c_g), ("private.", c_p)] {
            if factor.is_none() {
                tensors.retain(|name, _| !name.starts_with(prefix));
            }
        }
        if combine == Combine::Gate {
            let gate = HostTensor {
                shape: vec![1],
                values: vec![1.5],
            };
            tensors.insert("gate".to_owned(), gate);
        }

        let text = card::plain(&joined, &header());
        let line = format!(
            "In each adapter layer, after the feed-forward network and before its residual \
             and LayerNorm: h' = h + c_g A_g(h) + c_p A_p(h), where {wanted}"
        );
        for part in [
            line.as_str(),
            "A(h) = up · GELU(down · h + b_d) + b_u, with the exact GELU (erf).",
            "| scale of the global adapter, s_g | 0.5 |",
            "| scale of the private adapter, s_p | 2 |",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }

        // It is what the model computes.
        let term = |part: &str, factor: Option<f32>| {
            let name = format!("{part}.layer.1.up.bias");
            factor.map_or(0.0, |factor| factor * joined.tensors[&name].values[7])
        };
        let found = joined.fused_bottleneck(1).unwrap().up_bias.values[7];
        let expected = term("global", c_g) + term("private", c_p);
        assert!(
            (found - expected).abs() < 1e-5,
            "{combine:?}: {found}, {expected}"
        );
    }
}

#[test]
fn an_export_is_private_and_never_replaces_anything() {
    let (folder, out) = exported(Pool::Mean, ExportFormat::Safetensors);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode(&out), mode(&out.join("model.safetensors"))),
        (0o700, 0o600)
    );
    let again = write(
        &model(Pool::Mean),
        &header(),
        &tiny_backbone(),
        ExportFormat::Adapterhub,
        &out,
    );
    assert!(matches!(again, Err(ExportError::Exists(_))));
    let left: Vec<_> = fs::read_dir(folder.path().join("new")).unwrap().collect();
    assert_eq!(left.len(), 1, "nothing half-made is left: {left:?}");
}

#[test]
fn a_model_of_another_backbone_is_not_exported() {
    let folder = tempfile::tempdir().unwrap();
    let mut foreign = model(Pool::Mean);
    foreign.facts.backbone = Digest::of(b"other");
    let out = folder.path().join("out");
    let error = write(
        &foreign,
        &header(),
        &tiny_backbone(),
        ExportFormat::Safetensors,
        &out,
    )
    .unwrap_err();
    assert!(matches!(error, ExportError::Backbone { .. }), "{error}");
    assert!(!out.exists());
}
