use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    advisor::RegionPrompt,
    machine::{Decision, StopReason},
    region::Area,
    stats::{Interval, Wins},
};

fn picture(shade: u8) -> Image {
    let mut image = Image::filled(24, 24, [shade, 140, 200]).unwrap();
    for y in 6..18 {
        for x in 6..18 {
            image.put(x, y, [220, shade / 2, 60]);
        }
    }
    image
}

fn pair(item: u32, kept: bool) -> PairView {
    let region = |edges: [f64; 4], prompt: &str| Region {
        area: Area::try_from(edges).unwrap(),
        prompt: RegionPrompt::new(prompt).unwrap(),
        confidence: 0.7,
    };
    PairView {
        iteration: 1,
        item,
        prompt: "red apple, blue background".to_owned(),
        base: picture(60),
        enhanced: Some(picture(120)),
        regions: vec![
            region([0.0, 0.5, 0.5, 1.0], "red apple, well lit"),
            region([0.25, 0.0, 1.0, 0.5], "red apple, colourful"),
        ],
        rejected_replies: vec![RejectedReply {
            raw: "<img src=x onerror=alert(1)>".to_owned(),
            code: "no-json".to_owned(),
            reason: "the answer holds no JSON".to_owned(),
        }],
        scores: vec![("photometry".to_owned(), -0.8, -0.1)],
        kept,
        verdict: "the gain is 1.2 spreads".to_owned(),
    }
}

fn summary(iteration: u32) -> Summary {
    let interval = Interval {
        mean: 0.12,
        low: 0.08,
        high: 0.16,
        pairs: 200,
    };
    let arm = ArmSummary {
        score: -3.1,
        gain: interval,
        wins: Wins {
            wins: 150,
            ties: 10,
            losses: 40,
        },
        alignment: Some(0.31),
        diversity: Some(0.28),
    };
    Summary {
        iteration,
        raw_gain: Some(interval),
        kept: 48,
        rejected: [("little-gain".to_owned(), 200)].into(),
        rejected_replies: 3,
        arms: BTreeMap::from([(Arm::Base, arm.clone()), (Arm::Enhanced, arm)]),
        decision: if iteration == 1 {
            Decision::Continue
        } else {
            Decision::Stop {
                keep: 2,
                reason: StopReason::Maximum,
            }
        },
    }
}

fn sample() -> Gallery {
    Gallery {
        title: "icons, first try".to_owned(),
        notes: vec!["The base model is small and its weaknesses are planted.".to_owned()],
        iterations: vec![summary(1), summary(2)],
        pairs: vec![pair(0, true), pair(1, false), pair(2, true)],
        held_out: vec![HeldOutView {
            prompt: "green tree".to_owned(),
            seed: 7,
            images: vec![
                ("base".to_owned(), picture(50), -3.4),
                ("enhanced".to_owned(), picture(150), -2.9),
            ],
        }],
        curves: vec![Curve {
            name: "LoRA_1, iteration 1".to_owned(),
            losses: (0..1000)
                .map(|step| 1.0 / (1.0 + f64::from(step) / 50.0))
                .collect(),
        }],
        costs: vec![("forward passes".to_owned(), "12,345".to_owned())],
    }
}

/// The page's tags that open and close, in order, must nest.
fn check_nesting(html: &str) {
    let mut open = Vec::new();
    for part in html.split('<').skip(1) {
        let tag: String = part
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || "/!".contains(*c))
            .collect();
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(
                open.pop().as_deref(),
                Some(name),
                "{}",
                &part[..part.len().min(80)]
            ),
            None if tag.starts_with('!') || ["meta", "img"].contains(&tag.as_str()) => {}
            None if part.split('>').next().unwrap().ends_with('/') => {}
            None => open.push(tag),
        }
    }
    assert_eq!(open, Vec::<String>::new());
}

#[test]
fn the_page_shows_every_part_and_stands_alone() {
    let html = sample().to_html().unwrap();
    check_nesting(&html);
    for text in [
        "icons, first try",
        "planted",
        "Kept pairs",
        "Rejected pairs",
        "green tree",
        "LoRA_1, iteration 1",
        "12,345",
        "little-gain",
        "78 %",
        "stop, keeping iteration 2",
        "well lit",
        "seed 7",
        "+0.120 (+0.080 to +0.160)",
    ] {
        assert!(html.contains(text), "{text}");
    }
    assert!(html.contains("<rect x=\"0.00\" y=\"50.00\" width=\"50.00\" height=\"50.00\""));
    let without_names = html.replace("http-equiv", "");
    assert!(!without_names.contains("http") && !html.contains("<script") && !html.contains("href"));
}

#[test]
fn an_empty_gallery_is_a_page_all_the_same() {
    let html = Gallery::default().to_html().unwrap();
    check_nesting(&html);
    assert!(!html.contains("<h2>"));
}

#[test]
fn a_curve_of_nothing_finite_is_left_out() {
    let mut page = String::new();
    let curve = |losses: Vec<f64>| Curve {
        name: "x".to_owned(),
        losses,
    };
    chart::curves(
        &mut page,
        &[curve(vec![]), curve(vec![1.0]), curve(vec![f64::NAN; 9])],
    );
    assert_eq!(page, "");
    chart::curves(&mut page, &[curve(vec![2.0, f64::INFINITY, 2.0])]);
    assert!(page.contains("polyline") && !page.contains("NaN"));
}

proptest! {
    #[test]
    fn hostile_texts_stay_texts(text in "\\PC{0,40}|[<>\"'&/a-z =(){};!-]{0,60}") {
        let mut gallery = sample();
        gallery.title.clone_from(&text);
        gallery.pairs[0].prompt.clone_from(&text);
        gallery.pairs[1].verdict.clone_from(&text);
        gallery.pairs[2].rejected_replies[0].raw.clone_from(&text);
        gallery.pairs[2].scores[0].0.clone_from(&text);
        gallery.held_out[0].images[0].0.clone_from(&text);
        gallery.curves[0].name.clone_from(&text);
        gallery.costs[0].1 = text;
        check_nesting(&gallery.to_html().unwrap());
    }
}
