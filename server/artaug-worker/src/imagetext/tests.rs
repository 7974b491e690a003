use std::{collections::BTreeMap, path::Path, sync::Arc};

use concord_artaug::{
    advisor::{Advice, Advisor, AdvisorError, Question, Region, RegionPrompt},
    data::{BACKGROUNDS, Icon, STYLES, base_subjects, clean_image, read_icons},
    image::Image,
    region::Area,
    setup::{SetupError, TrainedScorers as _},
    words::Place,
};
use concord_common::seed::Seed;
use concord_learning::{
    named::{HostTensor, NamedTensors, to_safetensors},
    vision::{AlignmentSettings, EfficientNetLite0, TextTower},
};

use super::{advisor::emphasis, *};

/// A disc, a box or a bar for every subject of the base model in every style; what it looks like follows from the name.
fn icons() -> Vec<Icon> {
    STYLES
        .iter()
        .flat_map(|set| {
            let entries: Vec<String> = base_subjects()
                .enumerate()
                .map(|(number, name)| {
                    let (red, green, blue) =
                        (number * 37 % 256, number * 91 % 256, number * 53 % 256);
                    let shape = match number % 3 {
                        0 => "<circle cx='16' cy='16' r='12'",
                        1 => "<rect x='4' y='6' width='24' height='20'",
                        _ => "<rect x='12' y='1' width='8' height='30'",
                    };
                    format!(
                        "\"{name}\": {{\"body\": \"{shape} fill='rgb({red},{green},{blue})'/>\"}}"
                    )
                })
                .collect();
            let json = format!(
                "{{\"width\": 32, \"height\": 32, \"icons\": {{{}}}}}",
                entries.join(", ")
            );
            read_icons(set, json.as_bytes()).unwrap()
        })
        .collect()
}

/// Towers with small weights that follow from their names: the image tower of the right shape, the text tower of the tiny BERT.
struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let learning = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../common/learning");
        let fixture =
            std::fs::read(learning.join("fixtures/vision/efficientnet_lite0.json")).unwrap();
        let fixture: serde_json::Value = serde_json::from_slice(&fixture).unwrap();
        let shapes: BTreeMap<String, Vec<usize>> =
            serde_json::from_value(fixture["shapes"].clone()).unwrap();
        let weights: NamedTensors = shapes
            .into_iter()
            .map(|(name, shape)| {
                let mut rng = Seed(1).derive(&name).rng();
                let fan_in: usize = shape.iter().skip(1).product();
                let near_one =
                    shape.len() == 1 && (name.ends_with("var") || name.ends_with("weight"));
                let values = (0..shape.iter().product())
                    .map(|_| {
                        let drawn = rng.normal();
                        let value = if near_one {
                            1.0 + 0.1 * drawn.tanh()
                        } else if shape.len() == 1 {
                            0.1 * drawn
                        } else {
                            drawn * (2.0 / fan_in as f64).sqrt()
                        };
                        value as f32
                    })
                    .collect();
                (name, HostTensor { shape, values })
            })
            .collect();
        let bytes = to_safetensors(&weights, "").unwrap();
        std::fs::write(folder.path().join("vision.safetensors"), bytes).unwrap();
        Self { folder }
    }

    fn paths(&self) -> ImageTextFiles {
        ImageTextFiles {
            vision: self.folder.path().join("vision.safetensors"),
            text: Path::new(env!("CARGO_MANIFEST_DIR")).join("../../common/learning/fixtures/bert"),
            projections: self.folder.path().join("projections.safetensors"),
        }
    }

    fn towers(&self) -> (EfficientNetLite0, TextTower) {
        let paths = self.paths();
        (
            EfficientNetLite0::load(&paths.vision).unwrap(),
            TextTower::load(&paths.text).unwrap(),
        )
    }
}

fn recipe() -> Recipe {
    Recipe {
        base_clean: 1,
        base_damaged: 0,
        base_checks: 1,
        other_clean: 0,
        other_damaged: 0,
        most_subjects: 40,
        seen_at: 32,
        seed: 1,
    }
}

fn settings() -> AlignmentSettings {
    AlignmentSettings {
        width: 16,
        steps: 20,
        batch: 16,
        ..AlignmentSettings::default()
    }
}

fn trained(files: &Files, features: Option<&Path>) -> Trained {
    let drawings = Drawings::draw(icons()).unwrap();
    let (vision, text) = files.towers();
    let towers = (&vision, &text);
    train(
        &drawings,
        &recipe(),
        &settings(),
        true,
        towers,
        features,
        &mut |_| {},
    )
    .unwrap()
}

