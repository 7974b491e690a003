//! What each stage trains and draws, as the method has it: what the engine was told, held against the journal.

use concord_artaug::{
    engine::Order,
    image::Image,
    machine::Training,
    photometry::{Nearest, Thumbnails},
};

use super::*;
use crate::testing::{Fitting, HELD_OUT, Told, WINDOW};

/// A whole job of two iterations.
struct Job {
    server: Arc<FakeServer>,
    told: Told,
    /// What was open, and what was ordered, for every image.
    drawn: BTreeMap<Digest, (Vec<u8>, Order)>,
}

fn named(image: &Image) -> Digest {
    Digest::of(&image.to_png().unwrap())
}

impl Job {
    fn done() -> Self {
        let workshop = FakeWorkshop::default();
        let told = Arc::clone(&workshop.told);
        let server = run_by(SPEC, |worker| worker.workshop = Box::new(workshop));
        succeeded(&server);
        let told = told.lock().unwrap().clone();
        let mut drawn = BTreeMap::new();
        for drawing in &told.drawings {
            for (order, image) in drawing.orders.iter().zip(&drawing.images) {
                let how = (drawing.opened.clone(), order.clone());
                let known = drawn.insert(named(image), how.clone());
                assert!(known.is_none_or(|known| known == how));
            }
        }
        Self {
            server,
            told,
            drawn,
        }
    }

    fn object(&self, name: &Value) -> Vec<u8> {
        self.server.state().objects[&digest(name)].clone()
    }

    /// The events of a name in an iteration.
    fn events(&self, name: &str, iteration: u64) -> Vec<Value> {
        let mut events = events(&self.server, name);
        events.retain(|event| event["iteration"] == iteration);
        events
    }

    /// What items of an iteration became, by item.
    fn items(&self, name: &str, iteration: u64) -> BTreeMap<u64, Value> {
        let events = self.events(name, iteration).into_iter();
        events
            .map(|mut event| (event["item"].as_u64().unwrap(), event["result"].take()))
            .collect()
    }

    /// The adapters that are joined after an iteration: the enhanced model's and the control's. Before the first there are none.
    fn joined(&self, iteration: u64) -> [Vec<u8>; 2] {
        let fused = self.events("fused", iteration).pop();
        fused.map_or_else(Default::default, |event| {
            ["merged", "control"].map(|chain| self.object(&event["result"][chain]))
        })
    }

    /// What a training of an iteration gave.
    fn lora(&self, training: &str, iteration: u64) -> Vec<u8> {
        let mut events = self.events("trained", iteration);
        events.retain(|event| event["training"] == training);
        self.object(&events[0]["result"]["lora"])
    }

