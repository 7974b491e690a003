use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::*;
use crate::{
    advisor::{AdvisorError, Question},
    endpoint::testing::{Play, TestServer, never},
    image::Image,
    photometry::{CleanRanges, survey},
    scorer::Discriminant,
};

const SAMPLE: &str = include_str!("../../../../deploy/artaug/job.toml");

fn clean() -> Clean {
    let images: Vec<Image> = (0..20_u8)
        .map(|shade| Image::filled(16, 16, [shade * 9, 90, 200]).unwrap())
        .collect();
    let surveys: Vec<_> = images.iter().map(survey).collect();
    Clean {
        looks: CleanRanges::measure(&surveys, 0.05).unwrap().into(),
        statistics: Discriminant::fit(&images[..10], &images[10..]).unwrap(),
    }
}

/// A worker without any trained model.
struct Bare;

fn missing<T>(scorer: &'static str) -> Result<T, SetupError> {
    let what = "no model".to_owned();
    Err(SetupError::Scorer { scorer, what })
}

impl TrainedScorers for Bare {
    fn alignment_filter(&self) -> Result<Box<dyn Scorer<Use = ForFilter>>, SetupError> {
        missing("alignment")
    }
    fn alignment_guard(&self) -> Result<Box<dyn Scorer<Use = ForEvaluation>>, SetupError> {
        missing("alignment")
    }
    fn brisque_filter(&self) -> Result<Box<dyn Scorer<Use = ForFilter>>, SetupError> {
        missing("brisque")
    }
    fn brisque_evaluation(&self) -> Result<Box<dyn Scorer<Use = ForEvaluation>>, SetupError> {
        missing("brisque")
    }
}

fn spec(changes: &[(&str, &str)]) -> ArtaugSpec {
    let mut text = SAMPLE.to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    ArtaugSpec::parse(&text).unwrap()
}

const NO_ALIGNMENT: [(&str, &str); 2] = [
    ("    { kind = \"alignment\", least_gain = -0.02 },\n", ""),
    ("guard = \"alignment\"", "guard = \"none\""),
];

#[test]
fn the_plan_is_that_of_the_specification() {
    let plan = plan(&spec(&[]));
    assert_eq!((plan.iterations, plan.pairs, plan.held_out), (3, 288, 200));
    let names: Vec<(&str, f64)> = plan
        .filter
        .least_gain
        .iter()
        .map(|(name, gain)| (name.as_str(), *gain))
        .collect();
    assert_eq!(
        names,
        [("alignment", -0.02), ("colour", -0.1), ("photometry", 0.0)]
    );
    assert_eq!(
        (plan.filter.most_kept, plan.stop.judge.as_str()),
        (48, "statistics")
    );
    assert_eq!(plan.stop.alignment.as_deref(), Some(GUARD));
    assert_eq!(super::plan(&spec(&NO_ALIGNMENT)).stop.alignment, None);
}

#[test]
fn every_number_of_the_plan_is_that_of_the_specification() {
    let mut changes = NO_ALIGNMENT.to_vec();
    changes.extend([
        ("seed = 0", "seed = 5"),
        ("review = false", "review = true"),
        ("iterations = 3", "iterations = 4"),
        ("pairs = 288", "pairs = 50"),
        ("kept = 48", "kept = 21"),
        ("least_kept = 8", "least_kept = 7"),
        ("held_out = 200", "held_out = 90"),
        ("batch = 8\n# How strongly", "batch = 6\n# How strongly"),
        ("mode = \"joint\"", "mode = \"per-pair\""),
        ("batch = 8\n# Batches", "batch = 1\n# Batches"),
        ("first_steps = 120", "first_steps = 31"),
        ("second_steps = 120", "second_steps = 17"),
        ("control = true", "control = false"),
        ("confidence = 0.95", "confidence = 0.9"),
        ("resamples = 2000", "resamples = 300"),
        ("tie = 0.0", "tie = 0.25"),
        ("alignment_loss = 0.02", "alignment_loss = 0.03"),
        ("least_diversity = 0.8", "least_diversity = 0.7"),
    ]);
    let least_gain = [("colour", -0.1), ("photometry", 0.0)];
    let expected = Plan {
        iterations: 4,
        pairs: 50,
        held_out: 90,
        batch: 6,
        first_steps: 31,
        second_steps: 17,
        per_pair: true,
        review: true,
        control: false,
        filter: FilterRules {
            least_gain: least_gain
                .map(|(name, gain)| (name.to_owned(), gain))
                .into(),
            most_kept: 21,
        },
        stop: StopRules {
            judge: "statistics".to_owned(),
            tie: 0.25,
            alignment: None,
            alignment_loss: 0.03,
            least_diversity: 0.7,
            least_kept: 7,
        },
        bootstrap: Bootstrap {
            confidence: 0.9,
            resamples: 300,
            seed: Seed(5).derive("artaug bootstrap"),
        },
    };
    assert_eq!(plan(&spec(&changes)), expected);
}

