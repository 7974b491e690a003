use proptest::prelude::*;

use super::*;
use crate::{
    photometry::{CleanRanges, Survey, survey},
    words::{Dimension, Level, Place, Statement},
};

const SIDES: (u32, u32) = (200, 100);

fn read(text: &str) -> Result<ParsedReply, ReplyError> {
    parse_reply(text, BoxConvention::Fraction, SIDES, 4)
}

fn one_region(text: &str) -> Region {
    let parsed = read(text).unwrap();
    assert_eq!(
        (parsed.regions.len(), parsed.rejected.len()),
        (1, 0),
        "{text}"
    );
    parsed.regions[0].clone()
}

fn rejection(region: &str) -> RejectedRegion {
    match read(&format!(r#"{{"regions": [{region}]}}"#)) {
        Err(ReplyError::AllRejected { first, .. }) => first,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_plain_answer_is_read() {
    let region = one_region(
        r#"{"regions": [{"box": [0.1, 0.2, 0.5, 1], "prompt": " warm  light ", "confidence": 0.8}]}"#,
    );
    assert_eq!(region.area.edges(), [0.1, 0.2, 0.5, 1.0]);
    assert_eq!(region.prompt.as_str(), "warm light");
    assert_eq!(region.confidence, 0.8);
}

#[test]
fn the_habits_of_models_are_tolerated() {
    for text in [
        "```json\n{\"regions\": [{\"box\": [0, 0, 1, 1], \"prompt\": \"a\"}]}\n```",
        "Sure! Here is {my} answer [1]:\n{\"regions\": [{\"box\": [0, 0, 1, 1], \"prompt\": \"a\",},],}\nHope it helps }",
        "<think>{\"regions\": []} is too easy</think> {\"regions\": [{\"bbox_2d\": [0, 0, 1, 1], \"description\": \"a\"}]}",
        "[{\"bbox\": {\"x1\": 0, \"y1\": 0, \"x2\": 1, \"y2\": 1}, \"prompt\": \"a\", \"confidence\": null}]",
        "{\"box\": [0, 0, 1, 1], \"prompt\": \"a\"}",
        "{\"advice\": [{\"bounding_box\": {\"left\": 0, \"top\": 0, \"right\": 1, \"bottom\": 1}, \"prompt\": \"a\"}]}",
    ] {
        let region = one_region(text);
        assert_eq!(region.area, Area::WHOLE);
        assert_eq!(region.prompt.as_str(), "a");
        assert_eq!(region.confidence, 0.5);
    }
}

#[test]
fn a_comma_inside_a_prompt_stays() {
    let region = one_region(r#"{"regions": [{"box": [0, 0, 1, 1], "prompt": "a, b ,) \" ,", },]}"#);
    assert_eq!(region.prompt.as_str(), "a, b ,) ' ,");
}

#[test]
fn an_empty_list_means_nothing_to_improve() {
    assert_eq!(
        read("The image is fine: {\"regions\": []}"),
        Ok(ParsedReply::default())
    );
}

#[test]
fn an_answer_that_is_an_empty_list_as_a_whole_means_nothing_to_improve() {
    for text in ["[]", " [ ]\n", "```json\n[]\n```", "```\n[\n]\n```\n"] {
        assert_eq!(read(text), Ok(ParsedReply::default()), "{text}");
    }
    for text in [
        "The list [] is empty",
        "[] []",
        "[[]]",
        "[0]",
        "{}",
        "```json\n{}\n```",
    ] {
        assert_eq!(read(text), Err(ReplyError::NoRegions), "{text}");
    }
}

#[test]
fn boxes_are_read_in_the_declared_convention_only() {
    let area = |convention, numbers: &str| {
        let text = format!(r#"{{"regions": [{{"box": {numbers}, "prompt": "a"}}]}}"#);
        parse_reply(&text, convention, SIDES, 4).map(|parsed| parsed.regions[0].area.edges())
    };
    assert_eq!(
        area(BoxConvention::Pixel, "[20, 10, 100, 100]"),
        Ok([0.1, 0.1, 0.5, 1.0])
    );
    assert_eq!(
        area(BoxConvention::Thousand, "[100, 100, 500, 1000]"),
        Ok([0.1, 0.1, 0.5, 1.0])
    );
    // A little over the edge is the model's rounding and is clamped; far over it is another convention.
    assert_eq!(
        area(BoxConvention::Thousand, "[-3, 0, 1004, 500]"),
        Ok([0.0, 0.0, 1.0, 0.5])
    );
    assert!(area(BoxConvention::Fraction, "[20, 10, 100, 100]").is_err());
    assert!(area(BoxConvention::Pixel, "[100, 100, 500, 1000]").is_err());
    // Fractions where thousandths were declared are a box of no size.
    assert!(area(BoxConvention::Thousand, "[0.1, 0.1, 0.5, 1.0]").is_err());
}

#[test]
fn each_fault_of_a_region_is_told_apart() {
    for (region, expected) in [
        ("3", None),
        (r#"{"prompt": "a"}"#, Some(RejectedRegion::NoBox)),
        (
            r#"{"box": [0, 0, 1], "prompt": "a"}"#,
            Some(RejectedRegion::NoBox),
        ),
        (
            r#"{"box": [0, 0, 1, 1, 1], "prompt": "a"}"#,
            Some(RejectedRegion::NoBox),
        ),
        (
            r#"{"box": ["0", 0, 1, 1], "prompt": "a"}"#,
            Some(RejectedRegion::NoBox),
        ),
        (r#"{"box": [0, 0, 1e999, 1], "prompt": "a"}"#, None),
        (
            r#"{"box": [0, 0, 7, 1], "prompt": "a"}"#,
            Some(RejectedRegion::Convention),
        ),
        (
            r#"{"box": [0.5, 0, 0.2, 1], "prompt": "a"}"#,
            Some(RejectedRegion::EmptyBox),
        ),
        (
            r#"{"box": [0.5, 0.5, 0.501, 0.501], "prompt": "a"}"#,
            Some(RejectedRegion::EmptyBox),
        ),
        (r#"{"box": [0, 0, 1, 1]}"#, Some(RejectedRegion::NoPrompt)),
        (
            r#"{"box": [0, 0, 1, 1], "prompt": 3}"#,
            Some(RejectedRegion::NoPrompt),
        ),
        (
            r#"{"box": [0, 0, 1, 1], "prompt": "a", "confidence": 2}"#,
            Some(RejectedRegion::Confidence),
        ),
        (
            r#"{"box": [0, 0, 1, 1], "prompt": "a", "confidence": "high"}"#,
            Some(RejectedRegion::Confidence),
        ),
        (
            r#"{"box": [0, 0, 1, 1], "prompt": "  "}"#,
            Some(InvalidPrompt::Empty.into()),
        ),
        (
            r#"{"box": [0, 0, 1, 1], "prompt": "a\u0000b"}"#,
            Some(InvalidPrompt::Character('\0').into()),
        ),
    ] {
        match expected {
            Some(expected) => assert_eq!(rejection(region), expected, "{region}"),
            None => assert!(
                read(&format!(r#"{{"regions": [{region}]}}"#)).is_err(),
                "{region}"
            ),
        }
    }
}

#[test]
fn good_regions_pass_beside_bad_ones_and_the_surest_if_there_are_too_many() {
    let good = |confidence: f64| {
        format!(r#"{{"box": [0, 0, 1, 1], "prompt": "a", "confidence": {confidence}}}"#)
    };
    let text = format!(
        r#"{{"regions": [{}, {{"box": 1}}, {}, {}, {}, {}]}}"#,
        good(0.1),
        good(0.9),
        good(0.2),
        good(0.3),
        good(0.4)
    );
    let parsed = read(&text).unwrap();
    let confidences: Vec<f64> = parsed
        .regions
        .iter()
        .map(|region| region.confidence)
        .collect();
    assert_eq!(confidences, [0.9, 0.4, 0.3, 0.2]);
    assert_eq!(
        parsed.rejected,
        [RejectedRegion::NoBox, RejectedRegion::TooMany]
    );
}

#[test]
fn of_a_long_list_the_surest_stay_and_equally_sure_ones_in_their_order() {
    let region = |number: usize| {
        let sure = if number % 100 == 99 { 0.8 } else { 0.3 };
        format!(r#"{{"box": [0, 0, 1, 1], "prompt": "wish {number}", "confidence": {sure}}}"#)
    };
    let listed: Vec<String> = (0..500).map(region).collect();
    let text = format!(r#"{{"regions": [{}]}}"#, listed.join(", "));
    let parsed = parse_reply(&text, BoxConvention::Fraction, SIDES, 7).unwrap();
    let prompts: Vec<&str> = parsed
        .regions
        .iter()
        .map(|region| region.prompt.as_str())
        .collect();
    assert_eq!(
        prompts,
        [
            "wish 99", "wish 199", "wish 299", "wish 399", "wish 499", "wish 0", "wish 1"
        ]
    );
    // What is left out of hundreds is told a few times.
    assert_eq!(parsed.rejected, vec![RejectedRegion::TooMany; MAX_REGIONS]);
}

#[test]
fn an_answer_without_regions_is_told_from_one_without_json() {
    assert_eq!(read("The sky is too dark."), Err(ReplyError::NoJson));
    assert_eq!(read("{\"boxes\": 3} [1, 2]"), Err(ReplyError::NoRegions));
    assert_eq!(read("{\"regions\": [ {\"box\""), Err(ReplyError::NoJson));
    assert_eq!(
        read(&" ".repeat(MAX_REPLY_BYTES + 1)),
        Err(ReplyError::Long(MAX_REPLY_BYTES + 1))
    );
}

#[test]
fn prompts_keep_to_plain_characters_of_bounded_length() {
    assert_eq!(
        RegionPrompt::new("Sun\u{2019}s \u{201C}glow\u{201D} \u{2014}\nna\u{ef}ve, 50% (soft)")
            .unwrap()
            .as_str(),
        "Sun's 'glow' - na\u{ef}ve, 50% (soft)"
    );
    for hostile in [
        "a<b",
        "http://x",
        "a|b",
        "$(x)",
        "a\u{202E}b",
        "\u{1F600}",
        "\u{4f60}",
        "a\\b",
        "`x`",
        "{}",
        "a_b",
    ] {
        assert!(
            matches!(RegionPrompt::new(hostile), Err(InvalidPrompt::Character(_))),
            "{hostile}"
        );
    }
    assert!(RegionPrompt::new(&"a".repeat(MAX_REGION_PROMPT)).is_ok());
    assert_eq!(
        RegionPrompt::new(&"a".repeat(MAX_REGION_PROMPT + 1)),
        Err(InvalidPrompt::Long(MAX_REGION_PROMPT + 1))
    );
    assert!(serde_json::from_str::<RegionPrompt>("\"<b>\"").is_err());
}

#[test]
fn the_template_states_the_convention() {
    assert!(system_text(BoxConvention::Fraction, 64, 32).contains("from 0 to 1"));
    assert!(system_text(BoxConvention::Thousand, 64, 32).contains("from 0 to 1000"));
    let pixels = system_text(BoxConvention::Pixel, 64, 32);
    assert!(pixels.contains("x from 0 to 64, y from 0 to 32"));
}

fn any_text() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\\",
        "regions",
        "\"regions\":",
        "\"box\":",
        "\"prompt\":",
        "\"a\"",
        "[0,0,1,1]",
        "0",
        "-1e308",
        "1e999",
        "null",
        "true",
        " ",
        "\n",
        "```json",
        "```",
        "\u{20AC}",
        "\u{0}",
        "{\"regions\":[",
        "{\"box\":[0,0,1,1],\"prompt\":\"x\"}",
    ]);
    prop::collection::vec(pieces, 0..60).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn no_answer_crashes_the_parser_and_what_passes_is_within_bounds(
        text in prop_oneof![any_text(), ".{0,300}"], max in 0_usize..40,
    ) {
        for convention in [BoxConvention::Fraction, BoxConvention::Pixel, BoxConvention::Thousand] {
            if let Ok(parsed) = parse_reply(&text, convention, SIDES, max) {
                prop_assert!(parsed.regions.len() <= max.min(MAX_REGIONS));
                for region in parsed.regions {
                    prop_assert!(region.area.share() > 0.0);
                    prop_assert!((0.0..=1.0).contains(&region.confidence));
                    prop_assert_eq!(RegionPrompt::new(region.prompt.as_str()), Ok(region.prompt.clone()));
                }
            }
        }
    }

    #[test]
    fn a_good_answer_is_found_in_any_prose(before in "[a-z .{\\[]{0,40}", after in "[a-z .}\\]]{0,40}") {
        let text = format!("{before}\n{{\"regions\": [{{\"box\": [0, 0, 1, 1], \"prompt\": \"a\"}}]}}\n{after}");
        prop_assert_eq!(read(&text).unwrap().regions.len(), 1);
    }
}

#[test]
fn the_longest_hostile_answers_are_read_quickly() {
    let start = std::time::Instant::now();
    for text in [
        "[".repeat(MAX_REPLY_BYTES),
        "{\"".repeat(MAX_REPLY_BYTES / 2),
        "[,".repeat(MAX_REPLY_BYTES / 2),
        "[],".repeat(MAX_REPLY_BYTES / 3),
    ] {
        let _ = read(&text);
    }
    assert!(start.elapsed().as_secs() < 5);
}

/// A subject of a colour on a background, dimmed in a box.
fn picture(shade: u8, dimmed: Option<Area>) -> Image {
    let mut image = Image::filled(32, 32, [0; 3]).unwrap();
    for y in 0..32 {
        for x in 0..32 {
            let subject = (10..22).contains(&x) && (10..22).contains(&y);
            let colour = if subject {
                [220, 60, 40]
            } else {
                [90, 150, shade]
            };
            let inside = dimmed.is_some_and(|area| {
                let [left, top, right, bottom] = area.edges().map(|edge| (edge * 32.0) as u32);
                (left..right).contains(&x) && (top..bottom).contains(&y)
            });
            image.put(
                x,
                y,
                if inside {
                    colour.map(|value| value / 4)
                } else {
                    colour
                },
            );
        }
    }
    image
}

fn rules() -> RuleAdvisor {
    let clean: Vec<Survey> = (150..220)
        .map(|shade| survey(&picture(shade, None)))
        .collect();
    RuleAdvisor::new(
        CleanRanges::measure(&clean, 0.05).unwrap(),
        RuleSettings::default(),
    )
}

fn advice_on(image: &Image, prompt: &str) -> Vec<Region> {
    rules()
        .advise(&Question {
            image,
            prompt,
            max_regions: 4,
        })
        .unwrap()
        .regions
}

#[test]
fn a_clean_image_gets_no_advice() {
    assert_eq!(advice_on(&picture(180, None), "red square"), vec![]);
}

#[test]
fn a_dimmed_corner_is_found_where_it_is() {
    let corner = Area::new(0.0, 0.5, 0.5, 1.0).unwrap();
    let image = picture(180, Some(corner));
    let regions = advice_on(&image, "red square");
    let region = regions
        .iter()
        .find(|region| region.prompt.as_str().contains("well lit"))
        .unwrap();
    assert_eq!(region.area, corner);
    assert!(
        region.prompt.as_str().starts_with("red square, "),
        "{:?}",
        region.prompt
    );
    assert!((0.0..=1.0).contains(&region.confidence));
    let dim = Statement {
        dimension: Dimension::Exposure,
        level: Level::Low,
        place: Place::BottomLeft,
    };
    assert!(rules().faults(&survey(&image), "red square").contains(&dim));
}

#[test]
fn a_dimmed_image_is_meant_as_a_whole() {
    let regions = advice_on(&picture(180, Some(Area::WHOLE)), "red square");
    assert_eq!(regions[0].area, Area::WHOLE);
    assert!(regions[0].prompt.as_str().contains("well lit"));
}

#[test]
fn a_prompt_that_may_not_pass_leaves_the_wishes_alone() {
    let image = picture(180, Some(Area::WHOLE));
    for prompt in ["a|b", &"long ".repeat(100)] {
        let regions = advice_on(&image, prompt);
        assert!(
            regions[0].prompt.as_str().starts_with("well lit"),
            "{:?}",
            regions[0]
        );
    }
}
