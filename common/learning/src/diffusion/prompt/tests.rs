//! Agreement with Python's `transformers`, and refusals.

use std::fs;

use super::*;
use crate::diffusion::testing::{self, CHECKPOINTS, PLAIN};

/// The prompts of the fixtures, as `diffusion_fixtures.py` has them.
fn texts() -> [String; 5] {
    [
        "a red fox in the snow".to_owned(),
        String::new(),
        "The Quick brown FOX's 42 jumps, isn't it? we'll see!!".to_owned(),
        "caf\u{e9} na\u{ef}ve \u{6f22}\u{5b57}   two  spaces\tand a tab".to_owned(),
        "many words ".repeat(60),
    ]
}

#[test]
fn ids_agree_with_transformers() {
    // sd1 has vocab.json and merges.txt, sd2 tokenizer.json and another token for padding.
    for name in CHECKPOINTS {
        let tokenizer =
            PromptTokenizer::load(&testing::fixture(name).join("tokenizer"), 77, 523).unwrap();
        let theirs = testing::results(name, "reference.safetensors")
            .tensor("ids")
            .unwrap();
        let texts = texts();
        let ours = tokenizer
            .batch(&texts.each_ref().map(String::as_str))
            .unwrap();
        assert!(testing::same(&ours, &theirs), "{name}");
        assert_eq!(tokenizer.count(&texts[0]).unwrap(), 9);
        assert!(tokenizer.count(&texts[4]).unwrap() > 77);
    }
}

#[test]
fn a_prompt_is_cut_as_soon_as_its_tokens_and_the_two_around_them_are_more_than_the_encoder_reads() {
    for name in CHECKPOINTS {
        let tokenizer =
            PromptTokenizer::load(&testing::fixture(name).join("tokenizer"), 77, 523).unwrap();
        for (words, cut) in [(0, false), (1, false), (75, false), (76, true), (500, true)] {
            let prompt = "the ".repeat(words);
            assert_eq!(tokenizer.count(&prompt).unwrap(), words);
            assert_eq!(tokenizer.cuts(&prompt).unwrap(), cut, "{name} {words}");
        }
    }
}

#[test]
fn a_special_tokens_text_in_a_prompt_does_no_harm() {
    for name in CHECKPOINTS {
        let tokenizer =
            PromptTokenizer::load(&testing::fixture(name).join("tokenizer"), 77, 523).unwrap();
        let ids = tokenizer
            .ids("fox <|endoftext|> \u{0} \u{202e} fox")
            .unwrap();
        assert_eq!(ids.len(), 77);
    }
}

#[test]
fn files_that_do_not_belong_are_refused() {
    let folder = testing::checkpoint("sd1", PLAIN);
    let home = folder.path().join("tokenizer");
    let refusal = |positions, vocab| {
        PromptTokenizer::load(&home, positions, vocab)
            .unwrap_err()
            .to_string()
    };
    assert!(refusal(77, 522).contains("do not belong together"));
    fs::write(home.join("merges.txt"), "#version: 0.2\nt h e\n").unwrap();
    assert!(refusal(77, 523).contains("no pair"));
    fs::write(home.join("merges.txt"), "#version: 0.2\nzz yy\n").unwrap();
    refusal(77, 523);
    fs::write(home.join("merges.txt"), "").unwrap();
    fs::write(home.join("vocab.json"), "{\"a\":0}").unwrap();
    assert!(refusal(77, 523).contains("<|startoftext|>"));
}
