//! Tiny runs: two drawings, a UNet of a few thousand weights.

use std::{fs, path::Path};

use concord_artaug::image::Image;

use super::*;
use crate::base::{
    export::export,
    sample::{Drawing, contact_sheet, draw},
};

fn icons(colour: &str) -> Vec<(String, Vec<u8>)> {
    let text = format!(
        r#"{{"width": 16, "height": 16, "icons": {{
            "red-apple": {{"body": "<circle cx='8' cy='8' r='6' fill='{colour}'/>"}},
            "star": {{"body": "<path fill='gold' d='M0 0h16v9z'/>"}}
        }}}}"#
    );
    vec![("noto".to_owned(), text.into_bytes())]
}

fn corpus(colour: &str) -> Corpus {
    Corpus::from_sets(&icons(colour), &["red-apple", "star"], 16).unwrap()
}

fn recipe() -> Recipe {
    Recipe {
        side: 16,
        widths: vec![16, 16],
        groups: 4,
        heads: 2,
        text_width: 16,
        text_layers: 1,
        batch: 2,
        ..Recipe::icons()
    }
}

fn order(folder: &Path, steps: u64) -> Order {
    Order {
        folder: folder.to_path_buf(),
        steps,
        threads: 1,
        seed: Seed(3),
        save_every: 2,
    }
}

fn run(folder: &Path, steps: u64, colour: &str, recipe: &Recipe) -> Result<Ended, BaseError> {
    let go = AtomicBool::new(false);
    train(
        recipe,
        &corpus(colour),
        &order(folder, steps),
        &go,
        &mut |_| {},
    )
}

fn weights(run: &Path, to: &Path) -> Vec<Vec<u8>> {
    export(run, to).unwrap();
    ["unet/diffusion_pytorch_model", "text_encoder/model"]
        .map(|file| fs::read(to.join(format!("{file}.safetensors"))).unwrap())
        .to_vec()
}

#[test]
fn a_run_taken_up_again_exports_the_same_bytes_and_its_model_draws() {
    let folder = tempfile::tempdir().unwrap();
    let (once, twice) = (folder.path().join("once"), folder.path().join("twice"));
    run(&once, 5, "red", &recipe()).unwrap();
    // Stopped at a step between two checkpoints.
    assert_eq!(run(&twice, 3, "red", &recipe()).unwrap().step, 3);
    let ended = run(&twice, 5, "red", &recipe()).unwrap();
    assert_eq!(ended.step, 5);
    let model = folder.path().join("a");
    assert_eq!(
        weights(&once, &model),
        weights(&twice, &folder.path().join("b"))
    );
    let card = fs::read_to_string(model.join("README.md")).unwrap();
    assert!(card.contains("5 steps of 2 images: 10 samples"), "{card}");
    let notice = fs::read_to_string(model.join("NOTICE.md")).unwrap();
    assert!(notice.contains("Copyright (c) Microsoft"), "{notice}");

    let model = TextToImage::load(&model, Compute::CPU).unwrap();
    let drawing = Drawing {
        steps: 2,
        guidance: 2.0,
        seed: Seed(0),
    };
    let prompts = ["red apple, noto style, blue background", "star"].map(str::to_owned);
    let images = draw(&model, &prompts, &drawing).unwrap();
    assert_eq!((images.len(), images[0].width()), (2, 16));
    assert_ne!(images[0], images[1]);
    let sheet = contact_sheet(&images, 2, 3).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (2 * 50 + 2, 52));
    assert!(contact_sheet(&[] as &[Image], 2, 3).is_err());
}

#[test]
fn other_icons_another_recipe_and_a_damaged_checkpoint_are_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    run(&path, 2, "red", &recipe()).unwrap();
    let refusal = run(&path, 4, "blue", &recipe()).unwrap_err().to_string();
    assert!(refusal.contains("icons noto was "), "{refusal}");
    let slower = Recipe {
        learning_rate: 1e-4,
        ..recipe()
    };
    let refusal = run(&path, 4, "red", &slower).unwrap_err().to_string();
    assert!(refusal.contains("recipe was "), "{refusal}");
    let wider = Recipe {
        widths: vec![16, 32],
        ..recipe()
    };
    let refusal = run(&path, 4, "red", &wider).unwrap_err().to_string();
    assert!(refusal.contains("another recipe"), "{refusal}");

    // Step 2 stands in one file, step 4 in the other: without the newer one the older one is taken up.
    run(&path, 4, "red", &recipe()).unwrap();
    let newer = path.join("state-1.safetensors");
    let bytes = fs::read(&newer).unwrap();
    fs::write(&newer, &bytes[..bytes.len() / 2]).unwrap();
    let mut lines = Vec::new();
    let go = AtomicBool::new(false);
    let mut say = |line: &str| lines.push(line.to_owned());
    train(&recipe(), &corpus("red"), &order(&path, 4), &go, &mut say).unwrap();
    assert!(lines[0].contains("step 2 of 4"), "{lines:?}");
}

#[test]
fn a_run_that_is_told_to_stop_leaves_a_checkpoint_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let stop = AtomicBool::new(true);
    let ended = train(
        &recipe(),
        &corpus("red"),
        &order(&path, 100),
        &stop,
        &mut |_| {},
    )
    .unwrap();
    assert_eq!(ended.step, 0);
    assert!(path.join("state-0.safetensors").is_file());
}

#[test]
fn every_drawing_comes_once_in_a_round_and_some_captions_are_empty() {
    let corpus = corpus("red");
    let mut empty = 0;
    for step in 0..100 {
        let batch = corpus.batch(Seed(1), step, 2, 0.1).unwrap();
        assert_eq!(batch.images.len(), 2 * 16 * 16 * 3);
        let told: Vec<&String> = batch.captions.iter().filter(|c| !c.is_empty()).collect();
        if told.len() == 2 {
            let apples = told
                .iter()
                .filter(|c| c.starts_with("red apple, noto style, "));
            assert_eq!(apples.count(), 1, "{told:?}");
        }
        empty += 2 - told.len();
    }
    assert!((5..40).contains(&empty), "{empty}");
}
