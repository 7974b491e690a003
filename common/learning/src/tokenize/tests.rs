use std::fs;

use serde::Deserialize;

use super::*;
use crate::backbone::BackboneFiles;

#[derive(Deserialize)]
struct Case {
    first: String,
    second: Option<String>,
    max_length: usize,
    ids: Vec<i64>,
    type_ids: Vec<i64>,
}

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(family)
}

fn config(family: &str) -> BackboneConfig {
    let files = BackboneFiles::find(&fixture(family)).unwrap();
    BackboneConfig::read(&files.config).unwrap()
}

fn load(family: &str, max_length: usize) -> Result<TextTokenizer, LearningError> {
    let files = BackboneFiles::find(&fixture(family)).unwrap();
    TextTokenizer::load(&files.tokenizer, &config(family), max_length)
}

#[test]
fn every_family_tokenizes_as_python_does() {
    for family in ["bert", "roberta", "xlm-roberta", "distilbert"] {
        let text = fs::read(fixture(family).join("tokens.json")).unwrap();
        let cases: Vec<Case> = serde_json::from_slice(&text).unwrap();
        assert!(!cases.is_empty());
        for case in cases {
            let tokenizer = load(family, case.max_length).unwrap();
            let expected = Encoded {
                ids: case.ids,
                type_ids: case.type_ids,
            };
            let second = case.second.as_deref();
            let encoded = match second {
                Some(second) => tokenizer.encode_pair(&case.first, second),
                None => tokenizer.encode(&case.first),
            };
            assert_eq!(
                encoded.unwrap(),
                expected,
                "{family}: {} {second:?}",
                case.first
            );
            let all = tokenizer.encode_all(&[(&case.first, second)]).unwrap();
            assert_eq!(all, [expected], "{family}: {} {second:?}", case.first);
        }
    }
}

#[test]
fn padding_and_truncation_fixed_in_the_file_are_switched_off() {
    let file = fixture("bert").join("0_Transformer/tokenizer.json");
    let saved: serde_json::Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert_eq!(saved["padding"]["strategy"]["Fixed"], 128);
    assert_eq!(saved["truncation"]["max_length"], 128);
    let encoded = load("bert", 32).unwrap().encode("the river rises").unwrap();
    assert_eq!(encoded.ids.len(), 8);
}

#[test]
fn a_length_that_the_backbone_has_no_positions_for_is_refused() {
    let error = load("roberta", 33).unwrap_err();
    assert!(
        error.to_string().contains("more than the 32 positions"),
        "{error}"
    );
    assert!(load("roberta", 32).is_ok());
}

#[test]
fn a_length_without_room_for_a_pair_is_refused() {
    let error = load("roberta", 5).unwrap_err();
    assert!(error.to_string().contains("raise it to 6"), "{error}");
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let file = fixture("roberta").join("tokenizer.json");
    let error = TextTokenizer::load(&file, &config("bert"), 16).unwrap_err();
    assert!(
        error.to_string().contains("do not belong together"),
        "{error}"
    );
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
}

#[test]
fn a_tokenizer_without_the_padding_token_is_refused() {
    let mut larger = config("bert");
    larger.vocab = 500;
    larger.pad_id = 400;
    let files = BackboneFiles::find(&fixture("bert")).unwrap();
    let error = TextTokenizer::load(&files.tokenizer, &larger, 16).unwrap_err();
    assert!(error.to_string().contains("padding id 400"), "{error}");
}

#[test]
fn a_damaged_tokenizer_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    fs::write(&file, b"{\"model\": ").unwrap();
    let error = TextTokenizer::load(&file, &config("bert"), 16).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
}

#[test]
fn rows_are_padded_to_the_longest_of_them() {
    let short = Encoded {
        ids: vec![2, 7, 3],
        type_ids: vec![0, 0, 0],
    };
    let long = Encoded {
        ids: vec![2, 7, 3, 9, 3],
        type_ids: vec![0, 0, 0, 1, 1],
    };
    let batch = pad(&[&short, &long], 1).unwrap();
    let rows = |tensor: &Tensor| Vec::<Vec<i64>>::try_from(tensor).unwrap();
    assert_eq!(rows(&batch.input_ids), [[2, 7, 3, 1, 1], [2, 7, 3, 9, 3]]);
    assert_eq!(rows(&batch.token_types), [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]);
    assert_eq!(rows(&batch.mask), [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]);
}

#[test]
fn a_batch_without_tokens_is_refused() {
    let empty = Encoded {
        ids: vec![],
        type_ids: vec![],
    };
    let row = Encoded {
        ids: vec![2, 3],
        type_ids: vec![0, 0],
    };
    assert!(pad(&[], 0).is_err());
    assert!(pad(&[&empty], 0).is_err());
    let error = pad(&[&row, &empty], 0).unwrap_err();
    assert!(error.to_string().contains("row 1"), "{error}");
}