#[test]
fn an_advisor_elsewhere_is_asked_as_the_specification_says() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for (boxes, told) in [
        ("fraction", "from 0 to 1."),
        ("pixel", "which is 48 wide and 48 high"),
        ("thousand", "from 0 to 1000"),
    ] {
        let server = TestServer::start(vec![Play::says("no"), Play::says("nothing")]);
        let chat = format!(
            "kind = \"chat\"\nendpoint = \"vision\"\nmodel = \"m\"\nboxes = \"{boxes}\"\ntries = 2\ntemperature = 0.75\nmax_tokens = 77\n\
             schema = false\nleast_side = 40\n"
        );
        let spec = spec(&[
            ("kind = \"rules\"\n", &chat),
            ("tail = 0.02\n", ""),
            ("least_excess = 0.5\n", ""),
        ]);
        let mut allowed = Allowed::default();
        allowed
            .endpoints
            .insert("vision".to_owned(), server.settings());
        let advisor = Endpoints::new(&allowed, runtime.handle().clone(), never())
            .advisor(&spec.advisor, &clean().looks)
            .unwrap();
        let question = Question {
            image: &Image::filled(16, 16, [90, 90, 90]).unwrap(),
            prompt: "red apple",
            max_regions: 4,
        };
        assert!(matches!(
            advisor.advise(&question),
            Err(AdvisorError::NoUsableReply(advice)) if advice.rejected_replies.len() == 2
        ));
        let requests = server.requests();
        assert_eq!(requests.len(), 2);
        let body = &requests[0].body;
        assert_eq!(
            (&body["model"], &body["max_tokens"]),
            (&"m".into(), &77.into())
        );
        assert_eq!(body["temperature"], 0.75);
        assert!(body.get("response_format").is_none());
        // 16 pixels, enlarged by a whole factor to 40 at least, are 48.
        let system = body["messages"][0]["content"].as_str().unwrap();
        assert!(system.contains(told), "{system}");
    }
}

#[test]
fn a_scorer_elsewhere_is_asked_as_the_specification_says() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = TestServer::start(vec![Play::says("none"); 4]);
    let asked = "endpoint = \"vision\", criterion = \"c\", tries = 2, max_tokens = 77, schema = false, least_side = 40";
    let chat = |name: &str| {
        format!("{{ kind = \"chat\", name = \"{name}\", model = \"{name}\", {asked} }}")
    };
    let spec = spec(&[
        NO_ALIGNMENT[0],
        NO_ALIGNMENT[1],
        (
            "{ kind = \"photometry\", least_gain = 0.0 }",
            &chat("chooser"),
        ),
        ("{ kind = \"statistics\" }", &chat("taste")),
        ("judge = \"statistics\"", "judge = \"taste\""),
    ]);
    let mut allowed = Allowed::default();
    allowed
        .endpoints
        .insert("vision".to_owned(), server.settings());
    let mut endpoints = Endpoints::new(&allowed, runtime.handle().clone(), never());
    let filter = endpoints.filter_panel(&spec, &clean(), &Bare).unwrap();
    let evaluation = endpoints.evaluation_panel(&spec, &clean(), &Bare).unwrap();
    let image = Image::filled(16, 16, [90, 90, 90]).unwrap();
    filter[0].score(&image, "red apple").unwrap_err();
    evaluation[0].score(&image, "red apple").unwrap_err();
    let requests = server.requests();
    let models: Vec<&str> = requests
        .iter()
        .filter_map(|request| request.body["model"].as_str())
        .collect();
    assert_eq!(models, ["chooser", "chooser", "taste", "taste"]);
    for body in requests.iter().map(|request| &request.body) {
        assert_eq!(body["max_tokens"], 77);
        assert!(body.get("response_format").is_none());
        // 16 pixels, enlarged by a whole factor to 40 at least, are 48.
        let url = body["messages"][1]["content"][0]["image_url"]["url"]
            .as_str()
            .unwrap();
        let (_, png) = url.split_once(',').unwrap();
        let sent = Image::from_png(&STANDARD.decode(png).unwrap()).unwrap();
        assert_eq!((sent.width(), sent.height()), (48, 48));
    }
}