/// A loaded model with quickly trained projections.
fn model(files: &Files) -> ImageText {
    let trained = trained(files, None);
    std::fs::write(files.paths().projections, trained.projections).unwrap();
    ImageText::load(&files.paths(), 1).unwrap()
}

#[test]
fn every_subject_of_the_base_model_is_drawn_and_a_hundred_are_held_out() {
    let drawings = Drawings::draw(icons()).unwrap();
    assert_eq!(drawings.held_out().len(), 100);
    for name in base_subjects() {
        assert_eq!(drawings.of(name).len(), STYLES.len());
    }
    let first = base_subjects().next().unwrap();
    let others = icons().into_iter().filter(|icon| icon.name != first);
    let error = Drawings::draw(others.collect()).unwrap_err().to_string();
    assert!(error.contains(first), "{error}");
}

#[test]
fn renderings_repeat_and_say_what_is_true() {
    let drawings = Drawings::draw(icons()).unwrap();
    let wanted = Recipe {
        base_damaged: 2,
        ..recipe()
    };
    let (dataset, images) = Dataset::render(&drawings, &wanted).unwrap();
    assert_eq!(
        (dataset.subjects.len(), images.len()),
        (40, 40 * STYLES.len() * 5)
    );
    let (again, same) = Dataset::render(&drawings, &wanted).unwrap();
    assert!(dataset == again && images == same);
    for shown in &dataset.shown {
        let plain = &dataset.texts[shown.plain];
        assert!(
            plain.contains(&format!(", {} style, ", shown.style)),
            "{plain}"
        );
        assert!(dataset.texts[shown.caption].starts_with(plain.as_str()));
    }
    assert!(dataset.shown.iter().any(|shown| !shown.clean));
    assert!(
        dataset
            .shown
            .iter()
            .any(|shown| shown.caption != shown.plain)
    );
}

#[test]
fn a_training_repeats_to_the_bit_also_from_kept_features() {
    let files = Files::new();
    let kept = files.folder.path();
    let (first, second) = (trained(&files, Some(kept)), trained(&files, Some(kept)));
    assert_eq!(first.projections, second.projections);
    assert!(first.figures.unknown_subjects.images > 0);
    assert_eq!(first.figures.known_subjects.subjects, 100);
    // A damaged file of features is not believed.
    for name in ["images.safetensors", "texts.safetensors"] {
        let bytes = std::fs::read(kept.join(name)).unwrap();
        std::fs::write(kept.join(name), &bytes[..bytes.len() / 2]).unwrap();
    }
    assert_eq!(trained(&files, Some(kept)).projections, first.projections);
}

#[test]
fn alignment_is_a_cosine_and_repeats() {
    let files = Files::new();
    let model = model(&files);
    let drawings = Drawings::draw(icons()).unwrap();
    let name = base_subjects().next().unwrap();
    let image = clean_image(&drawings.of(name)[0].1, SIDE, 2).unwrap();
    let first = model.alignment(&image, "a thing").unwrap();
    assert!((-1.0..=1.0).contains(&first));
    assert_eq!(
        model.alignment(&image, "a thing").unwrap().to_bits(),
        first.to_bits()
    );
    // A model of its own, without anything remembered.
    let other = ImageText::load(&files.paths(), 1).unwrap();
    let _ = other.alignment(&image, "another").unwrap();
    assert_eq!(
        other.alignment(&image, "a thing").unwrap().to_bits(),
        first.to_bits()
    );
}

#[test]
fn projections_of_other_towers_are_refused() {
    let files = Files::new();
    drop(model(&files));
    let mut paths = files.paths();
    paths.text =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../common/learning/fixtures/distilbert");
    let error = ImageText::load(&paths, 1).unwrap_err().to_string();
    assert!(error.contains("text tower"), "{error}");
    paths.projections = files.folder.path().join("none");
    assert!(
        ImageText::load(&paths, 1)
            .unwrap_err()
            .to_string()
            .contains("none")
    );
}

#[test]
fn scorers_come_with_their_models_or_say_what_is_missing() {
    let files = Files::new();
    drop(model(&files));
    let nowhere = files.folder.path().join("brisque");
    let scorers = TrainedModels::new(Some(files.paths()), Some(nowhere), 1);
    let image = Image::filled(32, 32, [200, 40, 40]).unwrap();
    let filter = scorers.alignment_filter().unwrap();
    let guard = scorers.alignment_guard().unwrap();
    assert_eq!((filter.name(), guard.name()), ("alignment", "alignment"));
    assert_eq!(
        filter.score(&image, "a red thing").unwrap().to_bits(),
        guard.score(&image, "a red thing").unwrap().to_bits()
    );
    assert!(matches!(
        scorers.brisque_filter(),
        Err(SetupError::Scorer {
            scorer: "brisque",
            ..
        })
    ));
}

