//! A vocabulary in the format of CLIP's tokenizer, learned on the words of the captions: byte symbols, merges until every word of the captions is one
//! token, and the two ends (byte-pair encoding, Sennrich et al. 2016, arXiv 1508.07909).

use std::collections::{BTreeMap, BTreeSet};

use concord_artaug::{
    data::{BACKGROUNDS, STYLES},
    words::{Dimension, Level, Place},
};
use serde_json::{Map, Value};

/// Symbols and merges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    tokens: Vec<String>,
    merges: Vec<(String, String)>,
}

impl Vocabulary {
    /// What every text begins with.
    pub const START: &'static str = "<|startoftext|>";
    /// What every text ends with.
    pub const END: &'static str = "<|endoftext|>";

    /// Learned on the words that captions of these subjects can have.
    pub fn of_captions<'a>(subjects: impl IntoIterator<Item = &'a str>) -> Self {
        Self::learn(&caption_words(subjects))
    }

    /// Merges the most frequent pair of symbols, the first in order among equals, until every word is one symbol.
    fn learn(words: &BTreeMap<String, u64>) -> Self {
        let bytes = byte_symbols();
        let mut tokens: Vec<String> = bytes.iter().map(char::to_string).collect();
        tokens.extend(bytes.iter().map(|symbol| format!("{symbol}</w>")));
        let mut spelled: Vec<(Vec<String>, u64)> = words
            .iter()
            .map(|(word, &count)| {
                let mut symbols: Vec<String> = word
                    .bytes()
                    .map(|byte| bytes[usize::from(byte)].to_string())
                    .collect();
                if let Some(last) = symbols.last_mut() {
                    last.push_str("</w>");
                }
                (symbols, count)
            })
            .collect();
        let mut merges = Vec::new();
        let mut known: BTreeSet<String> = tokens.iter().cloned().collect();
        loop {
            let mut pairs: BTreeMap<(&str, &str), u64> = BTreeMap::new();
            for (symbols, count) in &spelled {
                for pair in symbols.windows(2) {
                    *pairs.entry((&pair[0], &pair[1])).or_default() += count;
                }
            }
            let mut best: Option<((&str, &str), u64)> = None;
            for (pair, count) in pairs {
                if best.is_none_or(|(_, most)| count > most) {
                    best = Some((pair, count));
                }
            }
            let Some(((first, second), _)) = best else {
                break;
            };
            let merge = (first.to_owned(), second.to_owned());
            for (symbols, _) in &mut spelled {
                join(symbols, &merge);
            }
            let token = format!("{}{}", merge.0, merge.1);
            if known.insert(token.clone()) {
                tokens.push(token);
            }
            merges.push(merge);
        }
        tokens.extend([Self::START, Self::END].map(str::to_owned));
        Self { tokens, merges }
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token; never.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Id of the beginning.
    pub fn start(&self) -> usize {
        self.tokens.len() - 2
    }

    /// Id of the end, which pads too.
    pub fn end(&self) -> usize {
        self.tokens.len() - 1
    }

    /// The text of `vocab.json`.
    pub fn vocab_json(&self) -> String {
        let ids: Map<String, Value> = self
            .tokens
            .iter()
            .enumerate()
            .map(|(id, token)| (token.clone(), Value::from(id)))
            .collect();
        format!("{}\n", Value::Object(ids))
    }

    /// The text of `merges.txt`.
    pub fn merges_text(&self) -> String {
        let lines: Vec<String> = self
            .merges
            .iter()
            .map(|(first, second)| format!("{first} {second}\n"))
            .collect();
        format!("#version: 0.2\n{}", lines.concat())
    }
}

/// Replaces each occurrence of a pair by the joined symbol, from left to right.
fn join(symbols: &mut Vec<String>, (first, second): &(String, String)) {
    let mut place = 0;
    while place + 1 < symbols.len() {
        if &symbols[place] == first && &symbols[place + 1] == second {
            let tail = symbols.remove(place + 1);
            symbols[place].push_str(&tail);
        }
        place += 1;
    }
}

