use super::*;
use crate::{
    advisor::Advice,
    machine::{Advised, Generated, ManifestLine},
};

fn advised(item: u32, prompt: &str, regions: &[([f64; 4], &str)]) -> ManifestLine {
    let region = |(edges, prompt): &([f64; 4], &str)| Region {
        area: Area::try_from(*edges).unwrap(),
        prompt: RegionPrompt::new(prompt).unwrap(),
        confidence: 0.5,
    };
    ManifestLine {
        iteration: 1,
        item,
        base: Some(Generated {
            prompt: prompt.to_owned(),
            seed: 0,
            image: concord_common::Digest::of(b"image"),
            cut: 0,
            forwards: 1,
            seconds: 0.0,
        }),
        advice: Some(Advised {
            advisor: "test".to_owned(),
            advice: Advice {
                regions: regions.iter().map(region).collect(),
                ..Advice::default()
            },
            error: None,
            seconds: 0.0,
        }),
        enhanced: None,
        scores: None,
        verdict: None,
    }
}

fn page_of(counts: AdviceCounts) -> String {
    let gallery = Gallery {
        advice: counts,
        ..sample()
    };
    let html = gallery.to_html().unwrap();
    check_nesting(&html);
    html
}

#[test]
fn advice_that_nearly_every_pair_gets_stands_first_with_its_share() {
    let middle = [0.25, 0.25, 0.75, 0.75];
    let mut counts = AdviceCounts::default();
    let once = |item, prompt: &str| advised(item, prompt, &[(middle, &format!("{prompt}, sharp"))]);
    counts.add(&[once(0, "red apple"), once(1, "green tree")]);
    counts.add(&[
        once(2, "blue car"),
        advised(3, "a cat", &[]),
        advised(4, "a dog", &[([0.0, 0.0, 1.0, 1.0], "a dog, well lit")]),
    ]);
    let html = page_of(counts);
    assert!(html.contains("4 of 5 pairs got advice"), "{html}");
    assert!(
        html.contains("<td>sharp</td><td>0.25 0.25 0.75 0.75</td><td>3 (60 %)</td>"),
        "{html}"
    );
    // What one pair alone got is no pattern.
    assert!(!html.contains("<td>well lit</td>"));
}

#[test]
fn the_same_advice_twice_on_a_pair_counts_once_and_strange_words_are_escaped() {
    let (box_, words) = ([0.0, 0.0, 1.0, 1.0], "it's (lit)");
    let mut counts = AdviceCounts::default();
    counts.add(&[
        advised(0, "red apple", &[(box_, words), (box_, words)]),
        advised(1, "green tree", &[(box_, words)]),
    ]);
    let html = page_of(counts);
    assert!(html.contains("<td>it&#39;s (lit)</td>"), "{html}");
    assert!(html.contains("<td>2 (100 %)</td>"), "{html}");
}

#[test]
fn a_page_without_advice_has_no_table_of_it() {
    assert!(!page_of(AdviceCounts::default()).contains("<h2>Advice</h2>"));
}
