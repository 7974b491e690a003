use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::photometry::survey;

const SET: &str = r##"{"prefix": "t", "width": 32, "height": 32, "icons": {
    "red-apple": {"body": "<circle cx=\"16\" cy=\"16\" r=\"12\" fill=\"#d02020\"/><circle cx=\"16\" cy=\"16\" r=\"4\" fill=\"#fff0a0\"/>"},
    "red-apple-light": {"body": "<path d=\"M0 0h9v9z\"/>"},
    "hand-skin-tone": {"body": ""},
    "boy-tone3": {"body": ""},
    "flash-light": {"body": "<rect width=\"32\" height=\"16\" fill=\"#0000ff\"/>", "height": 16},
    "old": {"body": "", "hidden": true},
    "headstone": {"body": "<path d=\"M0 0h9v9z\"/>"}
}}"##;

fn icons() -> Vec<Icon> {
    read_icons("test", SET.as_bytes()).unwrap()
}

fn apple() -> (Icon, Raster) {
    let icon = icons()
        .into_iter()
        .find(|icon| icon.name == "red-apple")
        .unwrap();
    let raster = rasterise(&icon, 40).unwrap();
    (icon, raster)
}

fn statement(dimension: Dimension, level: Level, place: Place) -> Statement {
    Statement {
        dimension,
        level,
        place,
    }
}

#[test]
fn hidden_icons_and_skin_tones_are_left_out() {
    let names: Vec<String> = icons().into_iter().map(|icon| icon.name).collect();
    assert_eq!(names, ["flash-light", "headstone", "red-apple"]);
}

#[test]
fn a_file_that_is_no_icon_set_is_refused_with_what_to_do() {
    for text in [
        "",
        "[]",
        "{}",
        r#"{"icons": {}}"#,
        r#"{"icons": {"a": {}}}"#,
        r#"{"icons": {"a": {"body": "", "width": -1}}}"#,
    ] {
        let error = read_icons("test", text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("fetch.py"), "{error}");
    }
}

#[test]
fn an_icon_is_drawn_in_the_middle_at_four_fifths() {
    let (_, raster) = apple();
    assert_eq!(raster.side(), 32);
    let image = clean_image(&raster, 40, 2).unwrap();
    assert_eq!(image.at(20, 20), [0xFF, 0xF0, 0xA0]);
    assert_eq!(image.at(20, 10), [0xD0, 0x20, 0x20]);
    assert_eq!(image.at(0, 0), BACKGROUNDS[2].1);
    let subject = survey(&image).subject.unwrap();
    assert!(subject.placement() > 0.97, "{subject:?}");
}

#[test]
fn a_wide_icon_keeps_its_shape() {
    let icon = icons()
        .into_iter()
        .find(|icon| icon.name == "flash-light")
        .unwrap();
    let image = clean_image(&rasterise(&icon, 40).unwrap(), 40, 0).unwrap();
    assert_eq!(image.at(20, 20), [0, 0, 255]);
    assert_eq!(image.at(20, 9), BACKGROUNDS[0].1);
}

#[test]
fn a_body_that_is_no_svg_is_an_error_with_the_name() {
    let (mut icon, _) = apple();
    for body in ["<g>", "</svg>", "&bomb;"] {
        icon.body = body.to_owned();
        let error = rasterise(&icon, 32).unwrap_err().to_string();
        assert!(error.contains("red-apple"), "{error}");
    }
}

#[test]
fn a_shift_moves_the_subject_and_cuts_it_off_at_the_edge() {
    let (_, raster) = apple();
    let shifted = raster.on_background(40, [100; 3], (12, 0)).unwrap();
    assert_eq!(shifted.at(32, 20), [0xFF, 0xF0, 0xA0]);
    assert_eq!(
        raster.on_background(40, [100; 3], (1000, -1000)).unwrap(),
        Image::filled(40, 40, [100; 3]).unwrap()
    );
}

#[test]
fn every_damage_moves_its_measure_and_not_that_of_the_other_half() {
    let (_, raster) = apple();
    let clean = clean_image(&raster, 40, 2).unwrap();
    let before = survey(&clean);
    for (dimension, level) in [
        (Dimension::Exposure, Level::Low),
        (Dimension::Exposure, Level::High),
        (Dimension::Contrast, Level::Low),
        (Dimension::Contrast, Level::High),
        (Dimension::Colour, Level::Low),
        (Dimension::Colour, Level::High),
        (Dimension::Sharpness, Level::Low),
    ] {
        for amount in [0.0, 1.0] {
            let mut image = clean.clone();
            apply(&mut image, statement(dimension, level, Place::Left), amount);
            let after = survey(&image);
            // The cell in the second row and column is part of the subject.
            let (old, new) = (
                before.cells[5].get(dimension).unwrap(),
                after.cells[5].get(dimension).unwrap(),
            );
            match level {
                Level::High => assert!(new > old * 1.02, "{dimension:?} {level:?}: {old} {new}"),
                _ => assert!(new < old * 0.9, "{dimension:?} {level:?}: {old} {new}"),
            }
            for x in 20..40 {
                for y in 0..40 {
                    assert_eq!(image.at(x, y), clean.at(x, y), "{dimension:?}");
                }
            }
        }
    }
}

