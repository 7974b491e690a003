//! Folders: their layouts, their `config.json`, and weights that do not fit.

use std::fs;

use safetensors::{SafeTensors, serialize_to_file, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// A copy of a fixture's flat folder that may be spoilt.
fn copy(family: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    let files = BackboneFiles::find(&fixture(family)).unwrap();
    for file in [files.config, files.weights, files.tokenizer] {
        fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
    }
    copy
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(&path, config.to_string()).unwrap();
}

fn load_error(folder: &Path) -> String {
    Backbone::load(folder, Kind::Float).unwrap_err().to_string()
}

/// Renames tensors of the weights file; those mapped to `None` are dropped.
fn rename_tensors(folder: &Path, rename: impl Fn(&str) -> Option<String>) {
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let kept: Vec<(String, TensorView<'_>)> = stored
        .tensors()
        .into_iter()
        .filter_map(|(name, view)| Some((rename(&name)?, view)))
        .collect();
    serialize_to_file(kept, None, &path).unwrap();
}

#[test]
fn every_family_is_recognised() {
    let found = FAMILIES.map(|family| backbone(family, Kind::Float).config().clone());
    let families = found.each_ref().map(|config| config.family);
    assert_eq!(
        families,
        [
            Family::Bert,
            Family::Roberta,
            Family::XlmRoberta,
            Family::DistilBert
        ]
    );
    assert_eq!(families.map(Family::model_type), FAMILIES);
    for config in found {
        assert_eq!(config.hidden, 24);
        assert_eq!(config.heads, 3);
        assert_eq!(config.intermediate, 40);
        assert_eq!(config.layers, 2);
        assert_eq!(config.max_positions, 32);
        let roberta = matches!(config.family, Family::Roberta | Family::XlmRoberta);
        assert_eq!(config.pad_id, i64::from(roberta));
    }
}

#[test]
fn a_family_has_the_same_name_in_files_and_in_print() {
    for family in [
        Family::Bert,
        Family::Roberta,
        Family::XlmRoberta,
        Family::DistilBert,
    ] {
        assert_eq!(json!(family), json!(family.model_type()));
        assert_eq!(family.to_string(), family.model_type());
    }
}

#[test]
fn the_digest_is_that_of_the_weights_file() {
    let files = BackboneFiles::find(&fixture("bert")).unwrap();
    let expected = Digest::of(&fs::read(files.weights).unwrap());
    assert_eq!(*backbone("bert", Kind::Float).digest(), expected);
}

#[test]
fn every_missing_and_unexpected_tensor_is_named_for_every_family() {
    for family in FAMILIES {
        let copy = copy(family);
        let down = if family == "distilbert" {
            "layer.1.ffn.lin2.weight"
        } else {
            "layer.1.output.dense.weight"
        };
        rename_tensors(copy.path(), |name| {
            if name.ends_with("word_embeddings.weight") {
                return None;
            }
            if name.ends_with(down) {
                return Some("classifier.weight".to_owned());
            }
            Some(name.to_owned())
        });
        let error = load_error(copy.path());
        assert!(
            error.contains("2 missing tensors: embeddings.word_embeddings.weight"),
            "{error}"
        );
        assert!(error.contains(down), "{error}");
        assert!(
            error.contains("1 unexpected tensors: classifier.weight"),
            "{error}"
        );
        assert!(error.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn weights_that_do_not_fit_the_configuration_name_tensor_and_shapes() {
    let copy = copy("roberta");
    edit_config(copy.path(), |config| config["vocab_size"] = json!(286));
    let error = load_error(copy.path());
    assert!(
        error.contains("embeddings.word_embeddings.weight has shape [285, 24], not [286, 24]"),
        "{error}"
    );
}

#[test]
fn more_layers_in_the_file_than_in_the_configuration_are_unexpected() {
    let copy = copy("bert");
    edit_config(copy.path(), |config| config["num_hidden_layers"] = json!(1));
    let error = load_error(copy.path());
    assert!(error.contains("16 unexpected tensors"), "{error}");
    assert!(
        error.contains("bert.encoder.layer.1.attention.self.query.weight"),
        "{error}"
    );
}

#[test]
fn a_configuration_that_cannot_be_run_says_which_field() {
    let cases: [(&str, &str, Value, &str); 8] = [
        ("bert", "model_type", json!("gpt2"), "model_type \"gpt2\""),
        ("bert", "hidden_act", json!("relu"), "hidden_act \"relu\""),
        (
            "distilbert",
            "activation",
            json!("relu"),
            "activation \"relu\"",
        ),
        (
            "bert",
            "position_embedding_type",
            json!("relative_key"),
            "position_embedding_type",
        ),
        ("bert", "is_decoder", json!(true), "is_decoder"),
        (
            "bert",
            "num_attention_heads",
            json!(5),
            "not a multiple of the 5 heads",
        ),
        ("roberta", "pad_token_id", json!(999), "pad_token_id 999"),
        ("bert", "hidden_size", json!("wide"), "invalid type"),
    ];
    for (family, field, value, expected) in cases {
        let copy = copy(family);
        edit_config(copy.path(), |config| config[field] = value);
        let error = load_error(copy.path());
        assert!(error.contains(expected), "{error}");
        assert!(error.contains("config.json"), "{error}");
    }
}

#[test]
fn a_kind_that_is_no_float_is_refused() {
    let error = Backbone::load(&fixture("bert"), Kind::Half).unwrap_err();
    assert!(error.to_string().contains("Half"), "{error}");
}

#[test]
fn the_sentence_transformers_layout_is_found_with_and_without_its_list() {
    let nested = fixture("bert").join("0_Transformer");
    assert_eq!(
        BackboneFiles::find(&fixture("bert")).unwrap().config,
        nested.join("config.json")
    );

    let older = tempfile::tempdir().unwrap();
    let home = older.path().join("0_Transformer");
    fs::create_dir(&home).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(nested.join(file), home.join(file)).unwrap();
    }
    // The tokenizer may stand at the top.
    fs::copy(
        nested.join("tokenizer.json"),
        older.path().join("tokenizer.json"),
    )
    .unwrap();
    let files = BackboneFiles::find(older.path()).unwrap();
    assert_eq!(files.weights, home.join("model.safetensors"));
    assert_eq!(files.tokenizer, older.path().join("tokenizer.json"));
}

#[test]
fn a_list_of_modules_may_name_the_folder_itself() {
    let copy = copy("distilbert");
    let modules = json!([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]);
    fs::write(copy.path().join("modules.json"), modules.to_string()).unwrap();
    assert!(Backbone::load(copy.path(), Kind::Float).is_ok());
}

#[test]
fn a_list_of_modules_may_not_lead_out_of_the_folder() {
    for path in ["../bert", "/etc"] {
        let folder = tempfile::tempdir().unwrap();
        let modules = json!([{"path": path, "type": "sentence_transformers.models.Transformer"}]);
        fs::write(folder.path().join("modules.json"), modules.to_string()).unwrap();
        let error = load_error(folder.path());
        assert!(error.contains("leads out of the folder"), "{error}");
    }
}

#[test]
fn a_list_of_modules_without_a_transformer_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("modules.json"), "[]").unwrap();
    let error = load_error(folder.path());
    assert!(
        error.contains("modules.json: no module of type Transformer"),
        "{error}"
    );
}

#[test]
fn a_file_that_is_not_there_is_named() {
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let copy = copy("roberta");
        fs::remove_file(copy.path().join(file)).unwrap();
        let error = load_error(copy.path());
        assert!(error.contains(file), "{error}");
    }
}

#[test]
fn weights_in_another_form_are_explained() {
    for (file, expected) in [
        ("pytorch_model.bin", "convert it to safetensors"),
        ("model.safetensors.index.json", "save them as one"),
    ] {
        let copy = copy("roberta");
        fs::rename(
            copy.path().join("model.safetensors"),
            copy.path().join(file),
        )
        .unwrap();
        let error = load_error(copy.path());
        assert!(error.contains(expected), "{error}");
    }
}
