use std::sync::Arc;

use super::*;
use crate::{
    advisor::chat::{Chat, ChatSettings},
    data::apply,
    endpoint::{
        Endpoint,
        testing::{Play, TestServer},
    },
    photometry::{CleanRanges, survey},
    words::{Dimension, Level, Place, Statement},
};

/// Blobs of several colours on several backgrounds.
fn clean_images() -> Vec<Image> {
    (0..60_u32)
        .map(|number| {
            let mut image =
                Image::filled(32, 32, [(120 + number) as u8, 150, (200 - number) as u8]).unwrap();
            for y in 0..32_u32 {
                for x in 0..32_u32 {
                    let (dx, dy) = (x.abs_diff(16), y.abs_diff(16));
                    if dx * dx + dy * dy < 80 + number {
                        image.put(
                            x,
                            y,
                            [(220 - number / 2) as u8, (30 + 2 * number) as u8, 40],
                        );
                    }
                    if dx < 4 && dy < 3 {
                        image.put(x, y, [250, 250, 230]);
                    }
                }
            }
            image
        })
        .collect()
}

fn ranges() -> CleanRanges {
    let surveys: Vec<_> = clean_images().iter().map(survey).collect();
    CleanRanges::measure(&surveys, 0.02).unwrap()
}

fn damaged(dimension: Dimension, level: Level, place: Place) -> Image {
    let mut image = clean_images().swap_remove(30);
    apply(
        &mut image,
        Statement {
            dimension,
            level,
            place,
        },
        0.8,
    );
    image
}

#[test]
fn the_fault_scorers_see_their_own_dimensions_and_the_size_of_a_fault() {
    let (photometry, colour) = (
        FaultScorer::photometry(ranges()),
        FaultScorer::colour(ranges()),
    );
    let score = |scorer: &FaultScorer, image: &Image| scorer.score(image, "").unwrap();
    let clean = clean_images().swap_remove(30);
    assert_eq!(score(&photometry, &clean), 0.0);
    assert_eq!(score(&colour, &clean), 0.0);
    for place in [Place::Whole, Place::TopLeft] {
        assert!(
            score(
                &photometry,
                &damaged(Dimension::Exposure, Level::Low, place)
            ) < -0.1
        );
    }
    let faded = damaged(Dimension::Colour, Level::Low, Place::Whole);
    let partly = damaged(Dimension::Colour, Level::Low, Place::TopLeft);
    assert!(score(&colour, &faded) < score(&colour, &partly) && score(&colour, &partly) < 0.0);
    assert!(score(&colour, &faded) < -0.5);
    assert!(score(&colour, &faded) < score(&photometry, &faded));
}

#[test]
fn the_statistics_tell_every_damage_from_clean_images() {
    let images = clean_images();
    let scorer = StatisticsScorer::new(CleanStatistics::fit(&images).unwrap());
    let score = |image: &Image| scorer.score(image, "").unwrap();
    let worst_clean = images.iter().map(score).fold(f64::INFINITY, f64::min);
    for (dimension, level) in [
        (Dimension::Exposure, Level::Low),
        (Dimension::Exposure, Level::High),
        (Dimension::Contrast, Level::Low),
        (Dimension::Colour, Level::Low),
        (Dimension::Sharpness, Level::Low),
    ] {
        assert!(
            score(&damaged(dimension, level, Place::Whole)) < worst_clean,
            "{dimension:?}"
        );
    }
}

#[test]
fn the_distance_is_that_of_mahalanobis() {
    // Of many clean images, the mean squared distance is nearly the number of features, a little less for the shrinkage.
    let images = clean_images();
    let scorer = StatisticsScorer::new(CleanStatistics::fit(&images).unwrap());
    let squares: f64 = images
        .iter()
        .map(|image| scorer.score(image, "").unwrap().powi(2))
        .sum();
    let mean = squares / images.len() as f64;
    assert!(mean > 1.0 && mean < 12.0, "{mean}");
}

#[test]
fn statistics_of_too_few_images_are_not_fitted() {
    assert_eq!(CleanStatistics::fit(&clean_images()[..1]), None);
}

#[test]
fn statistics_of_equal_images_stay_finite() {
    let grey = vec![Image::filled(8, 8, [9; 3]).unwrap(); 3];
    let scorer = StatisticsScorer::new(CleanStatistics::fit(&grey).unwrap());
    for image in [
        &grey[0],
        &damaged(Dimension::Exposure, Level::High, Place::Whole),
        &Image::filled(1, 1, [255; 3]).unwrap(),
    ] {
        assert!(scorer.score(image, "").unwrap().is_finite());
    }
}

#[test]
fn a_panel_gives_every_score_under_its_name() {
    let panel: Panel<ForFilter> = vec![
        Box::new(FaultScorer::photometry(ranges())),
        Box::new(FaultScorer::colour(ranges())),
    ];
    let scores = score_all(&panel, &clean_images()[0], "a").unwrap();
    let names: Vec<&str> = scores.iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["colour", "photometry"]);
    let text = serde_json::to_string(&scores).unwrap();
    assert_eq!(
        serde_json::from_str::<Scores<ForFilter>>(&text).unwrap(),
        scores
    );
}

#[test]
fn a_score_that_is_no_number_is_refused() {
    struct Broken;
    impl Scorer for Broken {
        type Use = ForEvaluation;
        fn name(&self) -> &'static str {
            "broken"
        }
        fn score(&self, _: &Image, _: &str) -> Result<f64, ScoreError> {
            Ok(f64::NAN)
        }
    }
    let panel: Panel<ForEvaluation> = vec![Box::new(Broken)];
    let error = score_all(&panel, &clean_images()[0], "a")
        .unwrap_err()
        .to_string();
    assert!(error.contains("broken") && error.contains("NaN"), "{error}");
}

fn external(
    plays: Vec<Play>,
) -> (
    TestServer,
    tokio::runtime::Runtime,
    ExternalScorer<ForEvaluation>,
) {
    let server = TestServer::start(plays);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let endpoint = Arc::new(Endpoint::open(server.settings()).unwrap());
    let chat = Chat::new(
        endpoint,
        ChatSettings::new("judge"),
        runtime.handle().clone(),
    );
    (
        server,
        runtime,
        ExternalScorer::new("beauty", "how pleasing it is", chat),
    )
}

#[test]
fn an_external_score_comes_over_the_chat_interface() {
    let (server, _runtime, scorer) =
        external(vec![Play::says("I would say ```{\"score\": 7.5}```")]);
    assert_eq!(scorer.score(&clean_images()[0], "red").unwrap(), 0.75);
    let system = server.requests()[0].body["messages"][0]["content"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(system.contains("how pleasing it is"));
}

#[test]
fn external_answers_without_a_usable_score_are_asked_again_and_then_told() {
    let (_server, _runtime, scorer) = external(vec![
        Play::says("{\"score\": 70}"),
        Play::says("{\"score\": \"high\"}"),
        Play::says("{\"score\": 1}"),
    ]);
    assert_eq!(scorer.score(&clean_images()[0], "red").unwrap(), 0.1);
    let (_server, _runtime, scorer) = external(vec![Play::says("eight out of ten"); 3]);
    assert!(matches!(
        scorer.score(&clean_images()[0], "red"),
        Err(ScoreError::NoScore { .. })
    ));
    let (_server, _runtime, scorer) =
        external(vec![Play::Answer("401 Unauthorized", "", String::new())]);
    assert!(matches!(
        scorer.score(&clean_images()[0], "red"),
        Err(ScoreError::Unavailable { .. })
    ));
}
