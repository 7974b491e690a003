use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use concord_artaug::{
    image::Image,
    scorer::{ForFilter, ScoreError, Scorer},
    setup::TrainedScorers as _,
};
use concord_common::config::ByteSize;

use super::*;

/// The sample, whose advisor and scorers are all built in.
const SAMPLE: &str = include_str!("../../../../deploy/artaug/job.toml");

fn spec() -> ArtaugSpec {
    ArtaugSpec::parse(SAMPLE).unwrap()
}

#[test]
fn a_job_that_measures_needs_clean_drawings() {
    let error = clean(&spec(), &DataSection::default(), 32).unwrap_err();
    assert!(error.to_string().contains("data.icons"), "{error}");
    let nowhere = DataSection {
        icons: Some("/nonexistent".into()),
        ..DataSection::default()
    };
    assert!(clean(&spec(), &nowhere, 32).is_err());
}

#[test]
fn a_job_whose_advisor_and_scorers_are_elsewhere_needs_none() {
    let mut spec = spec();
    spec.advisor = AdvisorSpec::Chat {
        endpoint: "vision".to_owned(),
        model: "m".to_owned(),
        boxes: concord_common::job::artaug::Boxes::Fraction,
        max_regions: 4,
        tries: 1,
        temperature: 0.0,
        max_tokens: 100,
        schema: false,
        least_side: 1,
    };
    spec.scorers.filter = vec![FilterScorer::Brisque { least_gain: 0.0 }];
    spec.scorers.evaluation = vec![EvaluationScorer::Brisque {}];
    assert!(clean(&spec, &DataSection::default(), 32).is_ok());
}

#[test]
fn what_this_worker_lacks_is_told_with_the_key_to_set() {
    let bare = TrainedModels::new(None, None, 1);
    let text = bare.alignment_guard().err().unwrap().to_string();
    assert!(text.contains("data.image_text"), "{text}");
    let asks = SAMPLE.replacen("# subject_below", "subject_below", 1);
    let asks = ArtaugSpec::parse(&asks).unwrap();
    let text = subjects(&bare, &asks).err().unwrap().to_string();
    assert!(text.contains("data.image_text"), "{text}");
    assert!(subjects(&bare, &spec()).unwrap().is_none());
    let text = bare.brisque_filter().err().unwrap().to_string();
    assert!(text.contains("data.brisque"), "{text}");
}

#[test]
fn the_subject_is_asked_for_as_the_job_says() {
    let with = |line: &str| {
        let text = SAMPLE.replacen("kind = \"rules\"", &format!("kind = \"rules\"\n{line}"), 1);
        subject_rule(&ArtaugSpec::parse(&text).unwrap())
    };
    assert_eq!(with(""), Subject::AsTheWorkerCan);
    assert_eq!(with("subject_below = 0.1"), Subject::Below(0.1));
    assert_eq!(with("subject_below = -1.0"), Subject::Never);
}

#[test]
fn a_model_outside_the_allowed_folders_is_refused() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    symlink(outside.path(), inside.path().join("link")).unwrap();
    let config = |folder: &Path| -> WorkerConfig {
        let text = format!(
            "state_dir = \"/s\"\n[server]\naddress = \"localhost:1\"\n[tls]\ncertificate = \"a\"\nkey = \"b\"\nca = \"c\"\n[allowed]\nmodel_folders = [{:?}]",
            folder.display().to_string()
        );
        toml::from_str(&text).unwrap()
    };
    let workshop = TorchWorkshop::new(config(inside.path()), runtime.handle().clone());
    for name in ["link", "other"] {
        let mut spec = spec();
        spec.model.folder = name.to_owned();
        let refused = workshop.parts(&spec, &Brake::new(Duration::ZERO));
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("not below"), "{text}");
    }
}

/// A job that needs nothing but a model: who advises and judges is elsewhere, and is not asked.
const ELSEWHERE: &str = r#"
kind = "artaug"
name = "test job"
[model]
folder = "m"
[prompts]
texts = ["red apple", "blue car"]
[held_out]
texts = ["white dog", "black boat"]
[advisor]
kind = "chat"
endpoint = "vision"
model = "a"
boxes = "fraction"
[scorers]
guard = "none"
filter = [{ kind = "chat", name = "liked", endpoint = "vision", model = "b", criterion = "beauty" }]
evaluation = [{ kind = "chat", name = "judged", endpoint = "vision", model = "c", criterion = "beauty" }]
[counts]
iterations = 1
pairs = 10
kept = 4
least_kept = 2
held_out = 4
[sampler]
steps = 2
size = [24, 16]
"#;

