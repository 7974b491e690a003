use std::sync::Arc;

use super::*;
use crate::{
    advisor::chat::{Chat, ChatSettings},
    data::apply,
    endpoint::{
        Endpoint,
        testing::{Play, TestServer, never},
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

/// Asks a whole panel, once.
fn score_all<U: Use>(
    panel: &Panel<U>,
    image: &Image,
    prompt: &str,
    usage: &mut Usage,
) -> Result<Opinion<U>, ScoreError> {
    let mut opinion = Opinion::default();
    for scorer in panel {
        opinion.ask(scorer.as_ref(), image, prompt, usage)?;
    }
    Ok(opinion)
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

fn damages() -> Vec<Statement> {
    let mut damages = Vec::new();
    for (dimension, level) in [
        (Dimension::Exposure, Level::Low),
        (Dimension::Exposure, Level::High),
        (Dimension::Contrast, Level::Low),
        (Dimension::Colour, Level::Low),
        (Dimension::Sharpness, Level::Low),
    ] {
        for place in [Place::Whole, Place::Left, Place::BottomRight] {
            damages.push(Statement {
                dimension,
                level,
                place,
            });
        }
    }
    damages
}

fn bad_images(good: &[Image]) -> Vec<Image> {
    let mut bad = Vec::new();
    for (number, image) in good.iter().enumerate() {
        for damage in damages().iter().skip(number % 2).step_by(2) {
            let mut damaged = image.clone();
            apply(&mut damaged, *damage, 0.5);
            bad.push(damaged);
        }
    }
    bad
}

#[test]
fn the_statistics_tell_good_images_from_bad_ones_that_they_have_not_seen() {
    let images = clean_images();
    let (seen, unseen): (Vec<_>, Vec<_>) = images
        .into_iter()
        .enumerate()
        .partition(|(number, _)| number % 3 > 0);
    let only = |list: Vec<(usize, Image)>| -> Vec<Image> {
        list.into_iter().map(|(_, image)| image).collect()
    };
    let (seen, unseen) = (only(seen), only(unseen));
    let scorer = StatisticsScorer::new(Discriminant::fit(&seen, &bad_images(&seen)).unwrap());
    let score = |image: &Image| scorer.score(image, "").unwrap();
    let (good, bad) = (
        unseen.iter().map(score).collect::<Vec<_>>(),
        bad_images(&unseen),
    );
    let (mut right, mut pairs) = (0, 0);
    for worse in bad.iter().map(score) {
        right += good.iter().filter(|better| **better > worse).count();
        pairs += good.len();
    }
    assert!(right * 100 > pairs * 97, "{right} of {pairs}");
}

#[test]
fn a_discriminant_survives_its_file_and_a_wrong_one_is_refused() {
    let images = clean_images();
    let trained = Discriminant::fit(&images, &bad_images(&images)).unwrap();
    let mut value = serde_json::to_value(&trained).unwrap();
    assert_eq!(
        serde_json::from_value::<Discriminant>(value.clone()).unwrap(),
        trained
    );
    value["spread"][3] = 0.0.into();
    assert!(serde_json::from_value::<Discriminant>(value.clone()).is_err());
    value["spread"] = serde_json::json!([1.0]);
    let error = serde_json::from_value::<Discriminant>(value)
        .unwrap_err()
        .to_string();
    assert!(error.contains("train it again"), "{error}");
}

#[test]
fn too_few_images_train_nothing() {
    let images = clean_images();
    assert_eq!(Discriminant::fit(&images[..1], &images), None);
    assert_eq!(Discriminant::fit(&images, &images[..1]), None);
}

#[test]
fn equal_and_tiny_images_have_finite_scores() {
    let grey = vec![Image::filled(8, 8, [9; 3]).unwrap(); 3];
    let scorer = StatisticsScorer::new(Discriminant::fit(&grey, &grey).unwrap());
    for image in [
        &grey[0],
        &clean_images()[0],
        &Image::filled(1, 1, [255; 3]).unwrap(),
        &Image::filled(1, 7, [3; 3]).unwrap(),
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
    let opinion = score_all(&panel, &clean_images()[0], "a", &mut Usage::default());
    let scores = opinion.unwrap().scores;
    let names: Vec<&str> = scores.iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["colour", "photometry"]);
    let text = serde_json::to_string(&scores).unwrap();
    assert_eq!(
        serde_json::from_str::<Scores<ForFilter>>(&text).unwrap(),
        scores
    );
}

#[test]
fn a_failing_scorer_is_named_and_takes_nothing_from_the_others() {
    struct Says(&'static str, f64);
    impl Scorer for Says {
        type Use = ForEvaluation;
        fn name(&self) -> &'static str {
            self.0
        }
        fn score(&self, _: &Image, _: &str) -> Result<f64, ScoreError> {
            if self.1 < 0.0 {
                let (scorer, what) = (self.0.to_owned(), "é".repeat(MAX_REASON));
                return Err(ScoreError::NoScore { scorer, what });
            }
            Ok(self.1)
        }
    }
    let panel: Panel<ForEvaluation> = vec![
        Box::new(Says("broken", f64::NAN)),
        Box::new(Says("whole", 0.5)),
        Box::new(Says("wordy", -1.0)),
    ];
    let opinion = score_all(&panel, &clean_images()[0], "a", &mut Usage::default()).unwrap();
    let names: Vec<&str> = opinion.scores.iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["whole"]);
    let [broken, wordy] = opinion.failures.as_slice() else {
        panic!("{:?}", opinion.failures)
    };
    assert!(broken.scorer == "broken" && broken.what.contains("NaN"));
    assert!(wordy.scorer == "wordy" && wordy.what.len() <= MAX_REASON);
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
    let endpoint = Arc::new(Endpoint::open(server.settings(), never()).unwrap());
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
    let (score, usage) = scorer.score_counted(&clean_images()[0], "red");
    assert_eq!((score.unwrap(), usage.calls), (0.1, 3));
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

#[test]
fn a_score_that_was_paid_for_counts_although_the_scorer_went_away() {
    let gone = Play::Answer("401 Unauthorized", "", String::new());
    let (_server, _runtime, scorer) = external(vec![
        Play::says("eight out of ten"),
        gone,
        Play::says("{\"score\": 8}"),
    ]);
    let panel: Panel<ForEvaluation> = vec![Box::new(scorer)];
    let mut usage = Usage::default();
    score_all(&panel, &clean_images()[0], "red", &mut usage).unwrap_err();
    assert_eq!((usage.calls, usage.prompt_tokens), (2, 100));
    score_all(&panel, &clean_images()[0], "red", &mut usage).unwrap();
    assert_eq!((usage.calls, usage.prompt_tokens), (3, 200));
}