#[test]
fn good_looks_change_nothing() {
    let (_, raster) = apple();
    let clean = clean_image(&raster, 40, 2).unwrap();
    let mut image = clean.clone();
    for dimension in Dimension::ALL {
        apply(
            &mut image,
            statement(dimension, Level::Good, Place::Whole),
            1.0,
        );
    }
    assert_eq!(image, clean);
}

#[test]
fn examples_repeat_and_their_captions_are_true() {
    let (icon, raster) = apple();
    let rendering = Rendering::new(40);
    let mut captions = BTreeSet::new();
    let (mut damaged, mut said, mut statements) = (0, 0, 0);
    for number in 0..400 {
        let made = example(&icon, &raster, &rendering, Seed(7), number).unwrap();
        assert_eq!(
            made,
            example(&icon, &raster, &rendering, Seed(7), number).unwrap()
        );
        assert!(made.caption.starts_with(&made.subject) && made.subject.starts_with("red apple, "));
        assert_eq!(made.truth.len(), 5);
        for words in made.caption[made.subject.len()..].split(", ").skip(1) {
            assert!(
                made.truth.iter().any(|truth| truth.to_string() == words),
                "{}",
                made.caption
            );
            said += 1;
        }
        statements += made.truth.len();
        let fault = |truth: &Statement| {
            truth.level == Level::Low
                || (truth.level == Level::High && truth.dimension.too_high_is_a_fault())
        };
        damaged += usize::from(made.truth.iter().any(fault));
        captions.insert(made.caption);
    }
    assert!((260..=340).contains(&damaged), "{damaged}");
    assert!((0.45..0.55).contains(&(f64::from(said) / statements as f64)));
    assert!(captions.len() > 250, "{}", captions.len());
}

#[test]
fn an_off_centre_example_is_off_centre() {
    let (icon, raster) = apple();
    let rendering = Rendering {
        damaged: 1.0,
        ..Rendering::new(40)
    };
    let mut seen = 0;
    for number in 0..300 {
        let made = example(&icon, &raster, &rendering, Seed(1), number).unwrap();
        if made.truth[4].level == Level::Low
            && made.truth[..4]
                .iter()
                .all(|truth| truth.level == Level::Good)
        {
            let placement = survey(&made.image).subject.unwrap().placement();
            assert!(placement < 0.75, "{placement}");
            seen += 1;
        }
    }
    assert!(seen > 20);
}

#[test]
fn a_subject_is_on_one_side_of_the_split_in_every_style() {
    let icon = |set: &str, number: u32| Icon {
        set: set.to_owned(),
        name: format!("thing-{number}"),
        body: String::new(),
        view: (1.0, 1.0),
    };
    let mut held_out = 0;
    for number in 0..1000 {
        let split = icon("noto", number).split(0.2, Seed(3));
        assert_eq!(split, icon("fluent", number).split(0.2, Seed(3)));
        held_out += u32::from(split == Split::HeldOut);
    }
    assert!((160..240).contains(&held_out), "{held_out}");
}

proptest! {
    #[test]
    fn hostile_bodies_never_crash_the_drawing(
        pieces in prop::collection::vec(prop::sample::select(vec![
            "<g>", "</g>", "<path d=\"M0 0L1e9 1e38 z\"/>", "<use href=\"#a\"/>", "<g id=\"a\"><use href=\"#a\"/></g>", "<circle r=\"-1\"/>",
            "<rect width=\"1e9\" height=\"9\" fill=\"url(#x)\"/>", "<filter id=\"x\"><feGaussianBlur stdDeviation=\"1e9\"/></filter>", "\"", "&lt;", "<!--",
            "<image href=\"file:///etc/passwd\"/>", "<text>a</text>", "<g transform=\"scale(0)\">",
        ]), 0..12)
    ) {
        let (mut icon, _) = apple();
        icon.body = pieces.concat();
        let _ = rasterise(&icon, 16);
    }
}
