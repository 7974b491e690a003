use super::*;
use crate::words::Level;

fn painted(width: u32, height: u32, colour: impl Fn(u32, u32) -> [u8; 3]) -> Image {
    let mut image = Image::filled(width, height, [0; 3]).unwrap();
    for y in 0..height {
        for x in 0..width {
            image.put(x, y, colour(x, y));
        }
    }
    image
}

fn close(found: f64, wanted: f64) {
    assert!((found - wanted).abs() < 1e-9, "{found} is not {wanted}");
}

#[test]
fn a_grey_image_has_exposure_only() {
    let survey = survey(&Image::filled(16, 16, [51; 3]).unwrap());
    close(survey.whole.exposure, 0.2);
    close(survey.whole.contrast, 0.0);
    close(survey.whole.colourfulness, 0.0);
    close(survey.whole.sharpness, 0.0);
    assert_eq!(survey.subject, None);
    close(survey.whole(Dimension::Placement), 1.0);
}

#[test]
fn the_measures_are_those_of_their_formulae() {
    // Half black, half pure red: Y is 0 or 0.2126, rg is 0 or 1, yb is 0 or 0.5.
    let half_red = painted(8, 8, |x, _| if x < 4 { [0; 3] } else { [255, 0, 0] });
    let whole = survey(&half_red).whole;
    close(whole.exposure, 0.1063);
    close(whole.contrast, 0.1063);
    close(
        whole.colourfulness,
        0.5_f64.hypot(0.25) + 0.3 * 0.5_f64.hypot(0.25),
    );
    // The Laplacian is +-0.2126 beside the edge, in two columns of eight, and 0 elsewhere.
    close(whole.sharpness, 0.2126 * 0.25_f64.sqrt() / 0.1063);
}

#[test]
fn a_checkerboard_is_sharper_than_a_ramp_of_the_same_contrast() {
    let board = painted(16, 16, |x, y| [((x + y) % 2 * 200) as u8; 3]);
    let ramp = painted(16, 16, |x, _| [(x * 16) as u8; 3]);
    assert!(survey(&board).whole.sharpness > 5.0 * survey(&ramp).whole.sharpness);
}

#[test]
fn sharpness_does_not_fall_with_contrast() {
    let board = |step: u32| {
        painted(16, 16, move |x, y| {
            [(50 + (x / 2 + y / 2) % 2 * step) as u8; 3]
        })
    };
    let (strong, weak) = (survey(&board(200)).whole, survey(&board(40)).whole);
    assert!(weak.contrast < 0.3 * strong.contrast);
    close(weak.sharpness, strong.sharpness);
}

#[test]
fn cells_are_measured_on_their_own() {
    let corner = painted(
        16,
        16,
        |x, y| if x < 4 && y >= 12 { [255; 3] } else { [0; 3] },
    );
    let cells = survey(&corner).cells;
    for (index, cell) in cells.iter().enumerate() {
        close(cell.exposure, if index == 12 { 1.0 } else { 0.0 });
    }
}

#[test]
fn an_image_smaller_than_the_grid_is_measured_all_the_same() {
    let cells = survey(&Image::filled(1, 3, [255; 3]).unwrap()).cells;
    assert!(cells.iter().all(|cell| (cell.exposure - 1.0).abs() < 1e-9));
}

#[test]
fn the_subject_is_found_where_it_stands() {
    let drawn = |left: u32| {
        painted(20, 20, move |x, y| {
            if (left..left + 4).contains(&x) && (8..12).contains(&y) {
                [250, 200, 0]
            } else {
                [20, 40, 200]
            }
        })
    };
    let middle = survey(&drawn(8)).subject.unwrap();
    close(middle.placement(), 1.0);
    close(middle.share, 16.0 / 400.0);
    let aside = survey(&drawn(0)).subject.unwrap();
    close(aside.x, 0.1);
    close(aside.placement(), 0.2);
}

fn thumbnails(images: &[&Image]) -> Thumbnails {
    let mut thumbnails = Thumbnails::default();
    for image in images {
        thumbnails.add(image);
    }
    thumbnails
}

#[test]
fn a_copy_is_at_no_distance_and_of_several_images_the_nearest_counts() {
    let [black, grey, white] = [0, 51, 255].map(|level| Image::filled(9, 9, [level; 3]).unwrap());
    let distances = |images: &[&Image], others: &[&Image]| {
        thumbnails(images)
            .distances(&thumbnails(others), || Ok::<_, ()>(()))
            .unwrap()
    };
    assert_eq!(distances(&[&black], &[&white, &black]), [0.0]);
    let both = distances(&[&grey, &white], &[&white, &black]);
    close(both[0], 0.2);
    close(both[1], 0.0);
    assert!(distances(&[&black], &[]).is_empty());
    let stopped = thumbnails(&[&black]).distances(&thumbnails(&[&white]), || Err("stop"));
    assert_eq!(stopped, Err("stop"));
}