/// A worker that has a model in the way in which the cache of Hugging Face keeps them: in `m` are links, their bytes are in `blobs`.
struct Place {
    root: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    limits: LimitsSection,
    brake: Brake,
}

impl Place {
    fn new() -> Self {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../common/learning/fixtures/diffusion/sd2");
        let root = tempfile::tempdir().unwrap();
        let model = root.path().join("m");
        let compute = concord_learning::diffusion::params::Compute::CPU;
        let fresh = TextToImage::fresh(&fixture, Seed(1), compute).unwrap();
        fresh.save(&model).unwrap();
        let blobs = root.path().join("blobs");
        fs::create_dir(&blobs).unwrap();
        for part in ["scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
            for file in fs::read_dir(model.join(part)).unwrap() {
                let file = file.unwrap();
                let name = format!("{part}-{}", file.file_name().display());
                fs::rename(file.path(), blobs.join(&name)).unwrap();
                symlink(Path::new("../../blobs").join(name), file.path()).unwrap();
            }
        }
        Self {
            root,
            runtime: tokio::runtime::Runtime::new().unwrap(),
            limits: LimitsSection::default(),
            brake: Brake::new(Duration::ZERO),
        }
    }

    fn model(&self) -> PathBuf {
        self.root.path().join("m")
    }

    fn parts(&self, changes: &[(&str, &str)]) -> Result<Parts, PartsError> {
        let settings = format!(
            "state_dir = \"/s\"\n[server]\naddress = \"localhost:1\"\n[tls]\ncertificate = \"a\"\nkey = \"b\"\nca = \"c\"\n\
             [allowed]\nmodel_folders = [{:?}]\n[allowed.endpoints.vision]\nurl = \"http://127.0.0.1:1/v1\"",
            self.root.path().display().to_string()
        );
        let mut config: WorkerConfig = toml::from_str(&settings).unwrap();
        config.limits = self.limits;
        let text = changes
            .iter()
            .fold(ELSEWHERE.to_owned(), |text, (from, to)| {
                text.replace(from, to)
            });
        let spec = ArtaugSpec::parse(&text).unwrap();
        let workshop = TorchWorkshop::new(config, self.runtime.handle().clone());
        workshop.parts(&spec, &self.brake)
    }

    /// Why the worker does not set a job up.
    fn refusal(&self, changes: &[(&str, &str)]) -> String {
        self.parts(changes).unwrap_err().to_string()
    }
}

#[test]
fn nothing_more_is_set_up_once_the_worker_is_told_to_stop() {
    let place = Place::new();
    place.brake.pull(crate::brake::Halt::Stop);
    assert_eq!(place.refusal(&[]), "the worker stops");
}

#[test]
fn a_link_that_leads_out_of_the_allowed_folders_is_refused_with_its_name() {
    let place = Place::new();
    place.parts(&[]).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let secret = elsewhere.path().join("vision.key");
    fs::write(&secret, "{}").unwrap();
    for name in ["tokenizer/more.json", "README.md"] {
        let link = place.model().join(name);
        symlink(&secret, &link).unwrap();
        let text = place.refusal(&[]);
        assert!(
            text.contains(name) && text.contains("allowed.model_folders"),
            "{text}"
        );
        assert!(!text.contains("vision.key"), "{text}");
        fs::remove_file(link).unwrap();
    }
    symlink(elsewhere.path(), place.model().join("more")).unwrap();
    assert!(place.refusal(&[]).contains("more: this leads out"));
}

#[test]
fn what_is_neither_file_nor_folder_is_refused_before_it_is_opened() {
    let place = Place::new();
    // Who opens this for reading waits for ever.
    let pipe = place.model().join("unet/notes.json");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let text = place.refusal(&[]);
    assert!(text.contains("unet/notes.json: this is neither"), "{text}");
    fs::remove_file(&pipe).unwrap();
    symlink("/dev/zero", &pipe).unwrap();
    assert!(place.refusal(&[]).contains("unet/notes.json"));
    fs::remove_file(&pipe).unwrap();
    symlink("nowhere", &pipe).unwrap();
    assert!(place.refusal(&[]).contains("unet/notes.json"));
    fs::remove_file(&pipe).unwrap();
    symlink("..", place.model().join("unet/again")).unwrap();
    let text = place.refusal(&[]);
    assert!(text.contains("again") && text.contains("deep"), "{text}");
}