    fn how(&self, result: &Value) -> &(Vec<u8>, Order) {
        &self.drawn[&digest(&result["image"])]
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

#[test]
fn an_enhanced_image_has_the_model_the_prompt_and_the_seed_of_its_base_image() {
    let job = Job::done();
    for iteration in [1, 2] {
        let [current, _] = job.joined(iteration - 1);
        let (generated, advised) = (
            job.items("generated", iteration),
            job.items("advised", iteration),
        );
        let regenerated = job.items("regenerated", iteration);
        assert_eq!(generated.len(), 10);
        assert!(regenerated.len() >= 4, "{}", regenerated.len());
        for (item, base) in &generated {
            let (opened, order) = job.how(base);
            assert_eq!(opened, &current);
            assert_eq!(order.prompt, text(&base["prompt"]));
            assert_eq!(order.seed.0, base["seed"].as_u64().unwrap());
            assert!(order.regions.is_empty());
            let Some(enhanced) = regenerated.get(item) else {
                continue;
            };
            let (opened, again) = job.how(enhanced);
            assert_eq!(opened, &current);
            assert_eq!((&again.prompt, again.seed), (&order.prompt, order.seed));
            let regions = serde_json::to_value(&again.regions).unwrap();
            assert_eq!(regions, advised[item]["advice"]["regions"]);
            assert!(!again.regions.is_empty());
        }
    }
}

/// `LoRA_1` on X; `LoRA_2` on X' with `LoRA_1` below it; the control on X' alone. `LoRA_2` is kept, `LoRA_1` is not, and the control has a chain of
/// its own.
#[test]
fn each_training_learns_the_images_on_the_model_that_the_method_says() {
    let job = Job::done();
    assert_eq!(job.told.fits.len(), 6);
    for (iteration, fits) in (1..).zip(job.told.fits.chunks(3)) {
        let filtered = job.events("filtered", iteration);
        let kept = filtered[0]["kept"].as_array().unwrap();
        let kept: Vec<u64> = kept.iter().map(|item| item.as_u64().unwrap()).collect();
        assert!(kept.len() >= 2, "{kept:?}");
        let images = |name: &str| -> Vec<(u64, Digest)> {
            let items = job.items(name, iteration);
            let image = |item: &u64| (*item, digest(&items[item]["image"]));
            kept.iter().map(image).collect()
        };
        let (x, enhanced) = (images("generated"), images("regenerated"));
        assert_ne!(x, enhanced);
        let [current, control] = job.joined(iteration - 1);
        assert_eq!(current == control, iteration == 1);
        let first = job.lora("first", iteration);
        for (fit, training, opened, below, images) in [
            (&fits[0], Training::First, &current, None, &x),
            (&fits[1], Training::Second, &current, Some(first), &enhanced),
            (&fits[2], Training::Control, &control, None, &enhanced),
        ] {
            assert_eq!(fit.training, training);
            assert_eq!(&fit.opened, opened, "{training:?}");
            assert_eq!(fit.below, below, "{training:?}");
            assert_eq!(&lessons(fit), images, "{training:?}");
            let bases = job.items("generated", iteration);
            for lesson in &fit.lessons {
                let base = &bases[&u64::from(lesson.item)];
                assert_eq!(lesson.prompt, text(&base["prompt"]));
            }
        }
        let (second, plain) = (
            job.lora("second", iteration),
            job.lora("control", iteration),
        );
        let after = [[current, second].concat(), [control, plain].concat()];
        assert_eq!(job.joined(iteration), after);
    }
    let seeds: BTreeSet<u64> = job.told.fits.iter().map(|fit| fit.seed.0).collect();
    assert_eq!(seeds.len(), 6);
}

fn lessons(fit: &Fitting) -> Vec<(u64, Digest)> {
    let lessons = fit.lessons.iter();
    lessons
        .map(|lesson| (lesson.item.into(), named(&lesson.image)))
        .collect()
}

#[test]
fn arms_differ_in_the_model_or_in_the_prompt_and_in_nothing_else() {
    let job = Job::done();
    let mut seeds = BTreeMap::new();
    let mut drawn: BTreeMap<(u64, String), usize> = BTreeMap::new();
    let mut rewritten = 0;
    for event in events(&job.server, "evaluated") {
        let [iteration, item] = ["iteration", "item"].map(|name| event[name].as_u64().unwrap());
        let (arm, result) = (text(&event["arm"]), &event["result"]);
        let [enhanced, control] = job.joined(iteration);
        let plain = HELD_OUT[item as usize % HELD_OUT.len()].to_owned();
        let (model, prompt) = match arm {
            "base" => (Vec::new(), plain),
            "rewriting" if result["advice"]["advice"]["regions"][0].is_null() => {
                (Vec::new(), plain)
            }
            "rewriting" => {
                rewritten += 1;
                (Vec::new(), plain + ", well lit")
            }
            "enhanced" => (enhanced, plain),
            "plain-lora" => (control, plain),
            other => panic!("{other}"),
        };
        let (opened, order) = job.how(result);
        assert_eq!(opened, &model, "{arm} {item}");
        assert_eq!(order.prompt, prompt, "{arm} {item}");
        assert!(order.regions.is_empty());
        let seed = *seeds.entry(item).or_insert(order.seed);
        assert_eq!(seed, order.seed, "{arm} {item}");
        *drawn.entry((iteration, arm.to_owned())).or_default() += 1;
    }
    let different: BTreeSet<u64> = seeds.values().map(|seed| seed.0).collect();
    assert_eq!(different.len(), 7);
    assert!(rewritten > 0);
    let arms = |iteration: u64, arms: &[&str]| -> Vec<_> {
        let of = |arm: &&str| ((iteration, (*arm).to_owned()), 7);
        arms.iter().map(of).collect()
    };
    let mut wanted = arms(1, &["base", "enhanced", "plain-lora", "rewriting"]);
    wanted.extend(arms(2, &["enhanced", "plain-lora"]));
    assert_eq!(drawn.into_iter().collect::<Vec<_>>(), wanted);
}

/// The images of training are X' of all iterations up to the arm's, and of no other pair.
#[test]
fn how_near_an_arm_comes_to_its_images_of_training_is_measured_beside_the_base() {
    let job = Job::done();
    let thumbnails = |images: &[Digest]| {
        let mut thumbnails = Thumbnails::default();
        for name in images {
            let png = job.server.state().objects[name].clone();
            thumbnails.add(&Image::from_png(&png).unwrap());
        }
        thumbnails
    };
    let drawn = |iteration: u64, arm: &str| {
        let mut events = job.events("evaluated", iteration);
        events.retain(|event| event["arm"] == arm);
        // In the order of the prompts, so that sums are the same to the last bit.
        events.sort_by_key(|event| event["item"].as_u64());
        let images = events.iter().map(|event| digest(&event["result"]["image"]));
        thumbnails(&images.collect::<Vec<_>>())
    };
    let base = drawn(1, "base");
    let metrics = text_of(&job.server, "metrics.jsonl");
    let mut taught = Vec::new();
    for (iteration, summary) in (1..).zip(metrics.lines()) {
        let summary: Value = serde_json::from_str(summary).unwrap();
        let enhanced = job.items("regenerated", iteration);
        let filtered = job.events("filtered", iteration);
        for item in filtered[0]["kept"].as_array().unwrap() {
            taught.push(digest(&enhanced[&item.as_u64().unwrap()]["image"]));
        }
        let x = thumbnails(&taught);
        for arm in ["enhanced", "plain-lora"] {
            let measured = &summary["arms"][arm]["nearest"];
            let [images, base] = [&drawn(iteration, arm), &base]
                .map(|drawn| drawn.distances(&x, || Ok::<_, ()>(())).unwrap());
            let wanted = Nearest::of(&images, &base).unwrap();
            assert_eq!(
                *measured,
                serde_json::to_value(wanted).unwrap(),
                "{arm} {iteration}"
            );
            assert_ne!(images, base);
        }
        for arm in ["base", "rewriting"] {
            assert!(summary["arms"][arm]["nearest"].is_null(), "{arm}");
        }
    }
    assert!(taught.len() >= 4, "{}", taught.len());
    assert!(text_of(&job.server, "MODEL_CARD.md").contains("nearest X' (the base's; near)"));
    assert!(text_of(&job.server, "gallery.html").contains("nearest X' (the base's; near)"));
    let table = text_of(&job.server, "metrics.csv");
    assert!(
        table
            .lines()
            .next()
            .unwrap()
            .ends_with(",nearest,nearest_base,near")
    );
}

#[test]
fn texts_that_are_longer_than_the_model_reads_are_counted() {
    let job = Job::done();
    let is_cut = |result: &Value| {
        let (_, order) = job.how(result);
        let regions = order.regions.iter().map(|region| region.prompt.as_str());
        let texts = regions.chain([order.prompt.as_str()]);
        texts.filter(|text| text.len() > WINDOW).count()
    };
    let mut rewritten = events(&job.server, "evaluated");
    rewritten.retain(|event| event["arm"] == "rewriting");
    let rewritten: usize = rewritten.iter().map(|event| is_cut(&event["result"])).sum();
    assert!(rewritten > 0);
    let metrics = text_of(&job.server, "metrics.jsonl");
    let first: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    assert_eq!(first["arms"]["rewriting"]["cut"], rewritten);
    assert_eq!(first["arms"]["enhanced"]["cut"], 0);
    let card = text_of(&job.server, "MODEL_CARD.md");
    let said =
        format!("{rewritten} of the 7 prompts of the arm prompt rewriting alone were longer");
    assert!(card.contains(&said), "{card}");
    let all = ["generated", "regenerated", "evaluated"].map(|name| events(&job.server, name));
    let all: usize = all
        .iter()
        .flatten()
        .map(|event| is_cut(&event["result"]))
        .sum();
    assert!(all > rewritten);
    let ledger: Value = serde_json::from_str(&text_of(&job.server, "ledger.json")).unwrap();
    assert_eq!(ledger["cut_texts"], all);
}