/// The character that stands for each byte in files of byte-level BPE: itself where it is printable, else one from 256 on.
fn byte_symbols() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256;
    (0..256_u32)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("codes below 512 are characters")
        })
        .collect()
}

/// The words of all captions with how many phrases have them, cut as the tokenizer cuts: runs of letters, single digits, runs of other signs.
fn caption_words<'a>(subjects: impl IntoIterator<Item = &'a str>) -> BTreeMap<String, u64> {
    let mut phrases: Vec<String> = subjects
        .into_iter()
        .map(|name| name.replace(['-', '_'], " "))
        .collect();
    phrases.extend(STYLES.map(|style| format!("{style} style,")));
    phrases.extend(BACKGROUNDS.map(|(name, _)| format!("{name} background")));
    for dimension in Dimension::ALL {
        for level in [Level::Low, Level::Good, Level::High] {
            phrases.push(dimension.word(level).to_owned());
        }
    }
    phrases.extend(Place::ALL.map(|place| place.words().to_owned()));
    let mut words = BTreeMap::new();
    for phrase in phrases {
        for word in cut(&phrase.to_lowercase()) {
            *words.entry(word).or_default() += 1;
        }
    }
    words
}

fn cut(text: &str) -> Vec<String> {
    #[derive(PartialEq, Clone, Copy)]
    enum Kind {
        Space,
        Letter,
        Digit,
        Sign,
    }
    let kind = |letter: char| {
        if letter.is_whitespace() {
            Kind::Space
        } else if letter.is_alphabetic() {
            Kind::Letter
        } else if letter.is_numeric() {
            Kind::Digit
        } else {
            Kind::Sign
        }
    };
    let mut words: Vec<String> = Vec::new();
    let mut before = Kind::Space;
    for letter in text.chars() {
        let now = kind(letter);
        match (now, words.last_mut()) {
            (Kind::Space, _) => {}
            (Kind::Letter | Kind::Sign, Some(word)) if now == before => word.push(letter),
            _ => words.push(letter.to_string()),
        }
        before = now;
    }
    words
}

#[cfg(test)]
mod tests {
    use std::fs;

    use concord_artaug::data::{base_subjects, plain_prompt};
    use concord_learning::diffusion::prompt::PromptTokenizer;

    use super::*;

    #[test]
    fn every_word_of_a_caption_is_one_token_of_the_loaded_tokenizer() {
        let words = Vocabulary::of_captions(base_subjects());
        assert!((1000..3000).contains(&words.len()), "{}", words.len());
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("vocab.json"), words.vocab_json()).unwrap();
        fs::write(folder.path().join("merges.txt"), words.merges_text()).unwrap();
        let tokenizer = PromptTokenizer::load(folder.path(), 40, words.len() as i64).unwrap();
        let mut longest = 0;
        for name in base_subjects() {
            let caption = format!(
                "{}, dim at the top left, glaring, off centre",
                plain_prompt(name, "noto", "purple")
            );
            let tokens = tokenizer.count(&caption).unwrap();
            assert_eq!(tokens, cut(&caption).len(), "{caption}");
            longest = longest.max(
                tokenizer
                    .count(&plain_prompt(name, "noto", "blue"))
                    .unwrap(),
            );
        }
        // Five statements of at most six tokens and a comma each may follow, of which three are usual.
        assert!(longest <= 14, "{longest}");
    }

    #[test]
    fn equal_subjects_give_equal_files() {
        let once = Vocabulary::of_captions(["red-apple", "pool-8-ball"]);
        assert_eq!(once, Vocabulary::of_captions(["red-apple", "pool-8-ball"]));
        assert_ne!(once, Vocabulary::of_captions(["red-apple"]));
        assert_eq!(
            cut("pool 8 ball, t-rex"),
            ["pool", "8", "ball", ",", "t", "-", "rex"]
        );
    }
}