#[test]
fn a_scorer_that_does_not_say_how_it_is_asked_is_asked_as_an_advisor_that_does_not() {
    let chat = "kind = \"chat\"\nendpoint = \"vision\"\nmodel = \"m\"\nboxes = \"pixel\"\n";
    let spec = spec(&[
        ("kind = \"rules\"\n", chat),
        ("tail = 0.02\n", ""),
        ("least_excess = 0.5\n", ""),
    ]);
    let AdvisorSpec::Chat {
        tries,
        temperature,
        max_tokens,
        schema,
        least_side,
        ..
    } = spec.advisor
    else {
        panic!("{:?}", spec.advisor)
    };
    let of_an_advisor = ChatSettings {
        model: "m".to_owned(),
        tries,
        temperature,
        max_tokens,
        send_schema: schema,
        least_side,
    };
    assert_eq!(asked("m", [None; 3], None), of_an_advisor);
}

#[test]
fn advisor_and_panels_are_those_of_the_specification() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let chat = "kind = \"chat\"\nendpoint = \"vision\"\nmodel = \"m\"\nboxes = \"pixel\"\n";
    let mut changes = NO_ALIGNMENT.to_vec();
    changes.push(("kind = \"rules\"\n", chat));
    changes.push(("tail = 0.02\n", ""));
    changes.push(("least_excess = 0.5\n", ""));
    changes.push((
        "evaluation = [{ kind = \"statistics\" }]",
        "evaluation = [{ kind = \"statistics\" }, { kind = \"chat\", name = \"beauty\", endpoint = \"vision\", model = \"j\", criterion = \"c\" }]",
    ));
    let spec = spec(&changes);
    let mut allowed = Allowed::default();
    let error = Endpoints::new(&allowed, runtime.handle().clone(), never())
        .advisor(&spec.advisor, &clean().looks)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("[allowed.endpoints.vision]"),
        "{error}"
    );
    allowed.endpoints.insert(
        "vision".to_owned(),
        EndpointSettings::new("http://127.0.0.1:1/v1"),
    );
    let mut endpoints = Endpoints::new(&allowed, runtime.handle().clone(), never());
    assert!(
        endpoints
            .advisor(&spec.advisor, &clean().looks)
            .unwrap()
            .name()
            .starts_with("m (")
    );
    let panel = endpoints.evaluation_panel(&spec, &clean(), &Bare).unwrap();
    let known: Vec<(&str, Option<&str>)> = panel
        .iter()
        .map(|scorer| (scorer.name(), scorer.version()))
        .collect();
    assert_eq!(
        known,
        [("statistics", None), ("beauty", Some("artaug-score-1"))]
    );
    assert_eq!(
        endpoints
            .filter_panel(&spec, &clean(), &Bare)
            .unwrap()
            .len(),
        2
    );
    assert_eq!(endpoints.open.len(), 1);
}

#[test]
fn a_scorer_without_its_model_is_an_error_and_no_silent_gap() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let allowed = Allowed::default();
    let mut endpoints = Endpoints::new(&allowed, runtime.handle().clone(), never());
    let spec = spec(&[]);
    assert!(matches!(
        endpoints.filter_panel(&spec, &clean(), &Bare),
        Err(SetupError::Scorer { .. })
    ));
    assert!(matches!(
        endpoints.evaluation_panel(&spec, &clean(), &Bare),
        Err(SetupError::Scorer { .. })
    ));
}

#[test]
fn prompts_come_from_the_file_below_the_allowed_folder() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("icons")).unwrap();
    std::fs::write(folder.path().join("icons/held-out.txt"), "green tree\n").unwrap();
    let allowed = Allowed {
        prompt_folders: vec![folder.path().to_owned()],
        ..Allowed::default()
    };
    let (trained, held_out) = prompts(&spec(&[]), &allowed).unwrap();
    assert_eq!(
        (trained.len(), held_out),
        (3, vec!["green tree".to_owned()])
    );
    std::fs::write(
        folder.path().join("icons/held-out.txt"),
        "rocket, purple background\n",
    )
    .unwrap();
    assert!(matches!(
        prompts(&spec(&[]), &allowed),
        Err(SetupError::Path(PathError::NotHeldOut(_)))
    ));
    assert!(matches!(
        prompts(&spec(&[]), &Allowed::default()),
        Err(SetupError::Path(PathError::Outside { .. }))
    ));
}

#[test]
fn an_unknown_setting_of_a_worker_is_named() {
    let error = toml::from_str::<Allowed>("model_folder = [\"/m\"]").unwrap_err();
    assert!(error.to_string().contains("model_folder"));
    let good = "model_folders = [\"/m\"]\n[endpoints.vision]\nurl = \"http://127.0.0.1:8000/v1\"\nrequests_per_minute = 30";
    assert_eq!(
        toml::from_str::<Allowed>(good).unwrap().endpoints["vision"].requests_per_minute,
        Some(30)
    );
}