#[test]
fn a_few_copies_among_many_images_stand_out() {
    let base: Vec<f64> = (1..=100).map(f64::from).collect();
    let same = Nearest::of(&base, &base).unwrap();
    close(same.near, 0.05);
    close(same.arm, 50.5);
    // Ten of a hundred are copies, the others as far as the base's images.
    let mut copies = base.clone();
    copies[90..].fill(0.0);
    let nearest = Nearest::of(&copies, &base).unwrap();
    close(nearest.near, 0.15);
    assert_eq!(nearest.base, same.base);
    assert!(nearest.arm < same.arm);
    assert_eq!(Nearest::of(&[], &base), None);
    assert_eq!(Nearest::of(&base, &[]), None);
}

#[test]
fn equal_images_have_no_diversity_and_black_and_white_all_of_it() {
    let black = Image::filled(9, 9, [0; 3]).unwrap();
    let white = Image::filled(9, 9, [255; 3]).unwrap();
    let diversity = |images: &[&Image]| thumbnails(images).diversity();
    assert_eq!(diversity(&[&black]), None);
    assert_eq!(diversity(&[&black, &black]), Some(0.0));
    assert_eq!(diversity(&[&black, &white]), Some(1.0));
    close(diversity(&[&black, &white, &white]).unwrap(), 2.0 / 3.0);
}

#[test]
fn ranges_are_quantiles_of_the_clean_images() {
    let clean: Vec<Survey> = (0..=100_u8)
        .map(|step| survey(&Image::filled(8, 8, [step + 50; 3]).unwrap()))
        .collect();
    let ranges = CleanRanges::measure(&clean, 0.1).unwrap();
    let range = ranges.whole(Dimension::Exposure);
    close(range.low, 60.0 / 255.0);
    close(range.high, 140.0 / 255.0);
    let dark = survey(&Image::filled(8, 8, [20; 3]).unwrap());
    let finding = ranges.judge_whole(&dark, Dimension::Exposure).unwrap();
    assert_eq!(finding.level, Level::Low);
    close(finding.excess, 40.0 / 255.0 / 0.05);
    let cell = ranges.judge_cell(&dark, 3, Dimension::Exposure).unwrap();
    close(cell.excess, finding.excess);
    assert_eq!(ranges.judge_cell(&dark, 3, Dimension::Placement), None);
    let bright = survey(&Image::filled(8, 8, [240; 3]).unwrap());
    assert_eq!(
        ranges
            .judge_whole(&bright, Dimension::Exposure)
            .unwrap()
            .level,
        Level::High
    );
    assert_eq!(ranges.judge_whole(&bright, Dimension::Colour), None);
}

#[test]
fn strong_colours_are_no_fault() {
    let grey = survey(&Image::filled(8, 8, [100; 3]).unwrap());
    let ranges = CleanRanges::measure(&[grey], 0.05).unwrap();
    let red = survey(&Image::filled(8, 8, [255, 0, 0]).unwrap());
    assert_eq!(ranges.judge_whole(&red, Dimension::Colour), None);
}

#[test]
fn ranges_without_images_are_refused() {
    assert_eq!(CleanRanges::measure(&[], 0.05), Err(NoImages));
}

#[test]
fn ranges_survive_their_text_form() {
    let clean = [survey(&painted(8, 8, |x, y| {
        [(x * 30) as u8, (y * 30) as u8, 7]
    }))];
    let ranges = CleanRanges::measure(&clean, 0.05).unwrap();
    let text = serde_json::to_string(&ranges).unwrap();
    assert_eq!(serde_json::from_str::<CleanRanges>(&text).unwrap(), ranges);
}

#[test]
fn a_context_in_the_prompt_chooses_its_own_ranges() {
    let grey = |value: u8| survey(&Image::filled(8, 8, [value; 3]).unwrap());
    let mut clean: Vec<(String, Survey)> = Vec::new();
    for step in 0..30 {
        clean.push(("white background".to_owned(), grey(220 + step)));
        clean.push(("off-white background".to_owned(), grey(190 + step)));
        clean.push(("black background".to_owned(), grey(step)));
    }
    clean.push(("rare".to_owned(), grey(128)));
    let looks = CleanLooks::measure(&clean, 0.0).unwrap();
    let level = |prompt: &str, value: u8| {
        let finding = looks
            .for_prompt(prompt)
            .judge_whole(&grey(value), Dimension::Exposure);
        finding.map(|finding| finding.level)
    };
    assert_eq!(level("cat, white background", 120), Some(Level::Low));
    assert_eq!(level("cat, black background", 120), Some(Level::High));
    assert_eq!(level("cat, off-white background", 200), None);
    assert_eq!((level("cat", 120), level("rare cat", 3)), (None, None));
    assert_eq!(CleanLooks::measure(&[], 0.1), Err(NoImages));
}