#[test]
fn prompts_that_the_model_does_not_read_to_their_end_are_found_by_their_places() {
    let place = Place::new();
    let spec = ArtaugSpec::parse(ELSEWHERE).unwrap();
    let mut engine = TorchEngine::new(Settings {
        folder: place.model(),
        precision: spec.model.precision,
        sampler: spec.sampler,
        lora: spec.lora,
        threads: 1,
        gpu: None,
    })
    .unwrap();
    engine.open(None).unwrap();
    // Each word is one of the 75 tokens that a text may have.
    let texts = [75, 76, 3, 200].map(|words| "the ".repeat(words));
    assert_eq!(cut_prompts(&engine, &texts).unwrap(), [1, 3]);
}

#[test]
fn names_with_a_dot_are_no_part_of_a_model_and_count_as_entries_of_its_folder() {
    let place = Place::new();
    fs::write(place.model().join(".notes"), "x").unwrap();
    let files = || files::files_of(&place.model(), &[place.root.path().to_owned()]);
    assert!(
        !files()
            .unwrap()
            .iter()
            .any(|file| file.name.contains(".notes"))
    );
    let many = place.model().join("unet");
    for number in 0..1000 {
        fs::write(many.join(format!(".{number}")), "").unwrap();
    }
    let text = files().unwrap_err().to_string();
    assert!(text.contains("may hold 1000"), "{text}");
}