#[test]
fn the_middle_is_asked_for_the_subject_where_little_of_it_is_recognised() {
    let prompt = "red apple, noto style, blue background";
    assert_eq!(emphasis(0.3, (0.2, 0.6), prompt), None);
    let near = emphasis(0.19, (0.2, 0.6), prompt).unwrap();
    let far = emphasis(-0.1, (0.2, 0.6), prompt).unwrap();
    assert!(near.confidence < far.confidence && far.confidence <= 0.95);
    assert_eq!(near.area, Place::Centre.area());
    assert_eq!(
        near.prompt.as_str(),
        "red apple, noto style, blue background, clear, sharp, centred"
    );
    assert_eq!(emphasis(-0.1, (0.2, 0.6), &"long ".repeat(80)), None);
}

/// Always gives one region.
struct Left;

impl Advisor for Left {
    fn name(&self) -> String {
        "left".to_owned()
    }

    fn advise(&self, _question: &Question<'_>) -> Result<Advice, AdvisorError> {
        let region = Region {
            area: Area::new(0.0, 0.0, 0.5, 1.0).unwrap(),
            prompt: RegionPrompt::new("well lit").unwrap(),
            confidence: 0.99,
        };
        Ok(Advice {
            regions: vec![region],
            ..Advice::default()
        })
    }
}

#[test]
fn advice_on_the_subject_comes_beside_the_other_and_within_the_number_wanted() {
    let files = Files::new();
    let model = Arc::new(model(&files));
    let facts = model.facts();
    for (wanted, low) in [(None, facts.low), (Some(facts.typical), facts.typical)] {
        let advisor = SubjectAdvisor::new(Box::new(Left), Arc::clone(&model), wanted);
        let named = format!("left, subject below {low:.3} by the image-text model ");
        assert!(advisor.name().starts_with(&named), "{}", advisor.name());
        for (number, name) in base_subjects().enumerate().take(60) {
            let colour = BACKGROUNDS[number % BACKGROUNDS.len()].1;
            let image = Image::filled(32, 32, colour).unwrap();
            let question = |max_regions| Question {
                image: &image,
                prompt: name,
                max_regions,
            };
            let advice = advisor.advise(&question(4)).unwrap();
            let emphasised = model.alignment(&image, name).unwrap() < low;
            assert_eq!(advice.regions.len(), 1 + usize::from(emphasised));
            assert_eq!(advice.regions[0].prompt.as_str(), "well lit");
            assert!(
                advice
                    .regions
                    .is_sorted_by(|a, b| a.confidence >= b.confidence)
            );
            assert_eq!(advisor.advise(&question(1)).unwrap().regions.len(), 1);
        }
    }
}

#[test]
fn a_model_that_draws_the_right_things_is_recognised_better_than_one_that_does_not() {
    let files = Files::new();
    let model = model(&files);
    let drawings = Drawings::draw(icons()).unwrap();
    let wanted = |prompt: &str| {
        let held_out = drawings.held_out().iter();
        let mut names =
            held_out.filter(|name| prompt.starts_with(&format!("{}, ", name.replace('-', " "))));
        let background = BACKGROUNDS
            .iter()
            .position(|(name, _)| prompt.ends_with(&format!("{name} background")));
        (*names.next().unwrap(), background.unwrap())
    };
    let judge = |right: bool| {
        let mut draw = |prompts: &[String]| -> Result<Vec<Image>, ImageTextError> {
            prompts
                .iter()
                .map(|prompt| {
                    let (name, background) = wanted(prompt);
                    let name = if right {
                        name
                    } else {
                        *drawings.held_out().first().unwrap()
                    };
                    Ok(clean_image(&drawings.of(name)[0].1, SIDE, background)?)
                })
                .collect()
        };
        let (figures, drawn) = Judge::new(&model, &drawings)
            .base(&mut draw, (100, false), Seed(1), &mut |_| {})
            .unwrap();
        assert_eq!(drawn.len(), 100);
        figures
    };
    let (good, bad) = (judge(true), judge(false));
    assert!(good.by_drawings.top1 > 0.9, "{good:?}");
    assert!(bad.by_drawings.top1 < 0.1, "{bad:?}");
    assert_eq!(good.by_words.subjects, 100);
    let mut few = |_: &[String]| -> Result<Vec<Image>, ImageTextError> { Ok(Vec::new()) };
    assert!(matches!(
        Judge::new(&model, &drawings).base(&mut few, (3, false), Seed(1), &mut |_| {}),
        Err(ImageTextError::Unusable(_))
    ));
}