#[test]
fn a_job_does_not_go_on_with_another_file_behind_a_link() {
    let place = Place::new();
    let before = place.parts(&[]).unwrap().tools;
    let names: Vec<&str> = before
        .card
        .base_files
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    for name in [
        "model_index.json",
        "tokenizer/tokenizer.json",
        "unet/diffusion_pytorch_model.safetensors",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }
    // Notes of a tool that fetched the model differ from worker to worker, and nobody reads them.
    fs::create_dir(place.model().join(".cache")).unwrap();
    fs::write(place.model().join(".cache/fetched"), "today").unwrap();
    fs::write(place.model().join("README.md"), "a card").unwrap();
    let same = place.parts(&[]).unwrap().tools.ingredients();
    assert!(before.ingredients().differing(&same).is_empty());
    let weights = place
        .model()
        .join("unet/diffusion_pytorch_model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let other = place.parts(&[]).unwrap().tools.ingredients();
    assert_eq!(
        before.ingredients().differing(&other),
        ["the files of the model"]
    );
}

#[test]
fn what_is_exchanged_after_the_parts_were_made_is_found_by_the_next_look() {
    let place = Place::new();
    let added = place.model().join("tokenizer/added_tokens.json");
    let inside = place.root.path().join("blobs/added");
    fs::write(&inside, "{}").unwrap();
    symlink(&inside, &added).unwrap();
    let tools = place.parts(&[]).unwrap().tools;
    let known = &tools.card.base_files;
    assert_eq!((tools.base)().unwrap(), *known);
    // The link leads to a file that nobody has allowed.
    let elsewhere = tempfile::tempdir().unwrap();
    let secret = elsewhere.path().join("vision.key");
    fs::write(&secret, "{}").unwrap();
    fs::remove_file(&added).unwrap();
    symlink(&secret, &added).unwrap();
    let text = (tools.base)().unwrap_err().to_string();
    assert!(
        text.contains("tokenizer/added_tokens.json: this leads out"),
        "{text}"
    );
    // It leads to another file that is allowed, or is one that was not there before.
    fs::remove_file(&added).unwrap();
    symlink(place.model().join("model_index.json"), &added).unwrap();
    let more = place.model().join("tokenizer/special_tokens_map.json");
    fs::write(more, "{}").unwrap();
    let found = (tools.base)().unwrap();
    let other: Vec<&str> = found
        .iter()
        .filter(|file| !known.contains(file))
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(
        other,
        [
            "tokenizer/added_tokens.json",
            "tokenizer/special_tokens_map.json"
        ]
    );
}

#[test]
fn a_file_that_took_anothers_place_is_seen_without_reading_it() {
    let place = Place::new();
    let tools = place.parts(&[]).unwrap().tools;
    assert!((tools.untouched)());
    let index = place.model().join("model_index.json");
    let copy = place.root.path().join("copy");
    fs::copy(&index, &copy).unwrap();
    fs::rename(&copy, &index).unwrap();
    assert!(!(tools.untouched)());
    // Who reads it finds that it is the same.
    assert_eq!((tools.base)().unwrap(), tools.card.base_files);
    fs::remove_file(&index).unwrap();
    assert!(!(tools.untouched)());
}

#[test]
fn a_job_that_wants_more_threads_than_the_worker_gives_is_for_another_one() {
    let place = Place::new();
    let wants_two = [("[sampler]", "[limits]\nthreads = 2\n[sampler]")];
    let error = place.parts(&wants_two).unwrap_err();
    assert!(matches!(error, PartsError::Limit { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("wants 2 threads") && text.contains("gives 1"),
        "{text}"
    );
    let generous = LimitsSection {
        threads: 3,
        ..LimitsSection::default()
    };
    let mut spec = spec();
    for (wanted, got) in [(Some(2), 2), (None, 3)] {
        spec.limits.threads = wanted;
        assert_eq!(threads(&spec, &generous).unwrap(), got);
    }
}

#[test]
fn a_job_does_not_go_on_with_another_number_of_threads() {
    let place = Place::new();
    let mut tools = place.parts(&[]).unwrap().tools;
    let one = tools.ingredients();
    tools.threads = Some(2);
    let two = tools.ingredients();
    assert_eq!(one.differing(&two), ["1 threads of the engine"]);
    assert_eq!(two.differing(&one), ["2 threads of the engine"]);
}

#[test]
fn a_model_that_the_worker_cannot_hold_is_for_another_one_before_it_is_loaded() {
    let mut place = Place::new();
    place.limits.memory = ByteSize(1000);
    let error = place.parts(&[]).unwrap_err();
    assert!(matches!(error, PartsError::Limit { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("`limits.memory`: the weights"), "{text}");
}

#[test]
fn a_fused_model_that_can_have_no_room_is_refused_before_the_job_begins() {
    let mut place = Place::new();
    let fused = ("[sampler]", "[output]\nfused = true\n[sampler]");
    place.parts(&[fused]).unwrap();
    let little = ("[output]", "[limits]\ndisk = \"1 MiB\"\n[output]");
    let refused = |place: &Place| {
        let error = place.parts(&[fused, little]).unwrap_err();
        assert!(matches!(error, PartsError::Model { .. }), "{error:?}");
        error.to_string()
    };
    let text = refused(&place);
    assert!(
        text.contains("`output.fused`") && text.contains("of the job"),
        "{text}"
    );
    // What is only this worker's own is for another one, if any can keep it at all.
    place.limits.disk = ByteSize::mebibytes(1);
    assert_eq!(refused(&place), text);
    let error = place.parts(&[fused]).unwrap_err();
    assert!(matches!(error, PartsError::Limit { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("`limits.disk`"), "{text}");
}

#[test]
fn the_card_says_what_is_planted_and_with_what_it_was_made() {
    let place = Place::new();
    let card = place.parts(&[]).unwrap().tools.card;
    let libtorch = card.versions.iter().find(|(name, _)| name == "libtorch");
    let (_, version) = libtorch.unwrap();
    assert!(
        version.starts_with(|first: char| first.is_ascii_digit()),
        "{version}"
    );
    assert!(card.limits.iter().all(|text| !text.contains("planted")));
    // The model in the repository says by its own key that it is the embedded one.
    let embedded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/artaug/base");
    assert!(card::is_embedded(&embedded));
    let limits = card::limits(&spec(), true).join(" ");
    for word in ["toy", "planted", "vocabulary", "statistics"] {
        assert!(limits.contains(word), "{word}: {limits}");
    }
}

/// A scorer of a name that asks with words of a version.
struct Worded(&'static str, &'static str);

impl Scorer for Worded {
    type Use = ForFilter;

    fn name(&self) -> &str {
        self.0
    }

    fn version(&self) -> Option<&'static str> {
        Some(self.1)
    }

    fn score(&self, _image: &Image, _prompt: &str) -> Result<f64, ScoreError> {
        Ok(0.0)
    }
}

#[test]
fn a_job_does_not_go_on_with_other_words_for_its_scorers() {
    let place = Place::new();
    let mut tools = place.parts(&[]).unwrap().tools;
    let words = "words of the scorers of kind chat".to_owned();
    let stated = (words, "artaug-score-1".to_owned());
    assert!(tools.card.versions.contains(&stated));
    let began = tools.ingredients();
    let mut with = |version| {
        tools.filter = vec![Box::new(Worded("liked", version))];
        began.differing(&tools.ingredients())
    };
    assert!(with("artaug-score-1").is_empty());
    assert_eq!(with("artaug-score-2"), ["the words of the scorer liked"]);
    tools.evaluation.clear();
    assert_eq!(
        began.differing(&tools.ingredients())[0],
        "the words of the scorer judged"
    );
}
